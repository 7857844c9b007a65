"""A plan as text for people."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from surgery.cli.outcomes import trainable_text
from surgery.cli.tables import table
from surgery.cli.text import duration, fitted, shown, size

if TYPE_CHECKING:
    from surgery.planning.plan import Plan


def plan_text(plan: Plan, seconds: float, *, every: bool) -> str:
    """A plan as text: tables of targets and of what is passed over, notes and totals.

    Args:
        plan: the plan.
        seconds: how long the run would take.
        every: whether each tensor gets a line; else one line stands for those whose names differ in numbers alone.
    """

    def group(name: str) -> str:
        return name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

    targets = Counter(
        (
            group(target.key),
            "x".join(map(str, target.shape)),
            target.view.kind + (f", {'x'.join(map(str, target.matrices))}" if target.view.slice else ""),
            target.dtype,
            f"{'' if target.energy is None else '<= '}{target.rank}",
        )
        for target in plan.targets
    )
    skipped = Counter((group(skip.tensor), skip.reason) for skip in plan.skipped)
    totals = [
        f"{len(plan.targets)} targets, {'at most ' if any(t.energy is not None for t in plan.targets) else ''}"
        f"{trainable_text(plan.trainable, plan.train)}"
        + (f", {_reached(plan)} of the weights that would be targets" if plan.reached < 1 else "")
        + f"; {len(plan.skipped)} tensors passed over",
        f"{plan.layout} layout, "
        + (f"recipe {plan.recipe}" if plan.recipe else "no recipe: the defaults for any model")
        + (", each matrix with a proof" if plan.options.prove else ""),
        f"{plan.files_along} other files are copied, {size(plan.bytes_along)}"
        + (f"; {len(plan.left_out)} files and folders are left out" if plan.left_out else ""),
        f"reads {size(plan.bytes_read)}, writes at most about {size(plan.bytes_written)}, "
        + _download(plan)
        + f"needs at most about {size(plan.memory.peak_bytes)} of memory"
        + (f", {size(plan.memory.device_bytes)} of each GPU's" if plan.memory.device_bytes else ""),
        f"takes about {duration(seconds)} on this machine" + (", without the download" if plan.download_bytes else ""),
    ]
    rows = [[f"{count}", *line] for line, count in targets.items()]
    stays: dict[str, list[str]] = {}
    for file, reason in plan.left_out.items():
        stays.setdefault(f"{file}: {reason}" if every else reason, []).append(file)
    left = [[f"{len(files)}", _few(files), plan.left_out[files[0]]] for files in stays.values()]
    passed = [[f"{count}", *line] for line, count in skipped.items()]
    return "\n".join(
        [
            table(["", "target", "shape", "view", "dtype", "rank"], rows, flush_right=(0, 5), names=(1,)),
            "",
            *([table(["", "passed over", "reason"], passed, flush_right=(0,), names=(1,), prose=(2,)), ""] if passed else []),
            *([table(["", "left out", "reason"], left, flush_right=(0,), prose=(1, 2)), ""] if left else []),
            *map(fitted, totals),
            *(shown(f"note: {note}") for note in plan.notes),
        ]
    )


def _reached(plan: Plan) -> str:
    """The share of the weights that are reached, as a percentage that does not look like all or nothing."""
    return f"{min(max(100 * plan.reached, 0.01), 99.9):.3g} %"


def _few(files: list[str]) -> str:
    """The first few names, and how many more there are, for a cell of a table."""
    count = next((count for count in range(min(len(files), 8), 1, -1) if len(", ".join(files[:count])) <= 32), 1)
    return ", ".join(files[:count]) + (" ..." if count < len(files) else "")


def _download(plan: Plan) -> str:
    if not plan.download_bytes:
        return ""
    if plan.temporary_bytes < plan.download_bytes:
        return f"downloads {size(plan.download_bytes)}, with at most {size(plan.temporary_bytes)} of it on the disk at a time, "
    return f"downloads {size(plan.download_bytes)} into the hub's cache, "
