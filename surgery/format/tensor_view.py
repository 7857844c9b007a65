"""A tensor of a checkpoint that is seen as matrices of which some directions are kept: what is planned and recorded alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from surgery.format.views import View
from surgery.names import DTYPE_BITS, FACTORIZABLE_DTYPES, target_key

_Target = TypeVar("_Target", bound="TensorView")


class TensorView:
    """Base of a planned target and of a recorded one, which are frozen dataclasses with these fields.

    Attributes:
        tensor: its name in the checkpoint.
        shard: the weight file that it is in.
        dtype, shape: of the tensor, as stored.
        rank: directions kept of each matrix.
    """

    __slots__ = ()

    tensor: str
    shard: str
    dtype: str
    shape: Sequence[int]
    rank: int

    @property
    def seen_as(self) -> View:
        """How it is seen as matrices."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Its name among factors and scales."""
        part = self.seen_as.slice
        return target_key(self.tensor, part.name if part else None)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(B, m, n)."""
        return self.seen_as.shape(self.shape)

    @property
    def entries(self) -> int:
        """How many numbers its matrices have."""
        return math.prod(self.matrices)

    @property
    def at_a_time(self) -> int | None:
        """How many matrices of a stack are held at a time; None for one matrix."""
        # What is quantized is worked on in float32.
        itemsize = DTYPE_BITS[self.dtype] // 8 if self.dtype in FACTORIZABLE_DTYPES else 4
        return self.seen_as.at_a_time(self.shape, itemsize)

    def place(self, index: int) -> int | None:
        """Which of a stack a matrix is; None for one matrix."""
        return index if self.seen_as.kind == "stack" else None

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """(k,), or (B, k) for a stack."""
        return (self.matrices[0], self.rank) if self.seen_as.kind == "stack" else (self.rank,)

    @property
    def trainable(self) -> int:
        """How many scales it has."""
        return math.prod(self.scales_shape)


def by_tensor(targets: Iterable[_Target]) -> dict[str, list[_Target]]:
    """Tensor -> its targets: one, or one for each slice of it. Tensors and targets are in the order in which they come."""
    found: dict[str, list[_Target]] = {}
    for target in targets:
        found.setdefault(target.tensor, []).append(target)
    return found
