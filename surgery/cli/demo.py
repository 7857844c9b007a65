"""The command ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.bar import Bar
from surgery.cli.options import PATH, device_option, json_option, notes_and_quiet, overwrite_option, quiet_option
from surgery.cli.printing import print_json
from surgery.cli.tables import table
from surgery.cli.text import fitted, say, size, whole
from surgery.escapes import quoted
from surgery.progress import phase

if TYPE_CHECKING:
    from surgery.demo.run import DemoReport

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Do the whole job on a small built-in model.")
@click.option("-o", "--out", type=PATH, help="Keep the demo's folders here; without it nothing is kept.")
@click.option("--rank", default=16, show_default=True, help="Singular directions to keep of each target.")
@click.option("--steps", default=60, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@device_option
@overwrite_option
@json_option
@quiet_option
@notes_and_quiet
def demo(out: Path | None, rank: int, steps: int, device: str, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Do the whole job on the built-in model: factorize, train the scales, fold, compare.

    The model is a small Llama that has learned Python source code; its scales are trained on English prose.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.demo.run import run_demo

    report = run_demo(out, rank=rank, steps=steps, device=device, overwrite=overwrite, progress=bar)
    if as_json:
        print_json(report)
    else:
        click.echo(_demo_text(report))
        if out is not None:
            kept = (whole(out / name) for name in ("factorized", "scales.safetensors", "folded"))
            say(f"kept: {', '.join(kept)}", quiet=quiet)
            convert = f"python llama.cpp/convert_hf_to_gguf.py {quoted(out / 'folded')} --outfile demo.gguf"
            say(f"llama.cpp serves the folded model: {whole(convert)}", quiet=quiet)


def _demo_text(report: DemoReport) -> str:
    rows = [
        ["original model", f"{report.weights:,} weights", size(report.source_bytes), f"{report.loss_before:.4f}", ""],
        ["factorized", f"{report.targets} matrices", size(report.factorized_bytes), "", f"{report.seconds_factorize:.1f}"],
        [
            f"scales, {report.steps} steps",
            f"{report.trainable:,} trainable",
            size(report.scales_bytes),
            f"{report.loss_attached:.4f}",
            f"{report.seconds_train:.1f}",
        ],
        [
            "folded model",
            f"{report.weights:,} weights",
            size(report.source_bytes),
            f"{report.loss_folded:.4f}",
            f"{report.seconds_fold:.1f}",
        ],
    ]
    untouched = (
        "gives the original files back, byte for byte" if report.untouched_fold_identical else "DIFFERS from the original files"
    )
    return "\n".join(
        [
            table(["", "numbers", "on disk", "loss", "seconds"], rows, flush_right=range(1, 5)),
            "",
            fitted(
                f"Trainable: {report.trainable / report.weights:.2%} of the weights. Loss: nats per byte of held-out English",
                "prose; the model had learned Python source code.",
                f"Folding untouched scales {untouched}.",
                indent="",
            ),
        ]
    )
