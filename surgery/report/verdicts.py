"""Verdicts on claims of others about fine-tuning, one matrix at a time and of all together; docs/study.md has the thresholds.

The claims, by paper:

- arXiv 2505.23099 (Si et al., "Weight Spectra Induced Efficient Model Adaptation"): the top singular values are amplified, the
  rest stays, the dominant vectors turn.
- arXiv 2509.17866 (He, Cao, "Understanding Post-Training Structural Changes in Large Language Models"): one factor for all
  singular values of a matrix, left and right vectors turned by the same orthogonal matrix.
- arXiv 2410.21228 (Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence"): LoRA brings in intruder
  dimensions, leading directions that are none of the base's; full fine-tuning does not.
- arXiv 2511.08567 (Zhu et al., "The Path Not Taken: RLVR Provably Learns Off the Principals"): training with verifiable rewards
  keeps off the principal directions, supervised fine-tuning does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from surgery.report.summary import change, median

#: Of one matrix. Unknown is what rounding may have made, and what was not computed.
Verdict = Literal["yes", "partly", "no", "unknown"]

#: Of all matrices.
TOGETHER = ("holds", "holds in part", "does not hold", "cannot be told")

#: An update is told from rounding if that accounts for no more of its squared norm: if it is twice as large.
ROUNDED = 1 / 4
#: The top is amplified if so many of its values grew; it is not if no more than half did.
GREW_MOST, GREW_HALF = 0.75, 0.5
#: What comes after the top is intact if it changed by no more than this share of what the top did; from the other on it is not.
INTACT, AS_MUCH = 2 / 3, 0.9
#: A direction has stayed, or has turned, if its cosine with the one that it became is above, or below, this.
STAYED, TURNED = 0.99, 0.9
#: One factor explains the change of the values, or two turns are alike, from here on; below the other number it is not so.
MUCH, LITTLE = 0.75, 0.25
#: One factor explains the change of few values whatever it is.
FEW = 8
#: Turns are alike only if they are so by as many standard deviations of independent ones.
DEVIATIONS = 2.0
#: The update keeps off the top subspaces if it has at most so much of chance inside; from the other number on it does not.
OFF, AS_CHANCE = 0.5, 0.8
#: So many of the matrices decide about all.
MOST = 0.75


def has_changed(target: Mapping[str, Any]) -> bool:
    """Whether the two weights differ."""
    return target["update"] is not None


def is_told_from_rounding(target: Mapping[str, Any]) -> bool:
    """Whether a matrix changed by more than the rounding of the stored numbers may account for."""
    return has_changed(target) and target["claims"]["rounding"] <= ROUNDED


def top_amplified(target: Mapping[str, Any], r: int) -> Verdict:
    """Whether the top singular values grew."""
    found = change(target, r)
    if target["claims"]["scaling"] is None or found.grew is None or found.mean is None:
        return "unknown"
    if found.grew <= GREW_HALF or found.mean <= 0:
        return "no"
    return "yes" if found.grew >= GREW_MOST else "partly"


def rest_intact(target: Mapping[str, Any], r: int) -> Verdict:
    """Whether the values after the top changed less than these, relative to what they were."""
    found = change(target, r)
    if target["claims"]["scaling"] is None or found.top is None or found.other is None:
        return "unknown"
    if found.other <= INTACT * found.top:
        return "yes"
    return "no" if found.other >= AS_MUCH * found.top else "partly"


def top_turned(target: Mapping[str, Any], r: int) -> Verdict:
    """Whether the top directions turned, and more than those after them."""
    top, after = middle_cosine(target, slice(r)), middle_cosine(target, slice(r, None))
    if top is None:
        return "unknown"
    if top >= STAYED:
        return "no"
    return "yes" if top < TURNED and after is not None and after > top else "partly"


def middle_cosine(target: Mapping[str, Any], which: slice) -> float | None:
    """The median cosine of some directions and what they became, of both sides together."""
    return median(value for side in ("left_cosine", "right_cosine") for value in target[side][which])


def scaled_uniformly(target: Mapping[str, Any], _: int) -> Verdict:
    """Whether one factor explains the change of the values."""
    scaling = target["claims"]["scaling"]
    few = len(target["amplification"]) < FEW
    return "unknown" if few or scaling is None else _by_share(scaling["of_values"])


def turned_alike(target: Mapping[str, Any], _: int) -> Verdict:
    """Whether the left and the right directions turned by the same matrix."""
    turning = target["claims"]["turning"]
    if turning is None:
        return "unknown"
    found = _by_share(turning["alike"])
    return "unknown" if found != "no" and turning["alike"] < DEVIATIONS * turning["independent"] else found


def _by_share(value: float) -> Verdict:
    if value >= MUCH:
        return "yes"
    return "no" if value < LITTLE else "partly"


def has_intruders(target: Mapping[str, Any], _: int) -> Verdict:
    """Whether there are intruder dimensions; unknown where they may be directions that were not computed."""
    if target["new_certain"]:
        return "yes"
    return "unknown" if target["new"] else "no"


def keeps_off(target: Mapping[str, Any], r: int) -> Verdict:
    """Whether the update keeps off the top subspaces."""
    chance = chance_in_either(target, r)
    if chance >= 1:
        return "unknown"
    ratio = in_either(target["update"]) / chance
    if ratio <= OFF:
        return "yes"
    return "partly" if ratio < AS_CHANCE else "no"


def in_either(update: Mapping[str, Any]) -> float:
    """The share of the update inside the top left or the top right subspace: all but ``(I - U U^T) D (I - V V^T)``."""
    return float(min(1.0, max(0.0, update["in_left"] + update["in_right"] - update["in_both"])))


def chance_in_either(target: Mapping[str, Any], r: int) -> float:
    """The same share of an update of independent entries, for subspaces of dimension r."""
    m, n = target["shape"]
    k = min(r, len(target["amplification"]))
    return float(1 - (1 - k / m) * (1 - k / n))


#: Of the claims, in the order in which they are told: name, paper, verdict.
CLAIMS: tuple[tuple[str, str, Callable[[Mapping[str, Any], int], Verdict]], ...] = (
    ("top_amplified", "2505.23099", top_amplified),
    ("rest_intact", "2505.23099", rest_intact),
    ("top_turned", "2505.23099", top_turned),
    ("scaled_uniformly", "2509.17866", scaled_uniformly),
    ("turned_alike", "2509.17866", turned_alike),
    ("intruders", "2410.21228", has_intruders),
    ("off_principals", "2511.08567", keeps_off),
)


def counted(
    claim: Callable[[Mapping[str, Any], int], Verdict], targets: Iterable[Mapping[str, Any]], r: int
) -> Counter[Verdict]:
    """The verdicts on the matrices that changed; unknown where that is no more than rounding."""
    return Counter(
        claim(target, r) if is_told_from_rounding(target) else "unknown" for target in targets if has_changed(target)
    )


def together(verdicts: Mapping[Verdict, int]) -> str:
    """The verdict on all matrices, one of ``TOGETHER``."""
    holds, in_part, does_not, unknown = TOGETHER
    told = sum(verdicts.get(one, 0) for one in ("yes", "partly", "no"))
    if told == 0 or told < sum(verdicts.values()) / 2:
        return unknown
    if verdicts.get("yes", 0) >= MOST * told:
        return holds
    return does_not if verdicts.get("no", 0) >= MOST * told else in_part
