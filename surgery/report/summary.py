"""Medians of what ``surgery spectra`` has measured, over layers, groups and experts. Shapes and units as in docs/study.md."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Target = dict[str, Any]
Floats = NDArray[np.float64]

#: So many directions are shown one by one; after that each doubling of the index takes half as many columns.
_SINGLE = 16


@dataclass(frozen=True, slots=True)
class Change:
    """How the singular values of one matrix changed. A figure is None if the matrix has no such values.

    Attributes:
        mean: mean of amplification - 1 over the top r.
        top: mean of |amplification - 1| over the top r.
        grew: share of the top r that grew.
        middle: mean |amplification - 1| of directions r + 1 to k.
        rest: |amplification - 1| of all that comes after the k.
    """

    mean: float | None
    top: float | None
    grew: float | None
    middle: float | None
    rest: float | None

    @property
    def other(self) -> float | None:
        """The larger of ``middle`` and ``rest``, the changes below the top; None if there is neither."""
        return max((value for value in (self.middle, self.rest) if value is not None), default=None)


def change(target: Mapping[str, Any], r: int) -> Change:
    """How the singular values of a matrix changed from one model to the other; its top are the first ``r``."""
    values = target["amplification"]
    known = [value - 1 for value in values[:r] if value is not None]
    middle = [abs(value - 1) for value in values[r:] if value is not None]
    rest = target["rest_amplification"]
    return Change(
        mean=statistics.fmean(known) if known else None,
        top=statistics.fmean(map(abs, known)) if known else None,
        grew=sum(value > 0 for value in known) / len(known) if known else None,
        middle=statistics.fmean(middle) if middle else None,
        rest=None if rest is None else abs(rest - 1),
    )


def half_energy_rank(singular_values: Sequence[float], norm: float) -> float:
    """The least rank that holds half of the squared Frobenius norm; infinity where the values kept do not reach it."""
    reached = np.cumsum(np.square(np.asarray(singular_values, dtype=float))) >= 0.5 * norm * norm
    return float(np.argmax(reached)) + 1 if reached.any() else math.inf


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def median_rank(values: Iterable[float]) -> float:
    """The lower median: ranks beyond those computed are infinite, and nothing lies between two of them."""
    return statistics.median_low(values)


def middle_of(values: Floats, axis: int) -> Floats:
    """The median along ``axis`` without the entries that are NaN; NaN where all are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.asarray(np.nanmedian(values, axis=axis), dtype=float)


def steps(k: int) -> list[slice]:
    """The indices from 0 to k - 1 that each column of a picture stands for: one each at first, then more, as on a log scale."""
    columns, start, width = [], 0, 1
    while start < k:
        columns.append(slice(start, min(start + width, k)))
        start = columns[-1].stop
        if start >= _SINGLE * width:
            width *= 2
    return columns


def in_steps(values: Floats, columns: Sequence[slice]) -> Floats:
    """The median of each column's indices, (rows, columns) from (rows, k)."""
    return np.stack([middle_of(values[:, column], axis=1) for column in columns], axis=1)


@dataclass(frozen=True)
class Row:
    """The matrices of one group in one layer: one matrix, or those of its experts.

    Attributes:
        layer: its number; None outside of all layers.
        targets: the matrices.
    """

    layer: int | None
    targets: tuple[Target, ...]

    def index_median(self, get: Callable[[Target], Sequence[float | None] | None], k: int) -> Floats:
        """The median over the matrices at each index, (k,); NaN where none has a value."""
        stacked = np.full((len(self.targets), k), np.nan)
        for line, target in zip(stacked, self.targets, strict=True):
            values = np.asarray(get(target) or [], dtype=float)[:k]  # None becomes NaN
            line[: len(values)] = values
        return stacked[0] if len(stacked) == 1 else middle_of(stacked, axis=0)

    def median(self, get: Callable[[Target], float | None]) -> float | None:
        return median(map(get, self.targets))


@dataclass(frozen=True)
class Group:
    """The matrices whose names differ in numbers alone, by layer.

    Attributes:
        name: the common name.
        rows: one for each layer.
    """

    name: str
    rows: tuple[Row, ...]

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        return tuple(target for row in self.rows for target in row.targets)

    @cached_property
    def k(self) -> int:
        """The largest number of singular values that are told of any of its matrices."""
        return max(len(target["singular_values"]) for target in self.targets)

    @property
    def stacked(self) -> bool:
        """Whether any layer has several of its matrices, as those of experts."""
        return any(len(row.targets) > 1 for row in self.rows)

    def table(self, get: Callable[[Target], Sequence[float | None] | None], length: int | None = None) -> Floats:
        """The values at each index, (layers, k): for each layer the median over its matrices; NaN where there is none."""
        return np.stack([row.index_median(get, length or self.k) for row in self.rows])

    @property
    def extent(self) -> str:
        """How many layers and matrices these are, in words."""
        layers = [row.layer for row in self.rows if row.layer is not None]
        words = f"{len(layers)} layer{'s' if len(layers) != 1 else ''}" if layers else "in no layer"
        if len(layers) > 1:
            words += f" ({layers[0]} to {layers[-1]})"
        return f"{words}, medians of {len(self.targets):,} matrices" if self.stacked else words


def groups_of(targets: Iterable[Target]) -> list[Group]:
    """The groups in the order of the checkpoint. Their rows are ordered by layer, with those outside of all layers last."""
    found: dict[str, dict[int | None, list[Target]]] = {}
    for target in targets:
        found.setdefault(target["group"], {}).setdefault(target["layer"], []).append(target)
    return [
        Group(
            name,
            tuple(
                Row(layer, tuple(members))
                for layer, members in sorted(rows.items(), key=lambda item: (item[0] is None, item[0] or 0))
            ),
        )
        for name, rows in found.items()
    ]


def worst_residual(target: Target) -> float:
    """The largest residual of a matrix's directions, relative to s_1, in both models."""
    return float(max((*target["residual"], *((target.get("tuned") or {}).get("residual") or ())), default=0.0))


def relative_update(target: Mapping[str, Any]) -> float:
    """The norm of the change over the base's norm; 0 where nothing changed."""
    update = target.get("update")
    return 0.0 if update is None else float(update["relative"] or 0.0)
