"""What an extraction tells of each tensor of the base, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.extraction.records import RULES, ComparedTensor, ExtractedTensor
from surgery.files.file_records import FileRecord
from surgery.format.header import TensorEntry
from surgery.planning.targets import Target
from surgery.reports import Report, rounded_to

#: Digits of the figures.
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class ExtractedTarget:
    """A weight whose change has become a low-rank pair. Norms are Frobenius norms; of a stack, of all matrices together.

    Attributes:
        tensor, shard, dtype, shape: in the base.
        view: how it is seen: ``matrix``, ``stack`` or ``convolution``.
        rank: of the pair; 0 where there is none.
        change: norm of the change, relative to the weight; null where that is zero.
        kept: share of the change's squared norm that the pair holds; null where nothing has changed.
        error: norm of what it leaves of the change, relative to the change; null likewise.
        merged_error: the same of what ``merge`` writes, which rounds once to the weight's dtype; null where nothing has
            changed, and with a budget.
        above_floor: how many directions stand above the noise that the change ends in; of a stack the most of any matrix. If
            it is the rank, there may be more.
        rule: by which the approximation was ended: ``directions``: each has converged; ``error``: the error is within
            ``excess`` of the least one of this rank; ``passes``: neither within the most passes; ``zero``: nothing has changed.
        excess: by what share the error may be above the least one of this rank; null where no bound is known.
    """

    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    view: str
    rank: int
    change: float | None
    kept: float | None
    error: float | None
    merged_error: float | None
    above_floor: int
    rule: str
    excess: float | None


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor without a low-rank pair.

    Attributes:
        tensor, shard, dtype, shape: in the base.
        fate: ``saved``: it has changed, and the adapter holds it whole; ``changed``: it has, and the adapter does not have
            that; ``same``: it has not; ``resized``: it has another shape in the tuned model, and the adapter does not have
            that; ``gone``: the tuned model does not have it.
        change: norm of its change, relative to the tensor, in Frobenius norms; of a resized one, of the rows in common; null
            where it cannot be told.
        tuned_shape: in the tuned model; null if it is gone.
        reason: why it is no target.
    """

    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    fate: str
    change: float | None
    tuned_shape: tuple[int, ...] | None
    reason: str


@dataclass(frozen=True, slots=True)
class ExtractReport(Report):
    """What an extraction wrote.

    Attributes:
        out: the folder.
        layout, dtype: of the adapter.
        files: its files.
        modules: how many modules have a low-rank pair.
        rank: the largest of them.
        numbers: how many the pairs have, with zeros that fill them up.
        targets: the weights whose changes were approximated.
        others: every other tensor of the base.
        further: tensors of the tuned model that the base does not have.
        change: norm of the change of all targets, relative to them.
        kept: share of its squared norm that the pairs hold; null if nothing has changed.
        kept_of_all: the same of the change of all tensors, whose parts are pairs, saved whole, or left out.
        error: norm of what the pairs leave of the targets' change, relative to it.
        merged_error: the same of what ``merge`` writes; null with a budget.
    """

    out: Path
    layout: str
    dtype: str
    files: tuple[FileRecord, ...]
    modules: int
    rank: int
    numbers: int
    targets: tuple[ExtractedTarget, ...]
    others: tuple[OtherTensor, ...]
    further: tuple[str, ...]
    change: float | None
    kept: float | None
    kept_of_all: float | None
    error: float | None
    merged_error: float | None

    @property
    def is_uneven(self) -> bool:
        """Whether pairs have different ranks."""
        return len({one.rank for one in self.targets if one.rank}) > 1


@dataclass(slots=True)
class Totals:
    """Sums of squared Frobenius norms.

    Attributes:
        before, change: of the targets, and of their changes.
        left: of what the pairs leave of these.
        merged: of what ``merge`` leaves of them; None where that is not known of all.
        all_change, all_left: of all tensors, whatever becomes of them.
    """

    before: float = 0.0
    change: float = 0.0
    left: float = 0.0
    merged: float | None = 0.0
    all_change: float = 0.0
    all_left: float = 0.0

    def relative_change(self) -> float | None:
        return _ratio(math.sqrt(self.change), math.sqrt(self.before))

    def kept(self) -> float | None:
        return _share(self.change, self.left)

    def kept_of_all(self) -> float | None:
        return _share(self.all_change, self.all_left)

    def error(self) -> float | None:
        return _ratio(math.sqrt(self.left), math.sqrt(self.change))

    def merged_error(self) -> float | None:
        return None if self.merged is None else _ratio(math.sqrt(self.merged), math.sqrt(self.change))


def told_of_target(target: Target, found: ExtractedTensor, rank: int, totals: Totals) -> ExtractedTarget:
    """What is told of a target; its sums are added to ``totals``.

    Args:
        target: as planned.
        found: what was found of it.
        rank: that its pair has in the adapter.
        totals: of all tensors.
    """
    before = math.fsum(one.before**2 for one in found.matrices)
    change = math.fsum(one.change**2 for one in found.matrices)
    left = math.fsum(left_by(one.values, one.error, rank) ** 2 for one in found.matrices)
    known = [one.merged for one in found.matrices if one.merged is not None]
    merged = math.fsum(value**2 for value in known) if len(known) == len(found.matrices) else None
    totals.before += before
    totals.change += change
    totals.left += left
    totals.merged = None if totals.merged is None or merged is None else totals.merged + merged
    totals.all_change += change
    totals.all_left += left
    worst = max(found.matrices, key=lambda one: RULES.index(one.rule))
    excess = [one.excess for one in found.matrices]
    return ExtractedTarget(
        tensor=target.tensor,
        shard=target.shard,
        dtype=target.dtype,
        shape=tuple(target.shape),
        view=target.view.kind,
        rank=rank,
        change=_ratio(math.sqrt(change), math.sqrt(before)),
        kept=_share(change, left),
        error=_ratio(math.sqrt(left), math.sqrt(change)),
        merged_error=None if merged is None else _ratio(math.sqrt(merged), math.sqrt(change)),
        above_floor=max(one.above_floor for one in found.matrices),
        rule=worst.rule,
        excess=None if None in excess else rounded_to(max(value or 0.0 for value in excess), 3),
    )


def told_of_other(
    entry: TensorEntry, shard: str, found: ComparedTensor, reason: str, totals: Totals, *, saved: bool
) -> OtherTensor:
    """What is told of a tensor without a pair; its sums are added to ``totals``.

    Args:
        entry: of the tensor in the base.
        shard: the weight file that it is in.
        found: what comparing it has found.
        reason: why it is no target.
        totals: of all tensors.
        saved: whether the adapter holds it whole.
    """
    is_saved = saved and found.fate == "changed"
    if found.change is not None:
        totals.all_change += found.change**2
        totals.all_left += 0.0 if is_saved else found.change**2
    return OtherTensor(
        tensor=entry.name,
        shard=shard,
        dtype=entry.dtype,
        shape=tuple(entry.shape),
        fate="saved" if is_saved else found.fate,
        change=None if found.change is None or found.norm is None else _ratio(found.change, found.norm),
        tuned_shape=None if found.shape is None else tuple(found.shape),
        reason=reason,
    )


def left_by(values: Sequence[float], error: float, rank: int) -> float:
    """The norm of what the first ``rank`` directions leave of a difference.

    Args:
        values: the singular values that were found.
        error: the norm of what all of these leave.
        rank: as many are kept.
    """
    return math.sqrt(error**2 + math.fsum(value**2 for value in values[rank:]))


def _ratio(value: float, whole: float) -> float | None:
    """Their ratio; None where the second is 0 or either is not finite."""
    ratio = value / whole if whole else math.nan
    return rounded_to(ratio, _DIGITS) if math.isfinite(ratio) else None


def _share(whole: float, left: float) -> float | None:
    """The share of ``whole`` without what is left; rounding may take it below 0."""
    return rounded_to(max(0.0, 1 - left / whole), _DIGITS) if whole else None
