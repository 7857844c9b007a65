"""The findings on the change from one model into another, in sentences, besides those on claims of others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.escapes import escaped
from surgery.report.summary import Group, half_energy_rank, median, median_rank, relative_update
from surgery.report.verdicts import has_changed, is_told_from_rounding
from surgery.report.words import count, directions_text, matrices, percent, times

#: Pure rescaling explains most of the update, or little of it.
MOST, LITTLE = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Statement:
    """A finding: one question, its answer in a few words, and the numbers for it."""

    question: str
    answer: str
    details: str


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
        details.append(f"{new:,} of the first {r} left ones of the tuned matrices are none of the base's that were computed.")
    return Statement(question, answer[0].upper() + answer[1:], " ".join(details))


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
    changed = [target for target in targets if has_changed(target)]
    relative = statistics.median(map(relative_update, changed))
    ranks = [half_energy_rank(target["update"]["singular_values"], target["update"]["norm"]) for target in changed]
    kept = max(len(target["update"]["singular_values"]) for target in changed)
    details = [
        f"The norm of the update is {percent(relative)} of the matrix's own (median of the {matrices(len(changed))} that "
        f"changed), and half of its energy takes {directions_text(median_rank(ranks), kept)}."
    ]
    if len(changed) < len(targets):
        details.append(f"{matrices(len(targets) - len(changed))} did not change at all.")
    if rounded := sum(not is_told_from_rounding(target) for target in changed):
        details.append(
            f"In {matrices(rounded)} it is so small that the rounding of the stored weights may account for much of it."
        )
    by_group = {group.name: median(map(relative_update, group.targets)) or 0.0 for group in groups}
    if len(by_group) > 1:
        high, low = max(by_group, key=by_group.__getitem__), min(by_group, key=by_group.__getitem__)
        details.append(
            f"It is largest in {escaped(high)} ({percent(by_group[high])}) and smallest in {escaped(low)} "
            f"({percent(by_group[low])})."
        )
    return Statement("How large is the update?", f"{percent(relative)} of the weights' norm", " ".join(details))
