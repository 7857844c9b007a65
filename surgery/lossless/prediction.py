"""Low-rank products in fixed-point arithmetic: the same bits on every device, thread count and library."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.lossless.factors import Factors
from surgery.memory import scratch

#: The smallest number of float32 that is not zero: float64 has it as an ordinary one.
_SMALLEST = 2.0**-149


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic after the exact product, for a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float32 else torch.float32


class Prediction:
    """``U diag(s) V^T`` in fixed-point arithmetic, rounded to the working precision: the same bits everywhere.

    With k columns the integers have ``b = (53 - log2 k) / 2`` bits (24 at k = 16), so the product is off by at
    most about ``k 2^-b max|U s| max|V|``: as good as float32 factors can be.

    Args:
        factors: of one matrix (m, n), or of a batch of them. Nothing waits for the device that they are on.
        dtype: of the weight.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        k = factors.s.shape[-1]
        bits = (53 - math.ceil(math.log2(max(k, 1)))) // 2
        left, right = factors.U * factors.s[..., None, :], factors.V
        powers = _powers(left, right, bits)
        # Each is a power of two that float64 has, and none of these numbers comes near the ends of its range: all is exact.
        self._left = (left * powers[0]).round_().div_(powers[0]).div_(powers[1])
        self._right = (right * powers[1]).round_().mT.contiguous()
        self._dtype = working_dtype(dtype)

    def of(self, matrices: slice, rows: slice) -> torch.Tensor:
        """The same rows of some matrices of a batch: (matrices, rows, n), in the working dtype."""
        return torch.bmm(self._left[matrices, rows], self._right[matrices]).to(self._dtype)

    def worker(self, most: int) -> Callable[[slice], torch.Tensor]:
        """A function that predicts rows of a matrix: (r, n), r <= ``most``, in the working dtype, valid until the next call."""
        shape, device = (most, self._right.shape[1]), self._left.device
        product = scratch("exact product", shape, torch.float64, device)
        rounded = scratch("rounded product", shape, self._dtype, device)

        def predict(rows: slice) -> torch.Tensor:
            count = rows.stop - rows.start
            exact = torch.mm(self._left[rows], self._right, out=product[:count])
            return exact if self._dtype == torch.float64 else rounded[:count].copy_(exact)

        return predict


def _powers(left: torch.Tensor, right: torch.Tensor, bits: int) -> torch.Tensor:
    """The powers of two that bring the numbers of float32 matrices below ``2^bits``, of each as large as it can be.

    They stay on the device: a program that asked for them, as ``to_integers`` does, would wait for it.

    Args:
        left, right: (..., m, k) and (..., n, k).

    Returns:
        float64 (2, ..., 1, 1).
    """
    if not left.numel():
        return left.new_ones((2, *left.shape[:-2], 1, 1), dtype=torch.float64)
    largest = torch.stack([torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True) for x in (left, right)])
    # Of float64 the bits tell the exponent e with 2^(e - 1) <= x < 2^e, as e + 1022, and those of 2^e are e + 1023.
    found = largest.double().clamp_(min=_SMALLEST).view(torch.int64) >> 52
    return ((bits + 2045 - found) << 52).view(torch.float64)
