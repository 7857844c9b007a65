"""The command ``export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    PATH,
    json_option,
    notes_and_quiet,
    overwrite_option,
    push_options,
    quiet_option,
)
from surgery.cli.printing import print_json
from surgery.cli.text import say, size, whole
from surgery.progress import phase

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Write trained scales as an adapter for other tools.")
@click.argument("factorized", type=PATH)
@click.argument("scales", type=PATH)
@click.option(
    "--to",
    "kind",
    type=click.Choice(["peft"]),
    default="peft",
    show_default=True,
    help="Format: a LoRA adapter as PEFT stores it.",
)
@click.option("-o", "--out", default="adapter", show_default=True, type=PATH, help="Folder to write.")
@push_options
@overwrite_option
@json_option
@quiet_option
@notes_and_quiet
def export(factorized: Path, scales: Path, kind: str, out: Path, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write the scales or cores in file SCALES as a LoRA adapter against the original model of folder FACTORIZED.

    PEFT loads it, and merges it to what fold writes; all modules have one rank, so that vLLM takes it as well. What an
    adapter cannot say, or PEFT is known to load wrongly, is refused: fold instead.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands.adapters.export import export as operation

    start = time.perf_counter()
    report = operation(factorized, scales, out, **chosen, progress=bar)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds)
        return
    say(
        f"{whole(out)}: a LoRA adapter of rank {report.rank} for {report.modules} modules; "
        f"{size(report.bytes_written)} in {seconds:.1f} s",
        quiet=quiet,
    )
