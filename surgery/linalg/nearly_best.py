"""Nearly best low-rank approximations: the iteration stops where the directions have converged, or where they lose little.

Many matrices end in a flat floor of noise, in which single directions mean nothing and converge slowly. What counts there is
the error of the approximation; at each check it is estimated how far above the best one it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from surgery.solvers.lanczos import basis_limit, block_size, iterate, krylov_basis, worst_residuals
from surgery.solvers.operator import Operator
from surgery.solvers.triplets import Solution, Triplets, clustered, engine, from_pairs, solve

Rule = Literal["directions", "error", "passes", "zero"]

#: Units of the working precision, times sqrt(lambda_1 lambda_i), that the recurrence may not see of a residual.
_UNSEEN = 4
#: A little more than is allowed: look again after the next step.
_JUST_NOT = 1.01
#: The least share of the squared norm that must be left for a loss to be seen beside the rounding of float32.
_VISIBLE = 1e-5


@dataclass(frozen=True, slots=True)
class Goal:
    """Where the iteration stops: the first of the two that holds.

    Attributes:
        excess: share of the best error by which the error may be above it.
        tolerance: of converged directions, see ``truncated_svd``.
    """

    excess: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class NearlyBest:
    """What was found of one matrix.

    Attributes:
        solution: the triplets, by which engine and in how many passes.
        rule: which of both held; ``passes`` for neither.
        excess: estimate from above of what the error is above the best one, relatively; 0 where the directions have converged,
            infinite where nothing is known.
    """

    solution: Solution
    rule: Rule
    excess: float


def nearly_best(operator: Operator, norms: torch.Tensor, k: int, goal: Goal, seed: int) -> list[NearlyBest]:
    """For each matrix of a batch: k triplets whose error is within ``goal.excess`` of the best, or that have converged.

    Args:
        operator: the matrices.
        norms: float64 (B,) on the CPU, their Frobenius norms.
        k: how many, from 1 to the shorter side.
        goal: where to stop.
        seed: of the random start block.
    """
    if engine(operator.short, k) != "block-lanczos":
        found = zip(solve(operator, k, goal.tolerance, seed), norms.tolist(), strict=True)
        return [_judged(solution, norm, goal) for solution, norm in found]
    block = min(block_size(k, operator), operator.short - 1)
    results = []
    for i, result in enumerate(_iterated(operator, norms, k, goal, block, seed)):
        single, norm = operator.one(i), norms[i : i + 1]
        wide = min(k + 8, operator.short - 1)
        if block < min(k, wide) and clustered(result.solution.triplets.s, block):
            # A block sees no more copies of a repeated value than it has rows.
            result = _iterated(single, norm, k, goal, wide, seed)[0]
        if result.rule == "passes":
            again = _judged(solve(single, k, goal.tolerance, seed)[0], norm.item(), goal)
            result = min(again, result, key=lambda one: one.excess)
        results.append(result)
    return results


def _iterated(operator: Operator, norms: torch.Tensor, k: int, goal: Goal, block: int, seed: int) -> list[NearlyBest]:
    basis = krylov_basis(operator, limit=basis_limit(k, block), block=block, seed=seed)
    basis.begin(None)
    eps = torch.finfo(operator.matrices.dtype).eps
    excess = torch.full_like(norms, math.inf)

    def far(values: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        nonlocal excess
        left = norms.square() - values[:, :k].sum(dim=1)
        unseen = _UNSEEN * eps * (values[:, :1] * values[:, :k].clamp(min=0)).sqrt()
        before, excess = excess, _excess(_losses(values[:, :k], residuals[:, :k] + unseen, values[:, k : k + 1]), left, norms)
        # Where there is a gap, the estimate is hardly above the truth, and one step more brings much; else it is far above.
        near = torch.where(before <= goal.excess, excess / goal.excess, (excess / goal.excess).clamp(min=_JUST_NOT))
        return torch.minimum(worst_residuals(values, residuals, k, goal.tolerance, eps), near)

    triplets = from_pairs(operator, iterate(basis, k, far))
    return [
        _ruled(Solution("block-lanczos", found, operator.passes, basis.search), bound, goal)
        for found, bound in zip(triplets, excess.tolist(), strict=True)
    ]


def _judged(solution: Solution, norm: float, goal: Goal) -> NearlyBest:
    """What another engine has found, judged by its residuals."""
    triplets = solution.triplets
    squares = triplets.s.square()[None]
    loss = _losses(squares, triplets.s * triplets.residual * triplets.s[0], squares.new_tensor([[triplets.next_bound**2]]))
    norms = squares.new_tensor([norm])
    return _ruled(solution, _excess(loss, norms.square() - squares.sum(dim=1), norms).item(), goal)


def _ruled(solution: Solution, excess: float, goal: Goal) -> NearlyBest:
    if _settled_directions(solution.triplets, goal.tolerance):
        return NearlyBest(solution, "directions", 0.0)
    return NearlyBest(solution, "error" if excess <= goal.excess else "passes", excess)


def _settled_directions(triplets: Triplets, tolerance: float) -> bool:
    return triplets.converged(tolerance) and triplets.known()


def _losses(values: torch.Tensor, residuals: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
    """How much the k largest eigenvalues may lie above their Ritz values (B, k), summed: float64 (B,).

    Each by its residual at most, or by the square of it over the distance to the value beyond (Kato-Temple), as far as that is
    known: (B, 1).
    """
    distance = (values - beyond).clamp(min=1e-300)
    return torch.minimum(residuals, residuals.square() / distance).sum(dim=1)


def _excess(losses: torch.Tensor, left: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """By what share errors are above the best ones: squared they are ``left`` (B,), of which ``losses`` (B,) could be saved."""
    visible = left > _VISIBLE * norms.square()
    best = (left - losses).clamp(min=0)
    share = (left / best.clamp(min=1e-300)).sqrt() - 1
    return torch.where(visible & (best > 0), share, torch.where(losses > 0, math.inf, 0.0))
