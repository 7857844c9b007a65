"""Measuring a recorded truncated SVD again, and checking what its certificate says against that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.linalg.top_k import UNKNOWN, TopK
from surgery.lossless.factors import Factors
from surgery.lossless.rounding import times_power_of_two
from surgery.memory import scratch
from surgery.precision import full_precision
from surgery.solvers.lanczos import MAX_PASSES, basis_limit, block_lanczos
from surgery.solvers.operator import Operator, wide_device, widened, widened_bytes
from surgery.solvers.product import leading_dimension
from surgery.solvers.triplets import allowed_residuals, engine, residuals_of

#: Rows whose norm is computed at a time.
_NORM_ROWS = 64
#: Up to this shorter side, the singular values of a matrix are computed by a full SVD.
_DENSE = 64
#: Of the iteration for the value after the kept ones: rows of a block, and the residual, of which its error is of second order.
_BLOCK = 16
_TOLERANCE = 3e-2
#: Another seed than factorize's default: a direction that its start block has missed by chance must not be missed again.
_SEED = 1
#: What float32 products may add to that value, relatively.
_ROUNDING = 2e-6
#: What rounding s to float32 may take from a difference of two values, over s_1.
_ROUNDED = 4e-7
#: Half a unit in the third digit, relatively, and a little more.
_THIRD_DIGIT = 5.1e-3
#: A residual over s_1 of what is no singular triplet at all.
_FAR = 0.5
#: Most passes of one solve: five runs of the iteration with the steps between them, and the Gram matrix after these.
_MOST_PASSES = 5 * (MAX_PASSES + 8) + 16


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
        prove: whether to prove that nothing larger is missing.
    """
    with torch.no_grad(), full_precision(A.device):
        residual = residuals_of(A, factors.U, factors.s, factors.V)
        energy = _squares(A)
        top = factors.s[0].item()
        # If the triplets are far from singular ones, there is nothing to learn from the rest, and numbers may overflow.
        sound = top > 0 and math.isfinite(energy) and bool((residual <= _FAR).all())
        beyond = _beyond(A, factors, math.sqrt(energy)) / top if sound else 0.0
        return Measured(residual, energy, beyond, 0.0, UNKNOWN)


def measuring_bytes(m: int, n: int, k: int) -> int:
    """Upper estimate of the memory that ``measure`` takes besides the matrix and the factors."""
    copy = 4 * m * leading_dimension(m, n, torch.device("cpu"))
    basis = 4 * (basis_limit(1, _BLOCK) + 2 * _BLOCK) * (m + n)
    return 2 * copy + max(basis, 8 * 4 * m * n if min(m, n) <= _DENSE else 0) + 48 * k * (m + n) + widened_bytes(m, n)


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


def _beyond(A: torch.Tensor, factors: Factors, norm: float) -> float:
    """A lower bound on the spectral norm of ``(I - U U^T) A (I - V V^T)``; ``norm`` is the Frobenius norm of A."""
    (m, n), k = A.shape, len(factors.s)
    if k >= min(m, n):
        return 0.0
    if min(m, n) <= _DENSE:
        wide, U, V = widened(A), widened(factors.U), widened(factors.V)
        wide = wide - U @ (U.T @ wide)
        return float(torch.linalg.svdvals(wide - (wide @ V) @ V.T)[0])
    # A power of two changes no bit: squares must neither overflow nor vanish.
    exponent = math.frexp(norm)[1]
    work = scratch("matrix", (1, m, leading_dimension(m, n, A.device)), torch.float32, A.device)
    work[0, :, :n] = A
    work[0, :, n:] = 0
    if not -12 < exponent < 24:
        work = times_power_of_two(work, -exponent)
    left, right = factors.U.T[None].contiguous(), factors.V.T[None].contiguous()
    operator = _Apart(work, n, left, right)
    found, _ = block_lanczos(operator, 1, tolerance=_TOLERANCE, block=min(_BLOCK, operator.short - 1), seed=_SEED)
    value = float(widened(found.images).norm() / widened(found.rows).norm()) * (1 - _ROUNDING)
    return value if -12 < exponent < 24 else math.ldexp(value, exponent)
