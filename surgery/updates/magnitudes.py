"""What adapters add to one matrix, DoRA's among them, as one change of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery.errors import ScalesError, WeightError
from surgery.lossless.blocks import row_slices, rows_at_a_time
from surgery.lossless.factors import Addition
from surgery.updates.changes import LowRankPart

#: What is above it is beyond float32, also where an adapter's sides are large and small; and its square is none of float64.
_LARGEST = 1e60


def addition_of(parts: Sequence[LowRankPart], weight: torch.Tensor, name: str) -> Addition:
    """The sum of what adapters do to a matrix W (m, n): ``factor * W + left right^T``.

    Of an adapter with a magnitude, ``c (W + B A) - W`` where c is the magnitude over the norms of W + B A, the part ``c W - W``
    goes into the factor.

    Args:
        parts: of the adapters, at least one.
        weight: W, as it is before any of them, in any dtype, on the CPU.
        name: of the weight, for messages.

    Raises:
        WeightError: the norm of a row or column is zero, so that it has no direction.
        ScalesError: the sum is beyond the range of all dtypes.
    """
    lefts, rights = [], []
    factor: torch.Tensor | None = None
    for part in parts:
        left, right = part.left.double() * part.scaling, part.right
        if part.magnitude is not None:
            norms = _norms(weight, left, right.double(), part.axis)
            if not bool((norms > 0).all()):
                raise WeightError(
                    f"{name!r} has a {'row' if part.axis == 0 else 'column'} of zeros, which has no direction to which DoRA's "
                    "magnitude could belong",
                    got=f"number {int((norms > 0).int().argmin())}, also with what the adapter adds to it",
                    hint="PEFT makes NaN of it: train the adapter without use_dora, or leave this module out",
                )
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
    left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=1)
    largest = [1.0 if one is None or not one.numel() else one.abs().max().item() for one in (left, right, factor)]
    if not math.prod(largest) < _LARGEST:
        raise ScalesError(f"the update of {name!r} is beyond the range of all dtypes", hint="check its alpha and --weights")
    return Addition(left, right, factor)


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
