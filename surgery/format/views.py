"""A tensor of a checkpoint seen as a batch of matrices.

| kind | tensor | matrices |
| --- | --- | --- |
| ``matrix`` | (m, n) | (1, m, n) |
| ``stack`` | (B, m, n), such as the experts of a layer | (B, m, n) |
| ``convolution`` | (out, in, kernel...) | (1, out, in * kernel) |

Nothing is transposed: the singular values are the same whether a matrix is stored as [out, in] or as [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["matrix", "stack", "convolution"]
KINDS: tuple[Kind, ...] = ("matrix", "stack", "convolution")

#: Bytes of a stack that are in memory at a time (or one matrix, if larger): the experts of a layer may not fit as a whole.
STACK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the rows (axis 0) or columns (axis 1) of a matrix: those with ``start <= index % period < stop``.

    If ``period`` is the length of the axis, the slice is one stretch, as for q, k and v one after the other. A smaller period
    is for projections that alternate head by head or column by column.
    """

    name: str
    axis: int
    period: int
    start: int
    stop: int

    def holds(self, index: torch.Tensor) -> torch.Tensor:
        """Which of these indices along its axis are in it: bool, of the shape of ``index``."""
        phase = index % self.period
        return (phase >= self.start) & (phase < self.stop)


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor is seen as matrices.

    Attributes:
        kind: see the table above.
        slice: the part of each matrix that is meant; None for the whole matrix.
    """

    kind: Kind
    slice: Slice | None = None

    def shape(self, tensor: Sequence[int]) -> tuple[int, int, int]:
        """The shape (B, m, n) of the matrices of a tensor.

        Args:
            tensor: its shape.

        Raises:
            ValueError: the view does not fit the shape.
        """
        sizes = self._whole(tensor)
        if self.slice is None:
            return sizes
        if self.slice.axis not in (0, 1):
            raise ValueError(f"a matrix has no axis {self.slice.axis}: the slice does not fit")
        part, length = self.slice, sizes[1 + self.slice.axis]
        if not (0 <= part.start < part.stop <= part.period and part.period <= length and length % part.period == 0):
            raise ValueError(f"a slice [{part.start}, {part.stop}) of every {part.period} does not fit {length}")
        sliced = length // part.period * (part.stop - part.start)
        return (sizes[0], sliced, sizes[2]) if part.axis == 0 else (sizes[0], sizes[1], sliced)

    def _whole(self, tensor: Sequence[int]) -> tuple[int, int, int]:
        least = {"matrix": 2, "stack": 3, "convolution": 3}[self.kind]
        if len(tensor) < least or (self.kind != "convolution" and len(tensor) > least) or 0 in tensor:
            raise ValueError(f"a tensor of shape {list(tensor)} is no {self.kind}")
        if self.kind == "stack":
            return tensor[0], tensor[1], tensor[2]
        return 1, tensor[0], math.prod(tensor[1:])

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrices (B, m, n) of a contiguous tensor, contiguous; they share its memory, except for most slices."""
        return self._select(tensor).reshape(self.shape(tensor.shape)).contiguous()

    def store(self, matrices: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write matrices (B, m, n) into ``tensor``, to where ``matrices(tensor)`` takes them from."""
        part = self._select(tensor)
        if matrices.data_ptr() != part.data_ptr():  # else they share the tensor's memory, and nothing is to do
            part.copy_(matrices.reshape(part.shape))

    def _select(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that is meant, as a view of its memory; a slice has its axis split into (periods, length)."""
        whole = tensor.view(self._whole(tensor.shape))
        if self.slice is None:
            return whole
        axis = 1 + self.slice.axis
        periods = whole.view(*whole.shape[:axis], -1, self.slice.period, *whole.shape[axis + 1 :])
        return periods.narrow(axis + 1, self.slice.start, self.slice.stop - self.slice.start)

    def at_a_time(self, tensor: Sequence[int], itemsize: int) -> int | None:
        """How many matrices of a stack are in memory at a time; None if it is not a stack.

        Args:
            tensor: its shape.
            itemsize: bytes of an entry.
        """
        return max(1, STACK_BYTES // max(1, tensor[1] * tensor[2] * itemsize)) if self.kind == "stack" else None
