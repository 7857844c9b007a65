"""Claims of others about fine-tuning, each with what the numbers say of it, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.report.summary import change, median
from surgery.report.verdicts import MUCH, TURNED, has_changed
from surgery.report.words import cosine, matrices, number, percent

Spectra = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Card:
    """A claim and what became of it.

    Attributes:
        claim: one sentence, without its end.
        source: the paper.
        verdict: one of ``surgery.report.verdicts.TOGETHER``.
        counts: for how many matrices it holds.
        details: the numbers for it.
    """

    claim: str
    source: str
    verdict: str
    counts: str
    details: str


def cards(spectra: Spectra) -> list[Card]:
    """The claims in the order of the findings; none where there is no change to speak of."""
    if spectra["tuned"] is None or not any(map(has_changed, spectra["targets"])):
        return []
    made = []
    for found in spectra["findings"]["claims"]:
        claim, tell = _TOLD[found["claim"]]
        source = f"{_PAPERS.get(found['arxiv'], '')} arXiv {found['arxiv']}".strip()
        made.append(Card(claim, source, found["verdict"], _counts(found), tell(spectra)))
    return made


def _counts(found: Mapping[str, Any]) -> str:
    """For how many matrices it holds."""
    total = sum(found[name] for name in ("yes", "partly", "no", "unknown"))
    if found["unknown"] == total:
        return f"of any of {matrices(total)}"
    said = [f"yes in {found['yes']:,} of {matrices(total)}"]
    if found["partly"]:
        said.append(f"in part in {found['partly']:,}")
    if found["unknown"]:
        said.append(f"not to be told in {found['unknown']:,}")
    return ", ".join(said)


def _amplified(spectra: Spectra) -> str:
    found, r = spectra["findings"], spectra["options"]["subspace"]
    mean = median(change(target, r).mean for target in spectra["targets"])
    if mean is None:
        return "No matrix has singular values above zero in both models."
    text = f"Of the first {r} singular values {percent(found['top_amplified_share'])} grew, by {percent(mean, signed=True)}"
    text += " (median over matrices of the mean change)."
    together = found["median_matched_amplification"]
    if together is not None:
        text += f" Followed by direction, wherever that is in the order now, they changed by {_change(together)} (median)."
    return text


def _intact(spectra: Spectra) -> str:
    found, r = spectra["findings"], spectra["options"]["subspace"]
    middle = median(change(target, r).middle for target in spectra["targets"])
    against = []
    if middle is not None:
        against.append(f"that of those after them {percent(middle)}")
    if found["rest_change"] is not None:
        against.append(f"that of the norm of all that comes after the values kept {percent(found['rest_change'])}")
    if found["top_change"] is None:
        return "No matrix has singular values above zero in both models."
    text = f"The mean size of the change of the first {r} singular values is {percent(found['top_change'])}"
    if not against:
        return f"{text}; no values were kept after these, so there is no rest to compare them with."
    return f"{text}, {' and '.join(against)} (medians over matrices)."


def _turned(spectra: Spectra) -> str:
    found, r = spectra["findings"], spectra["options"]["subspace"]
    told = [_angles(found, "median_"), _angles(found, "median_next_")]
    cosines = [value for target in spectra["targets"] for side in _SIDES for value in target[side][:r]]
    known = [value for value in cosines if value is not None]
    if not known:
        text = f"None of the first {r} directions is determined by the matrix in both models."
    else:
        turned = sum(value < TURNED for value in known) / len(known)
        text = f"The median cosine of a direction of the first {r} and the one that it became is {told[0]}"
        text += f"; of those after them {told[1]}." if told[1] else "."
        text += (
            f" Of the first {r}, {percent(turned) if turned else 'none'} {'are' if turned else 'is'} below {number(TURNED)}."
        )
        if len(known) < len(cosines):
            text += f" Left out are {percent(1 - len(known) / len(cosines))}, which are not determined, or gone."
    kept = median(_kept(target[side]) for target in spectra["targets"] for side in ("left_top", "right_top"))
    if kept is not None:
        text += f" The subspaces that they span keep {percent(kept)} of themselves"
        following = median(_kept(target[side]) for target in spectra["targets"] for side in ("left_next", "right_next"))
        text += f", those of the next {r} {percent(following)}." if following is not None else "."
    return text


_SIDES = ("left_cosine", "right_cosine")


def _angles(found: Mapping[str, Any], which: str) -> str:
    both = [(side, found[f"{which}{side}_cosine"]) for side in ("left", "right")]
    return ", ".join(
        f"{side} {cosine(value)} ({number(math.degrees(math.acos(min(1.0, value))))}°)"
        for side, value in both
        if value is not None
    )


def _kept(cosines: Sequence[float]) -> float | None:
    """The share of a subspace that lies in another: the mean squared cosine of the principal angles."""
    return statistics.fmean(value * value for value in cosines) if cosines else None


def _scaled(spectra: Spectra) -> str:
    found = spectra["findings"]
    if found["median_scaling"] is None:
        return "No values changed by more than the rounding of the weights and the tolerance of the solver."
    factors = [
        target["claims"]["scaling"]["factor"] for target in spectra["targets"] if target["claims"]["scaling"] is not None
    ]
    return (
        f"The best factor is {found['median_scaling']:.4f} (median; {min(factors):.4f} to {max(factors):.4f}), where a random "
        f"update of the same size makes the norm {found['median_scaling_at_random']:.4f} times as large. It explains "
        f"{percent(found['median_scaling_of_values'])} of the change of a matrix's values, and "
        f"{percent(found['median_scaling_of_update'])} of that of its weights (medians)."
    )


def _alike(spectra: Spectra) -> str:
    found, r = spectra["findings"], spectra["options"]["subspace"]
    alike, random = found["median_turned_alike"], found["median_turned_alike_at_random"]
    if alike is None:
        return "No directions turned by more than the rounding of the weights and the tolerance of the solver account for."
    turnings = [target["claims"]["turning"] for target in spectra["targets"] if target["claims"]["turning"] is not None]
    spread = statistics.median(turning["independent"] for turning in turnings)
    text = (
        f"The turns of the first {r} left and right directions are {number(alike)} alike (median): 1 is the same turn, and "
        f"independent ones of the same sizes would have 0 ± {number(spread)}. A random update of the same size would have "
        f"{number(random)}"
    )
    if random >= MUCH:
        return f"{text}: close values turn alike whatever the update is, so this alone says little of the training."
    return f"{text}."


def _intruders(spectra: Spectra) -> str:
    found, r = spectra["findings"], spectra["options"]["subspace"]
    least, most = found["new_certain"], found["new"]
    tops = sum(min(r, len(target["amplification"])) for target in spectra["targets"])
    numbers = f"{most:,}" if least == most else f"At least {least:,} and at most {most:,}"
    text = f"{numbers} of the first {r} left directions of the tuned matrices, {tops:,} in all, have a cosine below 0.5 with "
    text += "each of the base's."
    if least < most:
        text += " Between these numbers are those that may be one of the base's that was not computed."
    return f"{text} The paper finds such directions after LoRA, and hardly any after full fine-tuning."


def _off(spectra: Spectra) -> str:
    found, r = spectra["findings"], spectra["options"]["subspace"]

    def share(part: str, chance: str = "") -> str:
        return f"{percent(found[f'median_update_in_{part}'])} ({chance}{percent(found[f'chance_in_{part}'])})"

    return (
        f"Of the update's energy {share('either', 'by chance ')} lies in the base's first {r} left or right directions "
        f"(median): {share('left')} in the left ones, {share('right')} in the right ones, {share('both')} in both. The paper "
        "finds less than chance after such training, and more after supervised fine-tuning."
    )


def _change(ratio: float) -> str:
    return percent(ratio - 1, signed=True)


_PAPERS = {
    "2505.23099": "Weight Spectra Induced Efficient Model Adaptation,",
    "2509.17866": "Understanding Post-Training Structural Changes in Large Language Models,",
    "2410.21228": "LoRA vs Full Fine-tuning: An Illusion of Equivalence,",
    "2511.08567": "The Path Not Taken: RLVR Provably Learns Off the Principals,",
}
_TOLD: dict[str, tuple[str, Callable[[Spectra], str]]] = {
    "top_amplified": ("Fine-tuning amplifies the top singular values", _amplified),
    "rest_intact": ("It leaves the other singular values as they were", _intact),
    "top_turned": ("The dominant directions turn, the others less", _turned),
    "scaled_uniformly": ("All singular values of a matrix are scaled by one factor", _scaled),
    "turned_alike": ("Left and right directions turn by the same orthogonal matrix", _alike),
    "intruders": ("Intruder dimensions come in: leading directions that are none of the base's", _intruders),
    "off_principals": ("The update keeps off the principal directions, as in training with verifiable rewards", _off),
}
