"""The ranks that a budget of numbers buys, by what each direction takes in the adapter that is written.

That may be more than it takes by itself: of experts that are stored one by one and stacked in the model, all have the rank
of the one with most, and of weights that the model joins each direction is as long as both.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgery.errors import OptionError
from surgery.extraction.records import ExtractedTensor
from surgery.models.placement import Positions
from surgery.planning.allocation import Candidate, ranks_within
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.modules import AdaptedModule

#: Gains below this share of all of them are taken for rounding.
_NOISE = 1e-12


@dataclass(frozen=True, slots=True)
class _OfOneRank:
    """Tensors that have one rank in an adapter: the same projection of each expert of a stack, or a single tensor.

    Attributes:
        tensors: their names.
        cost: numbers that one more direction of all of them takes.
    """

    tensors: list[str]
    cost: int


def ranks_of_budget(
    adapter: AdapterToWrite, found: Mapping[str, ExtractedTensor], budget: int, *, uniform: bool
) -> dict[str, int]:
    """The ranks that hold the most of all changes within a budget.

    Args:
        adapter: with all directions that have been found.
        found: tensor -> what was found of it; those of the adapter among them.
        budget: numbers that all pairs may have together, with the zeros that fill them up.
        uniform: whether all pairs have one rank.

    Returns:
        Tensor of the adapter -> how many directions of each of its matrices are kept; 0 for none.

    Raises:
        OptionError: the budget does not suffice for any.
    """
    groups = _groups(adapter)
    if uniform:
        together = sum(_numbers(pair.module) for pair in adapter.pairs)
        least = together * max(_multiplicity(pair.module) for pair in adapter.pairs)
        ranks = {name: min(budget // least, found[name].rank) for group in groups for name in group.tensors}
    else:
        least = min(group.cost for group in groups)
        candidates = [_candidate(group, found) for group in groups]
        total = math.fsum(gain for candidate in candidates for gain in candidate.gains)
        bought = ranks_within(candidates, budget, _NOISE * total)
        ranks = {name: min(bought[group.tensors[0]], found[name].rank) for group in groups for name in group.tensors}
    if not any(ranks.values()):
        raise OptionError("the budget is too small for one direction", got=budget, expected=f"at least {least} numbers")
    return ranks


def _candidate(group: _OfOneRank, found: Mapping[str, ExtractedTensor]) -> Candidate:
    matrices = [matrix.values for name in group.tensors for matrix in found[name].matrices]
    gains = [math.fsum(value**2 for value in several) for several in itertools.zip_longest(*matrices, fillvalue=0.0)]
    return Candidate(group.tensors[0], gains, [group.cost] * len(gains))


def _groups(adapter: AdapterToWrite) -> list[_OfOneRank]:
    """The tensors of an adapter, those together that have one rank."""
    group_of: dict[str, object] = {}
    tensors: dict[object, list[str]] = {}
    costs: Counter[object] = Counter()
    for pair in adapter.pairs:
        module, counted = pair.module, set[object]()
        for one, places in module.tensors:
            # The same rows and columns of each matrix of a stack; a tensor may be in several modules.
            own = tuple(map(_as_key, places[0].part.at[1:])) if module.is_stack else one.tensor
            key = group_of.setdefault(one.tensor, (module.name, module.parameter, own))
            if one.tensor not in (members := tensors.setdefault(key, [])):
                members.append(one.tensor)
            if key not in counted:
                counted.add(key)
                costs[key] += len(places) * _numbers(module)
    return [_OfOneRank(members, costs[key]) for key, members in tensors.items()]


def _as_key(positions: Positions) -> Sequence[int]:
    return tuple(positions.tolist()) if isinstance(positions, torch.Tensor) else positions


def _numbers(module: AdaptedModule) -> int:
    """How many a pair of rank 1 has."""
    return sum(map(math.prod, module.shapes(1)))


def _multiplicity(module: AdaptedModule) -> int:
    """The rank of a module of whose tensors each has rank 1."""
    by_matrix: Counter[object] = Counter()
    for _, places in module.tensors:
        for place in places:
            by_matrix[_as_key(place.part.at[0]) if module.is_stack else None] += 1
    return max(by_matrix.values())
