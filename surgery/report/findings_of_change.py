"""The findings on the change from one model into another, in sentences, also where a finding does not hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from surgery.escapes import escaped
from surgery.report.statement import Statement
from surgery.report.summary import (
    Change,
    Group,
    Target,
    change,
    half_energy_rank,
    median,
    median_rank,
    relative_update,
    verdict,
)
from surgery.report.words import cosine, count, directions_text, matrices, number, percent, times

#: A direction has stayed, or has turned, if its cosine with the one that it became is above, or below, this.
STAYED, TURNED = 0.99, 0.9
#: If at least this share of directions turned, the answer tells of them, also where most have stayed.
MANY = 0.05
#: How many times the share that chance gives counts as more than chance.
MORE_THAN_CHANCE = 2.0
MOST, LITTLE = 0.5, 0.1
#: Changes of singular values count only above this many times the tolerance of the solver.
ABOVE_TOLERANCE = 10


def changes(spectra: dict[str, Any], targets: Sequence[Target]) -> list[Change]:
    """How the singular values of each matrix changed, with the size of the top that the run was asked for."""
    return [change(target, spectra["options"]["subspace"]) for target in targets]


def amplification_statement(spectra: dict[str, Any], groups: Sequence[Group]) -> Statement:
    """Whether the first singular values grew, and more than the others."""
    question = "Is the top of the spectrum amplified, more than the rest?"
    found, r = spectra["findings"], spectra["options"]["subspace"]
    each = changes(spectra, spectra["targets"])
    mean, middle = median(item.mean for item in each), median(item.middle for item in each)
    top, rest, grew = found["top_change"], found["rest_change"], found["top_amplified_share"]
    if mean is None or top is None or grew is None:
        return Statement(question, "This cannot be told", "No matrix has singular values above zero in both models.")

    others = [value for value in (middle, rest) if value is not None]
    details = [
        f"Of the first {r} singular values of all matrices, {percent(grew)} grew; their mean change is "
        f"{percent(mean, signed=True)}, and the mean size of their change {percent(top)} (medians over matrices)."
    ]
    against = []
    if middle is not None:
        against.append(f"{percent(middle)} for the directions after them")
    if rest is not None:
        against.append(f"{percent(rest)} for the norm of all that comes after the values kept")
    if against:
        details.append(f"Against that stand {' and '.join(against)}.")
    else:
        details.append(f"No values were kept after the first {r}, so there is no rest to compare them with.")

    tolerance = spectra["options"]["tolerance"]
    answer = verdict(grew, mean, max(others, default=None))
    if top < ABOVE_TOLERANCE * tolerance:
        return Statement(
            question,
            "This cannot be told",
            " ".join(
                [
                    *details,
                    f"Changes this small are near the tolerance of the computation, {number(tolerance)} of the first value.",
                ]
            ),
        )
    if answer == "yes":
        words = f"Yes: the top is amplified, {_against(mean, others)} the rest"
    elif answer == "unknown":
        words = "It grew, but there is no rest to compare" if grew > 0.5 else "No: half of the top or more did not grow"
    elif grew <= 0.5:
        words = "No: the top is not amplified, as half of it or more did not grow"
    elif answer == "no":
        words = "No: the top grew, but the rest changed as much or more"
    else:
        words = (
            "In part: the top grew, but not clearly more than the rest" if grew >= 0.75 else "In part: not all of the top grew"
        )
    if answer != "unknown":
        holding = sum(item.holds for item in each)
        details.append(f"Taken one by one, it holds in {holding:,} of {matrices(len(each))}.")
    details.extend(_where(spectra, groups))
    return Statement(question, words, " ".join(details))


def _against(top: float, others: Sequence[float]) -> str:
    other = max(others)
    return f"{times(top / other)} as much as" if other > 0 else "unlike"


def _where(spectra: dict[str, Any], groups: Sequence[Group]) -> list[str]:
    """The groups and layers where the top changed the most and the least."""
    by_group: dict[str, float] = {}
    layers: dict[int, list[float]] = {}
    for group in groups:
        means = []
        for row in group.rows:
            values = [item.mean for item in changes(spectra, row.targets) if item.mean is not None]
            means.extend(values)
            if row.layer is not None:
                layers.setdefault(row.layer, []).extend(values)
        if means:
            by_group[group.name] = statistics.median(means)
    said = []
    if between := _extreme_changes({escaped(name): value for name, value in by_group.items()}):
        said.append(f"By group the mean change of the top is {between}.")
    if between := _extreme_changes({f"layer {layer}": statistics.median(values) for layer, values in layers.items() if values}):
        said.append(f"By layer the mean change of the top is {between}.")
    return said


def _extreme_changes(values: dict[str, float]) -> str:
    """The part of a sentence that says where changes are highest and lowest; empty if the two would read the same."""
    words = {name: percent(value, signed=True) for name, value in values.items()}
    if len(set(words.values())) < 2:
        return ""
    high, low = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    return f"highest in {high} ({words[high]}) and lowest in {low} ({words[low]})"


def rotation_statement(spectra: dict[str, Any]) -> Statement:
    """How far the leading singular directions turned."""
    question = "Do the singular directions turn?"
    found, r = spectra["findings"], spectra["options"]["subspace"]
    left, right = found["median_left_cosine"], found["median_right_cosine"]
    kept = [_kept(target[side]) for target in spectra["targets"] for side in ("left_top", "right_top")]
    following = [_kept(target[side]) for target in spectra["targets"] for side in ("left_next", "right_next")]
    subspace, next_subspace = median(kept), median(following)
    subspaces = ""
    if subspace is not None:
        subspaces = f"The subspaces that the first {r} of either model span have {percent(subspace)} in common"
        subspaces += f", those of the next {r} {percent(next_subspace)}." if next_subspace is not None else "."
    known = [value for value in (left, right) if value is not None]
    if not known:
        return Statement(
            question,
            "This cannot be told of single directions",
            f"None of the first {r} directions is determined by the matrix in both models. {subspaces}".strip(),
        )
    worst = min(known)
    cosines = [value for target in spectra["targets"] for side in ("left_cosine", "right_cosine") for value in target[side][:r]]
    identified = [value for value in cosines if value is not None]
    turned = sum(value < TURNED for value in identified) / len(identified)
    if worst < TURNED:
        answer = "Yes"
    else:
        answer = "Hardly" if worst >= STAYED else "A little"
        if turned >= MANY:
            answer = f"Most do {'hardly' if worst >= STAYED else 'a little'}, but {percent(turned)} turned"
    if (worst < TURNED or turned >= MANY) and subspace is not None and subspace >= STAYED:
        answer += ", mostly among themselves: the subspace stays"
    angles = " and ".join(
        f"{name} {cosine(value)} ({number(math.degrees(math.acos(min(1.0, value))))}°)"
        for name, value in (("left", left), ("right", right))
        if value is not None
    )
    details = [
        f"Between a direction of the first {r} and the one that it became, wherever that is in the order, the median cosine "
        f"is: {angles}. "
        f"Of all these cosines {percent(turned) if turned else 'none'} {'is' if not turned else 'are'} below {number(TURNED)}."
    ]
    unknown = 1 - len(identified) / len(cosines)
    if unknown > 0:
        details.append(
            f"{percent(unknown)} of these directions are left out, as they are not determined in one of the models, or gone."
        )
    if subspaces:
        details.append(subspaces)
    return Statement(question, answer, " ".join(details))


def order_statement(spectra: dict[str, Any]) -> Statement:
    """Which of the leading directions changed places, are gone or are new."""
    question = "What became of the leading directions?"
    found, r = spectra["findings"], spectra["options"]["subspace"]
    changes, moved, grew = found["order_changes"], found["moved_share"], found["in_place_grew_share"]
    gone, new = found["gone"], found["new"]
    said = [f"their order changed {count(changes, 'time')}" if changes else "none changed their order"]
    if gone:
        said.append(f"{gone:,} {'is' if gone == 1 else 'are'} gone")
    if new:
        said.append(f"{new:,} {'is' if new == 1 else 'are'} new")
    answer = ", ".join(said)
    details = [f"Pairs of directions, one of the first {r} of a matrix and any other, that changed their order: {changes:,}."]
    if moved:
        details.append(
            f"Of the first {r} of all matrices that are mostly one direction of the tuned model, {percent(moved)} have another "
            "place there. That is no rotation: a change of values is enough, or one that came in or is gone."
        )
    if grew is not None:
        details.append(
            f"In place, uᵀ W′ v / s, they changed by {percent(found['median_in_place'] - 1, signed=True)} (median), and "
            f"{percent(grew)} grew."
        )
    if gone:
        details.append(f"Gone are those that have not turned, but whose values are below all that were computed: {gone:,}.")
    if new:
        details.append(f"{new:,} of the first {r} of the tuned matrices are none of the base's that were computed.")
    return Statement(question, answer[0].upper() + answer[1:], " ".join(details))


def _kept(cosines: Sequence[float]) -> float | None:
    """The share of a subspace that lies in another: the mean squared cosine of the principal angles."""
    return statistics.fmean(value * value for value in cosines) if cosines else None


def subspaces_statement(spectra: dict[str, Any]) -> Statement:
    """How much of the update lies in the base's leading subspaces, against chance."""
    question = "Does the update lie inside the base's top subspaces?"
    found, r = spectra["findings"], spectra["options"]["subspace"]
    inside, chance = found["median_update_in_both"], found["chance_in_both"]
    ratio = inside / chance
    if ratio < 1 / MORE_THAN_CHANCE:
        answer = "No, less than chance would have it"
    elif ratio < MORE_THAN_CHANCE:
        answer = "Not more than chance would have it"
    elif inside >= MOST:
        answer = "Yes, most of it"
    else:
        answer = "More than chance would have it, but most of it lies outside"
    changed = [target for target in spectra["targets"] if target["update"] is not None]
    updates = [target["update"] for target in changed]
    above = 0
    for target in changed:
        m, n = target["shape"]
        above += target["update"]["in_both"] >= MORE_THAN_CHANCE * min(r, m, n) ** 2 / (m * n)
    left, right = median(item["in_left"] for item in updates), median(item["in_right"] for item in updates)
    return Statement(
        question,
        answer,
        f"Of the update's energy {percent(inside)} lies inside both the left and the right top-{r} subspace of the base "
        f"(median); a random update would have {percent(chance)}, so this is {times(ratio)} as much. Inside the left one alone "
        f"there is {percent(left)}, inside the right one {percent(right)}. Taken one by one, {above:,} of "
        f"{matrices(len(changed))} have more than chance inside both.",
    )


def rescaling_statement(spectra: dict[str, Any]) -> Statement:
    """How much of the update new scales of the leading directions would give back."""
    question = "How much of the update would pure rescaling explain?"
    found, r = spectra["findings"], spectra["options"]["subspace"]
    share, chance = found["median_rescaling"], found["chance_rescaling"]
    if share >= MOST:
        answer = f"Most of it: {percent(share)}"
    elif share >= LITTLE:
        answer = f"A part of it: {percent(share)}"
    else:
        answer = f"Little: {percent(share)}"
    details = (
        f"New scales for the first {r} directions of the base, and nothing else, give back {percent(share)} of the update's "
        f"energy (median); of a random update they would give {percent(chance)}."
    )
    if chance:
        details += f" This is {times(share / chance)} as much."
    return Statement(question, answer, details)


def update_statement(spectra: dict[str, Any], groups: Sequence[Group]) -> Statement:
    """How large the update is against the weights, and of which rank."""
    targets = spectra["targets"]
    changed = [target for target in targets if target["update"] is not None]
    relative = statistics.median(map(relative_update, changed))
    ranks = [half_energy_rank(target["update"]["singular_values"], target["update"]["norm"]) for target in changed]
    kept = max(len(target["update"]["singular_values"]) for target in changed)
    details = [
        f"The norm of the update is {percent(relative)} of the matrix's own (median of the {matrices(len(changed))} that "
        f"changed), and half of its energy takes {directions_text(median_rank(ranks), kept)}."
    ]
    if len(changed) < len(targets):
        details.append(f"{matrices(len(targets) - len(changed))} did not change at all.")
    by_group = {group.name: median(map(relative_update, group.targets)) or 0.0 for group in groups}
    if len(by_group) > 1:
        high, low = max(by_group, key=by_group.__getitem__), min(by_group, key=by_group.__getitem__)
        details.append(
            f"It is largest in {escaped(high)} ({percent(by_group[high])}) and smallest in {escaped(low)} "
            f"({percent(by_group[low])})."
        )
    return Statement("How large is the update?", f"{percent(relative)} of the weights' norm", " ".join(details))
