"""What is left of a matrix without its leading directions, and which of these stand above noise like it.

Source: Hong, Sheng, Dobriban, "Selecting the number of components in PCA via random signflips" (2020, arXiv:2012.02985): signs
drawn at random for all entries destroy what is of low rank, and keep the variance of each entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.memory import scratch
from surgery.solvers.lanczos import krylov_basis
from surgery.solvers.operator import Operator, widened
from surgery.solvers.product import leading_dimension
from surgery.solvers.random import generator_of

#: Rows of the remainder that are made at a time: few enough for a cache.
_ROWS = 64
#: The shorter side up to which the largest value of the flipped remainder comes from a full SVD; beyond, from an iteration of
#: so many rows and steps.
_DENSE = 64
_BLOCK = 16
_STEPS = 3
#: By how many deviations of the largest singular value of noise the floor is above what one draw of signs gives.
_MARGIN = 4.5
#: Times the bound by the longest row and column, from which on a value needs no comparison with flipped signs.
_BEYOND = 1.2
#: The least share of a row or column of noise that directions leave of it, as far as that is made up for.
_LEAST_LEFT = 0.25
#: How often the floor is computed again, after more directions have been found to be above it.
_MAX_ROUNDS = 4
#: The least share of a squared norm that a difference may leave of it.
_DIGITS = 0.1
#: Units of the working precision, times s_1, below which a value is no more than rounding.
_ROUNDING = 8


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is left of a matrix A (m, n) without its k leading directions, and where its floor of noise is.

    Attributes:
        error: Frobenius norm of what is left.
        floor: the largest singular value that noise has whose entries have the variances of A's without the directions above
            it, and ``_MARGIN`` deviations more; at least the rounding of the working precision.
        above: how many of the k values are larger.
    """

    error: float
    floor: float
    above: int


def remainder(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, seed: int) -> Remainder:
    """Measure what is left, and find the floor.

    The floor is sought from above, with more and more directions taken away: in noise whose rows or columns differ, the leading
    directions *are* the longest rows and columns, and noise without them has a floor that they stand above.

    Args:
        A: (m, n), float32 or float64, not zero.
        U, V: (m, k), (n, k) in its dtype and on its device.
        s: float64 (k,) on the CPU.
        seed: of the random signs.
    """
    m, n = A.shape
    work = scratch("remainder", (1, m, leading_dimension(m, n, A.device)), torch.float32, A.device)
    signs = _Signs(m, n, seed, A.device)
    squares = s.square()
    rounding = _ROUNDING * torch.finfo(A.dtype).eps * s[0].item()
    above = _surely_above(A, U, s, V)
    for _ in range(_MAX_ROUNDS):
        taken = above
        left = _flipped(A, U[:, :taken], s[:taken], V[:, :taken], signs, work[0])
        floor = max(rounding, _largest(Operator(work, n), seed) * (1 + _MARGIN * _deviation(work[0])))
        above = max(taken, int((s > floor).sum()))
        if above == taken:
            break
    error = left**2 - squares[taken:].sum().item()
    # Where little is left of that, it has lost its digits.
    exact = error > _DIGITS * left**2 or taken == len(s)
    error = math.sqrt(error) if exact else _flipped(A, U, s, V, signs, work[0])
    return Remainder(error, floor, above)


def remainder_bytes(m: int, n: int) -> int:
    """Upper estimate of the memory that ``remainder`` takes on a CPU besides its arguments, and copies of U and V."""
    signed = 4 * m * leading_dimension(m, n, torch.device("cpu")) + m * n // 8 + 4 * m
    dense = 8 * 4 * m * n if min(m, n) <= _DENSE else 4 * 3 * _STEPS * _BLOCK * (m + n)
    return signed + dense + 8 * 4 * _ROWS * n


def _surely_above(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor) -> int:
    """How many values are above what the longest row and column allow noise to have.

    The largest singular value of a matrix of independent entries is hardly above the sum of both lengths (Bandeira, van
    Handel, "Sharp nonasymptotic bounds on the norm of random matrices with independent entries", Ann. Probab. 44, 2016). What
    is above that is taken away, which shortens rows and columns, and so on.
    """
    rows, columns = (squares.cpu() for squares in _squared_lengths(A))
    of_rows, of_columns = ((widened(X).cpu() * s).square().cumsum(dim=1) for X in (U, V))
    above = 0
    while above < len(s):
        longest_row = (rows - of_rows[:, above - 1]).max() if above else rows.max()
        longest_column = (columns - of_columns[:, above - 1]).max() if above else columns.max()
        bound = longest_row.clamp(min=0).sqrt() + longest_column.clamp(min=0).sqrt()
        more = int((s > _BEYOND * bound).sum())
        if more <= above:
            break
        above = more
    return above


class _Signs:
    """Random signs for the entries of an (m, n) matrix, the same each time. A word of random bits is for 32 of a row."""

    def __init__(self, m: int, n: int, seed: int, device: torch.device) -> None:
        words = torch.empty(m, -(-n // 32), dtype=torch.int32)
        words.random_(-(1 << 31), (1 << 31) - 1, generator=generator_of(seed))
        self._words = words.to(device)
        self._places = torch.arange(32, dtype=torch.int32, device=device)[:, None]
        self._columns = n

    def of(self, rows: slice) -> torch.Tensor:
        """int32 (r, n), all bits zero but the one that is the sign of a float32."""
        bits = (self._words[rows, None, :] << self._places) & -(1 << 31)
        return bits.flatten(1)[:, : self._columns]


def _flipped(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, signs: _Signs, out: torch.Tensor) -> float:
    """``A - U diag(s) V^T`` with random signs into the first columns of ``out``, zeros into the others.

    The directions have taken noise along: of a row of noise the share that is its row of U squared, and so for columns. The
    entries are made larger for that.

    Returns:
        The Frobenius norm of ``A - U diag(s) V^T``.
    """
    n = A.shape[1]
    out[:, n:] = 0
    left = U * s.to(U)
    of_rows, of_columns = (_lost(X)[:, None].to(A) for X in (U, V))
    squares = []
    for first in range(0, len(A), _ROWS):
        rows = slice(first, first + _ROWS)
        part = torch.addmm(A[rows], left[rows], V.T, alpha=-1)
        squares.append(torch.linalg.vector_norm(part, dim=1))
        part.mul_(of_rows[rows]).mul_(of_columns.T)
        torch.bitwise_xor(part.float().view(torch.int32), signs.of(rows), out=out[rows, :n].view(torch.int32))
    return math.sqrt(widened(torch.cat(squares)).square().sum().item())


def _lost(X: torch.Tensor) -> torch.Tensor:
    """Factors (m,) by which noise is shorter without the columns of X (m, k): ``1 / sqrt(1 - |row of X|^2)``."""
    return (1 - X.square().sum(dim=1)).clamp(min=_LEAST_LEFT).rsqrt()


def _largest(operator: Operator, seed: int) -> float:
    """The largest singular value of a matrix, or a few per cent more: the largest Ritz value and its residual."""
    if operator.short <= _DENSE:
        return float(torch.linalg.svdvals(widened(operator.matrices[0]))[0])
    basis = krylov_basis(operator, limit=_STEPS * _BLOCK, block=_BLOCK, seed=seed)
    basis.begin(None)
    for _ in range(_STEPS):
        basis.step()
    values, _, residuals = basis.ritz()
    return math.sqrt(values[0, 0].item() + residuals[0, 0].item())


def _deviation(E: torch.Tensor) -> float:
    """The scale at which the largest singular value of noise with the variances of E (m, n) fluctuates, relatively.

    Johnstone, "On the distribution of the largest eigenvalue in principal components analysis" (Ann. Statist. 29, 2001), with
    as many rows and columns as there were if all were as long as those that hold most of the energy.
    """
    a, b = ((x.sum().square() / x.square().sum().clamp(min=1e-300)).clamp(min=1.0).sqrt().item() for x in _squared_lengths(E))
    return float(math.cbrt(1 / a + 1 / b) / (a + b) / 2)


def _squared_lengths(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared lengths of the rows and the columns of a matrix (m, n), float64, on its device or the CPU."""
    of_rows, of_columns = [], widened(X[0]).new_zeros(X.shape[1])
    for first in range(0, len(X), _ROWS):
        squares = X[first : first + _ROWS].square()
        of_rows.append(widened(squares.sum(dim=1)))
        of_columns += widened(squares.sum(dim=0))
    return torch.cat(of_rows), of_columns
