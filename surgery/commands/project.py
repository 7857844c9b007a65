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
        key: the key of the target, or ``all`` for the total.
        change: ``||W_t - W|| / ||W||`` in Frobenius norms; None if W is zero and W_t is not.
        explained: the share of ``||W_t - W||^2`` that the scales or cores remove; None if nothing has changed.
        explained_by_scales: the share that scales of the same directions would remove; for scales it equals
            ``explained``.
        largest: for scales the largest ``|g - 1|``, for cores the largest entry of ``|C - I|``.
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
        fingerprint: the fingerprint of the factors that the scales belong to.
        train: what the file holds: ``scales``, or ``core`` for cores.
        trainable: how many scales, or numbers in cores, there are.
        targets: the targets, in the order of the manifest.
        total: all targets together, as if they were one long vector.
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

    Scales are ``g_i = 1 + u_i^T (W_t - W) v_i / s_i``. The ``u_i v_i^T`` are orthonormal matrices, so this is the
    unique minimizer of ``||W + U diag(s (g - 1)) V^T - W_t||`` in the Frobenius norm. If s_i is 0, or so small that g_i
    is outside the range of float32, g_i has no effect and stays 1.

    Cores (Balazy et al., LoRA-XS, arXiv 2405.17604) are ``C = I + U^T (W_t - W) V / sqrt(s s^T)``, entry by entry. For
    the same reason this is the unique minimizer of ``||W + U diag(sqrt s) (C - I) diag(sqrt s) V^T - W_t||``. An entry
    that has no effect stays that of I.

    W is the original weight; for FP8, in float32. For a residual without a correction, W is what a fold with untouched
    scales gives. The difference of the weights is formed first, and the rest is computed from it in float64.

    Both models are streamed. The memory needed is that of the largest target in both models (for a stack, of some of
    its matrices), times the number of targets that are compared at the same time. surgery compares one target on each
    core, as far as half of the free memory allows.

    Args:
        factorized: a folder that ``factorize`` has written.
        tuned: the fine-tuned model, folder or hub id, in bfloat16, float16, float32, or FP8 with scales, and in any
            shards. Its tensors have the names and shapes of the original ones, or known variants of them: the names of
            wrapping modules, one prefix or suffix for all, or another way to store them that transformers loads as the
            same, such as stacked experts.
        out: the scales file to write.
        train: ``scales`` or ``core``.
        base: for an overlay, the model that it was made from (folder or hub id). By default the one that the manifest
            names.
        device: device of the arithmetic: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: replace ``out`` if it exists.
        progress: receives the progress and the notes, such as a note if ``tuned`` does not look like a fine-tuned model
            (``surgery.tuned.likeness``). Without it, each note is a ``SurgeryWarning``.

    Returns:
        How much each target has changed, and how much of the change its scales or cores explain.

    Raises:
        SourceError: a model does not exist, or lacks a target; or a target has another shape there.
        WeightError: a fine-tuned weight holds NaN or infinity.
        ReadError: a file cannot be read.
        FormatError: a file is damaged, or is not the one that the manifest describes.
        OutputError: ``out`` exists already, is an input, or cannot be written.
        OptionError: a base was given that is not needed; or there is no such device.
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
