"""Low-rank products in fixed-point arithmetic: the same bits on every device, thread count and library."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.lossless.factors import Factors
from surgery.lossless.integers import to_integers
from surgery.lossless.rounding import times_power_of_two
from surgery.memory import scratch


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic after the exact product, for a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float32 else torch.float32


class Prediction:
    """``U diag(s) V^T`` in fixed-point arithmetic, rounded to the working precision: the same bits everywhere.

    With k columns the integers have ``b = (53 - log2 k) / 2`` bits (24 at k = 16), so the product is off by at
    most about ``k 2^-b max|U s| max|V|``: as good as float32 factors can be.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        k = factors.s.numel()
        bits = (53 - math.ceil(math.log2(max(k, 1)))) // 2
        self._left, left_exponent = to_integers(factors.U * factors.s, bits)
        right, right_exponent = to_integers(factors.V, bits)
        self._left = times_power_of_two(self._left, left_exponent + right_exponent - 2 * bits)
        self._right = right.T.contiguous()
        self._dtype = working_dtype(dtype)

    def worker(self, most: int) -> Callable[[slice], torch.Tensor]:
        """A function that predicts rows: (r, n), r <= ``most``, in the working dtype, valid until it is called again."""
        shape, device = (most, self._right.shape[1]), self._left.device
        product = scratch("exact product", shape, torch.float64, device)
        rounded = scratch("rounded product", shape, self._dtype, device)

        def predict(rows: slice) -> torch.Tensor:
            count = rows.stop - rows.start
            exact = torch.mm(self._left[rows], self._right, out=product[:count])
            return exact if self._dtype == torch.float64 else rounded[:count].copy_(exact)

        return predict
