"""``Quantized``: where the numbers and scales of a quantized weight are in the files of a model, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from surgery.errors import FormatError
from surgery.format.header import Stored
from surgery.quantized.codec import Codec, Parts, Role
from surgery.quantized.elements import Integers

#: How a part is stored: as it is; powers of two as their exponents in bytes; or as unsigned integers, several in an int32, the
#: first in the lowest bits, along the rows of a matrix (compressed-tensors' zero points).
Storage = Literal["plain", "exponents", "packed rows"]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor that belongs to the numbers of a quantized weight.

    Attributes:
        role: what it means for them.
        name, shard: its name, and the weight file that it is in, which may be another than theirs.
        by_matrix: whether its first dimension is that of a stack of matrices.
        storage: how it is stored.
        rows, bits: how many rows packed ones have, and how many bits each; 0 where nothing is packed.
    """

    role: Role
    name: str
    shard: str
    by_matrix: bool = False
    storage: Storage = "plain"
    rows: int = 0
    bits: int = 0

    def numbers(self, stored: torch.Tensor) -> torch.Tensor:
        """What the stored tensor means."""
        if self.storage == "exponents":
            return stored.view(torch.float8_e8m0fnu)
        if self.storage == "packed rows":
            return Integers(self.bits, packed=True).values(stored.mT.contiguous(), self.rows).mT.to(torch.int8).contiguous()
        return stored

    def stored(self, numbers: torch.Tensor) -> torch.Tensor:
        """The inverse of ``numbers``."""
        if self.storage == "exponents":
            return numbers.view(torch.uint8)
        if self.storage == "packed rows":
            return Integers(self.bits, packed=True).stored(numbers.mT.float()).mT.contiguous()
        return numbers


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight that is stored as numbers of few bits with scales.

    Attributes:
        name: of the weight, as a model that holds it dequantized names it.
        dtype: what the format is called; ``F8_E4M3``, or one of ``names.PACKED_BITS``.
        shape: of the weight.
        shard: the weight file that its numbers are in.
        numbers: the tensor that holds them.
        codec: what numbers and parts mean.
        parts: what belongs to them.
        beside: the names of tensors that tell nothing of the weight's numbers, such as scales of the layer's inputs; they go
            where the weight is not quantized any more.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    numbers: Stored
    codec: Codec
    parts: tuple[StoredPart, ...]
    beside: tuple[str, ...] = ()

    @property
    def shards(self) -> set[str]:
        """The weight files that its parts are in."""
        return {part.shard for part in self.parts}

    @property
    def is_packed(self) -> bool:
        """Whether its numbers are in a tensor of another name, dtype or shape."""
        return self.numbers != self.described

    @property
    def described(self) -> Stored:
        """The weight as a header would describe it that could hold it."""
        return Stored(self.name, self.dtype, self.shape)

    def parts_of_matrices(self, parts: Parts, first: int, count: int) -> dict[Role, torch.Tensor]:
        """The parts of some matrices of a stack, of those of all of them."""
        by_matrix = {part.role for part in self.parts if part.by_matrix}
        return {role: one[first : first + count] if role in by_matrix else one for role, one in parts.items()}

    def parts_of_matrix(self, parts: Parts, index: int) -> dict[Role, torch.Tensor]:
        """The parts of one matrix of a stack; all parts where the weight is none."""
        if len(self.shape) < 3:
            return dict(parts)
        by_matrix = {part.role for part in self.parts if part.by_matrix}
        return {role: one[index] if role in by_matrix else one for role, one in parts.items()}

    def dequantized(self, stored: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The weight, float32; or of a stack as many matrices as ``stored`` has.

        Args:
            stored: its numbers as in the file.
            parts: what belongs to these, as ``StoredPart.numbers`` gives it.

        Raises:
            FormatError: the file tells another shape of it.
        """
        told = parts.get("shape")
        if told is not None and tuple(told.tolist()) != self.shape:
            raise FormatError(
                f"{self.name!r} has another shape than its numbers and scales tell",
                got=f"{told.tolist()}, by the tensor of its shape",
                expected=str(list(self.shape)),
                hint="exclude it: a weight whose columns do not fill its last group or number is not read",
            )
        shape = (len(stored), *self.shape[1:]) if len(self.shape) > 2 else self.shape
        return self.codec.dequantize(stored, parts, shape)

    def quantized(self, weight: torch.Tensor, parts: Parts, stored: torch.Tensor) -> torch.Tensor:
        """The numbers nearest to a weight, or to some matrices of a stack, in the form that ``stored`` has."""
        return self.codec.quantize(weight, parts).view(stored.dtype).reshape(stored.shape)


def packed_in(weights: Iterable[Quantized]) -> dict[str, Stored]:
    """Name of each tensor that holds packed numbers -> the weight that it stands for."""
    return {one.numbers.name: one.described for one in weights if one.is_packed}


def beside_weights(weights: Iterable[Quantized]) -> set[str]:
    """The names of all tensors that belong to quantized weights, besides those that hold their numbers."""
    return {name for one in weights for name in (*(part.name for part in one.parts), *one.beside)}


#: Reads a tensor of a weight file, of a stack only some matrices: (shard, tensor, first matrix, how many or None for all).
ReadPart = Callable[[str, str, int, int | None], torch.Tensor]


def read_parts(quantized: Quantized, read: ReadPart, first: int = 0, count: int | None = None) -> dict[Role, torch.Tensor]:
    """The parts of a weight; of a stack those of ``count`` matrices from ``first`` on, or of all."""
    found: dict[Role, torch.Tensor] = {}
    for part in quantized.parts:
        some = (first, count) if part.by_matrix else (0, None)
        found[part.role] = part.numbers(read(part.shard, part.name, *some))
    return found
