"""What is left of a matrix without its leading directions, and which of these stand above noise like it.

Source: Hong, Sheng, Dobriban, "Selecting the number of components in PCA via random signflips" (2020, arXiv:2012.02985): signs
drawn at random for all entries destroy what is of low rank, and keep the variance of each entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.linalg.lanczos import block_lanczos
from surgery.linalg.operator import Operator, widened
from surgery.linalg.product import leading_dimension
from surgery.linalg.random import generator_of
from surgery.memory import scratch

#: Rows of the remainder that are made at a time.
_ROWS = 64
#: Of the iteration for the largest value of the flipped remainder: the shorter side up to which it is a full SVD, the rows of
#: a block, and the residual, of which its error is of second order.
_DENSE = 64
_BLOCK = 8
_TOLERANCE = 5e-2
#: Standard deviations of the largest singular value of noise by which the floor is above what one draw of signs gives.
_MARGIN = 3.0
#: Units of the working precision, times s_1, below which a value is no more than rounding.
_ROUNDING = 8


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is left of a matrix A (m, n) without k directions.

    Attributes:
        error: its Frobenius norm.
        floor: the largest singular value of noise with the variances that its entries have.
        above: how many of the k values are larger.
    """

    error: float
    floor: float
    above: int


def remainder(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, seed: int) -> Remainder:
    """Measure what is left, and find the floor.

    Args:
        A: (m, n), float32 or float64, not zero.
        U, V: (m, k), (n, k) in its dtype and on its device.
        s: float64 (k,) on the CPU.
        seed: of the random signs.
    """
    m, n = A.shape
    short, k = min(m, n), len(s)
    # Where most directions are given, those that are left are not typical of noise.
    removed = min(k, max(1, short // 4))
    work = scratch("remainder", (1, m, leading_dimension(m, n, A.device)), torch.float32, A.device)
    error = left = _subtract(A, U, s, V, work[0])
    if removed < k:
        left = _subtract(A, U[:, :removed], s[:removed], V[:, :removed], work[0])
    _flip(work[0], n, seed)
    top = _largest(Operator(work, n)) * (1 + _MARGIN * _deviation(m, n))
    rounding = _ROUNDING * torch.finfo(A.dtype).eps * s[0].item()
    squares = s.square()
    above, floor = k, 0.0
    while True:  # fewer and fewer, as the noise keeps more and more of the energy
        energy = left**2 + squares[above:removed].sum().item() - squares[removed:above].sum().item()
        floor = max(rounding, top * math.sqrt(max(0.0, energy)) / left if left else 0.0)
        if (fewer := int((s > floor).sum())) >= above:
            return Remainder(error, floor, above)
        above = fewer


def _subtract(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, out: torch.Tensor) -> float:
    """``A - U diag(s) V^T`` into the first columns of ``out``, zeros into the others; returns its Frobenius norm."""
    n = A.shape[1]
    out[:, n:] = 0
    left = U * s.to(U)
    squares = 0.0
    for first in range(0, len(A), _ROWS):
        rows = slice(first, first + _ROWS)
        part = torch.addmm(A[rows], left[rows], V.T, alpha=-1)
        squares += widened(torch.linalg.vector_norm(part, dim=1)).square().sum().item()
        out[rows, :n] = part
    return math.sqrt(squares)


def _flip(E: torch.Tensor, n: int, seed: int) -> None:
    """Give the entries of the first n columns random signs."""
    generator = generator_of(seed)
    for first in range(0, len(E), _ROWS):
        part = E[first : first + _ROWS, :n]
        signs = torch.randint(0, 2, part.shape, generator=generator, dtype=torch.int8)
        part.mul_((2 * signs - 1).to(E.device))


def _largest(operator: Operator) -> float:
    """The largest singular value of a matrix, up to one or two per cent."""
    if operator.short <= _DENSE:
        return float(torch.linalg.svdvals(widened(operator.matrices[0]))[0])
    found = block_lanczos(operator, 1, tolerance=_TOLERANCE, block=_BLOCK, seed=0)
    return float(widened(found.images).norm() / widened(found.rows).norm())


def _deviation(m: int, n: int) -> float:
    """The scale at which the largest singular value of (m, n) noise fluctuates, relatively (Johnstone 2001, Tracy-Widom)."""
    a, b = math.sqrt(m), math.sqrt(n)
    return math.cbrt(1 / a + 1 / b) / (a + b) / 2
