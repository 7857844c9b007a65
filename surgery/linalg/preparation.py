"""Matrices as they are solved: in the working precision, and with squares that neither overflow nor vanish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.errors import WeightError
from surgery.lossless.rounding import times_power_of_two
from surgery.memory import scratch
from surgery.solvers.operator import Operator, widened
from surgery.solvers.product import leading_dimension
from surgery.torch_threads import one_thread

#: Columns over which a float32 sum of squares stays accurate.
_NORM_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class Prepared:
    """Matrices as they are solved: in the working precision, divided by powers of two, and without those of zeros.

    Attributes:
        operator: of the Z matrices that are not zeros.
        norms: float64 (Z,) on the CPU, their Frobenius norms after the division.
        exponents: int32 (Z,), each has been divided by ``2^exponent``.
        nonzero: (Z,), which of the batch they are.
    """

    operator: Operator
    norms: torch.Tensor
    exponents: torch.Tensor
    nonzero: list[int]


def prepared(A: torch.Tensor) -> Prepared:
    """The matrices of a batch (B, m, n) as they are solved. Raises WeightError for NaN and infinity."""
    work = in_working_precision(A)
    norms = matrix_norms(work)
    shifts = [_shift(matrix, norm) for matrix, norm in zip(work, norms.tolist(), strict=True)]
    nonzero = [i for i, shift in enumerate(shifts) if shift is not None]
    if len(nonzero) < len(work):
        work, norms = work[nonzero], norms[nonzero]
    exponents = torch.tensor([shifts[i] for i in nonzero], dtype=torch.int32)
    if exponents.any():
        # Squares of the entries must neither overflow nor vanish. A power of two changes no bit of the mantissa.
        work = torch.stack([times_power_of_two(*pair) for pair in zip(work, (-exponents).tolist(), strict=True)])
        norms = matrix_norms(work)
    return Prepared(Operator(work, A.shape[2]), norms, exponents, nonzero)


def in_working_precision(A: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in float64 if A is float64, else in float32, with zeros behind each row where that is faster."""
    count, m, n = A.shape
    width = leading_dimension(m, n, A.device)
    if A.dtype == torch.float64 or (A.dtype == torch.float32 and width == n):
        return A.contiguous()
    padded = scratch("matrix", (count, m, width), torch.float32, A.device)
    padded[:, :, :n] = A
    padded[:, :, n:] = 0
    return padded


def _shift(matrix: torch.Tensor, norm: float) -> int | None:
    """The exponent of the power of two to divide a matrix by; None for a matrix of zeros. Raises WeightError."""
    if 2.0**-12 <= norm <= 2.0**24:
        return 0
    with one_thread():  # see exact_arithmetic
        low, high = (value.item() for value in torch.aminmax(matrix))
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise WeightError("the matrix holds NaN or infinity", got=f"values from {low} to {high}")
    return math.frexp(largest)[1] if largest else None


def matrix_norms(matrices: torch.Tensor) -> torch.Tensor:
    """Frobenius norms, float64 (B,) on the CPU: parts of rows are summed in their own dtype, these sums in float64."""
    starts = range(0, matrices.shape[2], _NORM_COLUMNS)
    pieces = [torch.linalg.vector_norm(matrices[:, :, i : i + _NORM_COLUMNS], dim=2) for i in starts]
    return widened(torch.stack(pieces)).square().sum(dim=(0, 2)).sqrt().cpu()
