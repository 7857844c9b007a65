"""Fold trained scales back into dense weights: the walk of factorize in the other direction."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import choose_device
from surgery.engine.pipeline import ShardWalk, TargetPiece, WriteBehind
from surgery.errors import FormatError, OptionError, SourceError
from surgery.format.factors import DAMAGED_HINT
from surgery.format.files import FileRecord, FileWriter, copy_file, not_as_described, write_file
from surgery.format.manifest import Manifest, ShardRecord
from surgery.format.safetensors import ShardReader
from surgery.format.scales import check_scales, read_scales
from surgery.memory import bytes_of
from surgery.names import CONFIG_FILE
from surgery.operations.base import BaseWeights, OwnWeights
from surgery.operations.dense import DenseWeights
from surgery.operations.output import loading_order, prepare_output
from surgery.operations.quantized import index_of, without_quantization
from surgery.progress import Progress, Silent
from surgery.source.model import open_source
from surgery.source.select import INDEX_SUFFIX

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
        dequantized: whether FP8 weights have become bfloat16.
    """

    out: Path
    files: tuple[FileRecord, ...]
    targets: int
    changed: int
    restored: int
    lossless: bool
    dequantized: bool


def fold(
    factorized: str | Path,
    scales: str | Path | Mapping[str, torch.Tensor],
    out: str | Path = "folded",
    *,
    base: str | Path | None = None,
    device: str = "auto",
    dequantize: bool = False,
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
        dequantize: write every FP8 weight as bfloat16, without its scales, and drop the quantization from the config;
            otherwise a changed FP8 weight is quantized again, with fresh scales for its blocks.
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
    # Folding is float64 arithmetic, which an Apple GPU does not have.
    exact_on = torch.device("cpu") if where.type == "mps" else where
    total = sum(shard.source.size for shard in manifest.shards)
    # What is FP8 takes twice as much in bfloat16.
    needed = total * (2 if dequantize else 1) + sum(record.size for record in manifest.files)
    writes = [shard.source.file for shard in manifest.shards] + [record.file for record in manifest.files]
    with DenseWeights(manifest, factorized, weights, values, exact_on, to_dense=dequantize) as dense:
        if dequantize and not dense.quantized:
            raise OptionError("there is nothing to dequantize: no weight is FP8", hint="drop --dequantize")
        prepare_output(out, inputs, writes, needed, overwrite=overwrite)
        progress.start("folding", total)
        try:
            written = [_fold_shard(shard, manifest, weights, dense, out, progress) for shard in manifest.shards]
        finally:
            progress.finish()
    files = [record for record in written if record is not None]
    _copy_others(factorized, out, manifest, to_dense=dequantize)
    changed = sum(bool((value != 1).any()) for value in values.values())
    originals = {shard.source.file: shard.source.sha256 for shard in manifest.shards}
    restored = sum(file.sha256 == originals[file.file] for file in files)
    return FoldReport(out, tuple(files), len(values), changed, restored, manifest.lossless, dequantize)


def _weight_source(factorized: Path, manifest: Manifest, base: str | Path | None) -> OwnWeights | BaseWeights:
    if manifest.layout == "residual":
        if base is not None:
            raise OptionError("--base is for overlays; this checkpoint holds its own weights", hint="leave --base out")
        return OwnWeights(factorized)
    if base is not None:
        return BaseWeights(open_source(base))
    source = manifest.source
    if source.repo_id is None:
        raise SourceError(
            f"{factorized} is an overlay on a local model, and does not say where that is",
            hint="--base FOLDER, the model it was factorized from",
        )
    return BaseWeights(open_source(source.repo_id, revision=source.commit, subfolder=source.subfolder))


def _fold_shard(
    shard: ShardRecord,
    manifest: Manifest,
    weights: OwnWeights | BaseWeights,
    dense: DenseWeights,
    out: Path,
    progress: Progress,
) -> FileRecord | None:
    """Write one weight file; None if nothing of it is left."""
    path, expected = weights.file(shard)
    with ExitStack() as stack:
        reader = stack.enter_context(ShardReader(path))
        header = dense.header(reader.header)
        if reader.header.tensors and all(dense.drops(entry.name) for entry in reader.header.tensors):
            progress.advance(reader.header.data_bytes)
            return None
        writer = stack.enter_context(FileWriter(out / shard.source.file))
        walk = stack.enter_context(ShardWalk(reader, dense.touched(reader.header), progress))
        with WriteBehind() as behind:
            behind.submit(writer.write, header)
            for piece in walk:
                if not isinstance(piece, TargetPiece):
                    behind.submit(writer.write, piece.data)
                elif (weight := dense.folded(piece)) is not None:
                    behind.submit(writer.write, bytes_of(weight.contiguous()))
        if walk.sha256 != expected.sha256:
            overlay = manifest.layout == "overlay"
            raise not_as_described(path, walk.sha256, expected, _BASE_HINT if overlay else DAMAGED_HINT)
        if header == reader.header.raw and dense.keeps(shard) and writer.sha256 != shard.source.sha256:
            raise FormatError(f"{path}: untouched scales do not give the source back", hint=DAMAGED_HINT)
        return writer.commit(shard.source.file)


def _copy_others(factorized: Path, out: Path, manifest: Manifest, *, to_dense: bool) -> None:
    """What goes along with the weights: as it is, but for what speaks of a quantization that is no more."""
    by_name = {record.file: record for record in manifest.files}
    for name in loading_order(by_name):
        copy_file(factorized / name, out / name, name, by_name[name])
        if not to_dense:
            continue
        if name == CONFIG_FILE:
            write_file(out / name, without_quantization(factorized / name))
        elif name.endswith(INDEX_SUFFIX) and "/" not in name:
            write_file(out / name, index_of(out, factorized / name))
