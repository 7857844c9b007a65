"""One line for each matrix: the table of the page, and a CSV file to calculate with."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.escapes import escaped
from surgery.files.file_writer import write_file
from surgery.report.schema import check_spectra
from surgery.report.summary import Target, change, half_energy_rank, median, relative_update, worst_residual
from surgery.report.words import cosine, number, percent

#: How many directions have columns of their own in the CSV file.
AMPLIFICATIONS = 8
_CLAIMS = {
    "scaling": ("factor", "of_values", "of_update"),
    "turning": ("left", "right", "alike", "independent", "random"),
}
_DIRECTIONS = ("amplification", "in_place", "place")
#: The most matrices that the page lists.
MAX_ROWS = 300

_NAMES = ("tensor", "slice", "matrix", "key", "group", "layer", "dtype")
_SCALARS = (
    "norm",
    "converged",
    "method",
    "stable_rank",
    "effective_rank",
    "effective_rank_error",
    "condition",
    "tail_exponent",
)
_UPDATE = (
    "norm",
    "relative",
    "in_left",
    "in_right",
    "in_both",
    "rescaling",
    "stable_rank",
    "effective_rank",
    "effective_rank_error",
)


#: Signs that begin a formula in a spreadsheet; in some languages their wide forms do so as well.
_BEGINS_A_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def write_csv(spectra: dict[str, Any], path: Path) -> None:
    """Write what is known of each matrix as one line of a CSV file (UTF-8, with a heading).

    A cell is empty where there is no value, as in a model alone or for a matrix that did not change. A text that a spreadsheet
    would take for a formula gets an apostrophe before it.

    Args:
        spectra: what ``surgery spectra`` has found (docs/study.md).
        path: the file to write; its folder is made if need be.

    Raises:
        FormatError: numbers of another schema version, or that are none of a matrix.
        OutputError: the file cannot be written.
    """
    check_spectra(spectra)
    tuned = spectra["tuned"] is not None
    heading = [*_NAMES, "rows", "columns", *_SCALARS]
    if tuned:
        heading += [f"tuned_{name}" for name in _SCALARS]
        heading += ["rest_amplification", *(f"update_{name}" for name in _UPDATE)]
        heading += ["order_changes", "gone", "new", "new_certain", "rounding"]
        heading += [f"{part}_{name}" for part, names in _CLAIMS.items() for name in names]
        heading += [f"{name}_{index + 1}" for name in _DIRECTIONS for index in range(AMPLIFICATIONS)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heading)
    for target in spectra["targets"]:
        values = [*(target[name] for name in _NAMES), *target["shape"], *(target[name] for name in _SCALARS)]
        if tuned:
            update = target["update"] or {}
            values += [target["tuned"][name] for name in _SCALARS]
            values += [target["rest_amplification"], *(update.get(name) for name in _UPDATE)]
            values += [target["order_changes"], *(len(target[name]) for name in ("gone", "new", "new_certain"))]
            values += [target["claims"]["rounding"]]
            values += [(target["claims"][part] or {}).get(name) for part, names in _CLAIMS.items() for name in names]
            for name in _DIRECTIONS:
                values += [*target[name], *[None] * AMPLIFICATIONS][:AMPLIFICATIONS]
        writer.writerow([_cell(value) for value in values])
    write_file(path, out.getvalue().encode())


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = escaped(value)
        return f"'{text}" if text.startswith(_BEGINS_A_FORMULA) else text
    return value


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the page's table.

    Attributes:
        heading: short.
        meaning: what it is, in words.
        get: the value it is sorted by; None sorts last.
        show: the value as a text that is not escaped.
        numeric: set flush right.
    """

    heading: str
    meaning: str
    get: Callable[[Target], Any]
    show: Callable[[Any], str]
    numeric: bool = True


def columns(spectra: dict[str, Any]) -> list[Column]:
    """The columns of the page's table."""
    r = spectra["options"]["subspace"]

    def half(target: Target) -> float:
        return half_energy_rank(target["singular_values"], target["norm"])

    found = [
        Column(
            "group", "matrices of one name but for the numbers in it", lambda target: target["group"], escaped, numeric=False
        ),
        Column("layer", "number of the layer", lambda target: target["layer"], _whole),
        Column("shape", "rows × columns", lambda target: target["shape"], lambda shape: "×".join(map(str, shape))),
        Column("norm", "Frobenius norm of the base", lambda target: target["norm"], number),
        Column("stable rank", "‖A‖² / s₁²", lambda target: target["stable_rank"], number),
        Column("effective rank", "exponential of the entropy of the energy", lambda target: target["effective_rank"], number),
        Column("half energy", "least rank that holds half of the energy", half, _rank),
    ]
    if spectra["tuned"] is not None:

        def update(name: str) -> Callable[[Target], Any]:
            return lambda target: target["update"] and target["update"][name]

        def claimed(part: str, name: str) -> Callable[[Target], Any]:
            return lambda target: target["claims"][part] and target["claims"][part][name]

        found += [
            Column("s₁ ×", "amplification of the first value", lambda target: target["amplification"][0], _factor),
            Column(f"top {r}", f"mean change of the first {r} values", lambda target: change(target, r).mean, _signed),
            Column("in place", f"median change of the first {r} in place", lambda target: in_place(target, r), _signed),
            Column("order", f"changes of order with one of the first {r}", lambda target: target["order_changes"], _whole),
            Column("new", f"left directions that are new among the first {r}", lambda target: len(target["new"]), _whole),
            Column("factor", "the one that fits all values best", claimed("scaling", "factor"), _factor),
            Column("of values", "share of the change of the values that it explains", claimed("scaling", "of_values"), percent),
            Column("alike", "how alike left and right directions turned, at most 1", claimed("turning", "alike"), number),
            Column("rest", "change of what comes after the values kept", _rest, _signed),
            Column(
                "left cos", f"median left cosine of the first {r}", lambda target: median(target["left_cosine"][:r]), cosine
            ),
            Column(
                "right cos", f"median right cosine of the first {r}", lambda target: median(target["right_cosine"][:r]), cosine
            ),
            Column("update", "norm of the update over the base's", relative_update, percent),
            Column("in both", f"share of the update inside both top-{r} subspaces", update("in_both"), percent),
            Column("rescaling", f"share of the update that scales of the first {r} explain", update("rescaling"), percent),
        ]
    found += [
        Column("residual", "worst residual of a direction, over s₁", worst_residual, number),
        Column(
            "converged", "whether the solver did, on every model", _converged, lambda yes: "yes" if yes else "no", numeric=False
        ),
    ]
    return found


def rows(spectra: dict[str, Any], most: int = MAX_ROWS) -> list[Target]:
    """The matrices that the page lists, in the order of the checkpoint.

    Where there are more than ``most``, those with the largest update; of a model alone, those with the lowest stable rank.
    """
    targets: Sequence[Target] = spectra["targets"]
    if spectra["tuned"] is not None:
        order = sorted(range(len(targets)), key=lambda i: -relative_update(targets[i]))
    else:
        order = sorted(range(len(targets)), key=lambda i: targets[i]["stable_rank"])
    return [targets[i] for i in sorted(order[:most])]


def _rest(target: Target) -> float | None:
    value = target["rest_amplification"]
    return None if value is None else float(value) - 1


def in_place(target: Target, r: int) -> float | None:
    """The median change of a matrix's first r directions in place."""
    value = median(target["in_place"][:r])
    return None if value is None else value - 1


def _converged(target: Target) -> bool:
    return bool(target["converged"] and (target.get("tuned") or target)["converged"])


def _whole(value: int | None) -> str:
    return "–" if value is None else str(value)


def _rank(value: float) -> str:
    return number(value) if value < float("inf") else "more"


def _factor(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return percent(value, signed=True)
