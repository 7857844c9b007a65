"""The leading singular vectors of large matrices by thick-restart randomized block Lanczos.

Works on ``C = B^T B`` with B the matrix or its transpose, such that the basis lives on the short side. The matrices of
a batch advance in step, each with a basis of its own. All vectors are stored as rows. Sources: Golub, Luk, Overton, "A
block Lanczos method for computing the singular values and corresponding singular vectors of a matrix" (ACM TOMS 7,
1981); Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (SIAM J. Matrix Anal. 22,
2000); Musco, Musco, "Randomized block Krylov methods" (NeurIPS 2015) for the random start block; Yamamoto et al.,
"Roundoff error analysis of the CholeskyQR2 algorithm" (ETNA 44, 2015) for the orthonormalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgery.solvers.deferred import DeferredBasis
from surgery.solvers.krylov import KrylovBasis
from surgery.solvers.operator import Operator
from surgery.solvers.product import LARGE
from surgery.solvers.search import Search
from surgery.solvers.single import SingleBasis

MAX_PASSES = 400

#: The most by which a step is assumed to reduce residuals, to decide when to look at them again.
_STEEPEST = 8.0

#: The fewest rows that a restart keeps besides those that are wanted.
_SPARE_ROWS = 64

#: A value after the wanted ones may lie above its estimate by this many of its residuals, and by so many units of rounding.
BEYOND_RESIDUAL = 2.0
_ROUNDING = 4


@dataclass(frozen=True, slots=True)
class RitzVectors:
    """Approximate singular vectors of B for the largest values.

    Attributes:
        rows: (B, k, short), right vectors, nearly orthonormal.
        images: (B, k, long), the products of B with them.
        next_bound: float64 (B,) on the CPU, how large the singular value after them may be.
    """

    rows: torch.Tensor
    images: torch.Tensor
    next_bound: torch.Tensor


def block_size(k: int, operator: Operator) -> int:
    """How many rows a block has, which are multiplied in a step.

    On a GPU kernel launches dominate, so few steps with wide blocks are best. On a CPU the total number of rows counts, and
    narrow blocks need fewer; but with a large matrix, fewer than sixteen rows take as long as sixteen.
    """
    if operator.matrices.device.type != "cpu":
        return 8 * math.ceil((k + 8) / 8)
    if operator.short * operator.long >= LARGE:
        return 16 if k <= 64 else 32
    return min(32, 8 * math.ceil(k / 64))


def basis_limit(k: int, block: int) -> int:
    """Rows at which the basis is full and restarts."""
    return max(384, kept_rows(k, block) + 3 * block)


def kept_rows(k: int, block: int) -> int:
    """Rows that a restart keeps: more than are wanted, which speeds up the steps after it (docs/numerics.md)."""
    return k + max(block, _SPARE_ROWS, k // 2)


def basis_rows(k: int) -> int:
    """Rows that a run keeps at most, for planning memory: the basis and one block behind it."""
    block = 2 * k + 32
    return basis_limit(k, block) + block


def block_lanczos(
    operator: Operator,
    k: int,
    *,
    tolerance: float,
    block: int,
    seed: int,
    start: torch.Tensor | None = None,
) -> tuple[RitzVectors, Search]:
    """Ritz vectors for the k largest singular values of each matrix, and the search that found them.

    Stops when every residual, estimated from the recurrence, is below ``tolerance`` times the largest singular
    value and below 100 ``tolerance`` times its own, or after ``MAX_PASSES``. The caller measures the true residuals.

    Args:
        operator: the matrices, float32 or float64.
        k: how many; ``k + 1 <= operator.short``.
        tolerance: see above.
        block: rows per step.
        seed: of the random rows, drawn on the CPU; each matrix gets the same ones, whatever batch it is in.
        start: (B, b, short) orthonormal rows to begin from, b <= ``block``, by descending value.
    """
    basis = krylov_basis(operator, limit=basis_limit(k, block), block=block, seed=seed)
    basis.begin(start)
    eps = torch.finfo(operator.matrices.dtype).eps
    ritz = iterate(basis, k, lambda values, residuals: worst_residuals(values, residuals, k, tolerance, eps))
    return ritz, basis.search


def krylov_basis(operator: Operator, *, limit: int, block: int, seed: int) -> KrylovBasis | SingleBasis:
    """An empty Krylov basis for the matrices of an operator: that which is made for one on a CPU, or for float32 on a GPU."""
    device, dtype = operator.matrices.device.type, operator.matrices.dtype
    if device == "cuda" and dtype == torch.float32:
        return DeferredBasis(operator, limit=limit, block=block, seed=seed)
    kind = SingleBasis if len(operator) == 1 and device == "cpu" else KrylovBasis
    return kind(operator, limit=limit, block=block, seed=seed)


def iterate(basis: KrylovBasis | SingleBasis, k: int, far: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> RitzVectors:
    """Step and restart until all matrices are near enough, or for ``MAX_PASSES``.

    Args:
        basis: begun.
        k: how many Ritz vectors are wanted; ``k + 1 <= operator.short``.
        far: of the Ritz values and residuals (``KrylovBasis.ritz``), how many times what is allowed the error of each matrix
            is: float64 (B,). It has seen those of the result last.
    """
    keep = kept_rows(k, basis.block)
    last_pass = basis.operator.passes + MAX_PASSES
    matrices = basis.operator.matrices
    on_gpu = matrices.device.type != "cpu"
    checks = _CheckSchedule(share=0.7 if on_gpu else 0.4, cheap_steps=on_gpu or matrices.numel() < LARGE)
    while True:
        basis.step()
        last = basis.operator.passes + 2 > last_pass
        full = basis.size + basis.block > basis.limit
        if not (checks.due() or full or last) or (basis.size <= k and not basis.exhausted):
            continue
        values, vectors, residuals = basis.ritz()
        worst = far(values, residuals).max().item()
        if worst <= 1 or last or basis.exhausted:
            rows, images = basis.combine(vectors[:, :, :k])
            rounding = _ROUNDING * torch.finfo(rows.dtype).eps * values[:, 0].clamp(min=0).sqrt()
            beyond = (values[:, k].clamp(min=0) + BEYOND_RESIDUAL * residuals[:, k]).sqrt()
            return RitzVectors(rows, images, beyond + rounding)
        checks.saw(worst)
        if full:
            basis.restart(values, vectors, min(keep, values.shape[1] - 1))


def worst_residuals(values: torch.Tensor, residuals: torch.Tensor, k: int, tolerance: float, eps: float) -> torch.Tensor:
    """The largest residual of each matrix over what is allowed (``block_lanczos``): float64 (B,).

    Args:
        values, residuals: float64 (B, p), as ``KrylovBasis.ritz`` gives them.
        eps: the rounding of the working precision.
    """
    sigma = values[:, :k].clamp(min=0).sqrt()
    top = sigma[:, :1]
    # Residuals cannot fall below the rounding of the working precision.
    floor = (8 * eps * top).clamp(min=1e-300)
    allowed = torch.minimum(sigma * (100 * tolerance), tolerance * top)
    estimate = residuals[:, :k] / torch.maximum(sigma, floor)
    return (estimate / torch.maximum(allowed, floor)).amax(dim=1)


class _CheckSchedule:
    """Decides after which steps to compute the residuals, since that takes an eigenproblem.

    Args:
        share: of the steps that the residuals' decay asks for, after which to look again: the decay becomes faster and
            faster. On a GPU, where the host solves the eigenproblem, rather a step too many than a look too many.
        cheap_steps: whether a step too many costs no more than an eigenproblem too many.
    """

    def __init__(self, *, share: float, cheap_steps: bool) -> None:
        self._share = share
        self._rounded = math.ceil if cheap_steps else math.floor
        self._steps = 0
        self._next = 4
        self._seen: tuple[int, float] | None = None

    def due(self) -> bool:
        self._steps += 1
        return self._steps >= self._next

    def saw(self, worst: float) -> None:
        """Plan the next check, after one in which the largest residual was ``worst`` times what is allowed."""
        wait = math.log(worst) / math.log(_STEEPEST)
        if self._seen is not None and worst < self._seen[1]:
            decay = math.log(self._seen[1] / worst) / (self._steps - self._seen[0])
            wait = max(wait, self._share * math.log(worst) / decay)
        self._seen = (self._steps, worst)
        self._next = self._steps + max(1, min(8, self._rounded(wait)))
