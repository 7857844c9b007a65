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

#: Entries that may be added to a report's JSON, and their meanings.
ADDED = {
    "out": ("string", "the folder that was written"),
    "seconds": ("number", "how long the command took"),
    "profile": (
        "object",
        "with `--profile`: the `seconds` that the weight files took, how many `threads` of each kind there were, and the "
        "seconds of their `stages`, summed over the threads of a kind",
    ),
}


def print_json(report: Report, *, out: Path | None = None, seconds: float | None = None, timing: Timing | None = None) -> None:
    """Print a report as one JSON object, with what the command adds to it.

    Args:
        report: what the operation returned.
        out: where its result was written, if the report does not say.
        seconds: how long the operation took; printed to four digits.
        timing: where the time went; None if nobody asked.
    """
    entries = report.as_json()
    if out is not None:
        entries["out"] = str(out)
    if seconds is not None:
        entries["seconds"] = rounded_to(seconds, 4)
    click.echo(json.dumps(entries | profile_figures(timing), indent=1, allow_nan=False))
