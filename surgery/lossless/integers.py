"""Products of matrices as sums of integers: the same bits on every device, thread count and library."""

from __future__ import annotations

import math

import torch

from surgery.lossless.rounding import times_power_of_two


def to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """``x`` as float64 integers of at most ``bits`` bits, and the exponent e such that x = integers 2^(e - bits)."""
    largest = x.abs().max().item() if x.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return times_power_of_two(x.double(), bits - exponent).round_(), exponent


def portable_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b``, float64, with the same bits everywhere.

    Each matrix is the sum of two of integers, whose products are exact: with ``b = (53 - log2 k) / 2`` bits (24 at k = 16) the
    result is within about ``k 2^(1 - 2 b) max|a| max|b|``.

    Args:
        a: (m, k).
        b: (k, n), on the same device, one with float64.
    """
    bits = (53 - math.ceil(math.log2(max(a.shape[1], 1)))) // 2
    (high_a, low_a), (high_b, low_b) = (_two_integers(x, bits) for x in (a, b))
    sums = times_power_of_two(low_a[0] @ high_b[0], low_a[1] + high_b[1])
    sums += times_power_of_two(high_a[0] @ low_b[0], high_a[1] + low_b[1])
    return sums.add_(times_power_of_two(high_a[0] @ high_b[0], high_a[1] + high_b[1]))


def _two_integers(x: torch.Tensor, bits: int) -> tuple[tuple[torch.Tensor, int], tuple[torch.Tensor, int]]:
    """Two matrices of integers with an exponent each, ``integers 2^exponent``, whose sum is ``x`` to twice as many bits."""
    x = x.double()
    high, exponent = to_integers(x, bits)
    rest, small = to_integers(x - times_power_of_two(high, exponent - bits), bits)
    return (high, exponent - bits), (rest, small - bits)
