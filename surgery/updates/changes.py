"""What adapters do to one tensor of a checkpoint: numbers only, or where they are stored. Nothing is rounded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch

from surgery.errors import FormatError, OptionError
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.lossless.rounding import all_finite
from surgery.memory import bytes_of

#: Bytes of a stored tensor that are hashed or looked at together.
_AT_A_TIME = 4 << 20


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """One adapter's change of one matrix W (m, n): ``weight scaling left right^T``, or that of DoRA.

    With a magnitude the change is ``weight (magnitude / norm(W') W' - W)``, where ``W' = W + scaling left right^T`` and the
    norms are those of its rows (``axis`` 0) or columns (1), each of which the magnitude has a number for. Source: Liu et al.,
    DoRA: Weight-Decomposed Low-Rank Adaptation (2024), equation 5; PEFT 0.21, ``tuners/lora/variants.py``.

    Attributes:
        left: float32 (m, r).
        right: float32 (n, r).
        scaling: the adapter's own.
        weight: with which the adapter counts in a sum.
        magnitude: float32, (m,) for axis 0 or (n,) for axis 1; None for an adapter without DoRA.
        axis: the axis of the matrix that the magnitude belongs to.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float = 1.0
    weight: float = 1.0
    magnitude: torch.Tensor | None = None
    axis: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an adapter's file, to be read when it is needed.

    Attributes:
        path: of the safetensors file.
        name: of the tensor in it.
        dtype: as the format names it.
        shape: its sizes.
        modified: when the file was changed last, in nanoseconds, as it was when the rest of the adapter was read.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    modified: int

    @classmethod
    def of(cls, reader: ShardReader, path: Path, entry: TensorEntry) -> Self:
        """The tensor of an entry of an open file."""
        return cls(path, entry.name, entry.dtype, entry.shape, reader.modified)

    def read(self) -> torch.Tensor:
        """Its numbers, in its own dtype and shape, on the CPU.

        Raises:
            ReadError: the file cannot be read.
            FormatError: it is not what it was, or the tensor holds NaN or infinity.
        """
        with ShardReader(self.path, name=str(self.path)) as reader:
            tensor = reader.read(self._entry(reader))
            reader.check_unchanged()
        if tensor.numel() and not all_finite(tensor):
            raise FormatError(f"{self.path}: {self.name!r} holds NaN or infinity", hint="take an earlier checkpoint")
        return tensor

    def _entry(self, reader: ShardReader) -> TensorEntry:
        """Its entry in the file, which has to be the one that was looked at."""
        entry = reader.entries.get(self.name)
        if entry is None or (entry.dtype, entry.shape, reader.modified) != (self.dtype, self.shape, self.modified):
            raise FormatError(
                f"{self.path}: {self.name!r} has changed since the adapter was looked at",
                hint="run the same command again when nothing writes to that folder any more",
            )
        return entry

    def hash_into(self, digest: _Hash) -> None:
        """Give its dtype, shape and bytes to a hash, a few megabytes at a time.

        Raises:
            ReadError, FormatError: as ``read``.
        """
        digest.update(f"{self.dtype} {self.shape}\0".encode())
        with ShardReader(self.path, name=str(self.path)) as reader:
            entry = self._entry(reader)
            for start in range(entry.start, entry.end, _AT_A_TIME):
                data = bytes_of(reader.empty(min(_AT_A_TIME, entry.end - start)))
                reader.read_into(data, start)
                digest.update(data)


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Rows that take the place of a matrix's own: those of trained tokens.

    Attributes:
        indices: int64 (t,), each once, ascending.
        values: float32 (t, n).
    """

    indices: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class TensorChange:
    """All that adapters do to one tensor. What replaces comes first, then what is added, then the one rounding.

    Attributes:
        parts: index of a matrix of a stack (B, m, n) -> what is added to it; ``{0: ...}`` for a tensor that is seen as one
            matrix (m, n), where n is the product of all axes but the first.
        is_stack: whether ``parts`` are those of a stack.
        offset: float64, of the tensor's shape, that is added; None for nothing.
        replacement: what takes the tensor's place; cast to its dtype, with one rounding. None if it stays.
        rows: the rows that take the place of others; None if all stay.
    """

    parts: Mapping[int, tuple[LowRankPart, ...]] = field(default_factory=dict)
    is_stack: bool = False
    offset: torch.Tensor | None = None
    replacement: StoredTensor | None = None
    rows: ReplacedRows | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers that are in memory; stored ones are not."""
        tensors = [one for parts in self.parts.values() for part in parts for one in (part.left, part.right, part.magnitude)]
        tensors += [self.offset] + ([] if self.rows is None else [self.rows.indices, self.rows.values])
        return sum(one.nbytes for one in tensors if one is not None)

    def hash_into(self, digest: _Hash) -> None:
        """Give all its numbers to a hash; stored ones are read.

        Raises:
            ReadError, FormatError: as ``StoredTensor.read``.
        """
        for index, parts in sorted(self.parts.items()):
            for part in parts:
                digest.update(f"{index} {part.scaling!r} {part.weight!r} {part.axis}\0".encode())
                for tensor in (part.left, part.right, part.magnitude):
                    _hash_tensor(tensor, digest)
        _hash_tensor(self.offset, digest)
        _hash_tensor(None if self.rows is None else self.rows.indices, digest)
        _hash_tensor(None if self.rows is None else self.rows.values, digest)
        if self.replacement is not None:
            self.replacement.hash_into(digest)


def summed(first: TensorChange, second: TensorChange) -> TensorChange:
    """Both changes of one tensor together, as sums are taken before the one rounding.

    Raises:
        OptionError: both replace the same, or one sees a stack where the other sees one matrix.
    """
    if (first.parts and second.parts and first.is_stack != second.is_stack) or any(
        getattr(first, name) is not None and getattr(second, name) is not None for name in ("replacement", "rows")
    ):
        raise OptionError("two updates change one tensor in ways that cannot be summed")
    parts = {index: (*first.parts.get(index, ()), *second.parts.get(index, ())) for index in {**first.parts, **second.parts}}
    offsets = [one.offset for one in (first, second) if one.offset is not None]
    return TensorChange(
        parts,
        first.is_stack or second.is_stack,
        sum(offsets[1:], offsets[0]) if offsets else None,
        second.replacement if first.replacement is None else first.replacement,
        second.rows if first.rows is None else first.rows,
    )


def _hash_tensor(tensor: torch.Tensor | None, digest: _Hash) -> None:
    digest.update(f"{None if tensor is None else tuple(tensor.shape)}\0".encode())
    if tensor is not None and tensor.numel():
        digest.update(bytes_of(tensor.contiguous()))
