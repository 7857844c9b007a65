"""The verb ``project``: the scales or cores that bring a factorized checkpoint closest to a fine-tuned model."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import on_its_own_terms
from surgery.format.manifest import Manifest
from surgery.format.scales.writing import write_scales
from surgery.names import SCALES_FILE, Train
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.run.disk_room import check_room, download_needs
from surgery.run.engines import LocalEngine, float64_device
from surgery.run.output_paths import check_not_the_source, check_output_path
from surgery.shards.projector import Closest, Projector, Sums, tuned_model
from surgery.source.open import open_part
from surgery.tuned.likeness import note_what_is_unlikely
from surgery.weights.checkpoint import FactorizedWeights, weights_of


@dataclass(frozen=True, slots=True)
class Projection:
    """How far a fine-tuned weight W_t is from the original W, and how much of that scales or cores can express.

    Attributes:
        key: of the target, or of all.
        change: ``||W_t - W|| / ||W||``, Frobenius norms; None where W is zero and W_t is not.
        explained: the share of ``||W_t - W||^2`` that the scales or cores take away; None where nothing has changed.
        explained_by_scales: the share that scales of the same directions take away, the same for scales.
        largest: the largest ``|g - 1|`` of scales, the largest entry of ``|C - I|`` of cores.
    """

    key: str
    change: float | None
    explained: float | None
    explained_by_scales: float | None
    largest: float


@dataclass(frozen=True, slots=True)
class ProjectReport(Report):
    """What a projection found.

    Attributes:
        out: the scales file.
        fingerprint: of the factors that they belong to.
        train: whether it has scales or cores.
        trainable: how many scales, or numbers in cores.
        targets: each of them, in the order of the manifest.
        total: all of them together, as if they were one long vector.
    """

    out: Path
    fingerprint: str
    train: Train
    trainable: int
    targets: tuple[Projection, ...]
    total: Projection


@on_its_own_terms
def project(
    factorized: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    train: Train = "scales",
    base: str | Path | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ProjectReport:
    """Write the scales or cores that bring a factorized checkpoint closest to a fully fine-tuned model.

    Scales are ``g_i = 1 + u_i^T (W_t - W) v_i / s_i``. As ``u_i v_i^T`` are orthonormal matrices, this is the one minimiser of
    ``||W + U diag(s (g - 1)) V^T - W_t||``, the Frobenius norm; where s_i is 0, or so small that g_i is beyond float32,
    g_i has no use and stays 1. Cores (Balazy et al., LoRA-XS, arXiv 2405.17604) are ``C = I + U^T (W_t - W) V / sqrt(s s^T)``,
    entry by entry, for the same reason the one minimiser of ``||W + U diag(sqrt s) (C - I) diag(sqrt s) V^T - W_t||``; an entry
    without use stays that of I. W is the original weight, for FP8 in float32; for a residual without a correction it is
    what a fold with untouched scales gives. Computed in float64 from the difference of the weights.

    Streams both models: the memory needed is that of the largest target, for a stack of some of its matrices, in both; as
    often as targets are compared at a time, one on each core as far as half of the free memory allows.

    Args:
        factorized: a folder written by ``factorize``.
        tuned: the fine-tuned model, folder or hub id. Its tensors have the names and shapes of the original ones, or others
            that are known for them: with the names of wrapping modules, or one prefix or suffix, or stored in another way
            that transformers loads as the same, such as stacked experts; in bfloat16, float16, float32, or FP8 with scales;
            in shards of any kind.
        out: the scales file to write.
        train: ``scales``, or ``core``.
        base: for an overlay, the model it was made from (folder or hub id), if the one that the manifest names is
            not to be used.
        device: where the arithmetic runs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: replace ``out`` if it is there.
        progress: told how far it is, and what the user should know, such as where ``tuned`` does
            not look like a fine-tuned model (``surgery.tuned.likeness``); without it that is a ``SurgeryWarning``.

    Returns:
        How much each target has changed, and how much of that its scales or cores explain.

    Raises:
        SourceError: a model is not there, or lacks a target; a target has another shape there.
        WeightError: a fine-tuned weight holds NaN or infinity.
        ReadError: a file cannot be read.
        FormatError: a file is damaged, or is not the one that the manifest describes.
        OutputError: ``out`` is there already, is an input, or cannot be written.
        OptionError: a base that is not needed; no such device.
    """
    progress = listening()
    engine = LocalEngine(float64_device(str(device)))
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    weights = weights_of(factorized, manifest, base)
    source = open_part(tuned, manifest.source.subfolder)
    inputs = [factorized, *weights.files.folders(), *source.folders()]
    check_output_path(out, inputs, overwrite=overwrite, but=factorized / SCALES_FILE)
    check_room(*download_needs(source, weights.files))
    check_not_the_source(out, manifest)
    with ExitStack() as stack:
        with phase(progress, "reading headers"):
            model = stack.enter_context(tuned_model(source, factorized, manifest, weights))
        checkpoint = stack.enter_context(FactorizedWeights(factorized, manifest, weights))
        found = Closest(manifest.targets, train)
        Projector(checkpoint, model, train).run(engine, found.add)
    for read in (source, weights):
        read.watch.check()
    write_scales(out, found.values, manifest.fingerprint, train)
    note_what_is_unlikely(source.name, [sums.norms(key) for key, sums in found.sums.items()])
    total = Sums()
    for sums in found.sums.values():
        total.add(sums)
    return ProjectReport(
        out,
        manifest.fingerprint,
        train,
        sum(target.numbers_of(train) for target in manifest.targets),
        tuple(_projection(target.key, found.sums[target.key]) for target in manifest.targets),
        _projection("all", total),
    )


def _projection(key: str, sums: Sums) -> Projection:
    change = math.sqrt(sums.change / sums.weight) if sums.weight else None if sums.change else 0.0
    explained, by_scales = (_share(part, sums.change) for part in (sums.explained, sums.explained_by_scales))
    return Projection(key, change, explained, by_scales, sums.largest)


def _share(part: float, change: float) -> float | None:
    # Rounding may take a change that is explained in full beyond 1.
    return min(1.0, part / change) if change else None
