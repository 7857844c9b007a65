"""What of trained scales or cores has arrived in a folded model: ``surgery verify --folded``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import on_its_own_terms
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.scales.writing import distance
from surgery.lossless.kept import Kept
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.run.engines import LocalEngine, float64_device
from surgery.shards.projector import Components, Projector, tuned_model
from surgery.source.open import open_part
from surgery.trained.reading import read_any_trained, trained_path
from surgery.updates.kept_updates import KeptSummary, KeptUpdate
from surgery.weights.checkpoint import FactorizedWeights, weights_of


@dataclass(frozen=True, slots=True)
class FoldCheck(Report):
    """How much of the scales or cores is in a model into which they were folded.

    Attributes:
        targets: how many targets have scales or cores.
        changed: how many of them have scales other than 1, or cores other than the identity.
        kept: share of the update that is in the weights, as ``fold`` reports it; None if nothing has changed.
        kept_least: the smallest such share of any target.
        kept_least_in: the key of that target.
    """

    targets: int
    changed: int
    kept: float | None
    kept_least: float | None
    kept_least_in: str | None


@on_its_own_terms
def verify_folded(
    factorized: str | Path,
    folded: str | Path,
    scales: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> FoldCheck:
    """Measure how much of trained scales or cores is in a folded model, after any rounding.

    The measure is ``<W_f - W, D> / <D, D>``. For scales, ``D = U diag(s (g - 1)) V^T``, and it is computed from
    ``u_i^T (W_f - W) v_i``. For cores, ``D = U diag(sqrt s) (C - I) diag(sqrt s) V^T``, and it is computed from
    ``U^T (W_f - W) V``. All in float64.

    Args:
        factorized: the folder that was folded.
        folded: the folded model, or any other model with the same tensors, folder or hub id.
        scales: the scales file, or a folder that holds one.
        base: for an overlay, the model that it was made from. By default the one that the manifest names.
        device: device of the arithmetic: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        How much was kept, in total and for the target that lost most.

    Raises:
        SourceError: a model does not exist, or lacks a target.
        ScalesError: the scales do not belong to the checkpoint.
        ReadError, FormatError: a file cannot be read, is damaged, or is not the one that the manifest describes.
        OptionError: there is no such device.
    """
    progress = listening()
    engine = LocalEngine(float64_device(str(device)))
    folder = Path(factorized)
    manifest = Manifest.read(folder)
    trained = read_any_trained(trained_path(Path(scales)), folder, manifest)
    weights = weights_of(folder, manifest, base)
    source = open_part(folded, manifest.source.subfolder)
    with phase(progress, "reading headers"):
        model = tuned_model(source, folder, manifest, weights)
    updates = []

    def measure(target: TargetRecord, index: int, found: Components) -> None:
        values = trained.values[target.key].view(-1, *found.values.shape)[index]
        change = found.units * distance(values.double(), trained.train)
        asked = float(change.square().sum())
        updates.append(KeptUpdate(target.key, Kept(asked, float((change * found.values).sum()), None, asked)))

    with model, FactorizedWeights(folder, manifest, weights) as checkpoint:
        Projector(checkpoint, model, trained.train).run(engine, measure)
    for read in (source, weights):
        read.watch.check()
    kept = KeptSummary.of(updates)
    return FoldCheck(len(manifest.targets), kept.updates, kept.share, kept.least, kept.least_in)
