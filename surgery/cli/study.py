"""The commands that study spectra: ``spectra`` and ``recommend``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    MODEL,
    PATH,
    Decorator,
    device_option,
    fills_options,
    json_option,
    notes_and_quiet,
    overwrite_file_option,
    quiet_option,
    revision_option,
)
from surgery.cli.outcomes import device_text
from surgery.cli.printing import print_json
from surgery.cli.text import say, whole
from surgery.format.options import Options
from surgery.names import SPECTRA_FILE, SPECTRA_PAGE, TRAINS, Train
from surgery.progress import phase

# Modules that import torch are imported inside the commands: --help must not wait for them.


#: The options that say which weights are studied and on which device, for ``spectra`` and ``recommend``.
_WHICH_WEIGHTS: tuple[str | Decorator, ...] = (
    "include",
    "exclude",
    "recipe",
    revision_option,
    click.option("--subfolder", metavar="PATH", help="Subfolder with each of the models, as in a diffusion pipeline."),
    "seed",
    device_option,
)
_WORDS = {
    "include": "Take the weights whose names match, and no others (repeatable).",
    "recipe": "Which weights are taken, and how they are viewed as matrices; see surgery recipes.",
}


@click.command(short_help="Study the spectra of a model, or what fine-tuning made of them.")
@click.argument("model", type=MODEL)
@click.argument("tuned", required=False, type=MODEL)
@click.option("-o", "--out", default="report", show_default=True, type=PATH, help="Folder to write.")
@click.option("--top", default=48, show_default=True, help="How many singular values to report of each matrix.")
@click.option("--subspace", type=int, help="Dimension of the leading subspaces that are compared.  [default: 16]")
@fills_options("split", *_WHICH_WEIGHTS, words=_WORDS)
@click.option("--overwrite", is_flag=True, help="Replace an earlier report.")
@json_option
@quiet_option
@notes_and_quiet
def spectra(
    model: str,
    tuned: str | None,
    out: Path,
    options: Options,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Describe the singular values of MODEL's weights, or how those of TUNED, a fine-tuned MODEL, differ from them.

    Writes spectra.json and spectra.csv. With the extra "plot" it also writes index.html, a page with the findings in words and
    pictures that needs no network. All files are written at the end. If the command is stopped before, the same command
    continues after the last finished weight file. With --json the findings are printed as well.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.study import spectra as operation

    start = time.perf_counter()
    report = operation.spectra(model, tuned, out=out, options=options, **where, overwrite=overwrite, progress=bar)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report.findings, out=out, seconds=seconds)
        return
    shown = next(path for name in (SPECTRA_PAGE, SPECTRA_FILE) if (path := out / name).exists())
    say(f"{whole(shown)}: {report.findings.targets} matrices in {seconds:.1f} s on {device_text(report.device)}", quiet=quiet)


@click.command(short_help="Recommend ranks that spend a budget best.")
@click.argument("model", type=MODEL)
@click.argument("tuned", required=False, type=MODEL)
@click.option("--budget", required=True, type=click.IntRange(min=1), help="How much the ranks may cost, in the unit of --unit.")
@click.option(
    "--train",
    type=click.Choice(TRAINS),
    default="scales",
    show_default=True,
    help="What will be trained on k directions: k scales, or a core of k x k numbers.",
)
@click.option(
    "--unit",
    type=click.Choice(["numbers", "bytes"]),
    default="numbers",
    show_default=True,
    help="Unit of the budget: numbers to train, or bytes of U, s and V.",
)
@click.option("--max-rank", default=256, show_default=True, type=click.IntRange(min=1), help="The largest rank of a matrix.")
@click.option("-o", "--out", default="recipe.toml", show_default=True, type=PATH, help="Recipe file to write.")
@fills_options(*_WHICH_WEIGHTS, words=_WORDS)
@overwrite_file_option
@json_option
@quiet_option
@notes_and_quiet
def recommend(
    model: str,
    tuned: str | None,
    budget: int,
    train: Train,
    unit: Literal["numbers", "bytes"],
    max_rank: int,
    out: Path,
    options: Options,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Write a recipe with a rank for each weight of MODEL, chosen so that a budget keeps as much as it can.

    Without TUNED, the ranks keep the most of the squared norm of all weights. With TUNED, a fine-tuned MODEL, they are chosen
    so that scales or cores explain the most of its change. surgery factorize MODEL --recipe FILE takes the result.
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.study import recommend as operation

    start = time.perf_counter()
    report = operation.recommend(
        model,
        tuned,
        budget=budget,
        train=train,
        unit=unit,
        max_rank=max_rank,
        out=out,
        options=options,
        **where,
        overwrite=overwrite,
        progress=bar,
    )
    if as_json:
        print_json(report, seconds=time.perf_counter() - start)
        return
    used = [value for value in report.ranks.values() if value]
    of = "the squared norm of the weights" if tuned is None else "the change"
    what = "scales" if train == "scales" else "numbers in cores"
    say(
        f"{whole(out)}: ranks {min(used)} to {max(used)} for {len(used)} of {len(report.ranks)} weights, "
        f"{report.trainable} {what}, {report.spent} of {budget} {unit}; keeps {report.kept:.2%} of {of}",
        quiet=quiet,
    )
    say(f"one rank for all that fits the budget, {report.uniform_rank}, would keep {report.uniform_kept:.2%}", quiet=quiet)
