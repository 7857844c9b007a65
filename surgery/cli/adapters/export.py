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
from surgery.escapes import quoted
from surgery.progress import phase

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Write scales as an adapter for other tools and trainers.")
@click.argument("factorized", type=PATH)
@click.argument("scales", type=PATH, required=False)
@click.option(
    "--to",
    type=click.Choice(["peft", "peft-trainable", "peft-pissa", "diffusers", "kohya"]),
    default="peft",
    show_default=True,
    help="peft, diffusers, kohya: a LoRA of the original model, in this layout. peft-trainable: scales or cores that PEFT "
    "(0.20 or newer) trains beside the original model. peft-pissa: a LoRA that is trained on FACTORIZED as its model.",
)
@click.option(
    "--train",
    type=click.Choice(["scales", "core"]),
    help="With peft-trainable: what is trained of each weight.  [default: what SCALES holds]",
)
@click.option(
    "--base-model",
    metavar="MODEL",
    help="The model that the adapter's config names, such as a hub id.  [default: the hub id, if the model is from the hub]",
)
@click.option("-o", "--out", default="adapter", show_default=True, type=PATH, help="Folder to write.")
@push_options
@overwrite_option
@json_option
@quiet_option
@notes_and_quiet
def export(factorized: Path, scales: Path | None, to: str, out: Path, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write the scales or cores in file SCALES as an adapter for tools that do not know them.

    By default this is a LoRA adapter of the original model of folder FACTORIZED. PEFT loads it, and merging with PEFT gives
    what fold writes. All modules have one rank, so that vLLM takes it as well. export refuses what an adapter cannot express,
    and what loaders are known to load wrongly; use fold instead.

    With --to peft-trainable or peft-pissa, any trainer that uses PEFT can train the adapter further. SCALES may then be left
    out. fold, export and merge take the trained adapter.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands.adapters.export import export as operation

    start = time.perf_counter()
    report = operation(factorized, scales, out, to=to, **chosen, progress=bar)  # type: ignore[arg-type]  # click has checked
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds)
        return
    what = "a TinyLoRA adapter" if to == "peft-trainable" else "a LoRA adapter"
    trained = f", {report.trainable:,} trainable numbers" if report.trainable else ""
    say(
        f"{whole(out)}: {what} of rank {report.rank} for {report.modules} modules{trained}; "
        f"{size(report.bytes_written)} in {seconds:.1f} s",
        quiet=quiet,
    )
    if to in ("peft-trainable", "peft-pissa"):
        is_lora = to == "peft-pissa"
        model, then = (f"{whole(factorized)} as the model", "merge") if is_lora else ("the original model", "fold")
        load = whole(f"PeftModel.from_pretrained(model, {str(out)!r}, is_trainable=True)")
        say(f"train it with {model}: {load}, then: {whole(f'surgery {then} {quoted(factorized)} TRAINED')}", quiet=quiet)
