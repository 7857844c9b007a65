"""The command ``resize``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import MODEL, PATH, json_option, notes_and_quiet, overwrite_option, quiet_option
from surgery.cli.outcomes import kept_of_update, least_share, span
from surgery.cli.printing import print_json
from surgery.cli.tables import table
from surgery.cli.text import fitted, say, size, whole
from surgery.progress import phase

if TYPE_CHECKING:
    from surgery.commands.adapters.resize import ResizeReport

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Give an adapter another rank, without a model.")
@click.argument("adapter", type=MODEL)
@click.option("-o", "--out", default="resized", show_default=True, type=PATH, help="Folder to write, or FILE.safetensors.")
@click.option("--rank", type=int, metavar="K", help="How many directions to keep of each module's update.")
@click.option(
    "--energy", type=float, metavar="X", help="Instead of a rank: keep this share (0 to 1) of each update's squared norm."
)
@click.option("--max-rank", type=int, metavar="K", help="With --energy: the largest rank of an update.")
@click.option("--uniform", is_flag=True, help="One rank for all modules; pad smaller ones with zeros.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Write the new matrices in this dtype; by default each keeps its own.",
)
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be kept, and stop.")
@json_option
@quiet_option
@notes_and_quiet
def resize(adapter: str, out: Path, dry_run: bool, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write ADAPTER, a LoRA adapter of PEFT, diffusers or kohya, with another rank, in its own layout.

    The update of each module becomes the closest one of its new rank, by an SVD of B A. This needs no model. The table shows
    the share of the squared norm that is kept. Modules whose names differ only in numbers share a row, with the least of them.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands.adapters.resize import resize as operation

    start = time.perf_counter()
    report = operation(adapter, out, dry_run=dry_run, **chosen, progress=bar)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds)
        return
    if not quiet or dry_run:
        click.echo(_table(report))
    text = f"{len(report.modules)} modules, rank {report.rank_before} -> {report.rank}"
    text += kept_of_update(report.kept, report.kept_least)
    text += f"; {size(report.bytes_before)} -> {size(report.bytes_written)}"
    if dry_run:
        click.echo("\n" + fitted(f"{text}; nothing is written", indent=""))
    else:
        say(f"{whole(out)}: {text} in {seconds:.1f} s", quiet=quiet)


def _table(report: ResizeReport) -> str:
    groups: dict[str, list[Any]] = {}
    for one in report.modules:
        groups.setdefault(re.sub(r"\d+", "*", one.module), []).append(one)
    rows = [
        [
            name if len(some) > 1 else some[0].module,
            str(len(some)),
            span(one.rank_before for one in some),
            span(one.rank for one in some),
            least_share([one.kept for one in some]),
        ]
        for name, some in groups.items()
    ]
    return table(("modules", "number", "before", "rank", "kept"), rows, flush_right=range(1, 5), names=(0,))
