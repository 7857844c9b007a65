"""The ``surgery`` command. Exit codes: 0 ok, 1 a SurgeryError, 2 usage, 3 a check that failed, 130 and 143 interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from surgery import __version__
from surgery.cli.options import (
    device_option,
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
    stream_option,
)
from surgery.cli.profile import profile_figures, profile_text
from surgery.cli.report import Bar, plan_text, say, size, table
from surgery.cli.scaling import blend, project, scales
from surgery.cli.study import recommend, spectra
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.demo.run import DemoReport
    from surgery.format.manifest import Manifest
    from surgery.operations.engines import EngineName

# Modules that import torch are imported inside the commands: --help must not wait for them.


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


class _Group(click.Group):
    """Turns a SurgeryError into a message and exit code 1; anything unforeseen keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # of whoever reads the output: click knows what to do
            raise
        except KeyboardInterrupt as stop:
            click.echo("Interrupted.", err=True)
            ctx.exit(143 if isinstance(stop, _Terminated) else 130)
        except SurgeryError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:  # of a path that the system will not even look at
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, before)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="surgery")
def main() -> None:
    """Surgery on model checkpoints: factorize weights by truncated SVD, train only scales, fold them back.

    \b
    surgery factorize MODEL --rank 16              write MODEL's factorized form and a tiny file of scales
    surgery fold factorized/ scales.safetensors    fold trained scales back into dense weights
    """


main.add_command(blend)
main.add_command(project)
main.add_command(recommend)
main.add_command(scales)
main.add_command(spectra)


def _planning(command: Callable[..., None]) -> Callable[..., None]:
    """The options that a plan depends on, for ``plan`` and ``factorize``."""
    options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.option("--rank", type=int, metavar="K", help="Singular directions to keep of each matrix.  [default: 16]"),
        click.option("--energy", type=float, metavar="X", help="Keep this share of each one's squared norm (0 to 1) instead."),
        click.option("--max-rank", type=int, metavar="K", help="With --energy: the most directions.  [default: 256]"),
        click.option(
            "--recipe", metavar="NAME|FILE", help="Which tensors, how seen: see surgery recipes.  [default: the family's]"
        ),
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Take exactly the weights whose names match (repeatable)."
        ),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Never take tensors that match (repeatable)."),
        click.option(
            "--split/--no-split", default=None, help="Split fused weights (qkv, gate_up) into their projections.  [default: no]"
        ),
        click.option(
            "--layout",
            type=click.Choice(["residual", "overlay"]),
            help="residual: self-contained; overlay: factors only, the weights stay where they are.  "
            "[default: residual, for FP8 overlay]",
        ),
        click.option(
            "--correction/--no-correction",
            default=True,
            help="Keep what makes residuals lossless (0.06 to 0.15 bytes per weight).  [default: correction]",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
        click.option("--subfolder", metavar="PATH", help="The model in this subfolder, as in a diffusion pipeline."),
        devices_option,
        memory_options,
        stream_option,
    ]

    for option in reversed(options):
        command = option(command)
    return command


@main.command(short_help="Write a model's factorized form and a tiny file of scales.")
@click.argument("model")
@click.option("-o", "--out", default="factorized", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@_planning
@click.option("--seed", default=0, show_default=True, help="Seed of the SVD's random start.")
@click.option(
    "--tolerance", default=1e-5, show_default=True, help="Residual over the largest singular value at which the SVD stops."
)
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
    seed: int,
    tolerance: float,
    engine: EngineName,
    push_to_hub: str | None,
    private: bool,
    overwrite: bool,
    dry_run: bool,
    profile: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Write the factorized form of MODEL, a Hugging Face repo id or a local folder.

    Which weights are factorized is told by the recipe of the model's family, or by default: the linear layers inside
    transformer blocks, experts included; no embeddings, output heads, norms, biases or routers. surgery plan lists
    every tensor that is passed over, with the reason.
    """
    from surgery.operations import factorize as operation
    from surgery.timing import Timing

    if dry_run:
        _show_plan(model, chosen, as_json)
        return
    timing = Timing() if profile else None
    start = time.perf_counter()
    manifest = operation.factorize(
        model,
        out,
        **chosen,
        seed=seed,
        tolerance=tolerance,
        engine=engine,
        push_to_hub=push_to_hub,
        private=private,
        overwrite=overwrite,
        progress=Bar(quiet=quiet),
        timing=timing,
    )
    seconds = time.perf_counter() - start
    if as_json:
        figures = {"seconds": round(seconds, 3), **_totals(manifest), **profile_figures(timing)}
        click.echo(json.dumps({"schema_version": 1, "out": str(out), **figures}))
    else:
        if timing is not None:
            click.echo(profile_text(timing, seconds))
        totals = _totals(manifest)
        say(
            f"{out}: {totals['matrices']} matrices at rank {_ranks(manifest)}, {totals['trainable']} trainable scales, "
            f"{size(totals['bytes_written'])} in {seconds:.1f} s on {manifest.device}",
            quiet=quiet,
        )
        say(f"train {out / 'surgery' / 'scales.safetensors'}, then: surgery fold {out} SCALES", quiet=quiet)


@main.command(short_help="Show what factorize would do, from headers.")
@click.argument("model")
@_planning
@click.option("--all", "every", is_flag=True, help="Every tensor on a line of its own, not by group.")
@json_option
def plan(model: str, every: bool, as_json: bool, **chosen: Any) -> None:
    """Show what surgery factorize would do with MODEL and the same options, from headers.

    For a model on the hub only headers are fetched. Of a local one, weights that may be stored twice are compared. Tensors
    are shown by group: those whose names differ in numbers alone. Memory and disk are upper estimates; the time is a
    rough one, without downloads.
    """
    _show_plan(model, chosen, as_json, every=every)


def _show_plan(model: str, chosen: dict[str, Any], as_json: bool, *, every: bool = False) -> None:
    from surgery.device import choose_devices
    from surgery.operations import factorize as operation
    from surgery.planning.estimate import estimate_seconds

    steps = operation.plan(model, **chosen)
    seconds = estimate_seconds(steps, choose_devices(chosen["device"])[0])
    click.echo(operation.plan_as_json(steps, seconds) if as_json else plan_text(steps, seconds, every=every))


@main.command(short_help="List the recipes and what they match.")
@json_option
def recipes(as_json: bool) -> None:
    """List the built-in recipes: the families that take them by themselves, and the tensors that their rules match.

    Copy one, edit it, and give its path to --recipe; docs/recipes.md describes the format.
    """
    from surgery.planning.recipes import builtin_recipes

    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "name": recipe.name,
                        "description": recipe.description,
                        "families": recipe.families,
                        "rules": [{"match": rule.text, "view": rule.view, "skip": rule.skip} for rule in recipe.rules],
                    }
                    for recipe in builtin_recipes().values()
                ],
                indent=1,
            )
        )
        return
    for recipe in builtin_recipes().values():
        click.echo(f"{recipe.name}: {recipe.description}")
        if recipe.families:
            click.echo(f"  families: {', '.join(recipe.families)}")
        for rule in recipe.rules:
            seen = f" ({rule.view})" if rule.view else ""
            click.echo(f"  - {rule.text}{seen}" if rule.skip is None else f"  - not {rule.text}: {rule.skip}")
        click.echo()


def _ranks(manifest: Manifest) -> str:
    least, most = (limit(target.rank for target in manifest.targets) for limit in (min, max))
    return str(most) if least == most else f"{least} to {most}"


def _doubt(share: float) -> str:
    """What is said beside a value of which this share is in doubt: nothing up to 1 %."""
    if share <= 0.01:
        return ""
    return f" +-{math.ceil(100 * share)}%" if share < 1 else " unknown"


def _totals(manifest: Manifest) -> dict[str, Any]:
    return {
        "layout": manifest.layout,
        "fingerprint": manifest.fingerprint,
        "targets": len(manifest.targets),
        "matrices": sum(target.matrices[0] for target in manifest.targets),
        "skipped": len(manifest.skipped),
        "trainable": sum(target.trainable for target in manifest.targets),
        "converged": all(target.converged for target in manifest.targets),
        "bytes_written": sum(record.size for record in manifest.output_files()),
    }


@main.command(short_help="Fold trained scales back into dense weights.")
@click.argument("factorized", type=click.Path(path_type=Path))
@click.argument("scales", type=click.Path(path_type=Path))
@click.option("-o", "--out", default="folded", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@overlay_base_option
@click.option(
    "--lora",
    metavar="ADAPTER",
    type=click.Path(path_type=Path),
    help="Folder of a LoRA adapter trained together with the scales, added before the one rounding.",
)
@click.option("--dequantize", is_flag=True, help="Write FP8 weights as bfloat16, and drop the quantization from config.json.")
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
    dequantize: bool,
    profile: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Fold the scales in file SCALES into the weights of folder FACTORIZED.

    Writes a folder that loads as the original model did, with its names, dtypes, shards, config and tokenizer.
    Scales that are all 1 give back the original files byte for byte. A changed FP8 weight is quantized again.
    """
    from surgery.operations import fold as operation
    from surgery.timing import Timing

    timing = Timing() if profile else None
    start = time.perf_counter()
    report = operation.fold(
        factorized,
        scales,
        out,
        base=base,
        lora=lora,
        dequantize=dequantize,
        **chosen,
        progress=Bar(quiet=quiet),
        timing=timing,
    )
    seconds = time.perf_counter() - start
    written = sum(record.size for record in report.files)
    if as_json:
        figures = {
            "targets": report.targets,
            "changed": report.changed,
            "shards": len(report.files),
            "restored": report.restored,
            "lossless": report.lossless,
            "dequantized": report.dequantized,
            "adapted": report.adapted,
            **profile_figures(timing),
        }
        click.echo(
            json.dumps(
                {"schema_version": 1, "out": str(out), "seconds": round(seconds, 3), "bytes_written": written, **figures}
            )
        )
        return
    outcome = (
        "the original weights, byte for byte"
        if report.restored == len(report.files)
        else f"{report.changed} of {report.targets} targets changed"
    )
    if lora is not None:
        outcome += f", {report.adapted} tensors by the adapter"
    if report.dequantized:
        outcome += ", FP8 weights now bfloat16"
    if not report.lossless:
        outcome += ", the others only nearly the source's (made with --no-correction)"
    if timing is not None:
        click.echo(profile_text(timing, seconds))
    say(f"{out}: {outcome}; {size(written)} in {seconds:.1f} s", quiet=quiet)


@main.command(short_help="Write trained scales as an adapter for other tools.")
@click.argument("factorized", type=click.Path(path_type=Path))
@click.argument("scales", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "kind",
    type=click.Choice(["peft"]),
    default="peft",
    show_default=True,
    help="Format: a LoRA adapter as PEFT stores it.",
)
@click.option("-o", "--out", default="adapter", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@push_options
@overwrite_option
@json_option
@quiet_option
@notes_and_quiet
def export(factorized: Path, scales: Path, kind: str, out: Path, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write the scales in file SCALES as a LoRA adapter against the original model of folder FACTORIZED.

    PEFT loads it, and merges it to what fold writes; all modules have one rank, so that vLLM takes it as well. What an
    adapter cannot say, or PEFT is known to load wrongly, is refused: fold instead.
    """
    from surgery.operations.export import export as operation

    start = time.perf_counter()
    report = operation(factorized, scales, out, **chosen, progress=Bar(quiet=quiet))
    seconds = time.perf_counter() - start
    if as_json:
        figures = {"format": kind, "modules": report.modules, "rank": report.rank, "bytes_written": report.bytes_written}
        click.echo(json.dumps({"schema_version": 1, "out": str(out), "seconds": round(seconds, 3), **figures}))
        return
    say(
        f"{out}: a LoRA adapter of rank {report.rank} for {report.modules} modules; "
        f"{size(report.bytes_written)} in {seconds:.1f} s",
        quiet=quiet,
    )


@main.command(short_help="Show what a factorized folder holds.")
@click.argument("factorized", type=click.Path(path_type=Path))
@json_option
def inspect(factorized: Path, as_json: bool) -> None:
    """Show what the folder FACTORIZED holds: a table of targets, or with --json all there is to know.

    \b
    energy        share of the squared Frobenius norm in the kept part
    s_1, s_k      largest and smallest kept singular value; +- where s_k is known to less than 1 %,
                  unknown where all of it is in doubt
    residual      largest residual of a kept triplet over s_1, measured
    undetermined  kept directions that are not determined: no gap to the next value, or none that is known
    """
    from surgery.operations import inspect as operation

    manifest = operation.inspect(factorized)
    if as_json:
        click.echo(json.dumps(operation.summary(manifest), indent=1))
        return
    rows = [
        [
            target.key,
            "x".join(map(str, target.shape)),
            target.dtype,
            str(target.rank),
            f"{target.energy:.1%}",
            f"{target.s_first:.4g}",
            f"{target.s_last:.4g}" + _doubt(operation.last_value_error(target)),
            f"{operation.largest_residual(target):.1e}",
            "yes" if target.converged else "NO",
            str(operation.undetermined(target)),
        ]
        for target in manifest.targets
    ]
    click.echo(
        table(
            ["target", "shape", "dtype", "rank", "energy", "s_1", "s_k", "residual", "converged", "undetermined"],
            rows,
            flush_right=range(1, 10),
        )
    )
    totals = _totals(manifest)
    origin = f"{manifest.source.repo_id}@{manifest.source.commit}" if manifest.source.repo_id else "a local folder"
    click.echo(
        f"\n{manifest.layout} layout of {origin}: {totals['targets']} targets, {totals['trainable']} trainable scales, "
        f"{totals['skipped']} tensors passed over"
    )
    if not manifest.lossless:
        entries = sum(target.entries for target in manifest.targets)
        lost = sum((target.inexact or 0) * target.entries for target in manifest.targets) / max(entries, 1)
        click.echo(f"not lossless (--no-correction): {lost:.1%} of the weights of targets cannot be recovered exactly")


@main.command(short_help="Check that a factorized folder is what its manifest says.")
@click.argument("factorized", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="The model it was made from: an overlay is checked in part without it.")
@click.option("--fast", is_flag=True, help="Hashes and headers only, no arithmetic.")
@device_option
@json_option
@quiet_option
@notes_and_quiet
def verify(factorized: Path, base: str | None, fast: bool, device: str, as_json: bool, quiet: bool) -> None:
    """Check the folder FACTORIZED against its manifest. Exit code 3 if anything does not hold.

    Every file has its sha256; headers and shapes fit; factors are orthonormal and singular values descend; residual,
    factors and correction give back each original weight (by the hash in the manifest); the certificates hold, measured
    anew; scales belong to the factors.
    """
    from surgery.operations import verify as operation

    start = time.perf_counter()
    report = operation.verify(factorized, base=base, fast=fast, device=device, progress=Bar(quiet=quiet))
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "ok": report.ok, **dataclasses.asdict(report)}, indent=1))
    elif report.failures:
        rows = [[failure.where, failure.check, failure.got, failure.expected] for failure in report.failures]
        click.echo(table(["where", "check", "got", "expected"], rows))
    for note in report.unchecked:
        say(f"not checked: {note}", quiet=quiet)
    outcome = "all is as the manifest says" if report.ok else f"{len(report.failures)} checks failed"
    seconds = time.perf_counter() - start
    say(f"{factorized}: {outcome}; {report.files} files, {report.targets} targets in {seconds:.1f} s", quiet=quiet)
    if not report.ok:
        raise SystemExit(3)


@main.command(short_help="Do the whole job on a small built-in model.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Keep the demo's folders here; without it nothing is kept.")
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
    from surgery.demo.run import run_demo

    report = run_demo(out, rank=rank, steps=steps, device=device, overwrite=overwrite, progress=Bar(quiet=quiet))
    if as_json:
        click.echo(json.dumps({"schema_version": 1, **dataclasses.asdict(report)}))
    else:
        click.echo(_demo_text(report))
        if out is not None:
            say(f"kept: {out / 'factorized'}, {out / 'scales.safetensors'}, {out / 'folded'}", quiet=quiet)


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
            f"Trainable: {report.trainable / report.weights:.2%} of the weights. Loss: nats per byte of held-out English",
            "prose; the model had learned Python source code.",
            f"Folding untouched scales {untouched}.",
        ]
    )
