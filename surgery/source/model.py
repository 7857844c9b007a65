"""A model as the rest of the program sees it: weight files with headers, and files that go along."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import FormatError, OptionError, SourceError, few
from surgery.escapes import quoted
from surgery.files.access import check_regular, read_errors
from surgery.files.hub_cache import cached_repo, hub_cache
from surgery.files.json_files import check_size, read_json_object
from surgery.files.paths import check_relative_path
from surgery.files.watch import Watch
from surgery.format.header import Header
from surgery.format.manifest_records import SourceRecord
from surgery.format.safetensors import ShardReader
from surgery.names import CONFIG_FILE
from surgery.source.address import address_of
from surgery.source.origin import FolderOrigin, Origin
from surgery.source.select import Selection, select_plain_files
from surgery.source.shards import index_entries


class Source(Protocol):
    """A model in a folder or on the hub.

    Attributes:
        name: what the user called it, for messages.
        record: its identity, for the manifest.
        selection: its files.
        watch: sees to it that those which are here stay as they are while they are in use.
    """

    name: str
    record: SourceRecord
    selection: Selection
    watch: Watch

    def size(self, file: str) -> int:
        """Bytes of one of its files."""

    def config(self) -> dict[str, Any]:
        """Its ``config.json``; empty if it has none."""

    def header(self, shard: str) -> Header:
        """The header of a weight file, without its weights where that can be had."""

    def fetch(self, file: str) -> Path:
        """A local path of one of its files, downloaded if need be; of one from the hub with the contents that the hub says."""

    def unchecked(self, file: str) -> Path:
        """``fetch`` for a weight file whose contents whoever reads all of it compares: with ``sha256``, or what is recorded."""

    def acquire(self, file: str) -> Path:
        """``unchecked`` for one that is needed until as many calls of ``release`` say that it is not, or until ``close``."""

    def release(self, file: str) -> bool:
        """See ``acquire``. Whether it is gone now."""

    def wait_for_room(self) -> None:
        """Returns when the next weight file may be acquired, or after ``close``."""

    def close(self) -> None:
        """Nothing more is wanted."""

    def sha256(self, file: str) -> str | None:
        """Of a weight file that has been fetched, if somebody else than the file itself says so."""

    def again(self, file: str) -> str | None:
        """The command that fetches a file once more, if it comes from the hub."""

    def origin(self, files: Iterable[str]) -> Origin:
        """Where some of its weight files are, for others to take them from."""

    def folders(self) -> list[Path]:
        """What must not be written to: the folders that its files are in, also by links, or the hub's cache."""

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of each file of a local model; empty where a commit pins them."""

    def bytes_to_fetch(self) -> int:
        """How much is still to be downloaded."""

    def room_to_fetch(self) -> dict[Path, int]:
        """Where a download will go, and how much more of it will be there at a time; nowhere for a local model."""


class Stays:
    """A source whose weight files stay where they are."""

    def fetch(self, file: str) -> Path:
        raise NotImplementedError

    def unchecked(self, file: str) -> Path:
        return self.fetch(file)

    def acquire(self, file: str) -> Path:
        return self.unchecked(file)

    def release(self, file: str) -> bool:
        return False

    def wait_for_room(self) -> None: ...

    def close(self) -> None: ...

    def sha256(self, file: str) -> str | None:
        return None

    def again(self, file: str) -> str | None:
        return None


class FolderSource(Stays):
    """A model in a local folder, or a snapshot of one from the hub's cache."""

    def __init__(
        self, root: Path, *, name: str | None = None, record: SourceRecord | None = None, within: Path | None = None
    ) -> None:
        self.name = name or str(root)
        self.record = record or SourceRecord("folder", None, None)
        self._root = root
        self._within = within or root  # a pipeline's other models are not to be written to either
        self.watch = Watch()
        found = select_plain_files(self._names, self._text, where=self.name)
        self.selection = replace(found, notes=(*found.notes, *self._notes_of_newer(found)))
        for file in self.selection.others:
            check_regular(self._copied(file), f"{self.name}/{file}")
        for file in self.selection.shards:
            self._real(file)  # weights are only read: they may lie anywhere

    def _notes_of_newer(self, found: Selection) -> list[str]:
        """Weight files of another save of the model, which are not read, and are newer than those that are."""
        if self.record.kind != "folder" or not found.rivals:
            return []
        last = max(self._changed(file) for file in found.shards)
        newer = [file for file in found.rivals if self._changed(file) > last]
        if not newer:
            return []
        read = found.index or found.shards[0]
        return [f"{newer[0]} is newer than {read}, which is read, as loaders read it; if the newer is meant, move {read} away"]

    def _changed(self, file: str) -> float:
        path = self._root / file
        return path.stat().st_mtime if path.exists() else 0.0

    def note(self, text: str) -> None:
        """Something that the user should know of where the model comes from."""
        self.selection = replace(self.selection, notes=(*self.selection.notes, text))

    def _names(self, folder: str) -> list[str]:
        """See ``Listing``. Links to folders count as folders; a folder that leads out of the model is not looked into."""
        path = self._root / folder
        if folder:
            real = self._copied(folder)
            if real in {parent.resolve() for parent in path.parents}:
                raise SourceError(f"{self.name}/{folder} is a link to a folder that it lies in", got=str(real))
        with read_errors(path, f"{self.name}/{folder}"):
            return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())

    def _text(self, file: str) -> str:
        self._copied(file)
        return read_text(self.fetch(file), f"{self.name}/{file}")

    def _real(self, file: str) -> Path:
        """Where a file is, whatever links lead to it."""
        try:
            return (self._root / file).resolve(strict=True)
        except (OSError, RuntimeError):  # links in a circle
            if (self._root / file).is_symlink():
                raise self._leads_nowhere(file) from None
            raise SourceError(
                f"{self.name}/{file} is not there any more",
                hint="put the file in its place; from the hub: fetch the model again",
            ) from None

    def _leads_nowhere(self, file: str) -> SourceError:
        """What to say of a link to nothing, and of others beside it: the hub's cache may have lost all its blobs."""
        folder = (self._root / file).parent.resolve()
        links = sorted(path for path in folder.iterdir() if path.is_symlink() and not path.exists())
        names = [path.name for path in links]
        target = Path(os.path.normpath(folder / (self._root / file).readlink()))
        cache = hub_cache(target)
        hint = "put the file in its place; from the hub: fetch the model again"
        if cache is not None and (repo_id := cached_repo(cache)) is not None:
            commit = next(
                (f" --revision {quoted(path.name)}" for path in (folder, *folder.parents) if path.parent.name == "snapshots"),
                "",
            )
            hint = f"the hub's cache has lost what they lead to; fetch it again: hf download {quoted(repo_id)}{commit}"
        return SourceError(
            f"{self.name}/{file} is a link that leads nowhere" + (f", one of {len(names)} here" if names[1:] else ""),
            got=str(target) if len(names) == 1 else few(names),
            expected="the files of the model",
            hint=hint,
        )

    def _copied(self, file: str) -> Path:
        """The same of what is copied into the result, and may be published with it.

        Raises:
            SourceError: it leads out of the model's folder, and not into the hub's cache.
        """
        real = self._real(file)
        within = self._within.resolve()
        if self.record.kind == "folder" and within not in (real, *real.parents) and hub_cache(real) is None:
            raise SourceError(
                f"{self.name}/{file} is a link that leaves the model's folder",
                got=str(real),
                hint="put a copy of the file in its place",
            )
        return real

    def size(self, file: str) -> int:
        path = self._root / file
        with read_errors(path, f"{self.name}/{file}"):
            return path.stat().st_size

    def config(self) -> dict[str, Any]:
        return read_config(self)

    def header(self, shard: str) -> Header:
        with ShardReader(self._root / shard, name=f"{self.name}/{shard}", watch=self.watch) as reader:
            return reader.header

    def fetch(self, file: str) -> Path:
        path = self._root / file
        self.watch.see(path, f"{self.name}/{file}")
        return path

    def folders(self) -> list[Path]:
        if self.record.kind != "folder":  # of a snapshot in the hub's cache the whole repository
            return [self._within.parent.parent]
        files = [self._real(file) for file in (*self.selection.shards, *self.selection.others)]
        return [self._within, *sorted({hub_cache(file) or file.parent for file in files} - {self._root.resolve()})]

    def stamps(self) -> dict[str, list[int]]:
        if self.record.kind != "folder":
            return {}
        return self._stamps((*self.selection.shards, *self.selection.others))

    def _stamps(self, files: Iterable[str]) -> dict[str, list[int]]:
        stamps = {file: self.watch.see(self._root / file, f"{self.name}/{file}") for file in files}
        # What a restart of the machine, or another place to mount a disk, leaves as it is.
        return {file: [stamp.size, stamp.mtime_ns] for file, stamp in stamps.items()}

    def bytes_to_fetch(self) -> int:
        return 0

    def room_to_fetch(self) -> dict[Path, int]:
        return {}

    def origin(self, files: Iterable[str]) -> FolderOrigin:
        # Of a model from the hub's cache each machine may have a copy of its own.
        return FolderOrigin(self._root.resolve(), self._stamps(files) if self.record.kind == "folder" else {})


def open_source(model: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Source:
    """The model that a user means: a local folder if there is one of that name, else one on the hub.

    Args:
        model: path, ``owner/name``, or what stands for one of these, see ``surgery.source.address``.
        revision: branch, tag or commit of a hub model; pinned to a commit at once.
        subfolder: of a folder or repository that holds several models, such as a diffusion pipeline.

    Raises:
        SourceError: not there, not reachable, or no model.
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
    """A model that is like one in this subfolder: the model itself, or the pipeline that it is a part of.

    Raises:
        SourceError, FormatError: see ``open_source``.
    """
    address = address_of(model)
    is_itself = address.folder is not None and subfolder is not None and not (address.folder / subfolder).is_dir()
    return open_source(model, subfolder=None if is_itself or address.subfolder is not None else subfolder)


def _check_is_all(source: Source, file: str) -> None:
    """Refuse a weight file as a model where it is not all of its weights."""
    shards = source.selection.shards
    if file in shards and len(shards) > 1:
        raise SourceError(
            f"{file} is one of the {len(shards)} weight files of {source.name}",
            expected="the model",
            hint=f"give {source.name}",
        )
    if file not in shards:
        raise SourceError(
            f"{file} is not among the weights that {source.name} stands for",
            got=few(shards),
            hint="give a folder with this file alone, and its config.json",
        )


def _open_folder(path: Path, name: str, subfolder: str | None) -> FolderSource:
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


def check_subfolder(subfolder: str) -> str:
    """``subfolder`` without slashes around it, if it stays inside.

    Raises:
        OptionError: it does not.
    """
    try:
        return check_relative_path(subfolder.strip("/"), "the subfolder")
    except FormatError as error:
        raise OptionError(error.what, got=error.got, expected="a path inside of the model, such as transformer") from None


def read_config(source: Source) -> dict[str, Any]:
    """The ``config.json`` among a source's files; empty if there is none."""
    if CONFIG_FILE not in source.selection.others:
        return {}
    return read_json_object(source.fetch(CONFIG_FILE), f"{source.name}/{CONFIG_FILE}")


def check_index(source: Source, headers: dict[str, Header]) -> list[str]:
    """What a user should know of an index that says something else than the shards; loaders believe the shards.

    Raises:
        FormatError: it is the index of another model.
    """
    index = source.selection.index
    if index is None:
        return []
    where = f"{source.name}/{index}"
    entries = index_entries(read_text(source.fetch(index), where), where)
    names = {shard: {entry.name for entry in header.tensors} for shard, header in headers.items()}
    there = set[str]().union(*names.values())
    if not there & entries.keys():
        raise FormatError(
            f"{where} names none of the tensors that its shards hold",
            got=repr(next(iter(entries))),
            hint="index and shards are from different models: fetch them again",
        )
    absent = [tensor for tensor in entries if tensor not in there]
    moved = [tensor for tensor, shard in entries.items() if tensor in there and tensor not in names[shard]]
    return [
        f"{index} {what}: {len(tensors)}, the first {tensors[0]}"
        for what, tensors in (
            ("names tensors that no shard holds", absent),
            ("names another shard than the tensor is in", moved),
        )
        if tensors
    ]


def read_text(path: Path, where: str) -> str:
    with read_errors(path, where):
        check_size(path, where)
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8 text") from None
