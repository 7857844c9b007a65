"""Factorize a checkpoint: plan -> one job per shard -> manifest."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from surgery import __version__
from surgery.device import choose_device, device_name
from surgery.engine.pipeline import ReadAhead
from surgery.errors import OptionError
from surgery.format.files import copy_file
from surgery.format.manifest import (
    LeftOutRecord,
    Manifest,
    OptionsRecord,
    ShardRecord,
    SkippedRecord,
    TargetRecord,
    fingerprint_of,
)
from surgery.format.scales import write_scales
from surgery.linalg.svd import DEFAULT_TOLERANCE, check_accuracy
from surgery.names import FORMAT_VERSION, MANIFEST_FILE, SCALES_FILE, factors_file
from surgery.operations.batch import Settings
from surgery.operations.job import Job, run_job
from surgery.operations.output import check_room, loading_order, prepare_output
from surgery.planning.plan import LAYOUTS, Layout, Plan, make_plan
from surgery.planning.targets import Choice
from surgery.progress import Progress, Silent
from surgery.source.model import Source, open_source


def plan(
    model: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: tuple[str, ...] | list[str] = (),
    exclude: tuple[str, ...] | list[str] = (),
    recipe: str | Path | None = None,
    split: bool | None = None,
    layout: Layout | None = None,
    correction: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str = "auto",
) -> Plan:
    """What ``factorize`` would do with the same arguments, from headers alone."""
    choice = _choice(rank, energy, max_rank, include, exclude, recipe, split)
    source = open_source(model, revision=revision, subfolder=subfolder)
    return _plan(source, choice, layout, correction, choose_device(device))


def _choice(
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    include: tuple[str, ...] | list[str],
    exclude: tuple[str, ...] | list[str],
    recipe: str | Path | None,
    split: bool | None,
) -> Choice:
    return Choice(rank, energy, max_rank, tuple(include), tuple(exclude), None if recipe is None else str(recipe), split)


def _plan(source: Source, choice: Choice, layout: Layout | None, correction: bool, device: torch.device) -> Plan:
    if layout is not None and layout not in LAYOUTS:
        raise OptionError("unknown layout", got=layout, expected=" or ".join(LAYOUTS))
    return make_plan(source, choice, layout, device.type, correction=correction)


def factorize(
    model: str | Path,
    out: str | Path = "factorized",
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: tuple[str, ...] | list[str] = (),
    exclude: tuple[str, ...] | list[str] = (),
    recipe: str | Path | None = None,
    split: bool | None = None,
    layout: Layout | None = None,
    correction: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    seed: int = 0,
    tolerance: float = DEFAULT_TOLERANCE,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the factorized form of a checkpoint (docs/format.md) and a file of scales, all ones.

    Each matrix W (m, n) of a target becomes U (m, k), s (k,), V (n, k), float32, and in the residual layout the residual
    ``round(W - U diag(s) V^T)`` in the dtype of W together with what makes W recoverable bit for bit. Shards are
    streamed: the memory needed is set by the largest target.

    Args:
        model: local folder or Hugging Face repo id.
        out: folder to write, empty or new.
        rank: k, directions to keep of each matrix, at most the smaller side; 16 if neither it, nor an energy, nor the
            recipe says anything.
        energy: keep as few directions of each target as hold this share of its squared Frobenius norm instead.
        max_rank: the most directions then; 256 if not given. Targets that would need more are named in a note.
        include, exclude: globs over tensor names, see ``surgery.planning.targets.Choice``.
        recipe: name or file of a recipe (``surgery.planning.recipes``); the one of the model's family by default.
        split: split fused weights into their projections, where the recipe knows them; as the recipe says by default.
        layout: ``residual``, self-contained, or ``overlay``, factors only, the weights staying where they are; the
            residual one by default, the overlay where targets are FP8.
        correction: with the residual layout, keep what makes it lossless: 0.06 to 0.15 bytes per weight. Without it a
            fold gives ``round(R + U diag(s g) V^T)``, in which some 8 to 18 % of the weights differ in their last bits.
        revision: of a hub model.
        subfolder: of a folder or repository with several models, such as a diffusion pipeline.
        seed, tolerance: of the truncated SVD, see ``surgery.truncated_svd``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; where the linear algebra runs.
        overwrite: replace an earlier result in ``out``.
        progress: told how far it is.

    Returns:
        The manifest, as written.

    Raises:
        SurgeryError: see ``surgery.errors``. What has been written by then has no manifest and no ``config.json``,
            and so is taken for a checkpoint by nobody.
    """
    progress = progress or Silent()
    where = choose_device(device)
    check_accuracy(tolerance, seed)
    source = open_source(model, revision=revision, subfolder=subfolder)
    choice = _choice(rank, energy, max_rank, include, exclude, recipe, split)
    steps = _plan(source, choice, layout, correction, where)
    for note in steps.notes:
        progress.note(note)
    out = Path(out)
    if (download := source.bytes_to_fetch()) is not None:
        check_room(*download)
    inputs = [folder] if (folder := source.folder()) else []
    prepare_output(out, inputs, _output_files(source, steps), steps.bytes_written, overwrite=overwrite)

    progress.start("factorizing", steps.bytes_read)
    shards, targets = [], []
    settings = Settings(steps.layout, correction, seed, tolerance, str(where))
    try:
        # A shard from the hub is downloaded while the one before it is worked on.
        jobs = (
            Job(
                shard,
                index,
                len(steps.shards),
                source.fetch(shard.file),
                out,
                {target.scaled.shard: source.fetch(target.scaled.shard) for target in shard.targets if target.scaled},
                steps.window_bytes,
                settings,
            )
            for index, shard in enumerate(steps.shards)
        )
        with ReadAhead(jobs) as ready:
            for job in ready:
                record, shard_targets = run_job(job, progress)
                shards.append(record)
                targets += shard_targets
    finally:
        progress.finish()
    options = OptionsRecord(
        rank, energy, max_rank, steps.recipe, split, correction, list(include), list(exclude), seed, tolerance
    )
    manifest = _finish(source, steps, out, shards, targets, options, where)
    for note in _accuracy_notes(targets, steps):
        progress.note(note)
    return manifest


def _output_files(source: Source, steps: Plan) -> set[str]:
    """Everything that the run will write, relative to the output folder."""
    files = {MANIFEST_FILE, SCALES_FILE, *source.selection.others}
    for index, shard in enumerate(steps.shards):
        if shard.targets:
            files.add(factors_file(index, len(steps.shards)))
        if steps.layout == "residual":
            files.add(shard.file)
    return files


def _finish(
    source: Source,
    steps: Plan,
    out: Path,
    shards: list[ShardRecord],
    targets: list[TargetRecord],
    options: OptionsRecord,
    device: torch.device,
) -> Manifest:
    """Copy what goes along, write the scales and, last, the manifest."""
    selection = source.selection
    others = [copy_file(source.fetch(name), out / name, name) for name in loading_order(selection.others)]
    fingerprint = fingerprint_of(targets)
    write_scales(out / SCALES_FILE, {target.key: torch.ones(target.scales_shape) for target in targets}, fingerprint)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tool=f"surgery {__version__}",
        torch=torch.__version__,
        device=device_name(device),
        layout=steps.layout,
        source=source.record,
        options=options,
        fingerprint=fingerprint,
        shards=shards,
        files=others,
        left_out=[LeftOutRecord(name, reason) for name, reason in sorted(selection.left_out.items())],
        targets=targets,
        skipped=[SkippedRecord(item.tensor, item.shard, item.reason) for item in steps.skipped],
    )
    manifest.write(out)
    return manifest


def _accuracy_notes(targets: list[TargetRecord], steps: Plan) -> list[str]:
    notes = []
    failed = [target.key for target in targets if not target.converged]
    if failed:
        notes.append(f"the SVD of {len(failed)} targets did not reach the tolerance (first: {failed[0]}); see surgery inspect")
    asked = {target.key: target.energy for target in steps.targets if target.energy is not None}
    short = [t for t in targets if t.key in asked and t.energy < (asked[t.key] or 0) and t.rank < min(t.matrices[1:])]
    if short:
        least = min(short, key=lambda target: target.energy)
        notes.append(
            f"{len(short)} of {len(targets)} targets hold less than {asked[least.key]:g} of their energy at rank "
            f"{least.rank}, the most allowed (least: {least.energy:g}, {least.key}); --max-rank allows more"
        )
    return notes


def plan_as_json(steps: Plan, seconds: float) -> str:
    """A plan as the JSON that ``surgery plan --json`` prints, with the time that it is estimated to take."""
    return json.dumps(
        {
            "schema_version": 1,
            "layout": steps.layout,
            "recipe": steps.recipe,
            "targets": [
                {
                    "tensor": t.tensor,
                    "slice": t.view.slice.name if t.view.slice else None,
                    "shard": t.shard,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "view": t.view.kind,
                    "matrices": list(t.matrices),
                    "rank": t.rank,
                    "energy": t.energy,
                }
                for t in steps.targets
            ],
            "skipped": [{"tensor": s.tensor, "shard": s.shard, "reason": s.reason} for s in steps.skipped],
            "notes": list(steps.notes),
            "trainable": steps.trainable,
            "bytes_read": steps.bytes_read,
            "bytes_written": steps.bytes_written,
            "temporary_bytes": steps.temporary_bytes,
            "peak_memory_bytes": steps.peak_memory_bytes,
            "device_memory_bytes": steps.device_memory_bytes,
            "seconds": float(f"{seconds:.2g}"),
        },
        indent=1,
    )
