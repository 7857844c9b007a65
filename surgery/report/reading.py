"""The glossary of a report: what its words and numbers mean, and the thresholds of its answers."""

from __future__ import annotations

from typing import Any

from surgery.report.findings_of_change import LITTLE, MANY, MORE_THAN_CHANCE, MOST, STAYED, TURNED
from surgery.report.summary import CLEARLY_MORE, GREW_HALF, GREW_MOST, worst_residual
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
                "When the top counts as amplified",
                f"When at least {percent(GREW_MOST)} of its values grew, and their mean change is at least "
                f"{number(CLEARLY_MORE)} times the mean size of the change of the directions after them and of the rest. "
                f"It does not hold when {percent(GREW_HALF)} or less grew, or the others changed as much or more; in between "
                "it holds in part.",
            ),
            (
                "Rotation",
                "|u<sub>i</sub> · u′| and |v<sub>i</sub> · v′|, where (u′, v′) is the direction of the tuned model that the "
                "i-th one became: they are assigned to one another such that the sum of ((u<sub>i</sub> · u′)² + "
                "(v<sub>i</sub> · v′)²) / 2 is greatest. What only changed its place has not turned. Directions whose values "
                "are equal, or so close that the rounding of the stored weights may have mixed them, are first turned among "
                "themselves to match best. "
                f"“Hardly” means a median cosine of at least {number(STAYED)}, “a little” of at least {number(TURNED)}; "
                f"a direction below that counts as turned, and from {percent(MANY)} of them on the answer says so.",
            ),
            (
                "In place, changes of order, gone, new",
                "In place: u<sub>i</sub><sup>T</sup> W′ v<sub>i</sub> / s<sub>i</sub>, how strong the base's direction is in "
                "the tuned model W′; it is what a scale would have to be. The order of two directions has changed where each "
                "is mostly one direction of the tuned model (more than half in common), and these are in the other order. A "
                "direction is gone where W′ still maps it to itself, with a value below all that was computed. New is a "
                f"direction of the tuned model's first {r} that has less than a quarter in common with the one that it is "
                "assigned to.",
            ),
            (
                "Share of the update in a subspace",
                "D is the tuned matrix minus the base's. Its share in both subspaces is ‖U<sup>T</sup> D V‖² / ‖D‖², with the "
                f"base's first {r} directions as U and V. Chance is the mean of that for a D of independent random entries: "
                f"{r}² / (m n) for an m × n matrix, {r} / m for the left and {r} / n for the right one alone. "
                f"“More than chance” means at least {number(MORE_THAN_CHANCE)} times as much.",
            ),
            (
                "Rescaling",
                f"The share Σ (u<sub>i</sub><sup>T</sup> D v<sub>i</sub>)² / ‖D‖² over the first {r} directions: what would be "
                f"reached by multiplying the base's singular values, with no direction turned. Chance is {r} / (m n). "
                f"“Most” means at least {percent(MOST)}, “little” less than {percent(LITTLE)}.",
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
