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
        key: key of the matrix.
        index: index of the value, from 1.
        amplification: the new value over the old value.
    """

    key: str
    index: int
    amplification: float


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """The verdict on a published claim about fine-tuning.

    Attributes:
        claim: one of top_amplified, rest_intact, top_turned, scaled_uniformly, turned_alike, intruders, off_principals.
        arxiv: the arXiv number of the paper.
        verdict: holds, holds in part, does not hold, or cannot be told.
        yes: number of changed matrices for which the claim holds.
        partly: number of changed matrices for which it holds in part.
        no: number of changed matrices for which it does not hold.
        unknown: number of changed matrices for which it cannot be told.
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
    """The findings about all matrices together. From ``top_change`` on, entries are None if there is no tuned model.

    The "top" of a matrix is its first r directions. "Next" are the other reported directions, up to k. "Rest" is
    everything after these k. Medians about the update count only the matrices that changed. docs/study.md defines the
    numbers of each matrix.

    Attributes:
        targets: how many matrices there are.
        median_stable_rank: median stable rank.
        median_effective_rank_share: median of the effective rank over the shorter side.
        median_energy: for each rank, the median share of the squared norm in that many leading directions.
        unconverged: number of matrices with an SVD that did not reach the tolerance: of the matrix, of the tuned
            matrix, or of the update.
        unidentified_share: share of the directions that their matrix does not determine.
        top_change: mean size of the relative change of the top's singular values in a matrix; the median over matrices.
        next_change: the same for the next singular values.
        rest_change: size of the relative change of the norm of the rest; the median over matrices.
        median_top_amplification: median of new over old singular values of the top, compared by their order.
        median_next_amplification: the same for the next singular values.
        median_rest_amplification: median of the new over the old norm of the rest.
        median_matched_amplification: for directions of the top that have become mostly one computed direction: the
            singular value of that direction over their own; the median.
        top_amplified_share: share of the top's singular values that grew.
        median_scaling: median of the one factor that fits all singular values of a matrix best.
        median_scaling_at_random: median of the factor by which a random update of the same size increases the norm.
        median_scaling_of_values: median share of the change of the singular values that this one factor explains.
        median_scaling_of_update: median share of the change of the weights that it explains.
        median_left_cosine: median cosine between a left direction of the top and the direction that it has become.
        median_right_cosine: the same for right directions.
        median_next_left_cosine: the same for the next left directions.
        median_next_right_cosine: the same for the next right directions.
        median_turned_alike: median of how similarly the top's left and right directions turned: 1 for the same turn, -1
            for opposite turns.
        median_turned_alike_at_random: the same number for a random update of the same size.
        median_in_place: median strength of the top's directions in the tuned model, relative to their old singular
            value: ``u_i^T W_tuned v_i / s_i``.
        in_place_grew_share: share of these directions that are stronger than before.
        order_changes: number of pairs of directions whose order has changed.
        moved_share: of the top's directions that are mostly one direction of the tuned model, the share that are at
            another place in the order.
        gone: number of the top's directions that the tuned model still has, with a singular value below all that were
            computed.
        new: number of left directions in the tuned model's top that have a cosine below 1/2 with every computed
            direction of the original.
        new_certain: number of these that also cannot be an original direction that was not computed.
        median_relative_update: median of the norm of the update over the norm of the matrix.
        median_update_in_left: median share of the update's squared norm inside the top's left subspace.
        chance_in_left: the same share by chance.
        median_update_in_right: median share of the update's squared norm inside the top's right subspace.
        chance_in_right: the same share by chance.
        median_update_in_either: median share of the update's squared norm inside the left or the right subspace.
        chance_in_either: the same share by chance.
        median_update_in_both: median share of the update's squared norm inside both subspaces.
        chance_in_both: the same share by chance.
        median_rescaling: median share of the update's squared norm that new scales of the top explain.
        chance_rescaling: the same share by chance.
        claims: verdicts on published claims.
        most_amplified: the singular values of the top that have changed most, the largest change first.
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
