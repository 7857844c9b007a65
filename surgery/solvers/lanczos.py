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
from functools import partial

import torch

from surgery.memory import scratch
from surgery.solvers.operator import Operator, wide_device, widened
from surgery.solvers.product import LARGE
from surgery.solvers.random import generator_of
from surgery.solvers.repair import NOISE, repaired
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
    """An empty Krylov basis for the matrices of an operator: for one matrix on a CPU that which is made for it."""
    kind = SingleBasis if len(operator) == 1 and operator.matrices.device.type == "cpu" else KrylovBasis
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
    checks = _CheckSchedule(cheap_steps=matrices.device.type == "cpu" and matrices.numel() < LARGE)
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
        cheap_steps: whether a step too many costs no more than an eigenproblem too many.
    """

    def __init__(self, *, cheap_steps: bool) -> None:
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
            wait = max(wait, 0.4 * math.log(worst) / decay)  # the decay becomes faster and faster
        self._seen = (self._steps, worst)
        self._next = self._steps + max(1, min(8, self._rounded(wait)))


class KrylovBasis:
    """Orthonormal bases of Krylov spaces, their images, and the projections of C on them."""

    def __init__(self, operator: Operator, *, limit: int, block: int, seed: int) -> None:
        self.operator = operator
        self.block = block
        matrices = operator.matrices
        count = len(operator)
        self.limit = min(limit, operator.short)
        rows = self.limit + block
        self._rows = scratch("basis", (count, rows, operator.short), matrices.dtype, matrices.device)
        self._images = scratch("images", (count, self.limit, operator.long), matrices.dtype, matrices.device)
        self._wide = wide_device(matrices)
        self._projected = torch.zeros(count, rows, rows, dtype=torch.float64, device=self._wide)
        self._coupling = torch.zeros(count, 0, 0, dtype=torch.float64, device=self._wide)
        self._top = torch.zeros(count, 1, dtype=torch.float64, device=self._wide)  # longest image so far
        # One generator for each matrix: its random rows must not depend on the other matrices of the batch.
        self._generators = [generator_of(seed) for _ in range(count)]
        self.size = 0  # rows already multiplied by C
        self._pending = 0  # orthonormal rows behind them, yet to be multiplied
        self._last = 0  # rows multiplied in the last step
        self._steps = 0  # before the first restart
        self._whole = True  # nothing has been let go of by a restart

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space, so that nothing is left to find."""
        return self._pending == 0

    @property
    def search(self) -> Search:
        """What it has gone through, if it began with random rows alone."""
        return Search(min(self.block, self.limit), self._steps)

    def begin(self, start: torch.Tensor | None) -> None:
        """Begin with ``start`` and random rows after it. The order is kept: mixing rows would lose small values in rounding."""
        width = min(self.block, self.limit) - (0 if start is None else start.shape[1])
        more = torch.stack([self._random(i, width) for i in range(len(self.operator))])
        start = more if start is None else torch.cat([start, more], dim=1)
        self._append(start, torch.zeros(start.shape[:2], dtype=torch.float64, device=self._wide))

    def step(self) -> None:
        """Multiply the pending rows by C and orthonormalise the result into the next ones."""
        first, stop = self.size, self.size + self._pending
        images = self.operator.to_long(self._rows[:, first:stop])
        self._images[:, first:stop] = images
        products = self.operator.to_short(images)
        self.size, self._last = stop, self._pending
        self._steps += self._whole
        known = self._rows[:, :stop]
        coefficients = torch.bmm(products, known.mT)
        products = torch.baddbmm(products, coefficients, known, alpha=-1)
        projected = widened(coefficients)
        # The diagonal holds the squared lengths of the images. The rounding error of a product is proportional to the
        # length of its own image and to the norm of B.
        lengths = projected.diagonal(first, 1, 2).clamp(min=0).sqrt()
        self._top = torch.maximum(self._top, lengths.amax(dim=1, keepdim=True))
        noise = NOISE * self._top * lengths
        # Only the lower triangle is set, since eigh reads nothing else.
        self._projected[:, first:stop, :stop] = projected + self._append(products, noise)

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ritz values (B, size), descending, their coefficients (columns) and residual norms; float64, on the CPU."""
        values, vectors = torch.linalg.eigh(self._projected[:, : self.size, : self.size].cpu())
        values, vectors = values.flip(1), vectors.flip(2)
        residuals = (self._coupling.cpu().mT @ vectors[:, self.size - self._last :]).norm(dim=1)
        return values, vectors, residuals

    def combine(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, size, c) coefficients -> (B, c, short) rows and (B, c, long) images."""
        turned = coefficients.mT.to(self._rows.dtype).to(self._rows.device)
        return turned @ self._rows[:, : self.size], turned @ self._images[:, : self.size]

    def restart(self, values: torch.Tensor, vectors: torch.Tensor, keep: int) -> None:
        """Shrink the basis to its leading Ritz vectors and go on from the pending rows."""
        pending = self._rows[:, self.size : self.size + self._pending].clone()
        self._rows[:, :keep], self._images[:, :keep] = self.combine(vectors[:, :, :keep])
        self._projected.zero_()
        self._whole = False
        self._projected.diagonal(0, 1, 2)[:, :keep] = values[:, :keep]
        self.size = keep
        self._append(pending, torch.zeros(pending.shape[:2], dtype=torch.float64, device=self._wide))

    def _append(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Orthonormalise ``rows`` (B, b, short), nearly free of the basis, and store them as the next block.

        A direction no longer than the ``noise`` (B, b) of its row is rounding error. Such directions are replaced by
        random ones, so that the block keeps its width and finds copies of a repeated value; their coupling to the
        previous block is zero.

        Returns:
            float64 (B, b, size), the coefficients of that part of ``rows`` that was still in the basis.
        """
        room = min(self.block, self.operator.short - self.size)
        known = self._rows[:, : self.size]
        self._pending = room
        if rows.shape[1] == room:
            block, coupling, still, sound = _orthonormalised(rows, known, noise)
        else:
            count, width, short = rows.shape
            block, sound = rows.new_empty(count, room, short), [room == 0] * count
            coupling = torch.zeros(count, width, room, dtype=torch.float64, device=self._wide)
            still = torch.zeros(count, width, self.size, dtype=torch.float64, device=self._wide)
        for i, done in enumerate(sound):
            if not done:
                block[i], coupling[i] = repaired(rows[i], noise[i], known[i], room, partial(self._random, i))
                still[i] = 0
        self._rows[:, self.size : self.size + room] = block
        self._coupling = coupling
        return still

    def _random(self, i: int, count: int) -> torch.Tensor:
        rows = torch.randn(count, self.operator.short, generator=self._generators[i], dtype=torch.float32)
        rows /= rows.norm(dim=1, keepdim=True)
        return rows.to(self._rows)


def _orthonormalised(
    rows: torch.Tensor, known: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[bool]]:
    """Orthonormalise rows (B, b, short) by Cholesky QR, twice with a projection between; they must be well conditioned.

    Returns:
        orthonormal rows (B, b, short); float64 coupling (B, b, b) and ``still`` (B, b, size) with
        ``rows = coupling rows' + still known``; for each matrix, whether that worked.
    """
    wide = widened(rows)
    factor, info = torch.linalg.cholesky_ex(torch.bmm(wide, wide.mT))
    # Each entry of the diagonal is the length of a row outside the span of those before it.
    sound = (info == 0) & (factor.diagonal(0, 1, 2) > noise).all(dim=1)
    eye = torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device).expand_as(factor)
    if not (all_sound := bool(sound.all())):
        factor = torch.where(sound[:, None, None], factor, eye)
    # In float64: the inverse of an ill-conditioned factor would magnify the rounding of a float32 product.
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    block = torch.bmm(inverse, wide).to(rows)
    again = torch.bmm(block, known.mT)
    block = torch.baddbmm(block, again, known, alpha=-1)
    wide = widened(block)
    root, info = torch.linalg.cholesky_ex(torch.bmm(wide, wide.mT))
    sound &= info == 0
    block = torch.bmm(torch.linalg.solve_triangular(root, eye, upper=False).to(rows), block)
    outcome = [True] * len(rows) if all_sound and not info.any() else sound.tolist()
    return block, torch.bmm(factor, root), torch.bmm(factor, widened(again)), outcome
