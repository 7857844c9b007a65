"""A pass over a weight file, piece by piece in the order of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from surgery.engine.buffers import Buffers
from surgery.engine.threads import ReadAhead
from surgery.files.file_writer import CHUNK_BYTES
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.memory import bytes_of, return_free_memory
from surgery.progress import Progress
from surgery.timing import Timing, timed

#: Bytes of a shard after which freed memory is given back.
_TRIM_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Bytes:
    """Some of what lies between targets, never looked into: uint8 (bytes,)."""

    buffer: torch.Tensor

    @property
    def data(self) -> memoryview:
        return bytes_of(self.buffer)

    def __len__(self) -> int:
        return len(self.buffer)


@dataclass(frozen=True, slots=True)
class TargetPiece:
    """A tensor with targets in it, whole, or some of the matrices of a stack; in its own dtype, on the CPU.

    Attributes:
        entry: what the header says of the tensor.
        first: the first of the matrices, 0 for a whole tensor.
        tensor: in the shape of the tensor, for a stack with fewer matrices.
        buffer: the memory of ``tensor``, uint8 (bytes,).
    """

    entry: TensorEntry
    first: int
    tensor: torch.Tensor
    buffer: torch.Tensor

    def __len__(self) -> int:
        return len(self.buffer)


Piece = Bytes | TargetPiece


def windows(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Runs of pieces, each as long as it takes to come to ``limit`` bytes."""
    window: list[Piece] = []
    held = 0
    for piece in pieces:
        window.append(piece)
        held += len(piece)
        if held >= limit:
            yield window
            window, held = [], 0
    if window:
        yield window


class ShardWalk:
    """One pass over a shard in file order, reading ahead and hashing what is read.

    A context manager over an iterable of ``Bytes`` and ``TargetPiece``. After the last piece ``sha256`` is that of the
    whole file, which has not changed since the reader was made: else a ``FormatError`` comes in the place of the end.

    Args:
        reader: of the shard.
        targets: the tensors to hand out as ``TargetPiece``; each with None, or how many matrices of a stack at a time.
        buffers: where the memory comes from; whoever uses a piece gives it back. None: fresh memory for each.
        timing: told how long the reading takes.
    """

    def __init__(
        self,
        reader: ShardReader,
        targets: Mapping[str, int | None],
        buffers: Buffers | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._reader = reader
        self._targets = targets
        self._buffers = buffers
        self._timing = timing
        self._sha256 = hashlib.sha256(reader.header.raw)
        self._ahead = ReadAhead(self._pieces())

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._buffers is not None:
            self._buffers.stop()  # the reader may be waiting for what nobody gives back any more
        self._ahead.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._ahead)

    def _pieces(self) -> Iterator[Piece]:
        if self._timing is not None:
            self._timing.watch("reader")
        position = 0
        for entry in self._reader.header.tensors:
            if entry.name not in self._targets:
                continue
            yield from self._between(position, entry.start)
            for first, count in _portions(entry, self._targets[entry.name]):
                yield self._target(entry, first, count)
            position = entry.end
        yield from self._between(position, self._reader.header.data_bytes)
        self._reader.check_unchanged()

    def _target(self, entry: TensorEntry, first: int, count: int | None) -> TargetPiece:
        start, stop = self._reader.span(entry, first, count)
        buffer = self._read(start, stop - start)
        return TargetPiece(entry, first, self._reader.shaped(buffer, entry, count), buffer)

    def _between(self, start: int, end: int) -> Iterator[Bytes]:
        for position in range(start, end, CHUNK_BYTES):
            yield Bytes(self._read(position, min(CHUNK_BYTES, end - position)))

    def _read(self, start: int, count: int) -> torch.Tensor:
        buffer = self._reader.empty(count) if self._buffers is None else self._buffers.take(count)
        try:
            with timed("read"):
                self._reader.read_into(bytes_of(buffer), start)
        except BaseException:  # nobody else knows of it, and others may go on with the lane
            if self._buffers is not None:
                self._buffers.give(buffer)
            raise
        with timed("hash"):
            self._sha256.update(bytes_of(buffer))
        return buffer


def looked_at(pieces: Iterable[Piece], look: Callable[[TargetPiece], object]) -> Iterator[Piece]:
    """Pieces, those of targets shown as they pass: later they may hold something else than what was read."""
    for piece in pieces:
        if isinstance(piece, TargetPiece):
            look(piece)
        yield piece


def reported(walk: ShardWalk, progress: Progress) -> Iterator[Piece]:
    """The pieces of a walk without buffers, telling the progress of whoever uses them one by one."""
    passed = 0
    for piece in walk:
        if isinstance(piece, TargetPiece):
            progress.item(piece.entry.name)
        yield piece
        progress.advance(len(piece))
        passed += len(piece)
        if passed >= _TRIM_BYTES:
            passed = 0
            return_free_memory()


def _portions(entry: TensorEntry, at_a_time: int | None) -> Iterator[tuple[int, int | None]]:
    if at_a_time is None:
        yield 0, None
        return
    for first in range(0, entry.shape[0], at_a_time):
        yield first, min(at_a_time, entry.shape[0] - first)
