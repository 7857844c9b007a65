"""The walk over a weight file: its pieces in the order of the file, read ahead and hashed, and the windows of pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch

from surgery.engine.buffers import Buffers
from surgery.engine.threads import ReadAhead
from surgery.files.file_writer import CHUNK_BYTES
from surgery.format.header import Header, TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.timing import Timing, timed


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


@dataclass(frozen=True, slots=True)
class Span:
    """Where a piece is in a file.

    Attributes:
        start, stop: of its bytes in the data.
        entry, first: as for ``TargetPiece``; None for bytes between targets.
        count: how many matrices of a stack it is; None for a whole tensor.
    """

    start: int
    stop: int
    entry: TensorEntry | None = None
    first: int = 0
    count: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start


def spans(header: Header, targets: Mapping[str, int | None]) -> Iterator[Span]:
    """The pieces of a weight file, in the order of the file. Arguments are those of ``ShardWalk``."""
    position = 0
    for entry in header.tensors:
        if entry.name not in targets:
            continue
        yield from _between(position, entry.start)
        for first, count in _portions(entry, targets[entry.name]):
            yield Span(*ShardReader.span(entry, first, count), entry, first, count)
        position = entry.end
    yield from _between(position, header.data_bytes)


def _between(start: int, end: int) -> Iterator[Span]:
    for position in range(start, end, CHUNK_BYTES):
        yield Span(position, min(position + CHUNK_BYTES, end))


_Sized = TypeVar("_Sized", bound=Sized)


def windows(pieces: Iterable[_Sized], limit: int) -> Iterator[list[_Sized]]:
    """Groups successive pieces into windows of at least ``limit`` bytes; the last window may be shorter."""
    window: list[_Sized] = []
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
        timing: records how long the reading takes.
    """

    def __init__(
        self,
        reader: ShardReader,
        targets: Mapping[str, int | None],
        buffers: Buffers,
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
        if error is not None:
            self._buffers.stop()  # the reader may be waiting for a buffer that is never given back
        self._ahead.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._ahead)

    def _pieces(self) -> Iterator[Piece]:
        """All pieces of the shard, made in the reading thread."""
        if self._timing is not None:
            self._timing.watch("reader")
        for span in spans(self._reader.header, self._targets):
            buffer = self._read(span.start, len(span))
            if span.entry is None:
                yield Bytes(buffer)
            else:
                yield TargetPiece(span.entry, span.first, self._reader.shaped(buffer, span.entry, span.count), buffer)
        self._reader.check_unchanged()

    def _read(self, start: int, count: int) -> torch.Tensor:
        """Read and hash bytes of the data, into a buffer uint8 (count,)."""

        def read(part: memoryview, done: int) -> None:
            with timed("read"):
                self._reader.read_into(part, start + done)
            with timed("hash"):
                self._sha256.update(part)

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


def _portions(entry: TensorEntry, at_a_time: int | None) -> Iterator[tuple[int, int | None]]:
    """(first matrix, number of matrices) of each piece of a tensor; (0, None) for a whole one."""
    if at_a_time is None:
        yield 0, None
        return
    for first in range(0, entry.shape[0], at_a_time):
        yield first, min(at_a_time, entry.shape[0] - first)
