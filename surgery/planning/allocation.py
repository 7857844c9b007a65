"""Ranks within a budget: which directions of which tensors keep the most of what counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

#: The most additions, and entries of tables, for the exact solution: seconds.
_EXACT_WORK = 4 * 10**9
_EXACT_CELLS = 5 * 10**7


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor that may be given a rank.

    Attributes:
        tensor: its name.
        gains: what each further direction of its matrices adds to what counts, from the first on.
        cost: of one direction, in units of the budget.
    """

    tensor: str
    gains: list[float]
    matrices: int
    cost: int


def ranks_within(candidates: Sequence[Candidate], budget: int, least: float) -> dict[str, int]:
    """The ranks that keep the most within a budget: solved exactly if that takes seconds, else greedily.

    They never keep less than one rank for all tensors would. Gains below ``least`` count as none.
    """
    cleaned = [replace(c, gains=[gain if gain > least else 0.0 for gain in c.gains]) for c in candidates]
    unit = math.gcd(*(candidate.cost for candidate in cleaned))
    columns = budget // unit + 1
    if columns * sum(len(candidate.gains) for candidate in cleaned) <= _EXACT_WORK and columns * len(cleaned) <= _EXACT_CELLS:
        return _exactly(cleaned, unit, columns)
    greedy = _greedily(cleaned, budget)
    rank = uniform_rank_within(cleaned, budget)
    uniform = {candidate.tensor: min(rank, len(candidate.gains)) for candidate in cleaned}
    return max(greedy, uniform, key=lambda ranks: gain_of(cleaned, ranks))


def _exactly(candidates: Sequence[Candidate], unit: int, columns: int) -> dict[str, int]:
    """Solve the multiple-choice knapsack problem exactly, by dynamic programming over the amount that is spent.

    Args:
        candidates: the tensors.
        unit: the common divisor of their costs, in which amounts are counted.
        columns: how many of these amounts there are.
    """
    best = np.zeros(columns)
    choices = []
    for candidate in candidates:
        cost, taken, gain = candidate.cost // unit, np.zeros(columns, dtype=np.int32), 0.0
        grown = best.copy()
        for rank, more in enumerate(candidate.gains, 1):
            gain += more
            if cost * rank >= columns:
                break
            if not more:
                continue  # a rank that ends in nothing is never better
            offered = best[: columns - cost * rank] + gain
            better = offered > grown[cost * rank :]
            grown[cost * rank :][better] = offered[better]
            taken[cost * rank :][better] = rank
        best = grown
        choices.append(taken)
    ranks, left = {}, columns - 1
    for candidate, taken in zip(reversed(candidates), reversed(choices), strict=True):
        ranks[candidate.tensor] = int(taken[left])
        left -= int(taken[left]) * (candidate.cost // unit)
    return {candidate.tensor: ranks[candidate.tensor] for candidate in candidates}


def _greedily(candidates: Sequence[Candidate], budget: int) -> dict[str, int]:
    """Take runs of directions by their mean gain over cost, the best first, as long as they fit into the budget.

    The runs are those of the upper concave hull of each candidate's gains.
    """
    runs = sorted(
        (-gain / (length * candidate.cost), index, first, length)
        for index, candidate in enumerate(candidates)
        for first, length, gain in _hull(candidate.gains)
        if gain > 0
    )
    ranks = {candidate.tensor: 0 for candidate in candidates}
    left = budget
    for _, index, first, length in runs:
        candidate = candidates[index]
        # A run is taken only if those before it of the same tensor have been.
        if ranks[candidate.tensor] == first and length * candidate.cost <= left:
            ranks[candidate.tensor] += length
            left -= length * candidate.cost
    return ranks


def _hull(gains: Sequence[float]) -> list[tuple[int, int, float]]:
    """Split gains into runs with falling mean gains: the first direction of each run, how many it has, and their sum."""
    runs: list[tuple[int, int, float]] = []
    for i, gain in enumerate(gains):
        runs.append((i, 1, gain))
        while len(runs) > 1 and runs[-1][2] * runs[-2][1] > runs[-2][2] * runs[-1][1]:
            (first, length, value), (_, more, added) = runs[-2], runs[-1]
            runs[-2:] = [(first, length + more, value + added)]
    return runs


def gain_of(candidates: Sequence[Candidate], ranks: Mapping[str, int]) -> float:
    """What the first directions of each tensor add to what counts, as many as ``ranks`` says."""
    return sum(sum(candidate.gains[: ranks[candidate.tensor]]) for candidate in candidates)


def uniform_rank_within(candidates: Sequence[Candidate], budget: int) -> int:
    """The largest rank for all tensors that fits the budget; 0 if none does."""
    fits = 0
    for rank in range(1, max(len(candidate.gains) for candidate in candidates) + 1):
        if sum(min(rank, len(candidate.gains)) * candidate.cost for candidate in candidates) > budget:
            break
        fits = rank
    return fits
