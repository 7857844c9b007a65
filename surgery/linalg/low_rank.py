"""Nearly best low-rank approximations of matrices that end in noise, such as the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.linalg.energy import FIRST_RANK, least_rank
from surgery.linalg.floor import remainder, remainder_bytes
from surgery.linalg.nearly_best import Goal, NearlyBest, Rule, nearly_best
from surgery.linalg.preparation import prepared
from surgery.linalg.svd import check_batch, in_range, pair_signs, solved_in_parts
from surgery.lossless.rounding import check_dense
from surgery.solvers.limits import DEFAULT_EXCESS, DEFAULT_TOLERANCE, check_accuracy, check_energy, check_excess, check_max_rank
from surgery.solvers.triplets import workspace_bytes


@dataclass(frozen=True, slots=True)
class LowRank:
    """``A ~ U diag(s) V^T``, of rank k.

    Vectors and values are float32, or float64 for a float64 matrix, on the device of the matrix.

    Attributes:
        U: (m, k), orthonormal columns.
        s: (k,), descending.
        V: (n, k), orthonormal columns.
        norm: Frobenius norm of A.
        error: Frobenius norm of ``A - U diag(s) V^T``, measured.
        rule: why it stopped. ``directions``: all of them have converged, as those of ``truncated_svd`` do; ``error``: the error
            is within ``excess`` of the best one, and single directions may be any of those that are about as good; ``passes``:
            neither after the most passes; ``zero``: a matrix of zeros.
        excess: by what share the error may be above the best one of rank k: an estimate from above, which held in every trial
            with the default, and is no proof (docs/numerics.md). 0 where the directions have converged, infinite where nothing
            is known.
        floor: the largest singular value that noise has whose entries have the variances of those of A without the directions
            above it, with a small margin.
        above_floor: how many of the k values are above the floor. If all are, there may be more.
        passes: products with A or its transpose.
        method: ``block-lanczos``, ``gram``, ``svd`` or ``zero``.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor
    norm: float
    error: float
    rule: Rule
    excess: float
    floor: float
    above_floor: int
    passes: int
    method: str


@on_its_own_terms
def low_rank(
    A: torch.Tensor, k: int, *, excess: float = DEFAULT_EXCESS, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0
) -> LowRank:
    """An approximation of rank k whose error is within ``excess`` of the least one, in the Frobenius norm.

    Stops where the directions have converged, or earlier, where the error is estimated to be near enough the best one. In a
    floor of noise that takes half to three quarters of the passes of ``truncated_svd``. What that says of signs, seeds and
    the caller's settings holds here too. Where the error is below 0.3 % of the norm, float32 does not show by how much it is
    above the best one, and the directions have to converge.

    Args:
        A: (m, n), any real floating dtype, any device.
        k: 1 <= k <= min(m, n).
        excess: share of the best error, from 1e-6 to 1e-3. Where it is what stops, one more step is made. Above 4e-4 the
            estimate may be too low, by a factor of 3 at most in the trials.
        tolerance: of converged directions, see ``truncated_svd``.
        seed: of the random start block and of the random signs that find the floor.

    Returns:
        ``LowRank``. A matrix on which the iteration fails is reported in ``rule``, never hidden.

    Raises:
        OptionError: k, excess, tolerance, seed or the shape or dtype of A make no sense.
        WeightError: A holds NaN or infinity, or its singular values overflow.

    Source: ``surgery.solvers.lanczos``; the estimate is Kato's and Temple's (Parlett, "The Symmetric Eigenvalue Problem",
    section 10.5), with the next Ritz value in place of the next eigenvalue; ``surgery.linalg.floor`` for the floor.
    """
    return low_ranks(_one_matrix(A)[None], k, excess=excess, tolerance=tolerance, seed=seed)[0]


def low_ranks(
    A: torch.Tensor, k: int, *, excess: float = DEFAULT_EXCESS, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0
) -> list[LowRank]:
    """``low_rank`` of a batch (B, m, n), with one result for each matrix; arguments and errors are the same."""
    check_batch(A, k)
    check_accuracy(tolerance, seed, "float64" if A.dtype == torch.float64 else "float32")
    check_excess(excess)
    goal = Goal(excess, tolerance)
    return solved_in_parts(A, k, lambda part: _approximated(part, k, goal, seed, A.device))


@on_its_own_terms
def low_rank_of_energy(
    A: torch.Tensor,
    energy: float,
    *,
    max_rank: int,
    excess: float = DEFAULT_EXCESS,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
) -> LowRank:
    """An approximation by as few directions as hold ``energy`` of the squared Frobenius norm; ``low_rank`` of growing rank.

    Args:
        A: see ``low_rank``.
        energy: share, above 0 and at most 1.
        max_rank: the most directions, even if they do not reach the share; at least 1. Above min(m, n) it counts as that.
        excess, tolerance, seed: see ``low_rank``.

    Returns:
        k <= max_rank directions; a matrix of zeros gives one. Whether they reach the share is in ``error`` and ``norm``.

    Raises:
        OptionError, WeightError: as ``low_rank``, or an energy or a max_rank that make no sense.
    """
    check_energy(energy, max_rank)
    limit = min(max_rank, *_one_matrix(A).shape)
    k = min(FIRST_RANK, limit)
    while True:
        found = low_rank(A, k, excess=excess, tolerance=tolerance, seed=seed)
        if found.rule == "zero":
            return _cut(found, 1)
        shares = (found.s.double().cpu() / found.norm).square()
        k, enough = least_rank(shares, energy, limit, found.s.dtype)
        if enough:
            return _cut(found, k)


@on_its_own_terms
def low_rank_above_floor(
    A: torch.Tensor,
    *,
    max_rank: int,
    excess: float = DEFAULT_EXCESS,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
) -> LowRank:
    """An approximation by the directions that stand above the floor of noise, as ``LowRank.above_floor`` counts them.

    Args:
        A: see ``low_rank``.
        max_rank: the most directions; at least 1. Above min(m, n) it counts as that.
        excess, tolerance, seed: see ``low_rank``.

    Returns:
        k <= max_rank directions, none where nothing stands above the floor: then U is (m, 0), s (0,) and V (n, 0).

    Raises:
        OptionError, WeightError: as ``low_rank``, or a max_rank that makes no sense.
    """
    check_max_rank(max_rank)
    limit = min(max_rank, *_one_matrix(A).shape)
    k = min(FIRST_RANK, limit)
    while True:
        found = low_rank(A, k, excess=excess, tolerance=tolerance, seed=seed)
        if found.above_floor < k or k == limit:
            return _cut(found, found.above_floor)
        k = min(limit, 2 * k)


def _one_matrix(A: torch.Tensor) -> torch.Tensor:
    check_dense(A, "A")
    if A.ndim != 2:
        raise OptionError("A is not one matrix", got=f"shape {tuple(A.shape)}")
    return A


def _cut(found: LowRank, k: int) -> LowRank:
    """The first k directions. What these lose is no more than what all have lost, and their error is no smaller."""
    dropped = found.s[k:].double().cpu()
    error = math.hypot(found.error, torch.linalg.vector_norm(dropped).item())
    U, s, V = found.U[:, :k].contiguous(), found.s[:k].contiguous(), found.V[:, :k].contiguous()
    return dataclasses.replace(found, U=U, s=s, V=V, error=error, above_floor=min(found.above_floor, k))


def low_rank_bytes(m: int, n: int, k: int, dtype: torch.dtype) -> int:
    """Upper estimate of the memory that ``low_rank`` of one (m, n) matrix of ``dtype`` takes besides the matrix."""
    return workspace_bytes(m, n, k, dtype) + remainder_bytes(m, n)


def _approximated(A: torch.Tensor, k: int, goal: Goal, seed: int, device: torch.device) -> list[LowRank]:
    ready = prepared(A)
    operator = ready.operator
    results: list[LowRank | None] = [None] * len(A)
    if ready.nonzero:
        for j, found in enumerate(nearly_best(operator, ready.norms, k, goal, seed)):
            shift = int(ready.exponents[j])
            results[ready.nonzero[j]] = _finished(operator.matrices[j], found, ready.norms[j].item(), shift, seed)
    dtype = operator.matrices.dtype
    return [_of_zeros(A[i], k, dtype, device) if result is None else _on(device, result) for i, result in enumerate(results)]


def _finished(matrix: torch.Tensor, found: NearlyBest, norm: float, shift: int, seed: int) -> LowRank:
    """The approximation of a matrix (m, n) that has been divided by ``2^shift``, and has this ``norm`` since."""
    triplets = found.solution.triplets
    wide = matrix.shape[0] < matrix.shape[1]
    U, V = (triplets.short, triplets.long) if wide else (triplets.long, triplets.short)
    left = remainder(matrix, U, triplets.s, V, seed)
    sign = pair_signs(U, V)
    return LowRank(
        U * sign,
        in_range(triplets.s, shift, U.dtype).to(U.device),
        V * sign,
        norm=math.ldexp(norm, shift),
        error=math.ldexp(left.error, shift),
        rule=found.rule,
        excess=found.excess,
        floor=math.ldexp(left.floor, shift),
        above_floor=left.above,
        passes=found.solution.passes,
        method=found.solution.method,
    )


def _on(device: torch.device, result: LowRank) -> LowRank:
    return dataclasses.replace(result, U=result.U.to(device), s=result.s.to(device), V=result.V.to(device))


def _of_zeros(matrix: torch.Tensor, k: int, dtype: torch.dtype, device: torch.device) -> LowRank:
    m, n = matrix.shape
    return LowRank(
        torch.eye(m, k, dtype=dtype, device=device),
        torch.zeros(k, dtype=dtype, device=device),
        torch.eye(n, k, dtype=dtype, device=device),
        norm=0.0,
        error=0.0,
        rule="zero",
        excess=0.0,
        floor=0.0,
        above_floor=0,
        passes=0,
        method="zero",
    )
