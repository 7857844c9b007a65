"""What ``--json`` prints: one object on stdout, whatever the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.profile import profile_figures
from surgery.reports import Report, rounded_to

if TYPE_CHECKING:
    from surgery.timing import Timing

#: What may be added to a report, and what it is.
ADDED = {
    "out": ("string", "the folder that was written"),
    "seconds": ("number", "how long the command took"),
    "profile": (
        "object",
        "with `--profile`: `seconds` at the weight files, how many `threads` of each kind there were, and the seconds of their "
        "`stages`, summed over the threads of a kind",
    ),
}


def print_json(report: Report, *, out: Path | None = None, seconds: float | None = None, timing: Timing | None = None) -> None:
    """A report as JSON: its entries, and what it does not know itself.

    Args:
        report: what the operation told.
        out: where its result was written, if the report does not say.
        seconds: how long it took; told to four digits.
        timing: where the time went.
    """
    entries = report.as_json()
    if out is not None:
        entries["out"] = str(out)
    if seconds is not None:
        entries["seconds"] = rounded_to(seconds, 4)
    click.echo(json.dumps(entries | profile_figures(timing), indent=1, allow_nan=False))
