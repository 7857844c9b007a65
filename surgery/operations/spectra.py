"""The spectra of a model's weights, and what fine-tuning has made of them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from surgery.device import as_memory_allows, choose_device, device_name, on_its_own_terms
from surgery.engine.walk import ShardWalk, TargetPiece, reported
from surgery.errors import OptionError, WeightError
from surgery.format.safetensors import TORCH_DTYPES, ShardReader
from surgery.linalg.spectrum import compare, spectrum
from surgery.linalg.svd import DEFAULT_TOLERANCE, check_accuracy
from surgery.operations.accuracy import unconverged_note
from surgery.operations.output import check_room, download_needs
from surgery.operations.quantized import Dequantizer
from surgery.operations.tuned import Norms, TunedModel, note_what_is_unlikely
from surgery.planning.plan import Plan, make_plan
from surgery.planning.targets import Choice, Target
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.source.address import address_of
from surgery.source.model import Source, open_source
from surgery.version import __version__

SCHEMA_VERSION = 2
_MOST_AMPLIFIED = 10
#: More triplets than are told, for directions that change places: a quarter of them, or so many.
_BEYOND = 16
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Amplified:
    """A singular value that fine-tuning has changed.

    Attributes:
        key: of the matrix.
        index: of the value, from 1.
        amplification: the new one over the old one.
    """

    key: str
    index: int
    amplification: float


@dataclass(frozen=True, slots=True)
class Findings(Report):
    """What can be said of all matrices together. From ``top_change`` on None where there is no tuned model.

    The first r directions of a matrix are its top, the next are those after it that are told, and the rest comes after these.

    Attributes:
        targets: how many matrices there are.
        median_stable_rank: of all matrices.
        median_effective_rank_share: of the effective rank over the shorter side.
        median_energy: by rank, of the share of the squared norm in as many directions.
        unconverged: how many matrices have an SVD that did not reach the tolerance: their own, that of what they became, or
            that of the update.
        unidentified_share: of the directions, those that their matrix does not determine.
        top_change, next_change, rest_change: medians of the mean size of the relative change of singular values, of the top,
            the next and the rest.
        median_top_amplification, median_next_amplification, median_rest_amplification: of new over old singular values.
        top_amplified_share: of the top's values, those that grew.
        median_left_cosine, median_right_cosine: of the top's directions and what they became.
        median_in_place: of how strong the top's directions are in the tuned model, over what they were.
        in_place_grew_share: of these, those that are stronger.
        order_changes: how many pairs of directions have changed their order.
        moved_share: of the top's directions, those that are at another place.
        gone: how many of the top's directions are beyond all that was computed.
        new: how many of the tuned model's top are no direction of the original.
        median_relative_update: of the norm of the change over that of the matrix.
        median_update_in_both, chance_in_both: of the share of the change inside the top's subspaces, and that by chance.
        median_rescaling, chance_rescaling: of the share of it that scales of the top explain, and that by chance.
        most_amplified: the values that have changed most, first the furthest.
    """

    schema_version: ClassVar[int] = SCHEMA_VERSION

    targets: int
    median_stable_rank: float | None
    median_effective_rank_share: float | None
    median_energy: Mapping[str, float | None]
    unconverged: int
    unidentified_share: float
    top_change: float | None = None
    next_change: float | None = None
    rest_change: float | None = None
    median_top_amplification: float | None = None
    median_next_amplification: float | None = None
    median_rest_amplification: float | None = None
    top_amplified_share: float | None = None
    median_left_cosine: float | None = None
    median_right_cosine: float | None = None
    median_in_place: float | None = None
    in_place_grew_share: float | None = None
    order_changes: int | None = None
    moved_share: float | None = None
    gone: int | None = None
    new: int | None = None
    median_relative_update: float | None = None
    median_update_in_both: float | None = None
    chance_in_both: float | None = None
    median_rescaling: float | None = None
    chance_rescaling: float | None = None
    most_amplified: tuple[Amplified, ...] | None = None


@dataclass(frozen=True, slots=True)
class StudiedModel:
    """A model.

    Attributes:
        name: as it was given.
        repo_id, commit: on the hub; None for a local folder.
    """

    name: str
    repo_id: str | None
    commit: str | None


@dataclass(frozen=True, slots=True)
class SpectraOptions:
    """What was asked for.

    Attributes:
        top: singular values that are told of each matrix.
        subspace: r, the dimension of the leading subspaces that are compared.
        seed, tolerance: of the truncated SVD.
        recipe: the name of the recipe that applies; None: the defaults for any model.
        include, exclude: globs over tensor names.
    """

    top: int
    subspace: int
    seed: int
    tolerance: float
    recipe: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SpectraReport(Report):
    """The spectra of a model, alone or against a fine-tuned one. Its JSON is the contents of ``spectra.json``.

    Attributes:
        tool, torch: the versions that measured.
        device: what the linear algebra ran on.
        base: the model.
        tuned: the fine-tuned one; None without it.
        options: what was asked for.
        targets: what was measured of each matrix, an object as described in docs/study.md.
        findings: what can be said of all of them together.
    """

    schema_version: ClassVar[int] = SCHEMA_VERSION

    tool: str
    torch: str
    device: str
    base: StudiedModel
    tuned: StudiedModel | None
    options: SpectraOptions
    targets: tuple[Mapping[str, Any], ...]
    findings: Findings


@on_its_own_terms
def spectra(
    model: str | Path,
    tuned: str | Path | None = None,
    *,
    top: int = 256,
    subspace: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    recipe: str | Path | None = None,
    split: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    seed: int = 0,
    tolerance: float = DEFAULT_TOLERANCE,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> SpectraReport:
    """Describe the spectrum of every matrix that ``factorize`` would take, alone or against a fine-tuned model.

    Both models are streamed and read once; the memory needed is that of the largest target in both. What the numbers
    mean is said in ``surgery.linalg.spectrum`` and docs/study.md.

    Args:
        model: local folder or Hugging Face repo id.
        tuned: the same of a model with the same tensors, in any dtype and shards.
        top: singular values to tell of each matrix.
        subspace: dimension of the leading subspaces that are compared; 16, or ``top`` if that is less.
        include, exclude, recipe, split, revision, subfolder: as for ``factorize``; the revision is the first model's.
        seed, tolerance: of the truncated SVD.
        device: where the linear algebra runs.
        progress: told how far it is, and what the user should know, such as where ``tuned`` does
            not look like a fine-tuned model (``surgery.operations.tuned``); without it that is a ``SurgeryWarning``.

    Returns:
        The numbers of each matrix, and the findings about all of them. ``as_json()`` is the content of ``spectra.json``.

    Raises:
        SurgeryError: a model cannot be had or read, holds NaN, or lacks a tensor; an option makes no sense.
    """
    progress = listening()
    where = choose_device(str(device))
    check_accuracy(tolerance, seed)
    subspace = min(16, top) if subspace is None else subspace
    for what, value in (("top", top), ("subspace", subspace)):
        if value < 1:
            raise OptionError(f"{what} must be at least 1", got=value)
    if subspace > top:
        raise OptionError("the subspaces need as many singular vectors", got=f"subspace {subspace}, top {top}")
    # The rank is of no account: what is told depends on top.
    choice = Choice(1, None, None, tuple(include), tuple(exclude), None if recipe is None else str(recipe), split)
    with phase(progress, "planning"):
        source = open_source(model, revision=revision, subfolder=subfolder)
        steps = make_plan(source, choice, "overlay")
        other = None if tuned is None else open_source(tuned, subfolder=subfolder)
    check_room(*download_needs(*([source] if other is None else [source, other])))
    measure = _Measure(top, subspace, tolerance, seed, where)
    targets = _walk(source, steps, other, measure, progress)
    for read in (source, other):
        if read is not None:
            read.watch.check()
    if other is not None:
        note_what_is_unlikely(other.name, [_norms(target) for target in targets])
    if failed := {target["key"]: _worst_residual(target) for target in targets if not _has_converged(target)}:
        hint = "The figures of these are less certain: among targets they are those with converged false"
        progress.note(unconverged_note(failed, f"{len(targets)} matrices", tolerance, hint))
    return SpectraReport(
        tool=f"surgery {__version__}",
        torch=torch.__version__,
        device=device_name(where),
        base=_named(source),
        tuned=None if other is None else _named(other),
        options=SpectraOptions(top, subspace, seed, tolerance, steps.recipe, tuple(include), tuple(exclude)),
        targets=tuple(targets),
        findings=_findings(targets, subspace, compared=other is not None),
    )


def _norms(target: Mapping[str, Any]) -> Norms:
    change = 0.0 if target["update"] is None else target["update"]["norm"]
    return Norms(target["key"], target["norm"], target["tuned"]["norm"], change)


def folders_of(*models: str | Path | None) -> list[Path]:
    """Those of models that are local."""
    addresses = [address_of(model) for model in models if model is not None]
    return [address.folder for address in addresses if address.folder is not None]


def _named(source: Source) -> StudiedModel:
    return StudiedModel(source.name, source.record.repo_id, source.record.commit)


class _Measure:
    """Takes the figures of one matrix, or of one and what it became."""

    def __init__(self, top: int, subspace: int, tolerance: float, seed: int, device: torch.device) -> None:
        self._top = top
        self._subspace = subspace
        self._tolerance = tolerance
        self._seed = seed
        # Differences and entropies are taken in float64, which an Apple GPU does not have.
        self._device = torch.device("cpu") if device.type == "mps" else device

    def __call__(self, old: torch.Tensor, new: torch.Tensor | None, spacings: tuple[float, float]) -> dict[str, Any]:
        """The figures of a matrix, and of what it became, stored with so much between the numbers next to 1."""

        def on(pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]], where: torch.device) -> list[dict[str, Any]]:
            before, after = pairs[0]
            return [self._figures(before.to(where), None if after is None else after.to(where), spacings)]

        return as_memory_allows(on, [(old, new)], self._device)[0]

    def _figures(self, old: torch.Tensor, new: torch.Tensor | None, spacings: tuple[float, float]) -> dict[str, Any]:
        top, seed = self._top, self._seed
        beyond = 0 if new is None else max(_BEYOND, top // 4)
        described, before = spectrum(old, top, beyond=beyond, tolerance=self._tolerance, seed=seed)
        figures = asdict(described)
        if new is not None:
            changed, after = spectrum(new, top, beyond=beyond, tolerance=self._tolerance, seed=seed)
            figures["tuned"] = asdict(changed)
            figures |= asdict(compare(old, new, before, after, top, self._subspace, spacings=spacings, seed=seed))
        short: dict[str, Any] = _rounded(figures)
        return short


def _rounded(value: Any) -> Any:
    """Six significant digits: what float32 weights can say."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _walk(source: Source, steps: Plan, other: Source | None, measure: _Measure, progress: Progress) -> list[dict[str, Any]]:
    """The figures of all targets, in the order of the checkpoint."""
    shapes = {target.tensor: target.shape for target in steps.targets}
    prefix = _common_prefix([_generic(target.tensor) for target in steps.targets])
    shards = [shard for shard in steps.shards if shard.targets]
    described: list[dict[str, Any]] = []
    with phase(progress, "measuring", sum(shard.size for shard in shards)), ExitStack() as stack:
        dequantizer = stack.enter_context(Dequantizer(source.fetch, source.watch))
        names = {entry.name for shard in source.selection.shards for entry in source.header(shard).tensors}
        tuned = None if other is None else stack.enter_context(TunedModel(other, shapes, names))
        for shard in shards:
            inside: dict[str, list[Target]] = {}
            for target in shard.targets:
                inside.setdefault(target.tensor, []).append(target)
            portions = {name: parts[0].at_a_time for name, parts in inside.items()}
            with (
                ShardReader(source.fetch(shard.file), name=shard.file, watch=source.watch) as reader,
                ShardWalk(reader, portions) as walk,
            ):
                for piece in reported(walk, progress):
                    if isinstance(piece, TargetPiece):
                        described += _piece(piece, inside[piece.entry.name], dequantizer, tuned, measure, prefix)
    return described


def _piece(
    piece: TargetPiece,
    targets: Sequence[Target],
    dequantizer: Dequantizer,
    tuned: TunedModel | None,
    measure: _Measure,
    prefix: str,
) -> list[dict[str, Any]]:
    weight = dequantizer.weight(piece.tensor, piece.first, targets[0].scaled)
    changed = None if tuned is None else tuned.weight(piece)
    stored = [targets[0].dtype] if tuned is None else [targets[0].dtype, tuned.dtype(piece.entry.name)]
    spacings = tuple(torch.finfo(TORCH_DTYPES[dtype]).eps for dtype in stored)
    described = []
    for target in targets:
        old = target.view.matrices(weight)
        new = None if changed is None else target.view.matrices(changed)
        for i, matrix in enumerate(old):
            index = piece.first + i if target.view.kind == "stack" else None
            try:
                figures = measure(matrix, None if new is None else new[i], (spacings[0], spacings[-1]))
            except WeightError as error:
                raise WeightError(f"{target.shard}: {target.key!r}: {error.what}", hint="repair the model") from error
            described.append({**_identity(target, index, prefix), "shape": list(matrix.shape), **figures})
    return described


def _identity(target: Target, index: int | None, prefix: str) -> dict[str, Any]:
    number = re.search(r"(?:^|\.)(\d+)\.", target.tensor)
    part = target.view.slice.name if target.view.slice else None
    group = _generic(target.tensor).removeprefix(prefix).removesuffix(".weight").removesuffix("_weight")
    return {
        "tensor": target.tensor,
        "slice": part,
        "matrix": index,
        "key": target.key if index is None else f"{target.key}#{index}",
        "group": group if part is None else f"{group}[{part}]",
        "layer": int(number[1]) if number else None,
        "view": target.view.kind,
        "dtype": target.dtype,
    }


def _generic(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"(?:(?<=\.)|^)\d+\.", "", name)


def _common_prefix(names: Sequence[str]) -> str:
    """Of whole parts of names, such as ``model.layers.``."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for some in zip(*parts, strict=False):
        if len(set(some)) > 1:
            break
        common.append(some[0])
    # What is left must still say what it is: ``self_attn.q_proj``.
    return "".join(f"{part}." for part in common[: max(0, min(map(len, parts)) - 1)])


def _findings(targets: Sequence[Mapping[str, Any]], r: int, *, compared: bool) -> Findings:
    ranks = sorted({int(rank) for target in targets for rank in target["energy"]})
    known = [flag for target in targets for flag in target["identified"]]
    found: dict[str, Any] = {
        "targets": len(targets),
        "median_stable_rank": _median(target["stable_rank"] for target in targets),
        "median_effective_rank_share": _median(target["effective_rank"] / min(target["shape"]) for target in targets),
        "median_energy": {
            str(rank): _median(target["energy"][str(rank)] for target in targets if str(rank) in target["energy"])
            for rank in ranks
        },
        "unconverged": sum(not _has_converged(target) for target in targets),
        "unidentified_share": 1 - sum(known) / len(known),
    }
    if compared:
        found |= _changes(targets, r)
    return Findings(**_rounded(found), most_amplified=_most_amplified(targets, r) if compared else None)


def _parts(target: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All that has an SVD of its own: a matrix, what it became, and the update."""
    return [target, *(part for name in ("tuned", "update") if (part := target.get(name)) is not None)]


def _has_converged(target: Mapping[str, Any]) -> bool:
    return all(part["converged"] for part in _parts(target))


def _worst_residual(target: Mapping[str, Any]) -> float:
    """Of a matrix and of what it became; of an update they are not told."""
    return max(max(part.get("residual", ()), default=0.0) for part in _parts(target))


def _most_amplified(targets: Sequence[Mapping[str, Any]], r: int) -> tuple[Amplified, ...]:
    every = (
        Amplified(target["key"], index, value)
        for target in targets
        for index, value in enumerate(target["amplification"][:r], 1)
        if value is not None
    )
    return tuple(sorted(every, key=lambda one: -abs(one.amplification - 1))[:_MOST_AMPLIFIED])


def _changes(targets: Sequence[Mapping[str, Any]], r: int) -> dict[str, Any]:
    tops = [[value for value in target["amplification"][:r] if value is not None] for target in targets]
    ratios = [value for values in tops for value in values]
    updates = [target["update"] for target in targets if target["update"] is not None]
    sizes = [(min(r, len(target["amplification"])), *target["shape"]) for target in targets if target["update"] is not None]
    nexts = [[value for value in target["amplification"][r:] if value is not None] for target in targets]
    rests = [target["rest_amplification"] for target in targets]
    in_place = [value for target in targets for value in target["in_place"][:r] if value is not None]
    places = [(i, place) for target in targets for i, place in enumerate(target["place"][:r], 1) if place is not None]
    return {
        "top_change": _median(statistics.fmean(abs(value - 1) for value in values) for values in tops if values),
        "next_change": _median(statistics.fmean(abs(value - 1) for value in values) for values in nexts if values),
        "rest_change": _median(abs(rest - 1) for rest in rests if rest is not None),
        "median_top_amplification": _median(ratios),
        "median_next_amplification": _median(value for values in nexts for value in values),
        "median_rest_amplification": _median(rest for rest in rests if rest is not None),
        "top_amplified_share": sum(value > 1 for value in ratios) / len(ratios) if ratios else None,
        "median_left_cosine": _median(value for t in targets for value in t["left_cosine"][:r] if value is not None),
        "median_right_cosine": _median(value for t in targets for value in t["right_cosine"][:r] if value is not None),
        "median_in_place": _median(in_place),
        "in_place_grew_share": sum(value > 1 for value in in_place) / len(in_place) if in_place else None,
        "order_changes": sum(target["order_changes"] for target in targets),
        "moved_share": sum(place != i for i, place in places) / len(places) if places else None,
        "gone": sum(len(target["gone"]) for target in targets),
        "new": sum(len(target["new"]) for target in targets),
        "median_relative_update": _median(u["relative"] for u in updates if u["relative"] is not None),
        "median_update_in_both": _median(update["in_both"] for update in updates),
        "chance_in_both": _median(k * k / (m * n) for k, m, n in sizes),
        "median_rescaling": _median(update["rescaling"] for update in updates),
        "chance_rescaling": _median(k / (m * n) for k, m, n in sizes),
    }


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
