"""Adapters that a user names: folders and files of this machine, or repositories of the hub, which are fetched."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from surgery.errors import SourceError, few
from surgery.names import ADAPTER_CONFIG
from surgery.source.address import Address, address_of

_SUFFIX = ".safetensors"
_INDEX = "adapter_model.safetensors.index.json"


def local_adapter(adapter: str | Path, revision: str | None = None) -> Path:
    """The path of an adapter on this machine: a folder, or the file that was given.

    Args:
        adapter: path, ``owner/name``, or another form of address that ``surgery.source.address`` understands. What is on the
            hub is fetched into its cache: the config and the weights.
        revision: branch, tag or commit, if it is on the hub.

    Raises:
        SourceError: it is not there, cannot be reached, or holds no adapter.
    """
    if Path(adapter).expanduser().exists():  # also a folder that no model could be in
        return Path(adapter).expanduser()
    address = address_of(adapter).with_options(revision, None)
    if address.folder is not None:
        return address.folder if address.file is None else address.folder / address.file
    return _fetched(address)


def _fetched(address: Address) -> Path:
    """Fetch an adapter of the hub; returns its folder in the cache, or the file that the address names."""
    from surgery.hub import repository  # the hub client is slow to import and not needed for folders
    from surgery.hub.hub_file import RemoteFile
    from surgery.source.fetch import fetch, patience_for
    from surgery.source.hub_errors import hub_errors

    repo_id, inside = address.repo_id, PurePosixPath(address.subfolder or "")
    with hub_errors(repo_id, revision=address.revision):
        commit = patience_for(repo_id).run(lambda: repository.resolve_commit(repo_id, address.revision))
        files = repository.list_files(repo_id, commit, patience_for(repo_id).run)
    here = {PurePosixPath(name).name: name for name in files if PurePosixPath(name).parent == inside}
    weights = [name for name in here if name.endswith(_SUFFIX)]
    named = PurePosixPath(address.file).name if address.file is not None else None
    wanted = [named] if named is not None else [name for name in (ADAPTER_CONFIG, _INDEX, *weights) if name in here]
    if not weights or any(name not in here for name in wanted):
        raise SourceError(
            f"{repo_id} holds no adapter" + (f" in {address.subfolder}" if address.subfolder else ""),
            got=few(sorted(here)) or "no files",
            expected=f"{ADAPTER_CONFIG} and adapter_model{_SUFFIX}, or LoRA weights of a diffusion model",
        )
    paths = [fetch(RemoteFile(repo_id, commit, here[name], files[here[name]])) for name in wanted]
    return paths[0] if named is not None else paths[0].parent
