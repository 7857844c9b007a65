"""Ranks within a budget: which directions of which tensors keep the most of what counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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
        costs: what each takes of the budget, at least 1; as many as gains.
    """

    tensor: str
    gains: Sequence[float]
    costs: Sequence[int]

    def cost_of(self, rank: int) -> int:
        """What the first directions cost, as many as the rank; no more than there are."""
        return sum(self.costs[:rank])


def ranks_within(candidates: Sequence[Candidate], budget: int, least: float) -> dict[str, int]:
    """The ranks that keep the most within a budget: solved exactly if that takes seconds, else greedily.

    They never keep less than one rank for all tensors would. Gains below ``least`` count as none.
    """
    cleaned = [replace(c, gains=[gain if gain > least else 0.0 for gain in c.gains]) for c in candidates]
    unit = math.gcd(*(cost for candidate in cleaned for cost in candidate.costs))
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
        unit: a common divisor of their costs, in which amounts are counted.
        columns: how many of these amounts there are.
    """
    best = np.zeros(columns)
    choices = []
    for candidate in candidates:
        taken, cost, gain = np.zeros(columns, dtype=np.int32), 0, 0.0
        grown = best.copy()
        for rank, (more, costs) in enumerate(zip(candidate.gains, candidate.costs, strict=True), 1):
            gain += more
            cost += costs // unit
            if cost >= columns:
                break
            if not more:
                continue  # a rank that ends in nothing is never better
            offered = best[: columns - cost] + gain
            better = offered > grown[cost:]
            grown[cost:][better] = offered[better]
            taken[cost:][better] = rank
        best = grown
        choices.append(taken)
    ranks, left = {}, columns - 1
    for candidate, taken in zip(reversed(candidates), reversed(choices), strict=True):
        ranks[candidate.tensor] = int(taken[left])
        left -= candidate.cost_of(ranks[candidate.tensor]) // unit
    return {candidate.tensor: ranks[candidate.tensor] for candidate in candidates}


def _greedily(candidates: Sequence[Candidate], budget: int) -> dict[str, int]:
    """Take runs of directions by their mean gain over cost, the best first, as long as they fit into the budget.

    The runs are those of the upper concave hull of each candidate's gains over its costs.
    """
    runs = sorted(
        (-run.gain / run.cost, index, run)
        for index, candidate in enumerate(candidates)
        for run in _hull(candidate)
        if run.gain > 0
    )
    ranks = {candidate.tensor: 0 for candidate in candidates}
    left = budget
    for _, index, run in runs:
        tensor = candidates[index].tensor
        # A run is taken only if those before it of the same tensor have been.
        if ranks[tensor] == run.first and run.cost <= left:
            ranks[tensor] += run.length
            left -= run.cost
    return ranks


class _Run(NamedTuple):
    """Directions that follow each other: the first, how many there are, and the sums of their gains and costs."""

    first: int
    length: int
    gain: float
    cost: int


def _hull(candidate: Candidate) -> list[_Run]:
    """Split directions into runs with falling gains over costs."""
    runs: list[_Run] = []
    for i, (gain, cost) in enumerate(zip(candidate.gains, candidate.costs, strict=True)):
        runs.append(_Run(i, 1, gain, cost))
        while len(runs) > 1 and runs[-1].gain * runs[-2].cost > runs[-2].gain * runs[-1].cost:
            last, one = runs.pop(), runs.pop()
            runs.append(_Run(one.first, one.length + last.length, one.gain + last.gain, one.cost + last.cost))
    return runs


def gain_of(candidates: Sequence[Candidate], ranks: Mapping[str, int]) -> float:
    """What the first directions of each tensor add to what counts, as many as ``ranks`` says."""
    return sum(sum(candidate.gains[: ranks[candidate.tensor]]) for candidate in candidates)


def least_budget(candidates: Sequence[Candidate], least: float) -> int | None:
    """The smallest budget that buys a gain above ``least``; None if none does."""
    first = [(c, next((rank for rank, gain in enumerate(c.gains, 1) if gain > least), None)) for c in candidates]
    return min((candidate.cost_of(rank) for candidate, rank in first if rank is not None), default=None)


def uniform_rank_within(candidates: Sequence[Candidate], budget: int) -> int:
    """The largest rank for all tensors that fits the budget; 0 if none does."""
    fits = spent = 0
    for rank in range(1, max(len(candidate.costs) for candidate in candidates) + 1):
        spent += sum(candidate.costs[rank - 1] for candidate in candidates if rank <= len(candidate.costs))
        if spent > budget:
            break
        fits = rank
    return fits
