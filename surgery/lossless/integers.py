"""Products of matrices as sums of integers: the same bits on every device, thread count and library."""

from __future__ import annotations

import functools
import math

import torch

from surgery.lossless.blocks import row_slices, rows_at_a_time
from surgery.lossless.rounding import times_power_of_two

#: Integers that each number is split into for a product: together they have more bits than float64.
_PIECES = 3
#: Rows and columns whose numbers are all below this are not made larger.
_SMALLEST = 2.0**-900


def to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """``x`` as float64 integers of at most ``bits`` bits, and the exponent e such that x = integers 2^(e - bits)."""
    largest = x.abs().max().item() if x.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return times_power_of_two(x.double(), bits - exponent).round_(), exponent


def portable_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b``, float64, with the same bits everywhere, and hardly more than rounded once.

    Each matrix is a sum of three of integers of ``(53 - log2 k) / 2`` bits (24 at k = 16), whose products are exact in whatever
    order they are summed. Beside its rounding an entry is off by less than ``k 2^-60`` (for k of up to 512) of the largest
    number in its row of ``a`` times the largest in its column of ``b``.

    Args:
        a: (m, k).
        b: (k, n), on the same device, one with float64.
    """
    bits = (53 - math.ceil(math.log2(max(a.shape[1], 1)))) // 2
    right, of_columns = _pieces(b, bits, 0)
    product = torch.empty((len(a), b.shape[1]), dtype=torch.float64, device=a.device)
    for rows in row_slices(len(a), rows_at_a_time(a.shape[1])):  # each row by itself: temporaries stay small
        left, of_rows = _pieces(a[rows], bits, 1)
        total = product[rows].zero_()
        for both in reversed(range(_PIECES)):  # the small ones first
            total.mul_(2.0**-bits).add_(functools.reduce(torch.add, (left[i] @ right[both - i] for i in range(both + 1))))
        total.mul_(of_rows * 2.0 ** (1 - bits)).mul_(of_columns * 2.0 ** (1 - bits))
    return product


def _pieces(x: torch.Tensor, bits: int, dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``x`` as sums of integers along ``dim``: ``x = powers 2^(1 - bits) (pieces[0] + 2^-bits (pieces[1] + 2^-bits ...))``."""
    x = x.double()
    largest = x.abs().amax(dim, keepdim=True)
    powers = (largest.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64).clamp_(min=_SMALLEST)
    rest, pieces = x / powers * 2.0 ** (bits - 1), []
    for _ in range(_PIECES):
        pieces.append(rest.round())
        rest = (rest - pieces[-1]) * 2.0**bits
    return pieces, powers
