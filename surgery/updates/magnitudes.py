"""What adapters add to one matrix, DoRA's among them, as one change of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.errors import WeightError
from surgery.lossless.blocks import row_slices, rows_at_a_time
from surgery.lossless.factors import Addition
from surgery.updates.changes import LowRankPart


def addition_of(parts: Sequence[LowRankPart], weight: torch.Tensor) -> Addition:
    """The sum of what adapters do to a matrix W (m, n): ``factor * W + left right^T``.

    Of an adapter with a magnitude, ``c (W + B A) - W`` where c is the magnitude over the norms of W + B A, the part ``c W - W``
    goes into the factor.

    Args:
        parts: of the adapters, at least one.
        weight: W, as it is before any of them, in any dtype, on the CPU.

    Raises:
        WeightError: the norm of a row or column is zero, so that it has no direction.
    """
    lefts, rights = [], []
    factor: torch.Tensor | None = None
    for part in parts:
        left, right = part.left.double(), part.right
        if part.magnitude is not None:
            norms = _norms(weight, left, right.double(), part.axis)
            if not bool((norms > 0).all()):
                raise WeightError("a row or column that DoRA gives a magnitude is zero, and has no direction")
            c = part.magnitude.double() / norms
            shape = (-1, 1) if part.axis == 0 else (1, -1)
            more = part.weight * (c - 1).view(shape)
            factor = 1 + more if factor is None else factor + more
            if part.axis == 0:
                left = left * c[:, None]
            else:
                right = right.double() * c[:, None]
        lefts.append(left * part.weight)
        rights.append(right)
    return Addition(torch.cat(lefts, dim=1), torch.cat(rights, dim=1), factor)


def _norms(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, axis: int) -> torch.Tensor:
    """The norms, float64, of the rows (``axis`` 0) or columns (1) of ``W + left right^T``."""
    m, n = weight.shape
    squares = torch.zeros(m if axis == 0 else n, dtype=torch.float64)
    for rows in row_slices(m, rows_at_a_time(n)):
        block = weight[rows].double().addmm_(left[rows], right.T)
        found = block.square_().sum(1 - axis)
        if axis == 0:
            squares[rows] = found
        else:
            squares += found
    return squares.sqrt_()
