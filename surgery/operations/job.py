"""The work of one shard: its targets factorized, its residual and its factors written."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import as_memory_allows
from surgery.engine.pipeline import Bytes, ShardWalk, TargetPiece, WriteBehind, windows
from surgery.errors import SourceError, WeightError
from surgery.format.factors import factors_hash
from surgery.format.files import FileRecord, FileWriter
from surgery.format.manifest import CertificateRecord, ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader, TensorFileWriter
from surgery.linalg.energy import energy_svd
from surgery.linalg.lossless import Factors, split
from surgery.linalg.svd import TruncatedSVD, truncated_svd, truncated_svds
from surgery.memory import bytes_of
from surgery.names import factor_key, factors_file
from surgery.planning.plan import Layout, ShardPlan
from surgery.planning.targets import Target
from surgery.progress import Progress


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
            found = truncated_svds(weights, target.rank, tolerance=job.tolerance, seed=job.seed)
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


def _digits(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
