"""Adapters that a user names: folders and files of this machine, or repositories of the hub, which are fetched."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from surgery.errors import SourceError, few
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE, PICKLED_ADAPTER
from surgery.progress import note
from surgery.source.address import Address, address_of


def local_adapter(adapter: str | Path) -> Path:
    """The path of an adapter on this machine: a folder, or the file that was given.

    Args:
        adapter: path, ``owner/name``, or another form of address that ``surgery.source.address`` understands. What is on the
            hub is fetched into its cache: the config and the weights.

    Raises:
        SourceError: it is not there, cannot be reached, or holds no adapter.
    """
    if Path(adapter).expanduser().exists():  # also a folder that no model could be in
        return Path(adapter).expanduser()
    address = address_of(adapter)
    if address.folder is not None:
        return address.folder if address.file is None else address.folder / address.file
    return _fetched(address)


def _fetched(address: Address) -> Path:
    """Fetch an adapter of the hub; returns its folder in the cache, or the file that the address names.

    If the hub cannot be reached it is taken from the cache, where what was fetched once still is.
    """
    from surgery.hub.adapter_files import adapter_files  # the hub client is slow to import and not needed for folders
    from surgery.hub.client_cache import cached_commit, cached_files
    from surgery.hub.hub_file import HubFile, RemoteFile
    from surgery.source.fetch import check_contents, fetch, fetch_again
    from surgery.source.hub import asked_first

    repo_id, revision = address.repo_id, address.revision
    file = None if address.file == ADAPTER_WEIGHTS else address.file  # PEFT's is nothing without its config

    def cached() -> tuple[str, dict[str, HubFile]] | None:
        commit = cached_commit(repo_id, revision)
        files = {} if commit is None else cached_files(repo_id, commit)
        if commit is None or not adapter_files(files, address.subfolder, file):
            return None
        note(f"{repo_id} is taken from the local cache, as the hub cannot be reached")
        return commit, files

    commit, files = asked_first(repo_id, revision, cached)
    paths = []
    for name in adapter_files(files, address.subfolder, file):
        path = fetch(RemoteFile(repo_id, commit, name, files[name]))
        check_contents(path, files[name], f"{repo_id}/{name}", fetch_again(repo_id, commit, name))
        paths.append(path)
    if not paths:
        hint = None
        if any(PurePosixPath(name).name == PICKLED_ADAPTER for name in files):
            hint = f"PEFT reads {PICKLED_ADAPTER}: load it there and save it again"
        elif CONFIG_FILE in files:
            hint = "this is a model: surgery merge takes the model first, then the adapters"
        raise SourceError(
            f"{repo_id} holds no adapter" + (f" in {address.subfolder}" if address.subfolder else ""),
            got=few(sorted(files)) or "no files",
            expected=f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, or LoRA weights of a diffusion model; or the address of a file",
            hint=hint,
        )
    return paths[0] if file is not None else paths[0].parent
