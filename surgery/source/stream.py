"""Streaming a model from the hub: each weight file is fetched, used and deleted, so the whole model is never on the disk."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import SourceError
from surgery.hub.client_cache import cache_folder
from surgery.hub.download import bytes_in_folder
from surgery.source.fetch import HubOrigin, is_cached
from surgery.source.hub import HubSource
from surgery.source.protocol import Source


class StreamedSource(HubSource):
    """The model of a ``HubSource``, whose weight files are in a private folder only for as long as they are needed.

    A weight file that is in the hub's cache is taken from there and stays there. An interrupted download is resumed.

    Args:
        source: the model.
        folder: where weight files are fetched to; it may hold some from an earlier start.
        at_a_time: how many weight files may be acquired before ``wait_for_room`` waits.
    """

    def __init__(self, source: HubSource, folder: Path, at_a_time: int) -> None:
        self.name, self.record, self.selection = source.name, source.record, source.selection
        self.repo_id, self.commit = source.repo_id, source.commit
        self._prefix, self._files, self.watch = source._prefix, source._files, source.watch
        self._checked, self._dropped, self._headers = source._checked, source._dropped, source._headers
        self._weights = frozenset(source.selection.shards)
        self._folder = folder
        self._at_a_time = at_a_time
        self._users: dict[str, int] = {}
        self._streamed_paths: dict[str, Path] = {}
        self._changed = threading.Condition()
        self._closed = False

    def _is_streamed(self, file: str) -> bool:
        """Whether a file is streamed: a weight file that is not in the hub's cache."""
        return file in self._weights and not is_cached(self.repo_id, self.commit, self._prefix + file)

    def _local_path(self, file: str, dropped: threading.Event | None, folder: Path | None = None) -> Path:
        with self._changed:
            is_streamed = file in self._users or self._is_streamed(file)
        if not is_streamed:
            return super()._local_path(file, dropped)
        if file not in self._streamed_paths:
            self._streamed_paths[file] = super()._local_path(file, dropped, self._folder)
        return self._streamed_paths[file]

    def acquire(self, file: str) -> Path:
        with self._changed:
            if file in self._users or self._is_streamed(file):
                self._users[file] = self._users.get(file, 0) + 1
        return super().acquire(file)

    def release(self, file: str) -> bool:
        with self._changed:
            if file not in self._users:
                return False
            self._users[file] -= 1
            if self._users[file]:
                return False
            del self._users[file]
            if (path := self._streamed_paths.pop(file, None)) is not None:  # None if it was never fetched
                path.unlink(missing_ok=True)
                self.watch.forget(path)  # it may be fetched again
            self._changed.notify_all()
            return True

    def wait_for_room(self) -> None:
        with self._changed:
            while len(self._users) >= self._at_a_time and not self._closed:
                self._changed.wait()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        super().close()

    def origin(self, files: Iterable[str]) -> HubOrigin:
        return HubOrigin(self.repo_id, self.commit, self._prefix, {file: self._files[file] for file in files}, passing=True)

    def room_to_fetch(self) -> dict[Path, int]:
        passing = [file for file in self.selection.shards if self._is_streamed(file)]
        largest = sorted((self.size(file) for file in passing), reverse=True)[: self._at_a_time]
        here = sum(bytes_in_folder(self._folder, self._prefix + file, self._files[file]) for file in passing)
        others = sum(self._to_fetch(file) for file in self.selection.others)
        return {self._folder: max(0, sum(largest) - here), cache_folder(): others}


def streamed(source: Source, folder: Path, at_a_time: int) -> StreamedSource:
    """The model of ``source`` as a ``StreamedSource``; arguments are the same.

    Raises:
        SourceError: it is a local folder, or comes from the cache since the hub cannot be reached.
    """
    if not isinstance(source, HubSource):
        where = (
            "is a local folder"
            if source.record.kind == "folder"
            else "comes from the local cache, as the hub cannot be reached"
        )
        raise SourceError(f"{source.name} {where}: there is nothing to stream", hint="leave --stream out")
    return StreamedSource(source, folder, at_a_time)
