"""The commands that look into a factorized folder: ``inspect`` and ``verify``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from surgery.cli.bar import Bar
from surgery.cli.options import MODEL, PATH, devices_option, json_option, memory_options, notes_and_quiet, quiet_option
from surgery.cli.outcomes import kept_of_update, top_k_text, trainable_text
from surgery.cli.printing import print_json
from surgery.cli.tables import table
from surgery.cli.text import fitted, say, whole
from surgery.errors import OptionError
from surgery.escapes import quoted
from surgery.progress import phase

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Show what a factorized folder holds.")
@click.argument("factorized", type=PATH)
@json_option
def inspect(factorized: Path, as_json: bool) -> None:
    """Show what the folder FACTORIZED holds: a table of targets; with --json, all details.

    \b
    energy        share of the squared Frobenius norm in the kept part
    s_1, s_k      largest and smallest kept singular value; +- the relative
                  error of s_k if it may be above 1 %, unknown if it may be
                  100 % or more
    residual      largest measured residual of a kept triplet, divided by s_1
    converged     whether the residuals reached the tolerance
    undetermined  how many kept directions have no known gap to the next value
    largest       whether no larger singular value was missed: proven, likely or
                  unknown; then the margin: a missed value is at most
                  s_k + margin * s_1
    """
    from surgery.commands import inspect as operation
    from surgery.format.top_k_records import TopKRecord

    report = operation.inspect(factorized)
    if as_json:
        print_json(report)
        return
    rows = [
        [
            target.key,
            "x".join(map(str, target.shape)),
            target.dtype,
            str(target.rank),
            f"{target.energy:.1%}",
            f"{target.s_first:.4g}",
            f"{target.s_last:.4g}" + _doubt(target.s_last_error),
            f"{target.max_residual:.1e}",
            "yes" if target.converged else "NO",
            str(target.undetermined),
            str(TopKRecord(target.top_k, target.margin, target.chance)),
        ]
        for target in report.targets
    ]
    click.echo(
        table(
            ["target", "shape", "dtype", "rank", "energy", "s_1", "s_k", "residual", "converged", "undetermined", "largest"],
            rows,
            flush_right=range(1, 11),
            names=(0,),
        )
    )
    origin = f"{report.source.repo_id}@{report.source.commit}" if report.source.repo_id else "a local folder"
    click.echo(
        fitted(
            "",
            f"{report.layout} layout of {origin}: {len(report.targets)} targets, "
            f"{trainable_text(report.trainable, report.train or 'scales')}, "
            f"{len(report.skipped)} tensors passed over",
            top_k_text(report.top_k),
        )
    )
    if not report.lossless:
        entries = [math.prod(target.matrices) for target in report.targets]
        lost = sum((target.inexact or 0) * n for target, n in zip(report.targets, entries, strict=True)) / max(sum(entries), 1)
        click.echo(fitted(f"not lossless (--no-correction): {lost:.1%} of the weights of targets cannot be recovered exactly"))


def _doubt(share: float) -> str:
    """The text after a value with this relative error at most: none up to 1 %."""
    if share <= 0.01:
        return ""
    return f" +-{math.ceil(100 * share)}%" if share < 1 else " unknown"


@click.command(short_help="Check that a factorized folder is what its manifest says.")
@click.argument("factorized", type=PATH)
@click.option(
    "--base",
    type=MODEL,
    metavar="MODEL",
    help="The model that was factorized: for --repair, and for weights that the folder does not hold, as in an overlay.",
)
@click.option("--fast", is_flag=True, help="Hashes and headers only, no arithmetic.")
@click.option("--prove", is_flag=True, help="Prove for each matrix that no larger singular value was missed; takes longer.")
@click.option(
    "--repair", is_flag=True, help="First make missing and damaged files again from MODEL, with exactly the recorded bytes."
)
@click.option(
    "--folded",
    type=MODEL,
    metavar="MODEL",
    help="Instead of these checks: measure how much of the update is in this folded model; with --scales.",
)
@click.option("--scales", type=PATH, metavar="FILE", help="With --folded: the scales that were folded.")
@devices_option
@memory_options
@json_option
@quiet_option
@notes_and_quiet
def verify(
    factorized: Path,
    base: str | None,
    fast: bool,
    prove: bool,
    repair: bool,
    folded: str | None,
    scales: Path | None,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Check the folder FACTORIZED against its manifest. The exit code is 3 if a check fails.

    verify checks that every file has its recorded sha256, that headers and shapes fit, that factors are orthonormal and
    singular values descend, that residual, factors and correction give back each original weight (by the hash in the
    manifest), and that scales belong to the factors. It measures certificates, energies and shares of inexact entries
    again. In each matrix it searches for a larger singular value than the kept ones, from a random start. With --prove
    it proves that there is none.

    With --repair, missing and damaged files are first made again. A residual is computed from MODEL and the factors.
    Factors need the SVD again, with the same torch on the same kind of device. verify replaces a file only by one that has
    the recorded sha256. It never replaces scales that exist.
    """
    bar = Bar(quiet=quiet)
    if folded is not None or scales is not None:
        _verify_folded(factorized, folded, scales, {"base": base, "device": chosen["device"], "progress": bar}, as_json=as_json)
        return
    with phase(bar, "starting"):
        from surgery.commands import verify as operation
        from surgery.shards.failures import FILE_CHECKS

    start = time.perf_counter()
    report = operation.verify(factorized, base=base, fast=fast, prove=prove, repair=repair, **chosen, progress=bar)
    if as_json:
        print_json(report, seconds=time.perf_counter() - start)
    elif report.failures:
        rows = [[failure.where, failure.check, failure.got, failure.expected] for failure in report.failures]
        click.echo(table(["where", "check", "got", "expected"], rows, names=(0,), prose=(1, 2, 3)))
    for file in report.repaired:
        say(f"made again: {whole(file)}", quiet=quiet)
    for note in report.unchecked:
        say(f"not checked: {note}", quiet=quiet)
    if report.top_k is not None:
        say(top_k_text(report.top_k), quiet=quiet)
    found = "what was checked is as the manifest says" if report.unchecked else "all is as the manifest says"
    outcome = found if report.ok else f"{len(report.failures)} checks failed"
    seconds = time.perf_counter() - start
    say(f"{whole(factorized)}: {outcome}; {report.files} files, {report.targets} targets in {seconds:.1f} s", quiet=quiet)
    if not report.ok:
        if not repair and any(failure.check in FILE_CHECKS for failure in report.failures):
            command = f"surgery verify {quoted(factorized)} --repair --base MODEL"
            say(f"the original model can repair it: {whole(command)}", quiet=quiet)
        raise SystemExit(3)


def _verify_folded(
    factorized: Path, folded: str | None, scales: Path | None, options: dict[str, Any], *, as_json: bool
) -> None:
    with phase(options["progress"], "starting"):
        from surgery.commands.verify_folded import verify_folded as operation

    if folded is None or scales is None:
        raise OptionError(
            f"{'--folded' if folded is None else '--scales'} is missing",
            expected="both: --folded with the model, and --scales with what was folded into it",
        )
    start = time.perf_counter()
    report = operation(factorized, folded, scales, **options)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(report, seconds=seconds)
        return
    kept = kept_of_update(report.kept, report.kept_least, report.kept_least_in)
    click.echo(fitted(f"{whole(folded)}: {report.changed} of {report.targets} targets changed{kept}, in {seconds:.1f} s"))
