"""Models on the Hugging Face hub, pinned to a commit, through the official client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from surgery.errors import FormatError, ReadError, SourceError, few
from surgery.files.watch import Stamp, Watch
from surgery.format.header import Header, header_length, parse_header
from surgery.format.manifest_records import SourceRecord
from surgery.format.safetensors import ShardReader
from surgery.hub import client_cache, patience, repository
from surgery.hub import hub_client as client
from surgery.hub.download import bytes_in_cache, first_bytes
from surgery.hub.hub_errors import FIRST_STATUSES, first_line, how_to_fetch_it, hub_errors, hub_errors_midway
from surgery.hub.hub_file import HubFile, RemoteFile
from surgery.hub.patience import is_busy
from surgery.names import CONFIG_FILE
from surgery.progress import listening
from surgery.source.address import check_subfolder
from surgery.source.fetch import HubOrigin, check_contents, fetch, fetch_again, is_cached, patience_for
from surgery.source.folder import FolderSource
from surgery.source.model_folder import listing_of
from surgery.source.origin import DamagedCopy, FolderOrigin
from surgery.source.protocol import FilesInPlace, Source, read_config, read_text
from surgery.source.select import select_plain_files
from surgery.source.weight_files import index_entries, is_index

#: Bytes that are fetched for a header at first, which most are shorter than; the rest of a longer one is fetched then.
_HEADER_BYTES = 100_000
_T = TypeVar("_T")


def open_hub(repo_id: str, revision: str | None, subfolder: str | None = None) -> Source:
    """Pin a model on the hub to a commit and list its files; or take it from the local cache if the hub cannot be reached.

    Raises:
        SourceError: it is not there, may not be read or cannot be reached (``surgery.hub.hub_errors``), or is no model.
    """
    inside = None if subfolder is None else check_subfolder(subfolder)
    found = asked_first(repo_id, revision, lambda: _cached(repo_id, revision, inside))
    if isinstance(found, CachedSource):
        return found
    commit, files = found
    return HubSource(repo_id, commit, SourceRecord("hub", repo_id, commit, inside), files)


def asked_first(repo_id: str, revision: str | None, cached: Callable[[], _T | None]) -> tuple[str, dict[str, HubFile]] | _T:
    """The commit of a repository and its files; or what the local cache has of it if the hub cannot be reached.

    Args:
        cached: gives that; None if the cache has nothing of it. May raise SourceError, if it has a part.

    Raises:
        SourceError: see ``surgery.hub.hub_errors``; or that of ``cached``.
    """
    # If nothing answers, or the cache has it, there is only one attempt: laptops are often offline.
    first = patience_for(repo_id, may_pass=is_busy, give_up_after=patience.GIVE_UP_FIRST_AFTER)
    with hub_errors(repo_id, revision=revision, statuses=FIRST_STATUSES):
        while True:
            try:
                commit = repository.resolve_commit(repo_id, revision)
                return commit, repository.list_files(repo_id, commit, patience_for(repo_id).run)
            except Exception as error:
                lacking = None
                if client.is_away(error):
                    try:
                        if (found := cached()) is not None:
                            return found
                    except SourceError as of_cache:
                        lacking = of_cache
                try:
                    first.failed(error)
                except Exception:
                    if lacking is not None:
                        raise lacking from error
                    raise


def _named(repo_id: str, record: SourceRecord) -> str:
    """What messages call a model: its repo id, with the subfolder."""
    return repo_id if record.subfolder is None else f"{repo_id}/{record.subfolder}"


def _cached(repo_id: str, revision: str | None, subfolder: str | None) -> CachedSource | None:
    """The model in the cache, which may have only those files that a loader has asked for; None without such a snapshot.

    Raises:
        SourceError: the files in the cache are no whole model, or one of them is damaged.
    """
    commit = client_cache.cached_commit(repo_id, revision)
    snapshot = None if commit is None else client_cache.cached_snapshot(repo_id, commit)
    if commit is None or snapshot is None:
        return None
    record = SourceRecord("hub", repo_id, commit, subfolder)
    name, root = _named(repo_id, record), snapshot / (subfolder or "")
    try:
        if not root.is_dir():
            raise SourceError(f"{name} is not there")
        source = CachedSource(root, name, record)
    except DamagedCopy:
        raise
    except (FormatError, SourceError) as error:
        absent = _absent(root)
        raise SourceError(
            f"{repo_id} cannot be reached, and the local cache has only a part of it",
            got=first_line(error),
            expected=f"also {few(absent)}" if absent else None,
            hint=how_to_fetch_it(repo_id, revision),
        ) from error
    lacking = "" if CONFIG_FILE in source.selection.others else f"; {CONFIG_FILE} is not in it"
    source.note(f"taken from the local cache, as the hub cannot be reached: files that were never fetched are missing{lacking}")
    return source


def _absent(folder: Path) -> list[str]:
    """Names of the files that a model in the cache lacks, as far as the others tell.

    These are links to nothing, the config, weight files that an index names, and ``*.safetensors`` if there are no weights.
    """
    there = {path.relative_to(folder).as_posix(): path.exists() for path in folder.rglob("*")}
    needed = {CONFIG_FILE, *there}
    for index in filter(is_index, [name for name, exists in there.items() if exists]):
        try:
            named = set(index_entries(read_text(folder / index, index), index).values())
        except FormatError:
            continue
        needed |= {(PurePosixPath(index).parent / name).as_posix() for name in named}
    if not any(name.endswith(".safetensors") for name in needed):
        needed.add("*.safetensors")
    return sorted(name for name in needed if not there.get(name))


@contextmanager
def _perhaps_removed() -> Iterator[None]:
    """Ignores a ReadError of a file that is gone: anybody may empty the hub's cache at any time, and it is fetched again."""
    try:
        yield
    except ReadError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise


class CachedSource(FolderSource):
    """A model in a snapshot of the hub's cache, whose files are checked against the hashes in the names of their blobs."""

    def __init__(self, root: Path, name: str, record: SourceRecord) -> None:
        self._checked: dict[Path, Stamp] = {}
        super().__init__(root, name=name, record=record)

    def _hub_file(self, file: str) -> HubFile | None:
        return client_cache.cached_hub_file(self._root / file)

    def fetch(self, file: str) -> Path:
        path = super().fetch(file)
        stamp = Stamp.at(path, f"{self.name}/{file}")
        if self._checked.get(path) != stamp and (hub_file := self._hub_file(file)) is not None:
            check_contents(path, hub_file, f"{self.name}/{file}", self.again(file))
            self._checked[path] = stamp
        return path

    def unchecked(self, file: str) -> Path:
        return super().fetch(file)

    def sha256(self, file: str) -> str | None:
        hub_file = self._hub_file(file)
        return None if hub_file is None else hub_file.sha256

    def again(self, file: str) -> str:
        subfolder = "" if self.record.subfolder is None else f"{self.record.subfolder}/"
        return fetch_again(str(self.record.repo_id), str(self.record.commit), subfolder + file)

    def origin(self, files: Iterable[str]) -> FolderOrigin:
        hashes = {file: known for file in files if (known := self.sha256(file)) is not None}
        return FolderOrigin(self._root.resolve(), {}, hashes, {file: self.again(file) for file in hashes})


class HubSource(FilesInPlace):
    """A model on the hub at one commit, whose files are fetched into the hub's cache.

    File names are relative to the model, which may lie in a subfolder of the repository.

    Args:
        repo_id, commit: of the repository.
        record: the identity of the model.
        files: of the whole repository, by name.

    Raises:
        SourceError: there is no such subfolder, or no model in it.
        FormatError: its index or a file's name is damaged.
    """

    def __init__(self, repo_id: str, commit: str, record: SourceRecord, files: Mapping[str, HubFile]) -> None:
        self.name = _named(repo_id, record)
        self.record = record
        self.watch = Watch(pinned=True)
        self.repo_id = repo_id
        self.commit = commit
        self._checked: dict[Path, Stamp] = {}
        self._headers: dict[str, Header] = {}
        self._dropped = threading.Event()
        self._prefix = "" if record.subfolder is None else f"{record.subfolder}/"
        self._files = {name.removeprefix(self._prefix): file for name, file in files.items() if name.startswith(self._prefix)}
        if not self._files:
            folders = sorted({name.rpartition("/")[0] for name in files if name.endswith(".safetensors")} - {""})
            raise SourceError(
                f"{repo_id} has no subfolder {record.subfolder!r}", expected=", ".join(folders) or "a model without subfolders"
            )
        self.selection = select_plain_files(listing_of(self._files), self._read_text, where=self.name)

    def _read_text(self, file: str) -> str:
        return read_text(self.fetch(file), f"{self.name}/{file}")

    def _remote(self, file: str) -> RemoteFile:
        return RemoteFile(self.repo_id, self.commit, self._prefix + file, self._files[file])

    def size(self, file: str) -> int:
        return self._files[file].size

    def config(self) -> dict[str, Any]:
        return read_config(self)

    def header(self, shard: str) -> Header:
        name, remote = f"{self.name}/{shard}", self._remote(shard)
        if is_cached(self.repo_id, self.commit, remote.path):
            with ShardReader(self.unchecked(shard), name=name, watch=self.watch) as reader:
                return reader.header
        if shard in self._headers:
            return self._headers[shard]
        listening().item(f"header of {shard}")
        with hub_errors_midway(self.repo_id, remote.path):
            patient = patience_for(remote.path)
            raw = first_bytes(remote, _HEADER_BYTES, patient)
            end = 8 + header_length(raw, file=name, file_bytes=remote.hub_file.size)
            if end > len(raw):
                raw = first_bytes(remote, end, patient)
        self._headers[shard] = parse_header(raw[:end], file=name, file_bytes=remote.hub_file.size)
        return self._headers[shard]

    def fetch(self, file: str) -> Path:
        while True:
            path = self.unchecked(file)
            with _perhaps_removed():
                stamp = Stamp.at(path, f"{self.name}/{file}")
                if self._checked.get(path) != stamp:
                    check_contents(path, self._files[file], f"{self.name}/{file}", self.again(file))
                    self._checked[path] = stamp
                return path

    def unchecked(self, file: str) -> Path:
        return self._local_path(file, None)

    def acquire(self, file: str) -> Path:
        return self._local_path(file, self._dropped)

    def close(self) -> None:
        # A new event: downloads under way are dropped, but files that are copied may still be fetched later.
        self._dropped.set()
        self._dropped = threading.Event()

    def _local_path(self, file: str, dropped: threading.Event | None, folder: Path | None = None) -> Path:
        """The path of a file in the cache or in ``folder``, fetched if it is not there; a fetched one has been checked.

        ``dropped`` and ``folder`` are as for ``fetch``.
        """
        path = client_cache.cached_file(self.repo_id, self.commit, self._prefix + file) if folder is None else None
        if path is not None:
            with _perhaps_removed():
                return self._cached_path(path, file)
        path = fetch(self._remote(file), folder, dropped)
        self.watch.forget(path)
        self._checked[path] = Stamp.at(path, f"{self.name}/{file}")
        return path

    def _cached_path(self, path: Path, file: str) -> Path:
        """The path of a file in the cache. If it has been replaced since it was last seen, its contents are checked again."""
        stamp = Stamp.at(path, f"{self.name}/{file}")
        if self.watch.seen(path) not in (None, stamp):
            check_contents(path, self._files[file], f"{self.name}/{file}", self.again(file))
            self.watch.forget(path)
            self._checked[path] = stamp
        return path

    def sha256(self, file: str) -> str | None:
        return self._files[file].sha256

    def again(self, file: str) -> str:
        return fetch_again(self.repo_id, self.commit, self._prefix + file)

    def origin(self, files: Iterable[str]) -> HubOrigin:
        return HubOrigin(self.repo_id, self.commit, self._prefix, {file: self._files[file] for file in files}, passing=False)

    def folders(self) -> list[Path]:
        return [client_cache.cache_folder()]

    def stamps(self) -> dict[str, list[int]]:
        return {}

    def bytes_to_fetch(self) -> int:
        wanted = (*self.selection.shards, *self.selection.others)
        return sum(self._to_fetch(file) for file in wanted)

    def _to_fetch(self, file: str) -> int:
        """Bytes of a file that are still to be fetched into the cache."""
        hub_file = self._files[file]
        return 0 if hub_file.is_cached else hub_file.size - bytes_in_cache(self.repo_id, hub_file)

    def room_to_fetch(self) -> dict[Path, int]:
        return {client_cache.cache_folder(): self.bytes_to_fetch()}
