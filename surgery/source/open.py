"""Opening the model that a user names: a local folder or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SourceError, few
from surgery.escapes import quoted
from surgery.files.hub_cache import cached_repo
from surgery.format.manifest_records import SourceRecord
from surgery.source.address import address_of, check_subfolder
from surgery.source.folder import FolderSource
from surgery.source.protocol import Source


def open_source(model: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Source:
    """Open a model: the local folder of that name if there is one, else the model on the hub.

    Args:
        model: path, ``owner/name``, or another form of address that ``address_of`` understands.
        revision: branch, tag or commit of a hub model; resolved to a commit at once.
        subfolder: the folder of the model, in a folder or repository of several models such as a diffusion pipeline.

    Raises:
        SourceError: it is not there, cannot be reached, or is no model.
        FormatError: its index is damaged.
    """
    address = address_of(model).with_options(revision, subfolder)
    source: Source
    if address.folder is None:
        from surgery.source.hub import open_hub  # the hub client is slow to import and not needed for folders

        source = open_hub(address.repo_id, address.revision, address.subfolder)
    else:
        if revision is not None:
            raise SourceError(f"{model} is a local folder: it has no revisions", hint="leave --revision out")
        name = str(model) if Path(model).expanduser() == address.folder else str(address.folder)
        source = _open_folder(address.folder, name, subfolder)
    if address.file is not None:
        _check_is_all(source, address.file)
    return source


def open_part(model: str | Path, subfolder: str | None) -> Source:
    """Open a second model that matches one from a subfolder, such as its original: given as the model or as the pipeline.

    Args:
        model: the model itself, or the pipeline that has it in ``subfolder``.
        subfolder: that the first model came from; None if it was at the top.

    Raises:
        SourceError, FormatError: as for ``open_source``.
    """
    address = address_of(model)
    is_itself = address.folder is not None and subfolder is not None and not (address.folder / subfolder).is_dir()
    return open_source(model, subfolder=None if is_itself or address.subfolder is not None else subfolder)


def _check_is_all(source: Source, file: str) -> None:
    """Refuse a weight file that was given as the model, but is not all of the model's weights."""
    shards = source.selection.shards
    if file in shards and len(shards) > 1:
        raise SourceError(
            f"{file} is one of the {len(shards)} weight files of {source.name}",
            expected="the model",
            hint=f"give {source.name}",
        )
    if file not in shards:
        raise SourceError(
            f"{file} is not one of the weight files that surgery reads of {source.name}",
            got=few(shards),
            hint="give a folder with this file alone, and its config.json",
        )


def _open_folder(path: Path, name: str, subfolder: str | None) -> FolderSource:
    """Open a model in a local folder, or in a subfolder of it. Raises SourceError, FormatError."""
    if (repo_id := cached_repo(path.resolve())) is not None and (path / "snapshots").is_dir():
        commits = sorted(one.name for one in (path / "snapshots").iterdir())
        raise SourceError(
            f"{name} is where the hub's client keeps {repo_id}",
            got=f"snapshots of {', '.join(commits)}",
            hint=f"give {quoted(repo_id)}" + (f" --revision {quoted(commits[0])}" if commits else ""),
        )
    if subfolder is None:
        return FolderSource(path, name=name)
    inside = path / check_subfolder(subfolder)
    if not inside.is_dir():
        models = sorted({file.parent.relative_to(path).as_posix() for file in path.rglob("*.safetensors")} - {"."})
        raise SourceError(
            f"{name} has no subfolder {subfolder!r}",
            expected=", ".join(models) or "a model without subfolders",
            hint="--subfolder",
        )
    return FolderSource(inside, name=f"{name}/{subfolder}", record=SourceRecord("folder", None, None, subfolder), within=path)
