"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.cli.outcomes import trainable_text
from surgery.cli.tables import table
from surgery.cli.text import duration, fitted, shown, size
from surgery.names import glob_of_numbers

if TYPE_CHECKING:
    from surgery.planning.plan import Plan
    from surgery.planning.targets import Target


def plan_text(plan: Plan, seconds: float, *, every: bool) -> str:
    """A plan as text: tables of targets and of what is passed over, notes and totals.

    Args:
        plan: the plan.
        seconds: how long the run would take.
        every: whether each tensor gets a line; else one line stands for those whose names differ in numbers alone.
    """

    targets = [
        (
            target.key,
            "x".join(map(str, target.shape)),
            _view(target),
            target.dtype,
            f"{'' if target.energy is None else '<= '}{target.rank}",
        )
        for target in plan.targets
    ]
    passed = _rows([(skip.tensor, skip.reason) for skip in plan.skipped], every=every)
    along, out = plan.files_along, len(plan.left_out)
    totals = [
        f"{len(plan.targets)} targets, {'at most ' if any(t.energy is not None for t in plan.targets) else ''}"
        f"{trainable_text(plan.trainable, plan.train)}"
        + (f", {_reached(plan)} of the weights that would be targets" if plan.reached < 1 else "")
        + f"; {len(plan.skipped)} tensors passed over",
        f"{plan.layout} layout, "
        + (f"recipe {plan.recipe}" if plan.recipe else "no recipe: the defaults for any model")
        + (", each matrix with a proof" if plan.options.prove else ""),
        f"{along} other {'file is' if along == 1 else 'files are'} copied, {size(plan.bytes_along)}"
        + (f"; {out} {'file or folder is' if out == 1 else 'files and folders are'} left out" if out else ""),
        f"reads {size(plan.bytes_read)}, writes at most about {size(plan.bytes_written)}, "
        + _download(plan)
        + f"needs at most about {size(plan.memory.peak_bytes)} of memory"
        + (f", {size(plan.memory.device_bytes)} of each GPU's" if plan.memory.device_bytes else ""),
        f"takes about {duration(seconds)} on this machine" + (", without the download" if plan.download_bytes else ""),
    ]
    stays: dict[str, list[str]] = {}
    for file, reason in plan.left_out.items():
        stays.setdefault(f"{file}: {reason}" if every else reason, []).append(file)
    left = [[f"{len(files)}", _few(files), plan.left_out[files[0]]] for files in stays.values()]
    return "\n".join(
        [
            table(
                ["", "target", "shape", "view", "dtype", "rank"], _rows(targets, every=every), flush_right=(0, 5), names=(1,)
            ),
            "",
            *([table(["", "passed over", "reason"], passed, flush_right=(0,), names=(1,), prose=(2,)), ""] if passed else []),
            *([table(["", "left out", "reason"], left, flush_right=(0,), prose=(1, 2)), ""] if left else []),
            *map(fitted, totals),
            *(shown(f"note: {note}") for note in plan.notes),
        ]
    )


def _rows(lines: Sequence[tuple[str, ...]], *, every: bool) -> list[list[str]]:
    """The rows of a table of tensors, each with a count: those that differ in the numbers of their names alone have one row.

    Rows whose names differ in numbers alone stand together. A row of one tensor has its whole name.

    Args:
        lines: of each tensor its name, and the rest of its row.
        every: whether each tensor has a row of its own.
    """
    groups: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for name, *rest in lines:
        glob = name if every else glob_of_numbers(name)
        groups.setdefault(glob, {}).setdefault(tuple(rest), []).append(name)
    return [
        [f"{len(names)}", glob if len(names) > 1 else names[0], *rest]
        for glob, rows in groups.items()
        for rest, names in rows.items()
    ]


def _view(target: Target) -> str:
    """How a target is seen; of a slice also the size of its matrices, as the shape is that of the whole tensor."""
    sizes = target.matrices if target.view.kind == "stack" else target.matrices[1:]
    return target.view.kind + (f", {'x'.join(map(str, sizes))}" if target.view.slice else "")


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
