"""Factorize a checkpoint: plan -> one job per shard -> manifest."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery import __version__
from surgery.device import as_memory_allows, choose_device, device_name
from surgery.engine.pipeline import Bytes, ReadAhead, ShardWalk, TargetPiece, WriteBehind, windows
from surgery.errors import OptionError, SourceError, WeightError
from surgery.format.files import FileRecord, FileWriter, copy_file
from surgery.format.manifest import (
    CertificateRecord,
    LeftOutRecord,
    Manifest,
    OptionsRecord,
    ShardRecord,
    SkippedRecord,
    TargetRecord,
    fingerprint_of,
)
from surgery.format.safetensors import ShardReader, TensorFileWriter
from surgery.format.scales import write_scales
from surgery.linalg.energy import energy_svd
from surgery.linalg.lossless import Factors, split
from surgery.linalg.svd import DEFAULT_TOLERANCE, TruncatedSVD, check_accuracy, truncated_svd
from surgery.memory import bytes_of
from surgery.names import FORMAT_VERSION, MANIFEST_FILE, SCALES_FILE, factor_key, factors_file
from surgery.operations.output import check_room, loading_order, prepare_output
from surgery.planning.plan import LAYOUTS, Layout, Plan, ShardPlan, make_plan
from surgery.planning.targets import Choice, Target
from surgery.progress import Progress, Silent
from surgery.source.model import Source, open_source

DEFAULT_RANK = 16
DEFAULT_MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class Job:
    """All that one shard's work depends on; run twice, it writes the same bytes.

    Attributes:
        shard: the source's weight file and its targets.
        index, count: which of how many shards.
        path: the weight file on this machine.
        out: the output folder.
        window_bytes: how much of the shard is held at a time, so that matrices of one shape are solved together.
        layout, correction, seed, tolerance, device: as asked for.
    """

    shard: ShardPlan
    index: int
    count: int
    path: Path
    out: Path
    window_bytes: int
    layout: Layout
    correction: bool
    seed: int
    tolerance: float
    device: str


def plan(
    model: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: tuple[str, ...] | list[str] = (),
    exclude: tuple[str, ...] | list[str] = (),
    layout: Layout = "residual",
    correction: bool = True,
    revision: str | None = None,
    device: str = "auto",
) -> Plan:
    """What ``factorize`` would do with the same arguments, from headers alone."""
    choice = _choice(rank, energy, max_rank, include, exclude)
    return _plan(open_source(model, revision=revision), choice, layout, correction, choose_device(device))


def _choice(
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    include: tuple[str, ...] | list[str],
    exclude: tuple[str, ...] | list[str],
) -> Choice:
    if rank is not None and energy is not None:
        raise OptionError("a rank and an energy contradict each other", got=f"rank {rank}, energy {energy}")
    if max_rank is not None and energy is None:
        raise OptionError("a largest rank goes with an energy", got=f"max_rank {max_rank} without one", hint="--energy 0.5")
    most = (DEFAULT_RANK if rank is None else rank) if energy is None else (DEFAULT_MAX_RANK if max_rank is None else max_rank)
    return Choice(most, tuple(include), tuple(exclude), energy)


def _plan(source: Source, choice: Choice, layout: Layout, correction: bool, device: torch.device) -> Plan:
    if layout == "overlay" and not correction:
        raise OptionError(
            "an overlay has no correction to leave out", hint="drop --no-correction: its weights stay as they are"
        )
    if layout not in LAYOUTS:
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
    layout: Layout = "residual",
    correction: bool = True,
    revision: str | None = None,
    seed: int = 0,
    tolerance: float = DEFAULT_TOLERANCE,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the factorized form of a checkpoint (docs/format.md) and a file of scales, all ones.

    Each target W (m, n) becomes U (m, k), s (k,), V (n, k), float32, and in the residual layout the residual
    ``round(W - U diag(s) V^T)`` in the dtype of W together with what makes W recoverable bit for bit. Shards are
    streamed: the memory needed is set by the largest target.

    Args:
        model: local folder or Hugging Face repo id.
        out: folder to write, empty or new.
        rank: k, directions to keep of each target, at most the smaller side; 16 if neither it nor an energy is given.
        energy: keep as few directions of each target as hold this share of its squared Frobenius norm instead.
        max_rank: the most directions then; 256 if not given. Targets that would need more are named in a note.
        include, exclude: globs over tensor names, see ``surgery.planning.targets.Choice``.
        layout: ``residual``, self-contained, or ``overlay``, factors only, the weights staying where they are.
        correction: with the residual layout, keep what makes it lossless: 0.06 to 0.15 bytes per weight. Without it a
            fold gives ``round(R + U diag(s g) V^T)``, in which some 8 to 18 % of the weights differ in their last bits.
        revision: of a hub model.
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
    source = open_source(model, revision=revision)
    choice = _choice(rank, energy, max_rank, include, exclude)
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
    try:
        # A shard from the hub is downloaded while the one before it is worked on.
        jobs = (
            Job(
                shard,
                index,
                len(steps.shards),
                source.fetch(shard.file),
                out,
                steps.window_bytes,
                layout,
                correction,
                seed,
                tolerance,
                str(where),
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
    options = OptionsRecord(choice.rank, choice.energy, correction, list(include), list(exclude), seed, tolerance)
    manifest = _finish(source, steps, out, shards, targets, options, where)
    for note in _accuracy_notes(targets, choice):
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
    write_scales(out / SCALES_FILE, {target.tensor: torch.ones(target.rank) for target in targets}, fingerprint)
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


def run_job(job: Job, progress: Progress) -> tuple[ShardRecord, list[TargetRecord]]:
    """Factorize the targets of one shard and write its files."""
    targets = {target.tensor: target for target in job.shard.targets}
    factors_name = factors_file(job.index, job.count)
    parts = ("U", "s", "V", "correction") if job.layout == "residual" and job.correction else ("U", "s", "V")
    keys = [factor_key(name, part) for name in targets for part in parts]
    records: list[TargetRecord] = []
    with ExitStack() as stack:
        reader = stack.enter_context(ShardReader(job.path, name=job.shard.file))
        _check_unchanged(reader, job.shard)
        residuals = stack.enter_context(FileWriter(job.out / job.shard.file)) if job.layout == "residual" else None
        factors = stack.enter_context(TensorFileWriter(job.out / factors_name, keys)) if targets else None
        walk = stack.enter_context(ShardWalk(reader, targets, progress))
        with WriteBehind() as behind:
            if residuals:
                behind.submit(residuals.write, reader.header.raw)
            for window in windows(walk, job.window_bytes):
                records += _work_off(window, targets, job, residuals, factors, behind)
        source = FileRecord(job.shard.file, reader.header.file_bytes, walk.sha256)
        residual_record = residuals.commit(job.shard.file) if residuals else None
        factors_record = factors.commit(factors_name) if factors else None
    return ShardRecord(source, residual_record, factors_record), records


def _work_off(
    window: list[Bytes | TargetPiece],
    targets: dict[str, Target],
    job: Job,
    residuals: FileWriter | None,
    factors: TensorFileWriter | None,
    behind: WriteBehind,
) -> list[TargetRecord]:
    """Factorize the targets of one window and hand it all to the writer in the order of the shard."""
    weights = [(targets[piece.entry.name], piece.tensor) for piece in window if isinstance(piece, TargetPiece)]
    all_done = _factorize_targets(weights, job)
    records = []
    for piece in window:
        if not isinstance(piece, TargetPiece):
            if residuals:
                behind.submit(residuals.write, piece.data)
            continue
        done = all_done.pop(piece.entry.name)
        records.append(done.record)
        if residuals and done.residual is not None:
            behind.submit(residuals.write, bytes_of(done.residual))
        if factors:
            for part, tensor in done.parts.items():
                behind.submit(factors.add, factor_key(done.record.tensor, part), tensor)
    return records


def _check_unchanged(reader: ShardReader, shard: ShardPlan) -> None:
    if reader.header.tensors != shard.header.tensors:
        raise SourceError(
            f"{shard.file} has changed since the run was planned", hint="start again when nothing writes to the model"
        )


@dataclass(frozen=True, slots=True)
class _Done:
    record: TargetRecord
    residual: torch.Tensor | None
    parts: dict[str, torch.Tensor]


_Weight = tuple[Target, torch.Tensor]


def _factorize_targets(weights: list[_Weight], job: Job) -> dict[str, _Done]:
    """Targets with their weights (m, n) on the CPU in; those of one shape, dtype and rank are worked on together."""
    groups: dict[object, list[_Weight]] = {}
    for target, weight in weights:
        alone = target.tensor if target.energy is not None else None  # its rank is not known yet
        groups.setdefault((target.shape, target.dtype, target.rank, alone), []).append((target, weight))
    done: dict[str, _Done] = {}
    for group in groups.values():
        results = as_memory_allows(lambda part, device: _factorize_group(part, device, job), group, torch.device(job.device))
        done.update((result.record.tensor, result) for result in results)
    return done


def _factorize_group(group: Sequence[_Weight], device: torch.device, job: Job) -> list[_Done]:
    """Factors, residuals and corrections on the CPU out."""
    target, weight = group[0]
    if len(group) == 1:
        weights = weight.to(device)[None]
        found = [_truncate(target, weights[0], job)]
    else:
        weights = torch.stack([weight.to(device) for _, weight in group])
        try:
            found = truncated_svd(weights, target.rank, tolerance=job.tolerance, seed=job.seed).unstack()
        except WeightError:  # some matrix of it; one by one the message can name it
            found = [_truncate(target, weight, job) for (target, _), weight in zip(group, weights, strict=True)]
    return [_finish_target(*item, svd, on_device, job) for item, svd, on_device in zip(group, found, weights, strict=True)]


def _truncate(target: Target, weight: torch.Tensor, job: Job) -> TruncatedSVD:
    try:
        if target.energy is not None:
            return energy_svd(weight, target.energy, max_rank=target.rank, tolerance=job.tolerance, seed=job.seed)
        return truncated_svd(weight, target.rank, tolerance=job.tolerance, seed=job.seed)
    except WeightError as error:
        raise WeightError(
            f"{target.shard}: {target.tensor!r} cannot be factorized: {error.what}",
            hint=f"repair the model, or leave it out: --exclude '{glob.escape(target.tensor)}'",
        ) from error


def _finish_target(target: Target, weight: torch.Tensor, svd: TruncatedSVD, on_device: torch.Tensor, job: Job) -> _Done:
    factors = Factors(svd.U.cpu().contiguous(), svd.s.cpu(), svd.V.cpu().contiguous())
    parts = {"U": factors.U, "s": factors.s, "V": factors.V}
    residual, inexact = None, None
    if job.layout == "residual":
        # The lossless arithmetic is float64, which an Apple GPU does not have.
        exact = weight if on_device.device.type == "mps" else on_device
        apart = split(exact, factors.to(exact.device), correct=job.correction)
        residual, inexact = apart.residual.cpu(), apart.inexact
        if apart.correction is not None:
            parts["correction"] = apart.correction
    return _Done(_target_record(target, weight, svd, factors, residual, inexact), residual, parts)


def _target_record(
    target: Target,
    weight: torch.Tensor,
    svd: TruncatedSVD,
    factors: Factors,
    residual: torch.Tensor | None,
    inexact: float | None,
) -> TargetRecord:
    kept = factors.s.double().square().sum().item()
    total = svd.norm.item() ** 2
    return TargetRecord(
        tensor=target.tensor,
        shard=target.shard,
        dtype=target.dtype,
        shape=list(target.shape),
        view=target.view,
        rank=len(factors.s),
        energy=_digits(min(kept / total, 1.0) if total else 1.0, 6),
        s_first=factors.s[0].item(),
        s_last=factors.s[-1].item(),
        sha256=hashlib.sha256(bytes_of(weight)).hexdigest(),
        residual_sha256=None if residual is None else hashlib.sha256(bytes_of(residual)).hexdigest(),
        inexact=None if inexact is None else _digits(inexact, 3),
        factors_sha256=factors_hash(factors),
        certificate=CertificateRecord(
            method=str(svd.certificate.method),
            passes=int(svd.certificate.passes),
            converged=bool(svd.certificate.converged),
            residual=[_digits(value, 3) for value in svd.certificate.residual.tolist()],
            gap=[_digits(value, 3) for value in svd.certificate.gap.tolist()],
        ),
    )


def factors_hash(factors: Factors) -> str:
    """sha256 over the bytes of U, s and V."""
    digest = hashlib.sha256()
    for part in (factors.U, factors.s, factors.V):
        digest.update(bytes_of(part))
    return digest.hexdigest()


def _digits(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _accuracy_notes(targets: list[TargetRecord], choice: Choice) -> list[str]:
    notes = []
    failed = [target.tensor for target in targets if not target.certificate.converged]
    if failed:
        notes.append(f"the SVD of {len(failed)} targets did not reach the tolerance (first: {failed[0]}); see surgery inspect")
    if choice.energy is not None:
        short = [target for target in targets if target.energy < choice.energy and target.rank < min(target.shape)]
        if short:
            least = min(short, key=lambda target: target.energy)
            notes.append(
                f"{len(short)} of {len(targets)} targets hold less than {choice.energy:g} of their energy at rank "
                f"{choice.rank}, the most allowed (least: {least.energy:g}, {least.tensor}); --max-rank allows more"
            )
    return notes


def plan_as_json(steps: Plan) -> str:
    """A plan as the JSON that ``--dry-run --json`` prints."""
    return json.dumps(
        {
            "schema_version": 1,
            "layout": steps.layout,
            "rank": steps.choice.rank,
            "energy": steps.choice.energy,
            "targets": [
                {"tensor": t.tensor, "shard": t.shard, "dtype": t.dtype, "shape": list(t.shape), "rank": t.rank, "view": t.view}
                for t in steps.targets
            ],
            "skipped": [{"tensor": s.tensor, "shard": s.shard, "reason": s.reason} for s in steps.skipped],
            "notes": list(steps.notes),
            "trainable": steps.trainable,
            "bytes_read": steps.bytes_read,
            "bytes_written": steps.bytes_written,
            "peak_memory_bytes": steps.peak_memory_bytes,
            "device_memory_bytes": steps.device_memory_bytes,
        },
        indent=1,
    )
