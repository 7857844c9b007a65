"""What the command line shows: data on stdout, all else on stderr."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from surgery.planning.plan import Plan


class Bar:
    """Progress as one bar over bytes, on a terminal only; notes on stderr unless quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._visible = not quiet and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def start(self, label: str, total_bytes: int) -> None:
        self._bar = tqdm(
            total=total_bytes, desc=label, unit="B", unit_scale=True, disable=not self._visible, leave=False, dynamic_ncols=True
        )

    def item(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=True)

    def advance(self, n_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(n_bytes)

    def note(self, message: str) -> None:
        if not self._quiet:
            tqdm.write(f"note: {message}", file=sys.stderr)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, flush_right: Collection[int] = ()) -> str:
    """Columns padded with spaces; names that would move a terminal's cursor are escaped."""
    rows = [[cell if cell.isprintable() else ascii(cell)[1:-1] for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in flush_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, rows)])


def size(n_bytes: float) -> str:
    """A size for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def say(message: str, *, quiet: bool = False) -> None:
    """A line for the user that is no data."""
    if not quiet:
        click.echo(message, err=True)


def plan_text(steps: Plan, seconds: float, *, every: bool) -> str:
    """A plan as tables of targets and of what is passed over, and its totals.

    Tensors whose names differ in numbers alone are one line, unless ``every`` one is wanted.
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
        for target in steps.targets
    )
    skipped = Counter((group(skip.tensor), skip.reason) for skip in steps.skipped)
    totals = [
        f"{len(steps.targets)} targets, {'at most ' if any(t.energy is not None for t in steps.targets) else ''}"
        f"{steps.trainable} trainable scales; {len(steps.skipped)} tensors passed over",
        f"{steps.layout} layout, " + (f"recipe {steps.recipe}" if steps.recipe else "no recipe: the defaults for any model"),
        f"{steps.files_along} other files go along, {size(steps.bytes_along)}"
        + (f"; {len(steps.left_out)} files and folders stay behind" if steps.left_out else ""),
        f"reads {size(steps.bytes_read)}, writes at most about {size(steps.bytes_written)}, "
        + _download(steps)
        + f"needs at most about {size(steps.memory.peak_bytes)} of memory"
        + (f", {size(steps.memory.device_bytes)} of each GPU's" if steps.memory.device_bytes else ""),
        f"takes about {duration(seconds)} on this machine" + (", without the download" if steps.download_bytes else ""),
        *(f"note: {note}" for note in steps.notes),
    ]
    rows = [[f"{count}", *line] for line, count in targets.items()]
    stays: dict[str, list[str]] = {}
    for file, reason in steps.left_out.items():
        stays.setdefault(f"{file}: {reason}" if every else reason, []).append(file)
    left = [[f"{len(files)}", _few(files), steps.left_out[files[0]]] for files in stays.values()]
    passed = [[f"{count}", *line] for line, count in skipped.items()]
    return "\n".join(
        [
            table(["", "target", "shape", "view", "dtype", "rank"], rows, flush_right=(0, 5)),
            "",
            *([table(["", "passed over", "reason"], passed, flush_right=(0,)), ""] if passed else []),
            *([table(["", "left out", "reason"], left, flush_right=(0,)), ""] if left else []),
            *totals,
        ]
    )


def _few(files: list[str]) -> str:
    """As many names as a line of a table has room for."""
    count = next((count for count in range(min(len(files), 8), 1, -1) if len(", ".join(files[:count])) <= 32), 1)
    return ", ".join(files[:count]) + (" ..." if count < len(files) else "")


def _download(steps: Plan) -> str:
    if not steps.download_bytes:
        return ""
    if steps.temporary_bytes < steps.download_bytes:
        return f"downloads {size(steps.download_bytes)}, of which at most {size(steps.temporary_bytes)} are here at a time, "
    return f"downloads {size(steps.download_bytes)} into the hub's cache, "


def duration(seconds: float) -> str:
    """A rough time for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
