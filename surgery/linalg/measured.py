"""What is measured anew of a truncated SVD that has been recorded, and what its certificate may say then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.linalg.lanczos import MAX_PASSES, basis_limit, block_lanczos
from surgery.linalg.lossless import Factors
from surgery.linalg.operator import Operator, wide_device, widened, widened_bytes
from surgery.linalg.precision import full_precision
from surgery.linalg.product import leading_dimension
from surgery.linalg.rounding import times_power_of_two
from surgery.linalg.triplets import allowed_residuals, engine, residuals_of
from surgery.memory import scratch

#: Rows that are worked on at a time for the norm.
_NORM_ROWS = 64
#: Up to this shorter side the values of a matrix are computed as a whole.
_DENSE = 64
#: Of the iteration for the value after the kept ones: rows of a block, and the residual, of which its error is of second order.
_BLOCK = 16
_TOLERANCE = 3e-2
#: Of another start block than factorize's own default: what that has missed by chance, this one must not.
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
    """Of a matrix A (m, n) and k triplets.

    Attributes:
        residual: float64 (k,) on the CPU, ``max(|A v - s u|, |A^T u - s v|) / s_1``, see ``residuals_of``.
        energy: squared Frobenius norm, in float64.
        beyond: how large, over s_1, the largest singular value of A outside of the triplets is at the least; 0 for none.
    """

    residual: torch.Tensor
    energy: float
    beyond: float


def measure(A: torch.Tensor, factors: Factors) -> Measured:
    """Measure a matrix and its factors.

    Args:
        A: (m, n), any floating dtype, finite.
        factors: float32, on the device of A; U and V orthonormal.
    """
    with torch.no_grad(), full_precision(A.device):
        residual = residuals_of(A, factors.U, factors.s, factors.V)
        energy = _squares(A)
        top = factors.s[0].item()
        # Of triplets that are far from being singular ones nothing more is to be known, and numbers may overflow.
        sound = top > 0 and math.isfinite(energy) and bool((residual <= _FAR).all())
        return Measured(residual, energy, _beyond(A, factors, math.sqrt(energy)) / top if sound else 0.0)


def measuring_bytes(m: int, n: int, k: int) -> int:
    """Upper estimate of the memory that ``measure`` takes besides the matrix and the factors."""
    copy = 4 * m * leading_dimension(m, n, torch.device("cpu"))
    basis = 4 * (basis_limit(1, _BLOCK) + 2 * _BLOCK) * (m + n)
    return 2 * copy + max(basis, 8 * 4 * m * n if min(m, n) <= _DENSE else 0) + 48 * k * (m + n) + widened_bytes(m, n)


def gap_limits(
    s: torch.Tensor, measured: Measured, gap: torch.Tensor, short: int, long: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How small and how large the gaps of a certificate may be, see ``surgery.linalg.svd.Certificate``: float64 (k,).

    A gap that is too large is one that does not hold: the next value kept is nearer, or what is left when the triplets are
    taken from the matrix has a larger one. For that as much is granted as the residuals can move values (Weyl). One that is too
    small is not what follows from the values and their residuals: only where the value after the last is known to lie lower.

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
    """bool (k,), where a residual is recorded larger than it is: by more than rounding may have been thought to hide."""
    return recorded > (1 + _THIRD_DIGIT) * measured.residual + 2 * _ROUNDED


def says_converged(s: torch.Tensor, residual: torch.Tensor, tolerance: float) -> bool | None:
    """Whether recorded residuals are those of a converged SVD in float32; None where their rounding leaves it open."""
    allowed = allowed_residuals(s, tolerance, torch.float32)
    if bool((residual <= (1 - 2 * _THIRD_DIGIT) * allowed).all()):
        return True
    return None if bool((residual <= (1 + 2 * _THIRD_DIGIT) * allowed).all()) else False


def could_come_from(method: str, passes: int, short: int, ranks: range, *, zeros: bool) -> bool:
    """Whether a method and its number of passes over the matrix are what a solve gives.

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
    """Products with a matrix without its parts along orthonormal rows of its short (1, k, short) and long (1, k, long) side."""

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
    """The norm of ``(I - U U^T) A (I - V V^T)``, at the least."""
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
    found = block_lanczos(operator, 1, tolerance=_TOLERANCE, block=min(_BLOCK, operator.short - 1), seed=_SEED)
    value = float(widened(found.images).norm() / widened(found.rows).norm()) * (1 - _ROUNDING)
    return value if -12 < exponent < 24 else math.ldexp(value, exponent)
