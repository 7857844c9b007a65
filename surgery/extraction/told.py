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
    """A weight whose change has become a low-rank pair.

    Norms are Frobenius norms; for a stack, of all matrices together.

    Attributes:
        tensor: its name in the base.
        shard: the weight file of the base that it is in.
        dtype: its dtype in the base.
        shape: its shape in the base.
        view: how the tensor is seen: ``matrix``, ``stack`` or ``convolution``.
        rank: rank of the pair; 0 if there is no pair.
        change: norm of the change, relative to the weight; None if the weight is zero.
        kept: share of the change's squared norm that the pair holds; None if nothing has changed.
        error: norm of the part of the change that the pair does not hold, relative to the change; None if nothing has
            changed.
        merged_error: the same error for the weight that ``merge`` writes, which is rounded once to the weight's dtype;
            None if nothing has changed, or with a budget.
        above_floor: how many directions stand above the noise level of the change; for a stack, the most of any matrix.
            If the number equals the rank, there may be more.
        rule: why the approximation stopped. ``directions``: each direction has converged. ``error``: the error is
            within ``excess`` of the smallest possible error at this rank. ``passes``: neither was reached within the
            maximum number of passes. ``zero``: nothing has changed.
        excess: an upper bound on the share by which the error exceeds the smallest possible error at this rank; None if
            no bound is known.
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
        tensor: its name in the base.
        shard: the weight file of the base that it is in.
        dtype: its dtype in the base.
        shape: its shape in the base.
        fate: what happened to it. ``saved``: it has changed, and the adapter holds the whole tensor. ``changed``: it
            has changed, and the adapter does not hold the change. ``same``: it has not changed. ``resized``: it has
            another shape in the tuned model, and the adapter does not hold the change. ``gone``: the tuned model does
            not have it.
        change: norm of its change relative to the tensor, in Frobenius norms; for a resized tensor, over the rows that
            both have; None if it is not known.
        tuned_shape: its shape in the tuned model; None if the tuned model does not have it.
        reason: why it is not a target.
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
        layout: layout of the adapter.
        dtype: dtype of the adapter's pairs.
        files: the files of the adapter.
        modules: how many modules have a low-rank pair.
        rank: the largest rank of any pair.
        numbers: how many numbers the pairs have, including zeros that pad them.
        targets: the weights whose changes were approximated.
        others: every other tensor of the base.
        further: tensors of the tuned model that the base does not have.
        change: norm of the change of all targets, relative to the norm of all targets.
        kept: share of the squared norm of this change that the pairs hold; None if nothing has changed.
        kept_of_all: share of the squared norm of the change of all tensors that the adapter holds, in pairs and in
            tensors that it saves whole; None if nothing has changed.
        error: norm of the part of the targets' change that the pairs do not hold, relative to this change; None if
            nothing has changed.
        merged_error: the same error for the weights that ``merge`` writes; None if nothing has changed, or with a
            budget.
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
        """Whether the pairs have different ranks."""
        return len({one.rank for one in self.targets if one.rank}) > 1


def ranks_in_words(report: ExtractReport, *, uniform: bool) -> str:
    """The ranks of an adapter's pairs, as words after "modules".

    Args:
        report: of the extraction.
        uniform: whether all pairs were to have one rank.
    """
    if not report.is_uneven:
        return f"of rank {report.rank}"
    return f"padded with zeros to rank {report.rank}" if uniform else f"of rank up to {report.rank}"


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
