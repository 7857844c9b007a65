"""Measuring a recorded truncated SVD again, and checking what its certificate says against that."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from surgery.linalg.proof import proof_bytes, prove_top_k
from surgery.linalg.top_k import (
    CHANCE,
    NOTHING_ELSE,
    UNKNOWN,
    TopK,
    known,
    least_projection,
    norm_with_rest,
    steps_for,
    stretch,
)
from surgery.lossless.factors import Factors
from surgery.lossless.rounding import times_power_of_two
from surgery.memory import scratch
from surgery.precision import full_precision
from surgery.solvers.krylov import KrylovBasis
from surgery.solvers.lanczos import MAX_PASSES
from surgery.solvers.operator import Operator, wide_device, widened, widened_bytes
from surgery.solvers.product import leading_dimension
from surgery.solvers.triplets import allowed_residuals, engine, residuals_of

#: Rows whose norm is computed at a time.
_NORM_ROWS = 64
#: Up to this shorter side, the singular values of a matrix are computed by a full SVD.
_DENSE = 64
#: Of the probe for values after the kept ones: rows of a block, and how far above what was found others may be, but for CHANCE.
_BLOCK = 16
_STRETCH = 1.08
#: What float32 products may add to that value, relatively.
_ROUNDING = 2e-6
#: What U and V may lack of being orthonormal, as float32 rounds them.
_ORTHONORMAL = 1e-6
#: What rounding s to float32 may take from a difference of two values, over s_1.
_ROUNDED = 4e-7
#: Half a unit in the third digit, relatively, and a little more.
_THIRD_DIGIT = 5.1e-3
#: A residual over s_1 of what is no singular triplet at all.
_FAR = 0.5
#: Most passes of a result: five runs of the iteration with the steps between them, and the Gram matrix after these; for a
#: proof all of that up to three times.
_MOST_PASSES = 3 * (5 * (MAX_PASSES + 8) + 16)


@dataclass(frozen=True, slots=True)
class Measured:
    """What ``measure`` finds for a matrix A (m, n) and k triplets.

    Attributes:
        residual: float64 (k,) on the CPU, ``max(|A v - s u|, |A^T u - s v|) / s_1``, see ``residuals_of``.
        energy: squared Frobenius norm, in float64.
        beyond: a lower bound, over s_1, on the largest singular value of A without the triplets; 0 if none is known.
        missed: how far above s_k a singular value was found that the triplets lack, over s_1, at the least; 0 if none was.
        top_k: what is known of values that the triplets lack.
    """

    residual: torch.Tensor
    energy: float
    beyond: float
    missed: float
    top_k: TopK


def measure(A: torch.Tensor, factors: Factors, *, prove: bool = False) -> Measured:
    """Measure a matrix and its factors.

    Args:
        A: (m, n), any floating dtype, finite.
        factors: float32, on the device of A; U and V orthonormal.
        prove: whether to prove that no larger singular value is missing; where that fails ``top_k`` is ``unknown``.
    """
    with torch.no_grad(), full_precision(A.device):
        residual = residuals_of(A, factors.U, factors.s, factors.V)
        energy = _squares(A)
        top = factors.s[0].item()
        # If the triplets are far from singular ones, there is nothing to learn from the rest, and numbers may overflow.
        sound = top > 0 and math.isfinite(energy) and bool((residual <= _FAR).all())
        if not sound:
            return Measured(residual, energy, 0.0, 0.0, UNKNOWN if energy else NOTHING_ELSE)
        s = factors.s.cpu().double()
        proven = prove_top_k(A, factors.U, s, factors.V, residual) if prove else None
        if len(s) == min(A.shape):
            return Measured(residual, energy, 0.0, 0.0, proven or NOTHING_ELSE)
        probe = _probed(A, factors, math.sqrt(energy))
        rest = torch.linalg.vector_norm(residual).item() * top
        # What the residuals may have moved, and U and V by not being quite orthonormal.
        sure = s[-1].item() + 2 * rest + _ORTHONORMAL * top
        missed = _surely_missed(A, factors, probe.row) - sure if probe.least > sure else 0.0
        top_k = UNKNOWN if missed > 0 else known(s, norm_with_rest(probe.most, rest), CHANCE)
        return Measured(residual, energy, probe.least / top, max(0.0, missed) / top, proven or top_k)


def measuring_bytes(m: int, n: int, k: int, *, prove: bool = False) -> int:
    """Upper estimate of the memory that ``measure`` takes besides the matrix and the factors."""
    copy = 4 * m * leading_dimension(m, n, torch.device("cpu"))
    share = least_projection(_BLOCK, max(min(m, n), _DENSE), 1, CHANCE)
    basis = 4 * (steps_for(_STRETCH, share) + 2) * _BLOCK * (m + n)
    probe = 2 * copy + max(basis, 8 * 4 * m * n if min(m, n) <= _DENSE else 0)
    return max(probe, proof_bytes(m, n) if prove else 0) + 48 * k * (m + n) + widened_bytes(m, n)


def gap_limits(
    s: torch.Tensor, measured: Measured, gap: torch.Tensor, short: int, long: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest gaps that a correct certificate may record (``surgery.linalg.svd.Certificate``): float64 (k,).

    A gap is too large if another kept value is nearer, or if the matrix without the triplets has a larger value than the gap
    allows; for that, the residuals may have moved values (Weyl). A gap is too small if the values and their residuals give a
    larger one; this can be said only where the value after the last triplet is known to be lower.

    Args:
        s: float64 (k,), as recorded.
        measured: of the same factors.
        gap: as recorded.
        short, long: the sides of the matrix.
    """
    k, residual = len(s), measured.residual
    s = s / s[0].clamp(min=1e-300)
    apart = s[:-1] - s[1:]
    most, least = s.new_full((k,), math.inf), s.new_full((k,), math.inf)
    most[:-1], most[1:] = apart, torch.minimum(most[1:], apart)
    least[:-1] = apart - residual[1:]
    least[1:] = torch.minimum(least[1:], apart - residual[:-1])
    if k < short:
        moved = residual.square().sum().sqrt().item()
        most = torch.minimum(most, s - (min(measured.beyond, s[-1].item()) - moved))
        least[-1] = 0.0
        if gap[-1] <= 0:
            least[:] = 0.0
    elif short < long or k == 1:
        most[-1], least[-1] = min(most[-1].item(), s[-1].item()), min(least[-1].item(), s[-1].item())
    return (1 - _THIRD_DIGIT) * least - _ROUNDED, (1 + _THIRD_DIGIT) * most + _ROUNDED


def overstated(recorded: torch.Tensor, measured: Measured) -> torch.Tensor:
    """Where a residual is recorded as larger than it is, by more than the allowance for rounding in it: bool (k,)."""
    return recorded > (1 + _THIRD_DIGIT) * measured.residual + 2 * _ROUNDED


def says_converged(s: torch.Tensor, residual: torch.Tensor, tolerance: float) -> bool | None:
    """Whether recorded residuals are those of a converged SVD in float32; None if their three digits do not tell."""
    allowed = allowed_residuals(s, tolerance, torch.float32)
    if bool((residual <= (1 - 2 * _THIRD_DIGIT) * allowed).all()):
        return True
    return None if bool((residual <= (1 + 2 * _THIRD_DIGIT) * allowed).all()) else False


def could_come_from(method: str, passes: int, short: int, ranks: range, *, zeros: bool) -> bool:
    """Whether a solve can have recorded this method and this number of passes over the matrix.

    Args:
        short: the shorter side of the matrix.
        ranks: how many triplets may have been asked for.
        zeros: whether it is a matrix of zeros.
    """
    if zeros or method == "zero":
        return zeros and method == "zero" and passes == 0
    engines = {engine(short, rank) for rank in ranks}
    if "block-lanczos" in engines:
        engines.add("gram")
    return method in engines and (passes == 3 if method == "svd" else 4 <= passes <= _MOST_PASSES)


def _squares(A: torch.Tensor) -> float:
    rows = range(0, len(A), _NORM_ROWS)
    wide = A.to(wide_device(A))
    return math.fsum(torch.linalg.vector_norm(wide[i : i + _NORM_ROWS], dtype=torch.float64).square().item() for i in rows)


class _Apart(Operator):
    """Products with ``(I - U U^T) A (I - V V^T)``, for U^T (1, k, m) and V^T (1, k, n) with orthonormal rows."""

    def __init__(self, padded: torch.Tensor, columns: int, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__(padded, columns)
        self._on_short, self._on_long = (left, right) if self.wide else (right, left)

    def to_long(self, x: torch.Tensor) -> torch.Tensor:
        return _without(super().to_long(_without(x, self._on_short)), self._on_long)

    def to_short(self, y: torch.Tensor) -> torch.Tensor:
        return _without(super().to_short(_without(y, self._on_long)), self._on_short)


def _without(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(x, x @ basis.mT, basis, alpha=-1)


@dataclass(frozen=True, slots=True)
class _Probe:
    """What a random block of rows has found of ``D = (I - U U^T) A (I - V V^T)``.

    Attributes:
        least: a lower bound on its spectral norm, up to the rounding of float32.
        most: what it is not above, but for ``CHANCE``.
        row: float64 (1, 1, short), a vector on the shorter side, nearly of unit length, that D makes as long as that.
    """

    least: float
    most: float
    row: torch.Tensor


def _probed(A: torch.Tensor, factors: Factors, norm: float) -> _Probe:
    """Probe A (m, n) without the triplets; ``norm`` is the Frobenius norm of A."""
    m, n = A.shape
    if min(m, n) <= _DENSE:
        wide, U, V = widened(A), widened(factors.U), widened(factors.V)
        wide = wide - U @ (U.T @ wide)
        left, values, right = torch.linalg.svd(wide - (wide @ V) @ V.T, full_matrices=False)
        return _Probe(values[0].item(), values[0].item(), (left.T[:1] if m < n else right[:1])[None])
    # A power of two changes no bit: squares must neither overflow nor vanish.
    exponent = math.frexp(norm)[1] if not -12 < math.frexp(norm)[1] < 24 else 0
    work = scratch("matrix", (1, m, leading_dimension(m, n, A.device)), torch.float32, A.device)
    work[0, :, :n] = A
    work[0, :, n:] = 0
    work = times_power_of_two(work, -exponent) if exponent else work
    operator = _Apart(work, n, factors.U.T[None].contiguous(), factors.V.T[None].contiguous())
    block = min(_BLOCK, operator.short - 1)
    share = least_projection(block, operator.short, 1, CHANCE)
    # Numbers that nobody can have known who made the matrix.
    seed, steps = int.from_bytes(os.urandom(4)), steps_for(_STRETCH, share)
    basis = KrylovBasis(operator, limit=steps * block, block=block, seed=seed)
    basis.begin(None)
    while not basis.exhausted and steps:
        basis.step()
        steps -= 1
    values, vectors, _ = basis.ritz()
    row, image = (widened(part) for part in basis.combine(vectors[:, :, :1]))
    value = math.ldexp((image.norm() / row.norm()).item(), exponent)
    most = 1.0 if basis.exhausted else stretch(basis.search, share, 1.0)
    return _Probe(value * (1 - _ROUNDING), value * (1 + _ROUNDING) * most, row)


def _surely_missed(A: torch.Tensor, factors: Factors, row: torch.Tensor) -> float:
    """A lower bound on the spectral norm of A without the triplets, by one vector: ``_Probe.row``."""
    operator = Operator(A[None])
    left, right = widened(factors.U).T[None].contiguous(), widened(factors.V).T[None].contiguous()
    short, long = (left, right) if operator.wide else (right, left)
    row = _without(row.to(short), short)
    row = _without(row / row.norm(), short)  # twice is enough
    return float(_without(operator.to_long_wide(row), long).norm() / row.norm()) * (1 - _ROUNDING)
