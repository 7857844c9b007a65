"""The spectra of a model's weights, and what fine-tuning has made of them."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from surgery.device import choose_devices, on_its_own_terms
from surgery.errors import FormatError, MissingExtra, OptionError, OutputError
from surgery.files.files import file_sha256, reading, write_file
from surgery.linalg.svd import DEFAULT_TOLERANCE, check_accuracy
from surgery.names import JOURNAL_DIR, SPECTRA_FILE, SPECTRA_PAGE, SPECTRA_TABLE
from surgery.planning.memory import need_to_measure, share_out
from surgery.planning.plan import Plan, make_plan
from surgery.planning.targets import Choice
from surgery.progress import Progress, listening, phase
from surgery.report.page import write_csv, write_page
from surgery.report.schema import SCHEMA_VERSION, check_target
from surgery.reports import Report
from surgery.run.engines import LocalEngine
from surgery.run.journal import Journal
from surgery.run.output import Interruptible, check_output_file, check_room, download_needs, files_together, locked
from surgery.shards.accuracy import unconverged_note
from surgery.source.address import address_of
from surgery.source.model import Source, open_source
from surgery.study.spectra_shard import Measure, Measuring, ShardSpectra, rounded
from surgery.version import __version__
from surgery.weights.tuned import Norms, note_what_is_unlikely

_FILES = (SPECTRA_FILE, SPECTRA_TABLE, SPECTRA_PAGE)
_MOST_AMPLIFIED = 10


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
    out: str | Path | None = None,
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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SpectraReport:
    """Describe the spectrum of every matrix that ``factorize`` would take, alone or against a fine-tuned model.

    Both models are streamed; the memory needed is set by the largest target in both and by how many are worked
    on at a time. What the numbers mean is said in ``surgery.study.spectrum`` and docs/study.md.

    Args:
        model: local folder or Hugging Face repo id.
        tuned: the same of a model with the same tensors, in any dtype and shards; for their names see ``project``.
        out: folder to write the report to: ``spectra.json``, ``spectra.csv`` and, with matplotlib, ``index.html``. They come
            together, when all is measured; the same call goes on after the last finished weight file. None writes nothing.
        top: singular values to tell of each matrix.
        subspace: dimension of the leading subspaces that are compared; 16, or ``top`` if that is less.
        include, exclude, recipe, split, revision, subfolder: as for ``factorize``; the revision is the first model's.
        seed, tolerance: of the truncated SVD.
        device: where the linear algebra runs. On a CPU each matrix is the work of one core: the numbers do not depend on how
            many there are.
        overwrite: replace an earlier report in ``out``, which stays as it is until the new one is whole.
        progress: told how far it is, and what the user should know, such as where ``tuned`` does
            not look like a fine-tuned model (``surgery.weights.tuned``); without it that is a ``SurgeryWarning``.

    Returns:
        The numbers of each matrix, and the findings about all of them. ``as_json()`` is the content of ``spectra.json``.

    Raises:
        OutputError: ``out`` holds a report, or another unfinished run; it is in a model, in use, or cannot be written.
        SurgeryError: a model cannot be had or read, holds NaN, or lacks a tensor; an option makes no sense.
    """
    progress = listening()
    check_accuracy(tolerance, seed)
    subspace = min(16, top) if subspace is None else subspace
    for what, value in (("top", top), ("subspace", subspace)):
        if value < 1:
            raise OptionError(f"{what} must be at least 1", got=value)
    if subspace > top:
        raise OptionError("the subspaces need as many singular vectors", got=f"subspace {subspace}, top {top}")
    out = None if out is None else Path(out)
    if out is not None:
        _check_out(out, folders_of(model, tuned), overwrite=overwrite)
    # Differences and entropies are taken in float64, which an Apple GPU does not have.
    exact_on = "cpu" if choose_devices(str(device))[0].type == "mps" else str(device)
    # The rank is of no account: what is told depends on top.
    choice = Choice(1, None, None, tuple(include), tuple(exclude), None if recipe is None else str(recipe), split)
    engine = LocalEngine(exact_on, None, None, None)
    with phase(progress, "planning"):
        source = open_source(model, revision=revision, subfolder=subfolder)
        steps = make_plan(source, choice, "overlay")
        other = None if tuned is None else open_source(tuned, subfolder=subfolder)
    check_room(*download_needs(*([source] if other is None else [source, other])))
    measure = Measure(top, subspace, tolerance, seed, compared=other is not None)
    options = SpectraOptions(top, subspace, seed, tolerance, steps.recipe, tuple(include), tuple(exclude))
    with ExitStack() as stack:
        journal = place = None
        if out is not None:
            run = stack.enter_context(Interruptible(out))
            run.journal = journal = Journal(out, _identity(source, other, steps, options, engine.device_name))
            stack.enter_context(locked(out, ()))
            place = stack.enter_context(files_together(out, journal, _FILES, overwrite=overwrite))
        targets = _measured(engine, source, steps, other, measure, journal, progress)
        for read in (source, other):
            if read is not None:
                read.watch.check()
        report = SpectraReport(
            tool=f"surgery {__version__}",
            torch=torch.__version__,
            device=engine.device_name,
            base=_named(source),
            tuned=None if other is None else _named(other),
            options=options,
            targets=tuple(targets),
            findings=_findings(targets, subspace, compared=other is not None),
        )
        if place is not None:
            _write(report, place, progress)
    if other is not None:
        note_what_is_unlikely(other.name, [_norms(target) for target in targets])
    if failed := {target["key"]: _worst_residual(target) for target in targets if not _has_converged(target)}:
        hint = "The figures of these are less certain: among targets they are those with converged false"
        progress.note(unconverged_note(failed, f"{len(targets)} matrices", tolerance, hint))
    return report


def _check_out(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output before any work. What an unfinished run has left there is looked at when the folder is locked."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no folder", hint="-o chooses another one")
    for name in _FILES:
        check_output_file(out / name, inputs, overwrite=overwrite or (out / JOURNAL_DIR).is_dir())


def _identity(source: Source, other: Source | None, steps: Plan, options: SpectraOptions, device: str) -> dict[str, Any]:
    """All that the figures depend on."""
    targets = [[t.key, list(t.shape), t.view.kind, asdict(t.view.slice) if t.view.slice else None] for t in steps.targets]
    models = {
        which: None if read is None else {**asdict(read.record), "files": read.stamps()}
        for which, read in (("base", source), ("tuned", other))
    }
    return {
        "command": "spectra",
        "schema_version": SCHEMA_VERSION,
        "tool": f"surgery {__version__}",
        "torch": torch.__version__,
        "device": device,
        "options": asdict(options),
        "targets": hashlib.sha256(json.dumps(targets).encode()).hexdigest(),
        **models,
    }


def _measured(
    engine: LocalEngine,
    source: Source,
    steps: Plan,
    other: Source | None,
    measure: Measure,
    journal: Journal | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The figures of all targets, in the order of the checkpoint; of what an earlier start has measured from the journal."""
    needs = [need_to_measure(target, measure.triplets, compared=measure.compared) for target in steps.targets]
    memory = share_out(needs, engine.resources)
    results: dict[int, list[dict[str, Any]]] = {}
    total = sum(shard.size for shard in steps.shards if shard.targets)
    with phase(progress, "measuring", total), Measuring(source, steps, other, measure, progress) as work:
        count = len(work.shards)
        done = None if journal is None else _Done(journal, source, other, work)
        for index in range(count):
            if done is not None and (known := done.of(index)) is not None:
                results[index] = known
                work.tell(index)
        if results:
            progress.note(f"going on after {len(results)} of {count} shards")
        missing = [index for index in range(count) if index not in results]
        with closing(engine.run(work, missing, memory)) as finished:
            for index, result in finished:
                results[index] = result.targets
                if done is not None:
                    done.record(index, result)
    return [target for index in range(count) for target in results[index]]


class _Done:
    """The shards that are measured, in a journal: each with the hashes of the local files that its figures were taken of."""

    def __init__(self, journal: Journal, source: Source, other: Source | None, work: Measuring) -> None:
        self._journal = journal
        self._source = source
        self._other = other
        self._work = work
        self._hashes: dict[Path, str] = {}

    def record(self, index: int, result: ShardSpectra) -> None:
        shard = self._work.shards[index]
        if self._source.record.kind == "folder":
            self._hashes[self._source.fetch(shard.file)] = result.sha256
        self._journal.record(index, shard.file, {"files": self._files(index), "targets": result.targets})

    def of(self, index: int) -> list[dict[str, Any]] | None:
        """The figures of a shard, if it is still what they were taken of."""
        value = self._journal.recorded(index, self._work.shards[index].file)
        targets = value.get("targets") if isinstance(value, dict) else None
        identities = self._work.identities(index)
        if not isinstance(targets, list) or len(targets) != len(identities):
            return None
        for target, identity in zip(targets, identities, strict=True):
            try:
                check_target(target, compared=self._other is not None)
            except FormatError:
                return None
            if any(target.get(name, ...) != value for name, value in identity.items()):
                return None
        return targets if value.get("files") == self._files(index) else None

    def _files(self, index: int) -> list[list[str]]:
        """Names and hashes of what a shard's figures are taken of. A commit pins the files of a hub model."""
        shard = self._work.shards[index]
        read = [(self._source, [shard.file])]
        if self._other is not None and self._work.tuned is not None:
            read.append((self._other, self._work.tuned.shards_of(target.tensor for target in shard.targets)))
        return [
            [file, self._sha256(model.fetch(file))] for model, files in read if model.record.kind == "folder" for file in files
        ]

    def _sha256(self, path: Path) -> str:
        if path not in self._hashes:
            with reading(path):
                self._hashes[path] = file_sha256(path)
        return self._hashes[path]


def _write(report: SpectraReport, place: Path, progress: Progress) -> None:
    """The files of a report."""
    content = report.as_json()
    write_file(place / SPECTRA_FILE, json.dumps(content, allow_nan=False).encode() + b"\n")
    write_csv(content, place / SPECTRA_TABLE)
    with phase(progress, "drawing"):
        try:
            write_page(content, place / SPECTRA_PAGE)
        except MissingExtra as missing:
            progress.note(f"no page: {missing.what}; try {missing.hint}")


def _norms(target: Mapping[str, Any]) -> Norms:
    change = 0.0 if target["update"] is None else target["update"]["norm"]
    return Norms(target["key"], target["norm"], target["tuned"]["norm"], change)


def folders_of(*models: str | Path | None) -> list[Path]:
    """Those of models that are local."""
    addresses = [address_of(model) for model in models if model is not None]
    return [address.folder for address in addresses if address.folder is not None]


def _named(source: Source) -> StudiedModel:
    return StudiedModel(source.name, source.record.repo_id, source.record.commit)


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
    return Findings(**rounded(found), most_amplified=_most_amplified(targets, r) if compared else None)


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
