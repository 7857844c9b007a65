"""``BlockScaling``: the scales and zeros of a matrix's blocks, applied to its entries without a copy for each entry."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

_InPlace = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class BlockScaling:
    """``(q - zero) * scale`` and its inverse for the entries of a matrix, or of each matrix of a stack.

    Args:
        scales: of the blocks, float32 (..., rows of blocks, columns of blocks).
        zeros: in the same shape; None: all are 0.
        row: the row of blocks that each row of the matrix is in, int64 (m,).
        column: the column of blocks that each column is in, int64 (n,); or how many columns each block has, one block after
            the other, of which the last may have fewer.
    """

    def __init__(self, scales: torch.Tensor, zeros: torch.Tensor | None, row: torch.Tensor, column: torch.Tensor | int) -> None:
        self._scales, self._zeros = scales, zeros
        self._row, self._column = row, column

    @cached_property
    def _divisors(self) -> torch.Tensor:
        # Where a scale is 0 a block holds nothing but zeros: what is divided by it stays what it is.
        is_zero = self._scales == 0
        return torch.where(is_zero, 1.0, self._scales) if bool(is_zero.any()) else self._scales

    def divide_(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """``x / scale + zero`` in the place of some rows, float32 (..., r, n); ``x + zero`` where a scale is 0."""
        self._apply(torch.Tensor.div_, x, self._divisors, rows)
        return x if self._zeros is None else self._apply(torch.Tensor.add_, x, self._zeros, rows)

    def multiply_(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """``(x - zero) * scale`` in the place of some rows, float32 (..., r, n)."""
        if self._zeros is not None:
            self._apply(torch.Tensor.sub_, x, self._zeros, rows)
        return self._apply(torch.Tensor.mul_, x, self._scales, rows)

    def to(self, device: torch.device) -> BlockScaling:
        """The same on a device."""
        tensors = [x for x in (self._scales, self._zeros, self._row, self._column) if isinstance(x, torch.Tensor)]
        if all(x.device == device for x in tensors):
            return self
        zeros = None if self._zeros is None else self._zeros.to(device)
        column = self._column if isinstance(self._column, int) else self._column.to(device)
        return BlockScaling(self._scales.to(device), zeros, self._row.to(device), column)

    def _apply(self, operation: _InPlace, x: torch.Tensor, numbers: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        if numbers.shape[-2] > 1:
            numbers = numbers.index_select(-2, self._row[rows if isinstance(rows, slice) else rows.to(self._row.device)])
        if numbers.shape[-1] == 1:
            operation(x, numbers)
        elif isinstance(self._column, int):
            # Views of blocks: expanded to entries, the scales would be as large as the weight.
            size = self._column
            whole = x.shape[-1] // size * size
            operation(x[..., :whole].view(*x.shape[:-1], -1, size), numbers[..., : whole // size, None])
            if whole < x.shape[-1]:
                operation(x[..., whole:], numbers[..., -1:])
        else:
            operation(x, numbers.index_select(-1, self._column))
        return x
