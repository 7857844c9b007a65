"""Weight files in the process of a remote task, which is told where to take them from."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from surgery.files.watch import Watch
from surgery.format.header import Header
from surgery.format.safetensors import ShardReader
from surgery.source.origin import Origin
from surgery.source.protocol import FilesInPlace


class SentFiles(FilesInPlace):
    """``WeightFiles`` for a remote task: each is taken from an ``Origin`` when it is first asked for. A context manager."""

    def __init__(self, origin: Origin) -> None:
        self.watch = Watch(pinned=origin.pinned)
        self._origin = origin
        self._here: dict[str, Path] = {}
        self._open = ExitStack()
        self._one = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def fetch(self, file: str) -> Path:
        with self._one:
            if file not in self._here:
                self._here[file] = self._open.enter_context(self._origin.file(file))
            return self._here[file]

    def size(self, file: str) -> int:
        return self.fetch(file).stat().st_size

    def header(self, shard: str) -> Header:
        with ShardReader(self.fetch(shard), name=shard, watch=self.watch) as reader:
            return reader.header

    def sha256(self, file: str) -> str | None:
        return self._origin.sha256(file)

    def again(self, file: str) -> str | None:
        return self._origin.again(file)

    def origin(self, files: Iterable[str]) -> Origin:
        return self._origin
