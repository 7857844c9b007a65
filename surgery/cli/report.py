"""What the command line shows: data on stdout, all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
from tqdm import tqdm


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


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns padded with spaces; the first ``left`` are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
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
