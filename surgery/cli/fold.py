"""The command ``fold``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    PATH,
    dequantize_option,
    devices_option,
    engine_option,
    json_option,
    memory_options,
    notes_and_quiet,
    overlay_base_option,
    overwrite_option,
    profile_option,
    push_options,
    quiet_option,
    rounding_option,
    stream_option,
)
from surgery.cli.outcomes import kept_of_update
from surgery.cli.printing import print_json
from surgery.cli.profile import profile_text
from surgery.cli.text import say, size, whole
from surgery.progress import phase

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Fold trained scales or cores back into dense weights.")
@click.argument("factorized", type=PATH)
@click.argument("scales", type=PATH)
@click.option("-o", "--out", default="folded", show_default=True, type=PATH, help="Folder to write.")
@overlay_base_option
@click.option(
    "--lora",
    metavar="ADAPTER",
    type=PATH,
    help="Folder of a LoRA adapter that was trained together with the scales. It is added before weights are rounded, once.",
)
@dequantize_option
@rounding_option
@devices_option
@memory_options
@engine_option
@stream_option
@push_options
@overwrite_option
@profile_option
@json_option
@quiet_option
@notes_and_quiet
def fold(
    factorized: Path,
    scales: Path,
    out: Path,
    base: str | None,
    lora: Path | None,
    profile: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Fold the scales or cores in file SCALES into the weights of folder FACTORIZED.

    Writes a folder that loads as the original model did, with its names, dtypes, shards, config and tokenizer.
    Untouched scales or cores give back the original files byte for byte. A changed quantized weight is quantized again.

    SCALES may also be the folder of an adapter that PEFT has trained: an adapter that surgery export has written for training,
    or one of the method in surgery.peft.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands import fold as operation
        from surgery.timing import Timing

    timing = Timing() if profile else None
    start = time.perf_counter()
    report = operation.fold(
        factorized,
        scales,
        out,
        base=base,
        lora=lora,
        **chosen,
        progress=bar,
        timing=timing,
    )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds, timing=timing)
        return
    outcome = (
        "the original weights, byte for byte"
        if report.restored == report.shards
        else f"{report.changed} of {report.targets} targets changed"
    )
    if lora is not None or report.adapted:
        outcome += f", {report.adapted} tensors by the adapter"
    outcome += kept_of_update(report.kept, report.kept_least)
    if report.dequantized:
        outcome += ", quantized weights now bfloat16"
    if not report.lossless:
        outcome += ", the others not exactly the source's (made with --no-correction)"
    if timing is not None:
        click.echo(profile_text(timing, seconds))
    say(f"{whole(out)}: {outcome}; {size(report.bytes_written)} in {seconds:.1f} s", quiet=quiet)
