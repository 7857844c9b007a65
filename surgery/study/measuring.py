"""What ``spectra`` and ``recommend`` have in common: a model is opened, alone or with a fine-tuned one, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.engine.sharing import share_out
from surgery.format.options import Options
from surgery.planning.memory import need_to_measure
from surgery.planning.notes import notes_of_reach
from surgery.planning.plan import Plan, make_plan
from surgery.progress import listening, note, phase
from surgery.report.summary import worst_residual
from surgery.run.disk_room import check_room, download_needs
from surgery.run.engines import LocalEngine, float64_device
from surgery.run.journal import Journal
from surgery.run.resume import shard_results
from surgery.shards.accuracy import unconverged_note
from surgery.source.address import address_of
from surgery.source.open import open_source
from surgery.source.protocol import Source
from surgery.study.overview import has_converged
from surgery.study.spectra_shard import Measure, SpectraJobs


@dataclass(frozen=True, slots=True)
class StudiedPair:
    """A model that is measured.

    Attributes:
        source, plan: the model, and which of its weights are looked at.
        other: the fine-tuned model; None without one.
        engine: what the measuring runs on.
    """

    source: Source
    plan: Plan
    other: Source | None
    engine: LocalEngine


def open_models(
    model: str | Path,
    tuned: str | Path | None,
    options: Options,
    revision: str | None,
    subfolder: str | None,
    device: str | torch.device,
) -> StudiedPair:
    """Open a model, alone or with the fine-tuned one, and plan what is measured. Arguments are those of ``spectra``."""
    # Differences and entropies are computed in float64.
    engine = LocalEngine(float64_device(str(device)))
    # The plan chooses the targets. Its rank does not matter: how many directions are looked at is said by what measures.
    with phase(listening(), "planning"):
        source = open_source(model, revision=revision, subfolder=subfolder)
        plan = make_plan(source, replace(options, rank=1), "overlay")
        other = None if tuned is None else open_source(tuned, subfolder=subfolder)
    for one in notes_of_reach(plan.skipped, plan.targets):
        note(one)
    check_room(*download_needs(*([source] if other is None else [source, other])))
    return StudiedPair(source, plan, other, engine)


def measured_matrices(models: StudiedPair, measure: Measure, journal: Journal | None = None) -> list[dict[str, Any]]:
    """The figures of each matrix, in the order of the files.

    Args:
        models: what is measured.
        measure: measures one matrix.
        journal: which has what was measured before, and is told what is; None keeps nothing.
    """
    source, plan, other = models.source, models.plan, models.other
    compared = other is not None
    needs = [need_to_measure(target, measure.triplets, compared=compared) for target in plan.targets]
    memory = share_out(needs, models.engine.resources)
    total = sum(shard.size for shard in plan.shards if shard.targets)
    with phase(listening(), "measuring", total), SpectraJobs(source, plan, other, measure) as jobs:
        measured = shard_results(jobs, lambda missing: models.engine.run(jobs, missing, memory), journal)
    for studied in (source, other):
        if studied is not None:
            studied.watch.check()
    return [target for shard in measured for target in shard.targets]


def note_unconverged(targets: Sequence[dict[str, Any]], tolerance: float, hint: str) -> None:
    """Tell which matrices have an SVD that did not reach the tolerance, if any have, and what that means."""
    if failed := {target["key"]: worst_residual(target) for target in targets if not has_converged(target)}:
        note(unconverged_note(failed, f"{len(targets)} matrices", tolerance, hint))


def folders_of(*models: str | Path | None) -> list[Path]:
    """The folders of those models that are local."""
    addresses = [address_of(model) for model in models if model is not None]
    return [address.folder for address in addresses if address.folder is not None]
