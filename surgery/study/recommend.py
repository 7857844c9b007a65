"""The verb ``recommend``: the ranks that keep the most within a budget, written as a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.files.file_writer import write_file
from surgery.format.options import Options, RecommendKeywords, chosen_options
from surgery.names import Train
from surgery.planning.allocation import Candidate, gain_of, least_budget, ranks_within, uniform_rank_within
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.run.output_paths import check_output_path
from surgery.study.gains import GainsMeasure
from surgery.study.measuring import folders_of, measured_matrices, note_unconverged, open_models
from surgery.tuned.likeness import Norms, note_what_is_unlikely

Unit = Literal["numbers", "bytes"]
#: Gains below this share of the total are taken for rounding.
_NOISE = 1e-9


@dataclass(frozen=True, slots=True)
class Recommendation(Report):
    """Ranks that fit a budget.

    Attributes:
        out: the recipe file.
        train: what will be trained with these ranks: ``scales`` or ``core``.
        unit: unit of the budget: ``numbers`` to train, or ``bytes`` of U, s and V.
        budget: how much may be spent.
        ranks: the rank of each tensor; 0 if the tensor is better left alone.
        spent: how much of the budget the ranks use.
        trainable: how many scales, or numbers in cores, these ranks give.
        kept: share that is kept of the squared norm of all weights, or of their change if there is a tuned model.
        uniform_rank: the largest rank that fits the budget if all tensors have the same rank.
        uniform_kept: the share that this one rank would keep.
    """

    out: Path
    train: Train
    unit: Unit
    budget: int
    ranks: Mapping[str, int]
    spent: int
    trainable: int
    kept: float
    uniform_rank: int
    uniform_kept: float


@on_its_own_terms
def recommend(
    model: str | Path,
    tuned: str | Path | None = None,
    *,
    budget: int,
    out: str | Path,
    train: Train = "scales",
    unit: Unit = "numbers",
    max_rank: int = 256,
    options: Options | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **keywords: Unpack[RecommendKeywords],
) -> Recommendation:
    """Write a recipe with a rank for each target, such that a budget keeps as much as possible.

    What counts is the squared norm of the leading singular values, ``sum s_i^2`` over all weights. With a fine-tuned
    model, what counts is the part of its change D that can be explained: by scales of these directions
    ``sum (u_i^T D v_i)^2``, by cores ``sum ||U^T D V||^2``. For a matrix of rank k, scales have k numbers to train, and
    a core has k^2.

    The ranks are the exact optimum if that takes only seconds (4e9 additions). Otherwise they are chosen greedily by
    gain over cost. They never keep less than one rank for all targets would.

    Args:
        model: local folder or Hugging Face repo id.
        tuned: the fine-tuned model, likewise.
        budget: how much may be spent, at least 1.
        out: the recipe file to write.
        train: what will be trained: ``scales`` or ``core``.
        unit: unit of the budget: ``numbers`` to train, or ``bytes`` of U, s and V in float32.
        max_rank: the most directions of a matrix.
        options: which weights are measured, and how accurately. It may set the options that are keywords here, except
            the largest rank: that is ``max_rank``.
        recipe, include, exclude, revision, subfolder: as for ``factorize``.
        seed, tolerance, device, progress: as for ``surgery.spectra``.
        overwrite: replace ``out`` if it exists.

    Returns:
        The ranks, what they cost, and what they keep, compared with one rank for all.

    Raises:
        OptionError: the budget is too small for any direction, or an option is not valid.
        OutputError: ``out`` exists already, or lies inside one of the models.
        SurgeryError: as for ``surgery.spectra``.
    """
    chosen = chosen_options("recommend", RecommendKeywords, options, keywords)
    out = Path(out)
    for what, value in (("budget", budget), ("max_rank", max_rank)):
        if value < 1:
            raise OptionError(f"{what} must be at least 1", got=value)
    check_output_path(out, folders_of(model, tuned), overwrite=overwrite)
    models = open_models(model, tuned, replace(chosen, split=False), revision, subfolder, device)
    targets = measured_matrices(models, GainsMeasure(max_rank, train, chosen.tolerance, chosen.seed))
    if models.other is not None:
        norms = [Norms(target["key"], target["norm"], target["tuned_norm"], target["update_norm"]) for target in targets]
        note_what_is_unlikely(models.other.name, norms)
    note_unconverged(targets, chosen.tolerance, "Their ranks are less certain")
    candidates = _candidates(targets, unit, train)
    total = sum(target["total"] for target in targets)
    if total == 0:
        what = "all weights are 0" if tuned is None else "the two models have the same weights"
        raise OptionError(f"there is nothing to keep: {what}")
    what = "scales" if train == "scales" else "cores"
    if (needed := least_budget(candidates, _NOISE * total)) is None:
        hint = "cores may explain some" if train == "scales" else f"more than {max_rank} directions may explain some"
        raise OptionError(f"{what} of the leading directions explain nothing of the change", hint=hint)
    with phase(listening(), "choosing ranks"):
        ranks = ranks_within(candidates, budget, _NOISE * total)
    if not any(ranks.values()):
        raise OptionError(
            "the budget is too small for one direction", got=f"{budget} {unit}", expected=f"at least {needed} {unit}"
        )
    text = _as_recipe(targets, ranks, f"ranks recommended for {what}, for a budget of {budget} {unit}")
    write_file(out, text.encode())
    uniform_kept, uniform_rank = _uniform(candidates, budget, total)
    return Recommendation(
        out=out,
        train=train,
        unit=unit,
        budget=budget,
        ranks=ranks,
        spent=sum(candidate.cost_of(ranks[candidate.tensor]) for candidate in candidates),
        trainable=sum(_numbers(ranks[target["tensor"]], train) for target in targets),
        kept=gain_of(candidates, ranks) / total,
        uniform_rank=uniform_rank,
        uniform_kept=uniform_kept,
    )


def _numbers(rank: int, train: Train) -> int:
    """How many are trained of one matrix."""
    return rank if train == "scales" else rank**2


def _candidates(targets: Sequence[Mapping[str, Any]], unit: Unit, train: Train) -> list[Candidate]:
    by_tensor: dict[str, list[Mapping[str, Any]]] = {}
    for target in targets:
        by_tensor.setdefault(target["tensor"], []).append(target)
    candidates = []
    for tensor, matrices in by_tensor.items():
        m, n = matrices[0]["shape"]
        # The matrices of a stack share one rank.
        gains = [sum(values) for values in zip(*(target["gains"] for target in matrices), strict=True)]
        costs = [
            len(matrices) * (4 * (m + n + 1) if unit == "bytes" else _numbers(rank, train) - _numbers(rank - 1, train))
            for rank in range(1, len(gains) + 1)
        ]
        candidates.append(Candidate(tensor, gains, costs))
    return candidates


def _uniform(candidates: Sequence[Candidate], budget: int, total: float) -> tuple[float, int]:
    """The share that the largest common rank within the budget keeps, and that rank."""
    rank = uniform_rank_within(candidates, budget)
    return gain_of(candidates, {candidate.tensor: rank for candidate in candidates}) / total, rank


def _as_recipe(targets: Sequence[Mapping[str, Any]], ranks: Mapping[str, int], description: str) -> str:
    """The text of a recipe with one rule for each tensor, which matches its name alone."""
    views = {target["tensor"]: target["view"] for target in targets}
    lines = [f"description = {json.dumps(description)}"]
    for tensor, rank in ranks.items():
        lines += ["", "[[rules]]", f"match = {json.dumps(_literal(tensor))}"]
        if rank:
            lines += [f"view = {json.dumps(views[tensor])}", f"rank = {rank}"]
        else:
            lines.append('skip = "not worth its part of the budget"')
    return "\n".join(lines) + "\n"


def _literal(name: str) -> str:
    """A glob that matches this name alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
