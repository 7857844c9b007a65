"""The commands that make scales files of others: ``project`` and ``blend``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    MODEL,
    PATH,
    device_option,
    factorized_option,
    json_option,
    notes_and_quiet,
    overlay_base_option,
    overwrite_file_option,
    quiet_option,
)
from surgery.cli.printing import print_json
from surgery.cli.tables import table
from surgery.cli.text import say, whole
from surgery.names import TRAINS, Train
from surgery.progress import phase

if TYPE_CHECKING:
    from surgery.commands.project import Projection

# Modules that import torch are imported inside the commands: --help must not wait for them.

out_option = click.option(
    "-o",
    "--out",
    default="scales.safetensors",
    show_default=True,
    type=PATH,
    help="Scales file to write.",
)


@click.command(short_help="Find the scales or cores that come closest to a fine-tuned model.")
@click.argument("factorized", type=PATH)
@click.argument("tuned", type=MODEL)
@out_option
@click.option(
    "--train",
    type=click.Choice(TRAINS),
    default="scales",
    show_default=True,
    help="What to find: scales, or cores, which also turn the kept directions.",
)
@overlay_base_option
@device_option
@overwrite_file_option
@json_option
@quiet_option
@notes_and_quiet
def project(
    factorized: Path,
    tuned: str,
    out: Path,
    train: Train,
    base: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the scales or cores that bring the folder FACTORIZED closest to TUNED, a repo id or a local folder.

    TUNED is a full fine-tune of the same model: the same tensors, in any dtype and any shards. They may have names that a
    wrapper has given them, or be stored in another way that transformers loads as the same. Scales and cores are the
    least-squares solutions: g_i = 1 + u_i^T (W_tuned - W) v_i / s_i, and C = I + U^T (W_tuned - W) V / sqrt(s s^T). The table
    shows, for each target:

    \b
    change      size of the change, |W_tuned - W| / |W| (Frobenius norms)
    explained   share of the change's squared norm that the scales explain;
                with --train core in two columns: scales, and core
    |g - 1|     largest distance of a scale from 1
    |C - I|     with --train core: largest distance of an entry of a core
                from the same entry of the identity
    """
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.commands import project as operation

    start = time.perf_counter()
    report = operation.project(factorized, tuned, out, train=train, base=base, device=device, overwrite=overwrite, progress=bar)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds)
        return
    total = dataclasses.replace(report.total, key=f"all {len(report.targets)}")
    rows = [_figures(one, train) for one in (*report.targets, total)]
    heading = ["change", "explained", "|g - 1|"] if train == "scales" else ["change", "scales", "core", "|C - I|"]
    click.echo(table(["target", *heading], rows, flush_right=range(1, 1 + len(heading)), names=(0,)))
    told = f"{report.trainable} scales"
    if train == "core":
        told = f"cores of {report.trainable} numbers"
        if total.explained is not None:
            told += f", which explain {_share(total.explained)} of the change, scales {_share(total.explained_by_scales)};"
    say(f"{whole(out)}: {told} in {seconds:.1f} s", quiet=quiet)


def _figures(found: Projection, train: Train) -> list[str]:
    shares = [found.explained] if train == "scales" else [found.explained_by_scales, found.explained]
    change = "-" if found.change is None else f"{found.change:.3g}"
    return [found.key, change, *map(_share, shares), f"{found.largest:.3g}"]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.7,0.3") from None


@click.command(short_help="Take the weighted mean of scales files.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=PATH)
@out_option
@click.option(
    "--weights",
    callback=_numbers,
    metavar="W,W...",
    help="One weight for each file; scaled so that their sum is 1.  [default: equal]",
)
@click.option(
    "--space",
    type=click.Choice(["linear", "log"]),
    default="linear",
    show_default=True,
    help="linear: mean of scales or cores; log: geometric mean, of scales only.",
)
@factorized_option
@overwrite_file_option
@json_option
@quiet_option
@notes_and_quiet
def blend(
    files: tuple[Path, ...],
    out: Path,
    weights: list[float] | None,
    space: Literal["linear", "log"],
    factorized: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the weighted mean of scales FILEs that were trained with the same factorized folder.

    A negative weight subtracts a training from the others: --weights 1.5,-0.5. If a FILE holds cores, the result holds cores
    as well, and scales g of other files count as cores diag(g). The factorized folder is not needed. A FILE may also be the
    folder of an adapter that holds scales or cores.
    """
    from surgery.commands import blend as operation

    report = operation.blend(
        files, out, weights=weights, space=space, factorized=factorized, overwrite=overwrite, progress=Bar(quiet=quiet)
    )
    if as_json:
        print_json(report)
        return
    shares = ", ".join(f"{weight:.3g}" for weight in report.weights)
    numbers, untouched = ("scales", "1") if report.train == "scales" else ("numbers in the cores", "the identity")
    say(
        f"{whole(out)}: {report.changed} of {report.trainable} {numbers} of {report.targets} targets differ from {untouched}; "
        f"weights {shares}, {report.space} mean",
        quiet=quiet,
    )
