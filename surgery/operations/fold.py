"""Fold trained scales back into dense weights: the walk of factorize in the other direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import as_memory_allows, choose_device
from surgery.engine.pipeline import ShardWalk, TargetPiece, WriteBehind
from surgery.errors import FormatError, OptionError, ScalesError, SourceError
from surgery.format.factors import DAMAGED_HINT, FactorsReader
from surgery.format.files import FileRecord, FileWriter, copy_file, not_as_described
from surgery.format.manifest import Manifest, ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.format.scales import check_scales, read_scales
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.lossless import approximate, join, rescale
from surgery.memory import bytes_of
from surgery.operations.base import BaseWeights, OwnWeights, check_entry
from surgery.operations.output import loading_order, prepare_output
from surgery.progress import Progress, Silent
from surgery.source.model import open_source

_BASE_HINT = "give the model that was factorized with --base"


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold wrote.

    Attributes:
        out: the folder.
        files: its weight files.
        targets: how many tensors had scales.
        changed: how many of them had scales other than 1.
        restored: weight files that are the source's own, bit for bit.
        lossless: whether untouched weights are the source's: not after ``--no-correction``.
    """

    out: Path
    files: tuple[FileRecord, ...]
    targets: int
    changed: int
    restored: int
    lossless: bool


def fold(
    factorized: str | Path,
    scales: str | Path | Mapping[str, torch.Tensor],
    out: str | Path = "folded",
    *,
    base: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FoldReport:
    """Write dense weights ``round(W + U diag(s (g - 1)) V^T)`` under the source's names, dtypes and shards.

    W is recovered bit for bit and the update added with one rounding at the end, so a target whose scales are all 1
    keeps its bytes. A residual without a correction gives ``round(R + U diag(s g) V^T)`` instead.

    Args:
        factorized: a folder written by ``factorize``.
        scales: a scales file, or for the key of each target ``g``, (k,), or (B, k) for a stack.
        out: folder to write, empty or new.
        base: for an overlay, the model it was made from (folder or hub id), if the one that the manifest names is
            not to be used.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: replace an earlier result in ``out``.
        progress: told how far it is.

    Raises:
        SurgeryError: see ``surgery.errors``. ``config.json`` comes last, so no loader takes what is there by then
            for a model.

    Warns:
        SurgeryWarning: see ``surgery.format.scales.read_scales``.
    """
    progress = progress or Silent()
    where = choose_device(device)
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    values = check_scales(scales, manifest) if isinstance(scales, Mapping) else read_scales(Path(scales), manifest)
    weights = _weight_source(factorized, manifest, base)
    inputs = [factorized] + ([folder] if (folder := weights.folder()) else [])
    if not isinstance(scales, Mapping):
        inputs.append(Path(scales))
    total = sum(shard.source.size for shard in manifest.shards)
    writes = [shard.source.file for shard in manifest.shards] + [record.file for record in manifest.files]
    prepare_output(out, inputs, writes, total + sum(record.size for record in manifest.files), overwrite=overwrite)

    # Folding is float64 arithmetic, which an Apple GPU does not have.
    exact_on = torch.device("cpu") if where.type == "mps" else where

    progress.start("folding", total)
    try:
        files = [
            _fold_shard(shard, manifest, factorized, weights, out, values, exact_on, progress) for shard in manifest.shards
        ]
    finally:
        progress.finish()
    by_name = {record.file: record for record in manifest.files}
    for name in loading_order(by_name):
        copy_file(factorized / name, out / name, name, by_name[name])
    changed = sum(bool((value != 1).any()) for value in values.values())
    restored = sum(file.sha256 == shard.source.sha256 for file, shard in zip(files, manifest.shards, strict=True))
    return FoldReport(out, tuple(files), len(values), changed, restored, manifest.lossless)


def _weight_source(factorized: Path, manifest: Manifest, base: str | Path | None) -> OwnWeights | BaseWeights:
    if manifest.layout == "residual":
        if base is not None:
            raise OptionError("--base is for overlays; this checkpoint holds its own weights", hint="leave --base out")
        return OwnWeights(factorized)
    if base is not None:
        return BaseWeights(open_source(base))
    if manifest.source.repo_id is None:
        raise SourceError(
            f"{factorized} is an overlay on a local model, and does not say where that is",
            hint="--base FOLDER, the model it was factorized from",
        )
    return BaseWeights(open_source(manifest.source.repo_id, revision=manifest.source.commit))


def _fold_shard(
    shard: ShardRecord,
    manifest: Manifest,
    factorized: Path,
    weights: OwnWeights | BaseWeights,
    out: Path,
    scales: Mapping[str, torch.Tensor],
    device: torch.device,
    progress: Progress,
) -> FileRecord:
    path, expected = weights.file(shard)
    targets = manifest.targets_of(shard.source.file)
    changed = {target.key for target in targets if bool((scales[target.key] != 1).any())}
    # The bytes of an overlay's base are right as they are where nothing has changed.
    touched: dict[str, list[TargetRecord]] = {}
    for target in targets:
        if manifest.layout == "residual" or target.key in changed:
            touched.setdefault(target.tensor, []).append(target)
    with ExitStack() as stack:
        reader = stack.enter_context(ShardReader(path))
        factors = stack.enter_context(FactorsReader(factorized, shard)) if touched else None
        writer = stack.enter_context(FileWriter(out / shard.source.file))
        portions = {name: parts[0].at_a_time for name, parts in touched.items()}
        walk = stack.enter_context(ShardWalk(reader, portions, progress))
        with WriteBehind() as behind:
            behind.submit(writer.write, reader.header.raw)
            for piece in walk:
                if not isinstance(piece, TargetPiece):
                    behind.submit(writer.write, piece.data)
                    continue
                assert factors is not None  # there are touched targets
                weight = _dense(piece, touched[piece.entry.name], factors, scales, manifest, device)
                behind.submit(writer.write, bytes_of(weight))
        if walk.sha256 != expected.sha256:
            overlay = manifest.layout == "overlay"
            raise not_as_described(path, walk.sha256, expected, _BASE_HINT if overlay else DAMAGED_HINT)
        if manifest.lossless and not changed and writer.sha256 != shard.source.sha256:
            raise FormatError(f"{path}: untouched scales do not give the source back", hint=DAMAGED_HINT)
        return writer.commit(shard.source.file)


def _dense(
    piece: TargetPiece,
    targets: list[TargetRecord],
    factors: FactorsReader,
    scales: Mapping[str, torch.Tensor],
    manifest: Manifest,
    device: torch.device,
) -> torch.Tensor:
    """The dense weights of a tensor, or of some matrices of a stack, on the CPU."""
    result: torch.Tensor | None = None
    for target in targets:
        check_entry(piece.entry, target)
        view = target.seen_as
        values = scales[target.key].view(-1, target.rank)
        dense = [
            _dense_matrix(weight, target, piece.first + i, factors, values[piece.first + i], manifest, device)
            for i, weight in enumerate(view.matrices(piece.tensor))
        ]
        if view.slice is None and len(dense) == 1:
            return dense[0].view(piece.tensor.shape)
        result = piece.tensor.clone() if result is None else result
        view.store(torch.stack(dense), result)
    assert result is not None  # there is at least one target
    return result


def _dense_matrix(
    weight: torch.Tensor,
    target: TargetRecord,
    index: int,
    factors: FactorsReader,
    scales: torch.Tensor,
    manifest: Manifest,
    device: torch.device,
) -> torch.Tensor:
    """One dense matrix (m, n), on the CPU, from its residual or, for an overlay, from its weight; scales (k,)."""
    changed = bool((scales != 1).any())
    if manifest.layout == "overlay" and not changed:
        return weight
    parts = factors.factors(target, index)
    correction = factors.correction(target, index) if manifest.layout == "residual" and manifest.lossless else None

    def compute(weights: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        there, kept = weights[0].to(where), parts.to(where)
        if manifest.layout == "overlay":
            return [rescale(there, kept, scales).cpu()]
        if correction is None:
            return [approximate(there, kept, scales if changed else None).cpu()]
        return [join(there, kept, correction, scales if changed else None).cpu()]

    try:
        result = as_memory_allows(compute, [weight], device)[0]
    except CorruptCorrection as error:
        raise FormatError(f"{target.shard}: the correction of {target.key!r} is damaged ({error})") from error
    # A minimum or maximum of NaN is NaN: one pass, many times faster than asking each number.
    if changed and not all(bool(torch.isfinite(end)) for end in torch.aminmax(result)):
        raise ScalesError(
            f"the scales of {target.key!r} push weights beyond the range of {target.dtype}",
            got=f"scales of up to {scales.abs().max().item():.3g}",
            hint="the training diverged: take an earlier checkpoint",
        )
    return result
