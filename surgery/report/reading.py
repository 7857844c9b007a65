"""The glossary of a report: what its words and numbers mean, and the thresholds of its answers."""

from __future__ import annotations

from typing import Any

from surgery.report import findings_of_change, verdicts
from surgery.report.summary import worst_residual
from surgery.report.words import count, number, percent


def terms(spectra: dict[str, Any]) -> list[tuple[str, str]]:
    """Terms and their meanings, as HTML. Only numbers of the run are put into it, no names."""
    options, found, targets = spectra["options"], spectra["findings"], spectra["targets"]
    r, tolerance = options["subspace"], options["tolerance"]
    entries = [
        (
            "Singular values and directions",
            "A matrix A is a sum of s<sub>i</sub> u<sub>i</sub> v<sub>i</sub><sup>T</sup>, with the singular values "
            "s<sub>i</sub> in descending order, left directions u<sub>i</sub> (what the matrix writes) and right directions "
            "v<sub>i</sub> (what it reads). A tensor of several matrices, such as fused projections or a stack of experts, is "
            "looked at matrix by matrix.",
        ),
        ("Energy", "The squared Frobenius norm ‖A‖², which is the sum of all s<sub>i</sub>²."),
        (
            "Stable rank, effective rank",
            "The stable rank is ‖A‖² / s<sub>1</sub>². The effective rank is the exponential of the entropy of the shares "
            "s<sub>i</sub>² / ‖A‖²: as many equal singular values would have the same entropy. Where not all values were "
            "computed, it is estimated from random vectors, with a standard error.",
        ),
    ]
    if spectra["tuned"] is not None:
        entries += [
            (
                "Amplification",
                "s<sub>i</sub> of the tuned model over s<sub>i</sub> of the base, for the same i. It compares values by their "
                f"place in the order, and says nothing of directions. The top is the first {r}; the rest is the Frobenius norm "
                "of all that comes after the values kept.",
            ),
            (
                "Verdicts",
                "A claim is tried on each matrix. It holds where it does in at least "
                f"{percent(verdicts.MOST)} of those of which it can be told, does not hold where it does not in as many, and "
                "holds in part in between. It cannot be told where it cannot of most: a change of no more than twice what "
                "the rounding of the stored weights makes says nothing.",
            ),
            (
                "When the top counts as amplified, and the rest as intact",
                f"The top is amplified when at least {percent(verdicts.GREW_MOST)} of its values grew, and not when "
                f"{percent(verdicts.GREW_HALF)} or less did, or their mean change is negative. The rest is intact when the "
                f"mean size of the change of the values after the top, and that of the norm of all later ones, is at most "
                f"{number(verdicts.INTACT)} of that of the top, and not when one of them is at least "
                f"{number(verdicts.AS_MUCH)} of it.",
            ),
            (
                "One factor",
                "c = ⟨s, s′⟩ / ⟨s, s⟩, with the values s of the base and s′ of the tuned model. Of their change it explains "
                "1 − ‖s′ − c s‖² / ‖s′ − s‖², of the weights’ 1 − ‖D − (c − 1) W‖² / ‖D‖². The claim holds from "
                f"{number(verdicts.MUCH)} of the values’ change on, and not below {number(verdicts.LITTLE)}.",
            ),
            (
                "Turned alike",
                "L and R are U<sup>T</sup> U′ and V<sup>T</sup> V′ without the products of a direction and the one that it "
                f"became, from the first {r} to the first {4 * r}. They are 2 ⟨L, R⟩ / (‖L‖² + ‖R‖²) alike: 1 for the same "
                f"turn, 0 for independent ones. The claim holds from {number(verdicts.MUCH)} on, and not below "
                f"{number(verdicts.LITTLE)}; it cannot be told where that is less than {number(verdicts.DEVIATIONS)} standard "
                "deviations of independent turns. Directions of close values turn alike under any update: what a random one "
                "of the same size would give stands beside it.",
            ),
            (
                "Intruder dimensions",
                f"Left directions of the tuned model’s first {r} whose cosine with each of the base’s is below 0.5. Only as "
                "many of the base’s are known as were computed: at least those are intruders of which too little lies "
                "outside of these for one that is not known, at most all. A matrix with one counts.",
            ),
            (
                "Rotation",
                "|u<sub>i</sub> · u′| and |v<sub>i</sub> · v′|, where (u′, v′) is the direction of the tuned model that the "
                "i-th one became: they are assigned to one another such that the sum of ((u<sub>i</sub> · u′)² + "
                "(v<sub>i</sub> · v′)²) / 2 is greatest. What only changed its place has not turned. Directions whose values "
                "are equal, or so close that the rounding of the stored weights may have mixed them, are first turned among "
                "themselves to match best. "
                f"The top turned where the median cosine is below {number(verdicts.TURNED)}, and did not from "
                f"{number(verdicts.STAYED)} on. The claim holds where it turned, and what comes after it has a greater one.",
            ),
            (
                "In place, changes of order, gone, new",
                "In place: u<sub>i</sub><sup>T</sup> W′ v<sub>i</sub> / s<sub>i</sub>, how strong the base's direction is in "
                "the tuned model W′; it is what a scale would have to be. The order of two directions has changed where each "
                "is mostly one direction of the tuned model (more than half in common), and these are in the other order. A "
                "direction is gone where W′ still maps it to itself, with a value below all that was computed. New are "
                "intruder dimensions.",
            ),
            (
                "Share of the update in a subspace",
                "D is the tuned matrix minus the base's. Its share in both subspaces is ‖U<sup>T</sup> D V‖² / ‖D‖², with the "
                f"base's first {r} directions as U and V, in the left one ‖U<sup>T</sup> D‖² / ‖D‖², in the right one "
                "‖D V‖² / ‖D‖², and in either these two less the first. Chance is the mean of that for a D of independent "
                f"random entries: {r}² / (m n) for an m × n matrix, {r} / m, {r} / n, and {r} (m + n − {r}) / (m n). The "
                f"update keeps off the principal directions where either has at most {number(verdicts.OFF)} of what chance "
                f"gives, and does not from {number(verdicts.AS_CHANCE)} on.",
            ),
            (
                "Rescaling",
                f"The share Σ (u<sub>i</sub><sup>T</sup> D v<sub>i</sub>)² / ‖D‖² over the first {r} directions: what would be "
                f"reached by multiplying the base's singular values, with no direction turned. Chance is {r} / (m n). "
                f"“Most” means at least {percent(findings_of_change.MOST)}, “little” less than "
                f"{percent(findings_of_change.LITTLE)}.",
            ),
        ]
    worst = max(map(worst_residual, targets))
    entries += [
        (
            "Certificates",
            "Each direction comes with a residual, which bounds the error of its singular value, over s<sub>1</sub>. "
            f"The worst here is {number(worst)}, and the solver was to reach {number(tolerance)}. "
            f"{_converged(found['unconverged'])} A direction is identified when its residual is small "
            "against the gap to the next singular values, so that the true direction is within 0.1 of the one found; "
            f"{percent(found['unidentified_share'])} are not. Where values are equal, no direction is the right one, and the "
            "cosines are left blank.",
        ),
        (
            "Medians",
            "Findings are medians over matrices, large and small ones alike. A median says what is common, not that it holds "
            "everywhere: the table has every exception.",
        ),
    ]
    return entries


def _converged(failed: int) -> str:
    return f"{count(failed, 'decomposition')} did not converge." if failed else "All converged."
