"""``TensorView``: what a planned target and a recorded target have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from surgery.format.views import View
from surgery.names import FACTORIZABLE_DTYPES, WEIGHT_BITS, Train, target_key

_Target = TypeVar("_Target", bound="TensorView")


class TensorView:
    """A target: a tensor, or a slice of one, seen as matrices of which k directions are kept.

    The base of planned and of recorded targets, which are frozen dataclasses with these fields.

    Attributes:
        tensor: its name in the checkpoint.
        shard: the weight file that it is in.
        dtype, shape: of the whole tensor, as stored.
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
        """The view: how it is seen as matrices."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Its name among factors and scales: that of the tensor, with that of the slice."""
        part = self.seen_as.slice
        return target_key(self.tensor, part.name if part else None)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """The shape of its matrices: (B, m, n)."""
        return self.seen_as.shape(self.shape)

    @property
    def entries(self) -> int:
        """The number of entries of all its matrices."""
        return math.prod(self.matrices)

    @property
    def at_a_time(self) -> int | None:
        """How many matrices of a stack are in memory at a time; None if it is not a stack."""
        # Quantized tensors are computed with in float32.
        itemsize = WEIGHT_BITS[self.dtype] // 8 if self.dtype in FACTORIZABLE_DTYPES else 4
        return self.seen_as.at_a_time(self.shape, itemsize)

    def place(self, index: int) -> int | None:
        """``index`` if it is a stack, else None: for functions that take the index of a matrix in a stack only."""
        return index if self.seen_as.kind == "stack" else None

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The shape of its scales: (k,), or (B, k) for a stack."""
        return (self.matrices[0], self.rank) if self.seen_as.kind == "stack" else (self.rank,)

    @property
    def trainable(self) -> int:
        """The number of its scales."""
        return math.prod(self.scales_shape)

    def shape_of(self, train: Train) -> tuple[int, ...]:
        """The shape of its scales; or of its cores, (k, k), or (B, k, k) for a stack."""
        return self.scales_shape if train == "scales" else (*self.scales_shape, self.rank)

    def numbers_of(self, train: Train) -> int:
        """How many numbers these are."""
        return math.prod(self.shape_of(train))


def by_tensor(targets: Iterable[_Target]) -> dict[str, list[_Target]]:
    """Tensor -> its targets: one, or one for each slice of it. Tensors and targets are in the order in which they come."""
    found: dict[str, list[_Target]] = {}
    for target in targets:
        found.setdefault(target.tensor, []).append(target)
    return found
