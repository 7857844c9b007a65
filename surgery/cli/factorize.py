"""The commands that take a model apart: ``factorize``, ``plan`` and ``recipes``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import (
    MODEL,
    PATH,
    Decorator,
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
from surgery.cli.outcomes import device_text, top_k_text, trainable_text
from surgery.cli.printing import print_json
from surgery.cli.profile import profile_text
from surgery.cli.report import plan_text
from surgery.cli.text import fitted, say, size, whole
from surgery.escapes import quoted
from surgery.format.options import Options
from surgery.names import TRAINS, Train
from surgery.progress import phase
from surgery.reports import rounded_to

if TYPE_CHECKING:
    from surgery.format.manifest import Manifest
    from surgery.run.engines import EngineName

# Modules that import torch are imported inside the commands: --help must not wait for them.


#: The options that a plan depends on, for ``plan`` and ``factorize``.
_PLANNING: tuple[str | Decorator, ...] = (
    "rank",
    "energy",
    "max_rank",
    "recipe",
    "include",
    "exclude",
    "split",
    click.option(
        "--layout",
        type=click.Choice(["residual", "overlay"]),
        help="residual: self-contained; overlay: factors only, used with the weights of the original model.  "
        "[default: residual; overlay where a target is quantized]",
    ),
    "correction",
    "prove",
    click.option(
        "--train",
        type=click.Choice(TRAINS),
        default="scales",
        show_default=True,
        help="What will be trained: scales, one multiplier for each kept direction; core: a K x K matrix between them.",
    ),
    revision_option,
    subfolder_option,
    devices_option,
    memory_options,
    stream_option,
)


@click.command(short_help="Write a model's factorized form and a tiny file of scales.")
@click.argument("model", type=MODEL)
@click.option("-o", "--out", default="factorized", show_default=True, type=PATH, help="Folder to write.")
@fills_options(*_PLANNING, "seed", "tolerance")
@engine_option
@push_options
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what surgery plan prints, and stop.")
@profile_option
@json_option
@quiet_option
@notes_and_quiet
def factorize(
    model: str,
    out: Path,
    options: Options,
    engine: EngineName,
    push_to_hub: str | None,
    private: bool,
    overwrite: bool,
    dry_run: bool,
    profile: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Write the factorized form of MODEL, a Hugging Face repo id or a local folder.

    The recipe of the model's family says which weights are factorized. Without a recipe, these are the linear layers inside
    transformer blocks, experts included; embeddings, output heads, norms, biases and routers are passed over. surgery plan
    lists every tensor that is passed over, with the reason.
    """
    bar = Bar(quiet=quiet)
    if dry_run:
        _show_plan(model, options, where, as_json, quiet)
        return
    with phase(bar, "starting"):
        from surgery.commands import factorize as operation
        from surgery.timing import Timing

    timing = Timing() if profile else None
    start = time.perf_counter()
    report = operation.factorize(
        model,
        out,
        options=options,
        **where,
        engine=engine,
        push_to_hub=push_to_hub,
        private=private,
        overwrite=overwrite,
        progress=bar,
        timing=timing,
    )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds, timing=timing)
    else:
        if timing is not None:
            click.echo(profile_text(timing, seconds))
        say(
            f"{whole(out)}: {report.matrices} matrices at rank {_ranks(report.manifest)}, "
            f"{trainable_text(report.trainable, report.train)}, {size(report.bytes_written)} in {seconds:.1f} s "
            f"on {device_text(report.device)}",
            quiet=quiet,
        )
        say(top_k_text(report.top_k), quiet=quiet)
        say(_next_steps(model, out, report.manifest, report.train), quiet=quiet)


@click.command(short_help="Show what factorize would do, from headers.")
@click.argument("model", type=MODEL)
@fills_options(*_PLANNING)
@click.option("--all", "every", is_flag=True, help="Show each tensor on its own line, not by group.")
@json_option
@quiet_option
@notes_and_quiet
def plan(model: str, options: Options, every: bool, as_json: bool, quiet: bool, **where: Any) -> None:
    """Show what surgery factorize would do with MODEL and the same options, from headers.

    Of a model on the hub, plan fetches only the headers. Of a local model, it also compares weights that may be stored
    twice. Tensors whose names differ only in numbers are shown as one group. Memory and disk are upper estimates. The time
    is a rough estimate, without downloads.
    """
    _show_plan(model, options, where, as_json, quiet, every=every)


def _show_plan(model: str, options: Options, where: dict[str, Any], as_json: bool, quiet: bool, *, every: bool = False) -> None:
    """Print a plan. ``where`` has the options of ``_PLANNING`` that are no fields of ``Options``."""
    bar = Bar(quiet=quiet, notes=False)  # the plan that is printed has them
    with phase(bar, "starting"):
        from surgery.commands import factorize as operation
        from surgery.device import choose_devices
        from surgery.planning.estimate import estimate_seconds

    planned = operation.plan(model, options=options, **where, progress=bar)
    seconds = rounded_to(estimate_seconds(planned, choose_devices(where["device"])[0]), 2)
    if as_json:
        print_json(planned, seconds=seconds)
    else:
        click.echo(plan_text(planned, seconds, every=every))


@click.command(short_help="List the recipes and what they match.")
@json_option
def recipes(as_json: bool) -> None:
    """List the built-in recipes: the model families that use them by default, and the tensors that their rules match.

    Copy one, edit it, and give its path to --recipe; docs/recipes.md describes the format.
    """
    from surgery.planning.recipes import recipes as operation

    report = operation()
    if as_json:
        print_json(report)
        return
    for recipe in report.recipes:
        click.echo(fitted(f"{recipe.name}: {recipe.description}"))
        if recipe.families:
            click.echo(fitted(f"  families: {', '.join(recipe.families)}", indent="    "))
        for rule in recipe.rules:
            seen = f" ({rule.view})" if rule.view else ""
            line = f"  - {rule.text}{seen}" if rule.skip is None else f"  - not {rule.text}: {rule.skip}"
            click.echo(fitted(line, indent="    "))
        click.echo()


def _next_steps(model: str, out: Path, manifest: Manifest, train: Train) -> str:
    """The commands by which scales or cores are trained and folded, to be copied by the user."""
    kind = "" if train == "scales" else f', train="{train}"'
    attach = f"surgery.attach(model, {json.dumps(str(out), ensure_ascii=False)}{kind})"
    fold = f"surgery fold {quoted(out)} scales.safetensors"
    if manifest.layout == "overlay" and manifest.source.repo_id is None:
        fold += f" --base {quoted(model)}"
    return f"train with {whole(attach)}, then: {whole(fold)}"


def _ranks(manifest: Manifest) -> str:
    least, most = (limit(target.rank for target in manifest.targets) for limit in (min, max))
    return str(most) if least == most else f"{least} to {most}"
