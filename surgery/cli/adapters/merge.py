"""The command ``merge``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    MODEL,
    PATH,
    dequantize_option,
    devices_option,
    engine_option,
    json_option,
    memory_options,
    notes_and_quiet,
    overwrite_option,
    profile_option,
    push_options,
    quiet_option,
    revision_option,
    rounding_option,
    stream_option,
    subfolder_option,
)
from surgery.cli.outcomes import kept_of_update, table_of_merged
from surgery.cli.printing import print_json
from surgery.cli.profile import profile_text
from surgery.cli.text import fitted, say, size, whole
from surgery.errors import OptionError
from surgery.progress import phase

if TYPE_CHECKING:
    from surgery.commands.adapters.merge import MergePlan, MergeReport

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Merge adapters into a model, without loading it.")
@click.argument("model", type=MODEL)
@click.argument("adapters", type=MODEL, nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--out", default="merged", show_default=True, type=PATH, help="Folder to write.")
@click.option("--weights", metavar="W,W...", help="Factor of each adapter in their sum, such as 0.7,0.3.  [default: 1 each]")
@revision_option
@subfolder_option
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Write all weights of 16 and 32 bits in this dtype; by default each keeps its own.",
)
@dequantize_option
@rounding_option
@devices_option
@memory_options
@engine_option
@stream_option
@push_options
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print which tensors would change, from headers and adapters, and stop.")
@profile_option
@json_option
@quiet_option
@notes_and_quiet
def merge(
    model: str,
    adapters: tuple[str, ...],
    out: Path,
    weights: str | None,
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
    """Merge one ADAPTER or several into MODEL, a Hugging Face repo id or a local folder, weight file by weight file.

    merge takes LoRA adapters as PEFT saves them, including DoRA, rsLoRA, biases, embeddings, experts and saved modules. For
    diffusion models it also takes the layouts of diffusers and kohya. Each tensor of an adapter must have a place in the
    model; else the command stops and names the tensor. Weights that no adapter changes keep their bytes.

    MODEL may be a factorized folder, if ADAPTER was made by surgery export --to peft-pissa and then trained on that folder.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands.adapters import merge as operation
        from surgery.timing import Timing

    factors = None if weights is None else _numbers(weights)
    if dry_run:
        planned = operation.plan_merge(model, adapters, weights=factors, **chosen, progress=bar)
        if as_json:
            print_json(planned)
        else:
            click.echo(_plan_text(planned))
        return
    timing = Timing() if profile else None
    start = time.perf_counter()
    report = operation.merge(
        model,
        adapters,
        out,
        weights=factors,
        **chosen,
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
    if report.tensors and not quiet:
        click.echo(table_of_merged(report.tensors))
    say(f"{whole(out)}: {_outcome(report)}; {size(report.bytes_written)} in {seconds:.1f} s", quiet=quiet)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError("--weights takes numbers separated by commas", got=repr(text), expected="such as 0.7,0.3") from None


def _outcome(report: MergeReport) -> str:
    text = f"{len(report.tensors)} tensors changed" + kept_of_update(report.kept, report.kept_least)
    if report.restored:
        text += f", {report.restored} of {report.shards} weight files unchanged"
    return text + (", quantized weights now bfloat16" if report.dequantized else "")


def _plan_text(plan: MergePlan) -> str:
    sizes = (
        f"{len(plan.tensors)} tensors would change, in {plan.changed_shards} of {plan.shards} weight files; "
        f"reads {size(plan.bytes_read)}, writes {size(plan.bytes_written)}"
        + (f", of which {size(plan.download_bytes)} have to be fetched" if plan.download_bytes else "")
        + f"; at most {size(plan.peak_memory_bytes)} of memory"
    )
    return f"{table_of_merged(plan.tensors)}\n\n{fitted(sizes, indent='')}"
