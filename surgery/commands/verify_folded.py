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
    """What is left in a folded model of the scales or cores that were folded into it.

    Attributes:
        targets: how many tensors have scales or cores.
        changed: how many of them have scales other than 1, or cores other than the identity.
        kept: share of the update that is in the weights, as ``fold`` reports it; null if none has changed.
        kept_least: the smallest share that is left of the update of any target.
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
    """Measure what of trained scales or cores is in a folded model, after whatever rounding.

    With ``D = U diag(s (g - 1)) V^T`` it is ``<W_f - W, D> / <D, D>``, from ``u_i^T (W_f - W) v_i``; with the
    ``D = U diag(sqrt s) (C - I) diag(sqrt s) V^T`` of cores from ``U^T (W_f - W) V``. In float64.

    Args:
        factorized: the folder that was folded.
        folded: the model that came of it, or any other with the same tensors, folder or hub id.
        scales: the scales file, or a folder that holds one.
        base: for an overlay, the model it was made from, if the one that the manifest names is not to be used.
        device: where the arithmetic runs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: told how far it is, and what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        What was kept, as a whole and of the target that lost most.

    Raises:
        SourceError: a model is not there, or lacks a target.
        ScalesError: the scales are not those of the checkpoint.
        ReadError, FormatError: a file cannot be read, is damaged, or is not the one that the manifest describes.
        OptionError: no such device.
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
