"""The command ``extract``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    MODEL,
    PATH,
    devices_option,
    engine_option,
    fills_options,
    json_option,
    memory_options,
    notes_and_quiet,
    overwrite_option,
    profile_option,
    push_options,
    quiet_option,
    revision_option,
    stream_option,
    subfolder_option,
)
from surgery.cli.outcomes import least_share, median_share, share_text, span
from surgery.cli.printing import print_json
from surgery.cli.profile import profile_text
from surgery.cli.tables import table
from surgery.cli.text import fitted, say, size, whole
from surgery.progress import phase

if TYPE_CHECKING:
    from surgery.commands.adapters.extract import ExtractPlan
    from surgery.extraction.told import ExtractedTarget, ExtractReport
    from surgery.format.options import Options

# Modules that import torch are imported inside the commands: --help must not wait for them.

_WORDS = {
    "include": "Take the weights whose names match, and no others; embeddings and heads too (repeatable).",
    "seed": "Seed of the approximation's random start.",
    "tolerance": "A direction has converged when its residual, divided by the largest singular value, is at most this.",
}


def _rank(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    """A number, or ``auto``."""
    if value is None or value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


@click.command(short_help="Extract a fine-tune as a LoRA adapter.")
@click.argument("base", type=MODEL)
@click.argument("tuned", type=MODEL)
@click.option("-o", "--out", default="adapter", show_default=True, type=PATH, help="Folder to write.")
@click.option(
    "--rank",
    callback=_rank,
    metavar="K|auto",
    help="Rank for each weight; auto: all directions above the noise of rounding.  [default: 16]",
)
@click.option(
    "--energy", type=float, metavar="X", help="Instead of a rank: keep this share (0 to 1) of each change's squared norm."
)
@click.option(
    "--budget", type=int, metavar="N", help="How many numbers the whole adapter may have; ranks are chosen to keep the most."
)
@click.option("--max-rank", type=int, metavar="K", help="Without a fixed rank: the largest rank of a weight.  [default: 256]")
@click.option(
    "--layout",
    type=click.Choice(["peft", "diffusers", "kohya"]),
    default="peft",
    show_default=True,
    help="diffusers, kohya: for a part of a diffusion pipeline.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the adapter.",
)
@click.option("--uniform", is_flag=True, help="Pad all pairs with zeros to one rank, for engines that need it (SGLang, TGI).")
@click.option("--full", multiple=True, metavar="GLOB", help="Save matching tensors whole, if they have changed (repeatable).")
@fills_options("recipe", "include", "exclude", "seed", "tolerance", words=_WORDS)
@revision_option
@click.option("--tuned-revision", metavar="REV", help="Branch, tag or commit of the fine-tuned model.")
@subfolder_option
@devices_option
@memory_options
@engine_option
@stream_option
@push_options
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be extracted, from headers, and stop.")
@profile_option
@json_option
@quiet_option
@notes_and_quiet
def extract(
    base: str,
    tuned: str,
    out: Path,
    options: Options,
    engine: Any,
    stream: bool,
    push_to_hub: str | None,
    private: bool,
    overwrite: bool,
    dry_run: bool,
    profile: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Write the change from BASE to TUNED, its fine-tuned version, as a LoRA adapter: repo ids or local folders.

    The change of each weight is approximated with the least error that its rank allows. Both models are streamed. Their dtypes
    and weight files may differ. The report names what else has changed, such as norms and embeddings; --full saves
    such tensors whole. surgery merge BASE ADAPTER gives the fine-tuned model back, as closely as the report says.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands.adapters import extract as operation
        from surgery.timing import Timing

    if dry_run:
        planned = operation.plan_extract(base, tuned, **chosen, options=options, progress=bar)
        if as_json:
            print_json(planned)
        else:
            click.echo(_plan_text(planned))
        return
    timing = Timing() if profile else None
    start = time.perf_counter()
    report = operation.extract(
        base,
        tuned,
        out,
        **chosen,
        options=options,
        engine=engine,
        stream=stream,
        push_to_hub=push_to_hub,
        private=private,
        overwrite=overwrite,
        progress=bar,
        timing=timing,
    )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds, timing=timing)
        return
    if timing is not None:
        click.echo(profile_text(timing, seconds))
    if not quiet:
        click.echo(_table(report.targets))
    written = sum(record.size for record in report.files)
    outcome = _outcome(report, uniform=chosen["uniform"])
    say(f"{whole(out)}: {outcome}; {size(written)} in {seconds:.1f} s", quiet=quiet)


def _outcome(report: ExtractReport, *, uniform: bool) -> str:
    from surgery.extraction.told import ranks_in_words

    text = f"{report.modules} modules {ranks_in_words(report, uniform=uniform)}"
    if report.kept is not None:
        text += f", {share_text(report.kept)} of the targets' change"
    saved = sum(one.fate == "saved" for one in report.others)
    if saved:
        text += f", {saved} tensors whole"
    if report.kept_of_all is not None and report.kept_of_all != report.kept:
        text += f", {share_text(report.kept_of_all)} of all change"
    return text


def _table(targets: Sequence[ExtractedTarget]) -> str:
    """A table of the targets: those whose names differ in numbers alone have one row."""
    groups: dict[str, list[ExtractedTarget]] = {}
    for one in targets:
        groups.setdefault(re.sub(r"\d+", "*", one.tensor), []).append(one)
    rows = [
        [
            name if len(some) > 1 else some[0].tensor,
            str(len(some)),
            span(one.rank for one in some),
            median_share([one.change for one in some]),
            least_share([one.kept for one in some]),
            _most([one.merged_error for one in some]),
            span(one.above_floor for one in some),
        ]
        for name, some in groups.items()
    ]
    head = ("weights", "number", "rank", "change", "kept", "merged error", "above noise")
    return table(head, rows, flush_right=(1, 2, 3, 4, 5, 6), names=(0,))


def _most(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return share_text(max(known)) if known else "-"


def _plan_text(plan: ExtractPlan) -> str:
    groups: dict[str, list[Any]] = {}
    for target in plan.targets:
        groups.setdefault(re.sub(r"\d+", "*", target.tensor), []).append(target)
    rows = [
        [
            name if len(some) > 1 else some[0].tensor,
            str(len(some)),
            "x".join(map(str, some[0].matrices if some[0].matrices[0] > 1 else some[0].matrices[1:])),
            some[0].dtype,
            span(target.rank for target in some),
        ]
        for name, some in groups.items()
    ]
    compared = f"{plan.compared} compared" + (f" ({len(plan.resized)} of another shape in TUNED)" if plan.resized else "")
    rest = (
        f"{len(plan.targets)} weights, {len(plan.saved)} tensors whole if they have changed, {compared}, "
        f"{len(plan.gone)} only in BASE, {len(plan.further)} only in TUNED; reads {size(plan.bytes_read)}, writes at most "
        f"{size(plan.bytes_written)}"
        + (f", of which {size(plan.download_bytes)} have to be fetched" if plan.download_bytes else "")
        + f"; at most {size(plan.peak_memory_bytes)} of memory"
    )
    text = table(("weights", "number", "shape", "dtype", "rank"), rows, flush_right=(1, 2, 4), names=(0,))
    return f"{text}\n\n{fitted(rest, indent='')}"
