"""The commands about one scales file: ``scales new`` and ``scales show``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.bar import Bar
from surgery.cli.options import PATH, factorized_option, json_option, notes_and_quiet, overwrite_file_option, quiet_option
from surgery.cli.outcomes import span, trainable_text
from surgery.cli.printing import print_json
from surgery.cli.scaling import out_option
from surgery.cli.tables import table
from surgery.cli.text import fitted, say, whole
from surgery.names import TRAINS, Train

if TYPE_CHECKING:
    from surgery.commands.figures import ChosenDirections, ShownCore
    from surgery.commands.scales import ScalesSummary

# Modules that import torch are imported inside the commands: --help must not wait for them.

#: How many angles, and how many entries, of a core are printed.
_SHOWN = 3


@click.group(short_help="Write an untouched scales file, or look into one.")
def scales() -> None:
    """Write an untouched scales file, or look into one.

    \b
    surgery scales new FACTORIZED [--train core]    untouched scales, or cores
    surgery scales show FILE [--top N] [--json]     the largest changes
    """


@scales.command(short_help="Write an untouched scales file.")
@click.argument("factorized", type=PATH)
@click.option(
    "--train",
    type=click.Choice(TRAINS),
    default="scales",
    show_default=True,
    help="What it holds: scales, one multiplier for each kept direction; core: a K x K matrix between them.",
)
@out_option
@overwrite_file_option
@json_option
@quiet_option
@notes_and_quiet
def new(factorized: Path, train: Train, out: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write an untouched scales file of the folder FACTORIZED: scales that are all 1, or cores that are the identity."""
    from surgery.commands.new_scales import new_scales

    report = new_scales(factorized, out, train=train, overwrite=overwrite, progress=Bar(quiet=quiet))
    if as_json:
        print_json(report)
        return
    say(f"{whole(out)}: {trainable_text(report.trainable, train)}, {report.targets} targets, untouched", quiet=quiet)


@scales.command(short_help="Show what a scales file changes most.")
@click.argument("file", type=PATH)
@click.option(
    "--top", default=20, show_default=True, type=click.IntRange(min=0), help="How many directions, or cores, to list."
)
@factorized_option
@json_option
@quiet_option
@notes_and_quiet
def show(file: Path, top: int, factorized: Path | None, as_json: bool, quiet: bool) -> None:
    """Show the directions that a scales FILE changes most, and a summary. The factorized folder is not needed.

    FILE may also be the folder of an adapter that holds scales or cores.

    Matrices of a stack are counted from 0, directions from 1: direction 1 has the largest singular value. Of cores C, the
    command shows those that are furthest from the identity:

    \b
    |C - I|    the distance, Frobenius norm
    stretch    smallest and largest singular value of C
    turn       the angles by which C turns, in degrees: those of its polar factor
    entries    the largest of C - I, as row,column:value
    """
    from surgery.commands.scales import show_scales

    found = show_scales(file, top=top, factorized=factorized, progress=Bar(quiet=quiet))
    if as_json:
        print_json(found)
        return
    if found.directions:
        rows = [
            [
                one.target,
                "" if one.matrix is None else str(one.matrix),
                str(one.direction),
                f"{one.g:.6g}",
                f"{100 * (one.g - 1):+.3g}",
            ]
            for one in found.directions
        ]
        click.echo(table(["target", "matrix", "direction", "g", "change in %"], rows, flush_right=range(1, 5), names=(0,)))
        click.echo()
    if found.cores:
        click.echo(_table_of_cores(found.cores))
        click.echo()
    click.echo(fitted(*_summary(found)))


def _table_of_cores(cores: Sequence[ShownCore]) -> str:
    rows = [
        [
            one.target,
            "" if one.matrix is None else str(one.matrix),
            f"{one.distance:.4g}",
            f"{one.least:.4g} to {one.most:.4g}",
            _angles(one.angles),
            "  ".join(f"{entry.row},{entry.column}:{entry.value:+.3g}" for entry in one.entries[:_SHOWN]),
        ]
        for one in cores
    ]
    return table(
        ["target", "matrix", "|C - I|", "stretch", "turn", "entries"],
        rows,
        flush_right=(1, 2),
        names=(0,),
    )


def _angles(angles: Sequence[float]) -> str:
    """The largest angles; those that would be printed as 0 are left out."""
    turned = [f"{angle:.3g}" for angle in angles if angle >= 0.0005]
    return ", ".join(turned[:_SHOWN]) + (" ..." if len(turned) > _SHOWN else "") if turned else "0"


def _summary(found: ScalesSummary) -> list[str]:
    figures = f"least {found.least:.6g}, median {found.median:.6g}, most {found.most:.6g}"
    if found.train == "scales":
        changed = f"{found.changed} of them differ from 1" if found.changed else "all of them 1: an untouched file"
        lines = [f"{found.targets} targets, {found.trainable} trainable numbers, {changed}", figures]
    else:
        changed = (
            f"{found.matrices_changed} of them differ from the identity"
            if found.matrices_changed
            else "all of them the identity: an untouched file"
        )
        lines = [
            f"{found.targets} targets, {found.matrices} cores with {found.trainable} trainable numbers, {changed}",
            f"singular values: {figures}; largest turn {_angles([found.largest_angle or 0])} degrees",
        ]
    if found.orthogonal:
        lines.append("trained as orthogonal cores: a turn between two scalings")
    if found.chosen:
        lines.append(_chosen(found.chosen))
    return [*lines, f"fingerprint {found.fingerprint or 'unknown: the file does not say which factors it belongs to'}"]


def _chosen(chosen: Sequence[ChosenDirections]) -> str:
    trained, kept = span(len(one.directions) for one in chosen), span(one.rank for one in chosen)
    each = "target" if all(one.matrix is None for one in chosen) else "matrix"
    return f"{trained} of {kept} directions of each {each} are trained, the others untouched"
