"""A tensor of a checkpoint seen as a batch of matrices.

| kind | tensor | matrices |
| --- | --- | --- |
| ``matrix`` | (m, n) | (1, m, n) |
| ``stack`` | (B, m, n), such as the experts of a layer | (B, m, n) |
| ``convolution`` | (out, in, kernel...) | (1, out, in * kernel) |

Whether a matrix is stored [out, in] or [in, out] makes no difference to its singular values, so nothing is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["matrix", "stack", "convolution"]
KINDS: tuple[Kind, ...] = ("matrix", "stack", "convolution")

#: Bytes of a stack that are held at a time, if one matrix is not more: a layer's experts may be larger than memory.
STACK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the rows (axis 0) or columns (axis 1) of a matrix: those with ``start <= index % period < stop``.

    With ``period`` the whole length it is one stretch, as in q, k and v one after the other; a smaller one is for
    projections that alternate head by head or column by column.
    """

    name: str
    axis: int
    period: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor is seen: its kind, and which part of each matrix, if not all."""

    kind: Kind
    slice: Slice | None = None

    def shape(self, tensor: Sequence[int]) -> tuple[int, int, int]:
        """(B, m, n) for a tensor of this shape.

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
        """(B, m, n), contiguous, of a contiguous tensor of the kind; the tensor's own memory, but for most slices."""
        return self._select(tensor).reshape(self.shape(tensor.shape)).contiguous()

    def store(self, matrices: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write matrices (B, m, n) to where ``matrices(tensor)`` takes them from."""
        part = self._select(tensor)
        if matrices.data_ptr() != part.data_ptr():  # some slices are stretches of the tensor's own memory
            part.copy_(matrices.reshape(part.shape))

    def _select(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that is meant, in the tensor's own memory."""
        whole = tensor.view(self._whole(tensor.shape))
        if self.slice is None:
            return whole
        axis = 1 + self.slice.axis
        periods = whole.view(*whole.shape[:axis], -1, self.slice.period, *whole.shape[axis + 1 :])
        return periods.narrow(axis + 1, self.slice.start, self.slice.stop - self.slice.start)

    def at_a_time(self, tensor: Sequence[int], itemsize: int) -> int | None:
        """How many matrices of a stack of this shape are held at a time; None where the tensor is one matrix."""
        return max(1, STACK_BYTES // max(1, tensor[1] * tensor[2] * itemsize)) if self.kind == "stack" else None
