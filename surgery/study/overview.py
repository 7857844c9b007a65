"""Findings about the spectra of all matrices of a model together: medians, shares and counts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.report.schema import SCHEMA_VERSION
from surgery.report.summary import median, relative_update
from surgery.report.verdicts import CLAIMS, chance_in_either, counted, has_changed, in_either, together
from surgery.reports import Report
from surgery.study.spectra_shard import rounded

_MOST_AMPLIFIED = 10


@dataclass(frozen=True, slots=True)
class Amplified:
    """A singular value that fine-tuning has changed.

    Attributes:
        key: of the matrix.
        index: of the value, from 1.
        amplification: the new one over the old one.
    """

    key: str
    index: int
    amplification: float


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """What the numbers say of a claim of others about fine-tuning.

    Attributes:
        claim: one of top_amplified, rest_intact, top_turned, scaled_uniformly, turned_alike, intruders, off_principals.
        arxiv: number of the paper.
        verdict: holds, holds in part, does not hold, or cannot be told.
        yes, partly, no, unknown: of how many of the matrices that changed it holds, holds in part, does not hold, or cannot be
            told.
    """

    claim: str
    arxiv: str
    verdict: str
    yes: int
    partly: int
    no: int
    unknown: int


@dataclass(frozen=True, slots=True)
class Findings(Report):
    """What can be said of all matrices together. From ``top_change`` on None where there is no tuned model.

    The first r directions of a matrix are its top, the next are those after it that are told, and the rest comes after these.

    Attributes:
        targets: how many matrices there are.
        median_stable_rank: of all matrices.
        median_effective_rank_share: of the effective rank over the shorter side.
        median_energy: by rank, of the share of the squared norm in as many directions.
        unconverged: how many matrices have an SVD that did not reach the tolerance: their own, that of what they became, or
            that of the update.
        unidentified_share: of the directions, those that their matrix does not determine.
        top_change, next_change, rest_change: medians of the mean size of the relative change of singular values, of the top,
            the next and the rest.
        median_top_amplification, median_next_amplification, median_rest_amplification: of new over old singular values.
        median_matched_amplification: of the values of what the top's directions became over their own.
        top_amplified_share: of the top's values, those that grew.
        median_scaling: of the one factor for all values of a matrix.
        median_scaling_at_random: of the factor by which a random update of the same size makes the norm larger.
        median_scaling_of_values, median_scaling_of_update: of what it explains of the change of the values, and of the weights.
        median_left_cosine, median_right_cosine: of the top's directions and what they became.
        median_next_left_cosine, median_next_right_cosine: the same of the next.
        median_turned_alike, median_turned_alike_at_random: of how alike the top's left and right directions turned, and how
            alike a random update would have turned them.
        median_in_place: of how strong the top's directions are in the tuned model, over what they were.
        in_place_grew_share: of these, those that are stronger.
        order_changes: how many pairs of directions have changed their order.
        moved_share: of the top's directions, those that are at another place.
        gone: how many of the top's directions are beyond all that was computed.
        new: how many left directions of the tuned model's top have a cosine below 1/2 with each of the original that was
            computed.
        new_certain: how many of these cannot be one that was not computed.
        median_relative_update: of the norm of the change over that of the matrix.
        median_update_in_left, chance_in_left: of the share of the change inside the top's left subspace, and that by chance.
        median_update_in_right, chance_in_right: the same of the right one.
        median_update_in_either, chance_in_either: the same of what is inside either.
        median_update_in_both, chance_in_both: the same of what is inside both.
        median_rescaling, chance_rescaling: of the share of it that scales of the top explain, and that by chance.
        claims: verdicts on claims of others.
        most_amplified: the values that have changed most, first the furthest.
    """

    schema_version: ClassVar[int] = SCHEMA_VERSION

    targets: int
    median_stable_rank: float | None
    median_effective_rank_share: float | None
    median_energy: Mapping[str, float | None]
    unconverged: int
    unidentified_share: float
    top_change: float | None = None
    next_change: float | None = None
    rest_change: float | None = None
    median_top_amplification: float | None = None
    median_next_amplification: float | None = None
    median_rest_amplification: float | None = None
    median_matched_amplification: float | None = None
    top_amplified_share: float | None = None
    median_scaling: float | None = None
    median_scaling_at_random: float | None = None
    median_scaling_of_values: float | None = None
    median_scaling_of_update: float | None = None
    median_left_cosine: float | None = None
    median_right_cosine: float | None = None
    median_next_left_cosine: float | None = None
    median_next_right_cosine: float | None = None
    median_turned_alike: float | None = None
    median_turned_alike_at_random: float | None = None
    median_in_place: float | None = None
    in_place_grew_share: float | None = None
    order_changes: int | None = None
    moved_share: float | None = None
    gone: int | None = None
    new: int | None = None
    new_certain: int | None = None
    median_relative_update: float | None = None
    median_update_in_left: float | None = None
    chance_in_left: float | None = None
    median_update_in_right: float | None = None
    chance_in_right: float | None = None
    median_update_in_either: float | None = None
    chance_in_either: float | None = None
    median_update_in_both: float | None = None
    chance_in_both: float | None = None
    median_rescaling: float | None = None
    chance_rescaling: float | None = None
    claims: tuple[ClaimVerdict, ...] | None = None
    most_amplified: tuple[Amplified, ...] | None = None


def findings_of(targets: Sequence[Mapping[str, Any]], r: int, *, compared: bool) -> Findings:
    """The findings about these matrices.

    Args:
        targets: what was measured of each, as docs/study.md describes it.
        r: dimension of the leading subspaces that are compared.
        compared: whether there is a tuned model.
    """
    ranks = sorted({int(rank) for target in targets for rank in target["energy"]})
    known = [flag for target in targets for flag in target["identified"]]
    found: dict[str, Any] = {
        "targets": len(targets),
        "median_stable_rank": median(target["stable_rank"] for target in targets),
        "median_effective_rank_share": median(target["effective_rank"] / min(target["shape"]) for target in targets),
        "median_energy": {
            str(rank): median(target["energy"][str(rank)] for target in targets if str(rank) in target["energy"])
            for rank in ranks
        },
        "unconverged": sum(not has_converged(target) for target in targets),
        "unidentified_share": 1 - sum(known) / len(known),
    }
    if not compared:
        return Findings(**rounded(found))
    found |= _values(targets, r) | _directions(targets, r) | _updates(targets, r)
    return Findings(**rounded(found), claims=_claims(targets, r), most_amplified=_most_amplified(targets, r))


def _parts(target: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measurements of a target that come from an SVD of their own: of the matrix, of the tuned one, and of the update."""
    return [target, *(part for name in ("tuned", "update") if (part := target.get(name)) is not None)]


def has_converged(target: Mapping[str, Any]) -> bool:
    """Whether every SVD for a matrix reached the tolerance: its own, that of the tuned one, and that of the update."""
    return all(part["converged"] for part in _parts(target))


def _most_amplified(targets: Sequence[Mapping[str, Any]], r: int) -> tuple[Amplified, ...]:
    every = (
        Amplified(target["key"], index, value)
        for target in targets
        for index, value in enumerate(target["amplification"][:r], 1)
        if value is not None
    )
    return tuple(sorted(every, key=lambda one: -abs(one.amplification - 1))[:_MOST_AMPLIFIED])


def _claims(targets: Sequence[Mapping[str, Any]], r: int) -> tuple[ClaimVerdict, ...]:
    found = []
    for name, arxiv, claim in CLAIMS:
        verdicts = counted(claim, targets, r)
        numbers = (verdicts["yes"], verdicts["partly"], verdicts["no"], verdicts["unknown"])
        found.append(ClaimVerdict(name, arxiv, together(verdicts), *numbers))
    return tuple(found)


def _values(targets: Sequence[Mapping[str, Any]], r: int) -> dict[str, Any]:
    """What became of the singular values."""
    tops = [[value for value in target["amplification"][:r] if value is not None] for target in targets]
    nexts = [[value for value in target["amplification"][r:] if value is not None] for target in targets]
    rests = [target["rest_amplification"] for target in targets]
    ratios = [value for values in tops for value in values]
    scalings = [target["claims"]["scaling"] for target in targets if target["claims"]["scaling"] is not None]
    return {
        "top_change": median(statistics.fmean(abs(value - 1) for value in values) for values in tops if values),
        "next_change": median(statistics.fmean(abs(value - 1) for value in values) for values in nexts if values),
        "rest_change": median(abs(rest - 1) for rest in rests if rest is not None),
        "median_top_amplification": median(ratios),
        "median_next_amplification": median(value for values in nexts for value in values),
        "median_rest_amplification": median(rest for rest in rests if rest is not None),
        "median_matched_amplification": median(value for target in targets for value in _followed(target, r)),
        "top_amplified_share": sum(value > 1 for value in ratios) / len(ratios) if ratios else None,
        "median_scaling": median(scaling["factor"] for scaling in scalings),
        "median_scaling_at_random": median(
            math.hypot(1, relative_update(t)) for t in targets if t["claims"]["scaling"] is not None
        ),
        "median_scaling_of_values": median(scaling["of_values"] for scaling in scalings),
        "median_scaling_of_update": median(scaling["of_update"] for scaling in scalings),
    }


def _followed(target: Mapping[str, Any], r: int) -> list[float]:
    """Of the first ``r`` directions that are mostly one that was computed: the value of that one over their own."""
    new = target["tuned"]["singular_values"]
    old, places = target["singular_values"], target["place"][:r]
    return [new[place - 1] / old[i] for i, place in enumerate(places) if place is not None and place <= len(new)]


def _directions(targets: Sequence[Mapping[str, Any]], r: int) -> dict[str, Any]:
    """What became of the directions."""
    in_place = [value for target in targets for value in target["in_place"][:r] if value is not None]
    places = [(i, place) for target in targets for i, place in enumerate(target["place"][:r], 1) if place is not None]
    turnings = [target["claims"]["turning"] for target in targets if target["claims"]["turning"] is not None]
    cosines = {
        f"median_{after}{side}": median(value for target in targets for value in target[side][which])
        for side in ("left_cosine", "right_cosine")
        for after, which in (("", slice(r)), ("next_", slice(r, None)))
    }
    return {
        **cosines,
        "median_turned_alike": median(turning["alike"] for turning in turnings),
        "median_turned_alike_at_random": median(turning["random"] for turning in turnings),
        "median_in_place": median(in_place),
        "in_place_grew_share": sum(value > 1 for value in in_place) / len(in_place) if in_place else None,
        "order_changes": sum(target["order_changes"] for target in targets),
        "moved_share": sum(place != i for i, place in places) / len(places) if places else None,
        "gone": sum(len(target["gone"]) for target in targets),
        "new": sum(len(target["new"]) for target in targets),
        "new_certain": sum(len(target["new_certain"]) for target in targets),
    }


def _updates(targets: Sequence[Mapping[str, Any]], r: int) -> dict[str, Any]:
    """Where the updates lie."""
    changed = [target for target in targets if has_changed(target)]
    updates = [target["update"] for target in changed]
    sizes = [(min(r, len(target["amplification"])), *target["shape"]) for target in changed]
    return {
        "median_relative_update": median(u["relative"] for u in updates if u["relative"] is not None),
        "median_update_in_left": median(update["in_left"] for update in updates),
        "chance_in_left": median(k / m for k, m, _ in sizes),
        "median_update_in_right": median(update["in_right"] for update in updates),
        "chance_in_right": median(k / n for k, _, n in sizes),
        "median_update_in_either": median(map(in_either, updates)),
        "chance_in_either": median(chance_in_either(target, r) for target in changed),
        "median_update_in_both": median(update["in_both"] for update in updates),
        "chance_in_both": median(k * k / (m * n) for k, m, n in sizes),
        "median_rescaling": median(update["rescaling"] for update in updates),
        "chance_rescaling": median(k / (m * n) for k, m, n in sizes),
    }
