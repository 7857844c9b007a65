"""Overlap within one process: read ahead in one thread, write behind in another, compute in between."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from surgery.format.safetensors import ShardReader, TensorEntry
from surgery.memory import bytes_of, return_free_memory
from surgery.progress import Progress

_T = TypeVar("_T")

#: Bytes of a shard after which freed memory is given back.
_TRIM_BYTES = 16 << 20


class ReadAhead(Generic[_T]):
    """Iterate over ``items`` with the next one being made in a thread while this one is used.

    Exactly one item is ready or in the making besides the one handed out. A context manager: leaving it stops the
    thread after the item in the making. Errors of the iterator are raised where its item would have come.
    """

    def __init__(self, items: Iterator[_T]) -> None:
        self._items = items
        self._room = threading.Semaphore(1)
        self._ready: queue.SimpleQueue[tuple[_T | None, BaseException | None, bool]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="surgery-read", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping = True
        self._room.release()
        # On an error nobody wants what is still being read, which may be a whole download: the thread is left behind.
        self._thread.join(timeout=None if error is None else 1.0)

    def _run(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stopping:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    self._ready.put((None, None, True))
                    return
                self._ready.put((item, None, False))
        except BaseException as error:  # handed to the thread that waits for the item
            self._ready.put((None, error, True))

    def __iter__(self) -> Iterator[_T]:
        while True:
            item, error, end = self._ready.get()
            self._room.release()
            if error is not None:
                raise error
            if end:
                return
            yield item  # type: ignore[misc]  # an item is there unless it is the end


class WriteBehind:
    """Runs calls in order in one thread, with at most one waiting behind the one that runs.

    A context manager. Leaving it normally waits for all calls; the first error is raised at the next call of
    ``submit`` or when leaving.
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="surgery-write", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._error = self._error or error  # the calls still waiting are dropped
        self._calls.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def submit(self, call: Callable[..., object], *args: Any) -> None:
        """Run ``call(*args)`` after all calls before it."""
        if self._error is not None:
            raise self._error
        self._calls.put((call, args))

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            if self._error is None:
                call, args = item
                try:
                    call(*args)
                except BaseException as error:  # raised in the thread that submits
                    self._error = error


@dataclass(frozen=True, slots=True)
class Bytes:
    """Some of what lies between targets, never looked into."""

    data: memoryview

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class TargetPiece:
    """A tensor with targets in it, whole, or some of the matrices of a stack; in its own dtype, on the CPU.

    Attributes:
        entry: what the header says of the tensor.
        first: the first of the matrices, 0 for a whole tensor.
        tensor: in the shape of the tensor, for a stack with fewer matrices.
    """

    entry: TensorEntry
    first: int
    tensor: torch.Tensor

    def __len__(self) -> int:
        return self.tensor.nbytes


def windows(pieces: Iterable[Bytes | TargetPiece], limit: int) -> Iterator[list[Bytes | TargetPiece]]:
    """Runs of pieces, each as long as it takes to come to ``limit`` bytes.

    A window is emptied when the next one is asked for: the caller must not keep it.
    """
    window: list[Bytes | TargetPiece] = []
    held = 0
    for piece in pieces:
        window.append(piece)
        held += len(piece)
        if held >= limit:
            yield window
            window.clear()
            held = 0
    if window:
        yield window


class ShardWalk:
    """One pass over a shard in file order, reading ahead and hashing what is read.

    A context manager over an iterable of ``Bytes`` and ``TargetPiece``. After the last piece ``sha256`` is that of the
    whole file.

    Args:
        reader: of the shard.
        targets: the tensors to hand out as ``TargetPiece``; each with None, or how many matrices of a stack at a time.
        progress: told how far it is.
    """

    def __init__(self, reader: ShardReader, targets: Mapping[str, int | None], progress: Progress) -> None:
        self._reader = reader
        self._targets = targets
        self._progress = progress
        self._sha256 = hashlib.sha256(reader.header.raw)
        self._ahead = ReadAhead(self._pieces())

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ahead.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Bytes | TargetPiece]:
        passed = 0
        for piece in self._ahead:
            if isinstance(piece, TargetPiece):
                self._progress.item(piece.entry.name)
            yield piece
            self._progress.advance(len(piece))
            passed += len(piece)
            if passed >= _TRIM_BYTES:
                passed = 0
                return_free_memory()

    def _pieces(self) -> Iterator[Bytes | TargetPiece]:
        position = 0
        for entry in self._reader.header.tensors:
            if entry.name not in self._targets:
                continue
            yield from self._between(position, entry.start)
            for first, count in _portions(entry, self._targets[entry.name]):
                tensor = self._reader.read(entry, first, count)
                self._sha256.update(bytes_of(tensor))
                yield TargetPiece(entry, first, tensor)
            position = entry.end
        yield from self._between(position, self._reader.header.data_bytes)

    def _between(self, start: int, end: int) -> Iterator[Bytes | TargetPiece]:
        for chunk in self._reader.chunks(start, end):
            self._sha256.update(chunk)
            yield Bytes(chunk)


def _portions(entry: TensorEntry, at_a_time: int | None) -> Iterator[tuple[int, int | None]]:
    if at_a_time is None:
        yield 0, None
        return
    for first in range(0, entry.shape[0], at_a_time):
        yield first, min(at_a_time, entry.shape[0] - first)
