"""The report of an extraction, and the notes that go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import few
from surgery.extraction.extraction import Extraction
from surgery.extraction.records import ExtractedShard
from surgery.extraction.told import ExtractReport, Totals, told_of_other, told_of_target
from surgery.files.file_records import FileRecord
from surgery.names import DTYPES
from surgery.planning.targets import matches
from surgery.progress import listening
from surgery.tuned.likeness import Norms, note_what_is_unlikely
from surgery.updates.writing.adapter import AdapterToWrite


@dataclass(frozen=True, slots=True)
class WrittenAdapter:
    """An adapter that has been written: its folder, what it is, and its files."""

    out: Path
    adapter: AdapterToWrite
    records: Sequence[FileRecord]


def report_of(
    extraction: Extraction, results: Sequence[ExtractedShard], ranks: Mapping[str, int], written: WrittenAdapter
) -> ExtractReport:
    """The report of an extraction.

    Args:
        extraction: as planned.
        results: of all jobs, in order.
        ranks: of all targets.
        written: the adapter.
    """
    totals = Totals()
    found = {one.tensor: one for result in results for one in result.targets}
    plan, reasons = extraction.plan, {skipped.tensor: skipped.reason for skipped in extraction.plan.skipped}
    reasons |= {one: "matched by --full" for one in reasons if matches(one, extraction.options.full)}
    targets = tuple(told_of_target(target, found[target.tensor], ranks[target.tensor], totals) for target in plan.targets)
    others = []
    for shard, result in zip(plan.shards, results, strict=True):
        for one in result.others:
            entry = extraction.entry(one.tensor)
            # A plan passes over the tensor of the file; what is compared is the weight whose numbers that may have packed.
            reason = reasons[entry.name if entry.name in reasons else entry.stored.name]
            saved = one.tensor in extraction.saved
            others.append(told_of_other(entry, shard.file, one, reason, totals, saved=saved))
    return ExtractReport(
        out=written.out,
        layout=extraction.options.form.layout,
        dtype=next(name for name, stored in DTYPES.items() if stored == extraction.options.form.dtype),
        files=tuple(written.records),
        modules=written.adapter.modules,
        rank=written.adapter.rank,
        numbers=written.adapter.numbers,
        targets=targets,
        others=tuple(others),
        further=extraction.further(),
        change=totals.relative_change(),
        kept=totals.kept(),
        kept_of_all=totals.kept_of_all(),
        error=totals.error(),
        merged_error=totals.merged_error(),
    )


def tell_of(report: ExtractReport, tuned: str, results: Sequence[ExtractedShard]) -> None:
    """Notes on what the user should know of a result."""
    norms = [
        Norms(one.tensor, matrix.before, matrix.after, matrix.change)
        for result in results
        for one in result.targets
        for matrix in one.matrices
    ]
    note_what_is_unlikely(tuned, norms)
    tell_what_is_missing(report)
    if stopped := [one.tensor for one in report.targets if one.rule == "passes"]:
        listening().note(f"of {len(report.targets)} approximations these ended before they were good enough: {few(stopped)}")


def tell_what_is_missing(report: ExtractReport) -> None:
    """A note for each way in which a tensor differs between the models without being in the adapter."""
    note = listening().note
    if left := [one for one in report.others if one.fate == "changed"]:
        most = max(left, key=lambda one: one.change or 0.0)
        change = "" if most.change is None else f", by {_figure(most.change)} of its norm"
        many = f"{len(left)} tensors have changed and are not in the adapter, most of all {most.tensor}{change}"
        one = f"{most.tensor} has changed{change}, and is not in the adapter"
        hints = ["--full GLOB takes small ones whole"] if report.layout == "peft" else []
        if any(len(each.shape) > 1 for each in left):
            hints.append("--include GLOB chooses the matrices that become pairs")
        note("; ".join([many if len(left) > 1 else one, *([", ".join(hints)] if hints else [])]))
    if resized := [one for one in report.others if one.fate == "resized"]:
        shapes = (f"{one.tensor}, {list(one.shape)} and there {list(one.tuned_shape or ())}" for one in resized)
        note(
            f"{len(resized)} tensor{'s have' if len(resized) > 1 else ' has'} another shape in the tuned model: "
            f"{few(shapes, between='; ')}; nothing of that is in the adapter, neither the change of the common part nor "
            f"what is beyond it, and a merge leaves {'these tensors' if len(resized) > 1 else 'it'} as before"
        )
    if gone := [one.tensor for one in report.others if one.fate == "gone"]:
        note(f"not in the tuned model, of the tensors of the base: {few(gone)}; a merge leaves them as they are")
    if report.further:
        note(f"not in the base, of the tensors of the tuned model: {few(report.further)}; the adapter has nothing of them")


def _figure(value: float) -> str:
    """Two digits; of a large number all before the point."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"
