"""The walk over a weight file: its pieces in the order of the file, read ahead and hashed, and the windows of pieces."""

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

#: Bytes of a shard that pass before freed memory is returned to the system.
_TRIM_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Bytes:
    """A piece of what lies between targets, kept as bytes: ``buffer`` is uint8 (bytes,)."""

    buffer: torch.Tensor

    def __len__(self) -> int:
        return len(self.buffer)


@dataclass(frozen=True, slots=True)
class TargetPiece:
    """A piece that is a tensor with targets in it, or some of the matrices of a stack; in its own dtype.

    Attributes:
        entry: what the header says of the tensor.
        first: index of the first matrix in the stack; 0 for a whole tensor.
        tensor: of the shape in ``entry``; a part of a stack has fewer matrices.
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
    """Groups successive pieces into windows of at least ``limit`` bytes; the last window may be shorter."""
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
    """One pass over a shard in file order, which reads ahead and hashes what is read.

    A context manager, to be iterated once: gives ``Bytes`` and ``TargetPiece``, which together are all data of the file.
    After the last piece ``sha256`` is that of the whole file. If the file has changed since the reader was opened, the
    iteration ends in a ``FormatError``.

    Args:
        reader: of the shard.
        targets: names of the tensors to give as ``TargetPiece``, each with how many matrices of a stack to give at a time,
            or None for the whole tensor.
        buffers: where the memory of the pieces comes from, on the CPU or on a GPU; whoever uses a piece gives its buffer back.
            None: fresh memory of the CPU.
        timing: records how long the reading takes.
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
        """Of the header and all data read so far, in hex."""
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._buffers is not None:
            self._buffers.stop()  # the reader may be waiting for a buffer that is never given back
        self._ahead.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._ahead)

    def _pieces(self) -> Iterator[Piece]:
        """All pieces of the shard, made in the reading thread."""
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
        """Read and hash bytes of the data, into a buffer uint8 (count,)."""

        def read(part: memoryview, done: int) -> None:
            with timed("read"):
                self._reader.read_into(part, start + done)
            with timed("hash"):
                self._sha256.update(part)

        if self._buffers is None:
            buffer = self._reader.empty(count)
            read(bytes_of(buffer), 0)
            return buffer
        buffer = self._buffers.take(count)
        try:
            self._buffers.fill(buffer, read)
        except BaseException:  # only this method knows the buffer, and the lane may go on with other shards
            self._buffers.give(buffer)
            raise
        return buffer


def looked_at(pieces: Iterable[Piece], on_target: Callable[[TargetPiece], object]) -> Iterator[Piece]:
    """Passes pieces on, and calls ``on_target`` with those of targets as they were read: later steps may overwrite them."""
    for piece in pieces:
        if isinstance(piece, TargetPiece):
            on_target(piece)
        yield piece


def with_progress(walk: ShardWalk, progress: Progress) -> Iterator[Piece]:
    """Passes the pieces of a walk without ``buffers`` on one by one, and tells the progress of their use."""
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
    """(first matrix, number of matrices) of each piece of a tensor; (0, None) for a whole one."""
    if at_a_time is None:
        yield 0, None
        return
    for first in range(0, entry.shape[0], at_a_time):
        yield first, min(at_a_time, entry.shape[0] - first)
