"""The findings of a report in sentences, which follow from the numbers, also where a finding does not hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from surgery.escapes import escaped
from surgery.report.findings_of_change import Statement, order_statement, rescaling_statement, update_statement
from surgery.report.summary import (
    Group,
    Target,
    half_energy_rank,
    median,
    median_rank,
    worst_residual,
)
from surgery.report.verdicts import has_changed
from surgery.report.words import count, directions_text, matrices, number, percent, rank_text


def statements(spectra: dict[str, Any], groups: Sequence[Group]) -> list[Statement]:
    """The findings on a model alone, or on the change from one model into another besides claims of others."""
    targets: list[Target] = spectra["targets"]
    if spectra["tuned"] is None:
        return [_spectrum_statement(spectra), _energy_statement(targets, groups), _certificates_statement(spectra)]
    if not any(map(has_changed, targets)):
        unchanged = Statement(
            "What changed?",
            "Nothing",
            f"The two models are the same in all {matrices(len(targets))} that were compared, so there is no update to speak "
            "of.",
        )
        return [unchanged, _energy_statement(targets, groups), _certificates_statement(spectra)]
    return [
        update_statement(spectra, groups),
        order_statement(spectra),
        rescaling_statement(spectra),
        _energy_statement(targets, groups),
        _certificates_statement(spectra),
    ]


def _energy_statement(targets: Sequence[Target], groups: Sequence[Group]) -> Statement:
    def rank_of(target: Target) -> float:
        return half_energy_rank(target["singular_values"], target["norm"])

    def share(target: Target) -> float:
        rows, columns = target["shape"]
        return rank_of(target) / float(min(rows, columns))

    kept = max(len(target["singular_values"]) for target in targets)
    rank = median_rank(map(rank_of, targets))
    details = f"Half of the energy of a matrix (its squared norm) takes {directions_text(rank, kept)} (median)"
    if math.isfinite(rank):
        details += f", which is {percent(median_rank(map(share, targets)))} of all it has."
    else:
        details += ", and more were not computed."
    details += _extremes(groups, rank_of, lambda value: rank_text(value, kept), "ranks")
    held = median(target["energy"].get("1") for target in targets)
    if held is not None:
        details += f" The first direction alone holds {percent(held)}."
    return Statement(
        "What rank holds half of the energy?",
        f"Rank {number(rank)}" if math.isfinite(rank) else f"More than rank {kept}",
        details,
    )


def _extremes(groups: Sequence[Group], get: Callable[[Target], float], word: Callable[[float], str], what: str) -> str:
    """A sentence that names the groups with the least and the greatest median."""
    values = {group.name: median_rank(map(get, group.targets)) for group in groups}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[low] == values[high]:
        return ""
    return f" The {what} go from {word(values[low])} in {escaped(low)} to {word(values[high])} in {escaped(high)}."


def _spectrum_statement(spectra: dict[str, Any]) -> Statement:
    found, targets = spectra["findings"], spectra["targets"]
    effective = found["median_effective_rank_share"]
    tail = median(target["tail_exponent"] for target in targets)
    details = [
        f"The stable rank, the squared norm over that of the first direction, is {number(found['median_stable_rank'])} (median "
        f"of {matrices(found['targets'])}), and the effective rank {percent(effective)} of what the shapes allow."
    ]
    if tail is not None:
        details.append(
            f"In the last three quarters of what was kept the values fall like the index to the power of {number(-tail)}."
        )
    condition = median(target["condition"] for target in targets)
    if condition is not None:
        details.append(f"The first value is {number(condition)} times the last one kept.")
    if effective is None:
        answer = "This cannot be told"
    elif effective >= 0.7:
        answer = "Flat: nearly all directions count"
    elif effective >= 0.3:
        answer = "Neither flat nor steep"
    else:
        answer = "Steep: few directions count"
    return Statement("How fast do the singular values fall?", answer, " ".join(details))


def _certificates_statement(spectra: dict[str, Any]) -> Statement:
    found, tolerance = spectra["findings"], spectra["options"]["tolerance"]
    worst = max(map(worst_residual, spectra["targets"]))
    unconverged, unidentified = found["unconverged"], found["unidentified_share"]
    parts = [
        f"The worst residual of any direction is {number(worst)} of the first value, at a tolerance of {number(tolerance)}."
    ]
    if unconverged:
        answer = f"Not all: {count(unconverged, 'decomposition')} did not converge"
        parts.append("What is said of them is an estimate; the table marks them.")
    else:
        answer = "Yes, all solvers converged"
    if unidentified:
        parts.append(
            f"{percent(unidentified)} of the directions are not determined by their matrix, as values next to theirs are "
            "nearly equal: their singular values count, their directions are left out."
        )
    return Statement("Can the numbers be trusted?", answer, " ".join(parts))
