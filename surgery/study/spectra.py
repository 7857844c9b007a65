"""The verb ``spectra``: the spectra of a model's weights, alone or compared with those of a fine-tuned model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch

from surgery.device import on_its_own_terms
from surgery.errors import MissingExtra, OptionError, OutputError
from surgery.files.file_writer import write_file
from surgery.format.options import Options, SpectraKeywords, chosen_options
from surgery.names import JOURNAL_DIR, SPECTRA_FILE, SPECTRA_PAGE, SPECTRA_TABLE
from surgery.planning.plan import Plan
from surgery.progress import Progress, listening, phase
from surgery.report.listing import write_csv
from surgery.report.page import write_page
from surgery.report.schema import SCHEMA_VERSION
from surgery.reports import Report
from surgery.run.factorization import target_identity
from surgery.run.output_paths import check_output_path
from surgery.run.run import Run
from surgery.source.protocol import Source
from surgery.study.measuring import folders_of, measured_matrices, note_unconverged, open_models
from surgery.study.overview import Findings, findings_of
from surgery.study.spectra_shard import SpectraMeasure
from surgery.tuned.likeness import Norms, note_what_is_unlikely
from surgery.version import __version__

_FILES = (SPECTRA_FILE, SPECTRA_TABLE, SPECTRA_PAGE)


@dataclass(frozen=True, slots=True)
class StudiedModel:
    """A model that was studied.

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
    """The spectra of a model, alone or compared with a fine-tuned model. Its JSON is the contents of ``spectra.json``.

    Attributes:
        tool: version of surgery.
        torch: version of torch.
        device: the device of the linear algebra.
        base: the model.
        tuned: the fine-tuned model; None if there is none.
        options: what was asked for.
        targets: what was measured of each matrix, as an object that docs/study.md describes.
        findings: the findings about all matrices together.
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
    top: int = 48,
    subspace: int | None = None,
    options: Options | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **keywords: Unpack[SpectraKeywords],
) -> SpectraReport:
    """Describe the spectrum of every matrix that ``factorize`` would factorize, alone or compared with a fine-tuned model.

    Both models are streamed. The memory needed depends on the largest target in both models, and on how many targets
    are processed at the same time. ``surgery.study.spectrum`` and docs/study.md explain the numbers.

    Args:
        model: local folder or Hugging Face repo id.
        tuned: the fine-tuned model, likewise. It has the same tensors, in any dtype and any shards. For the names of
            its tensors see ``project``.
        out: folder for the report: ``spectra.json``, ``spectra.csv`` and, if matplotlib is installed, ``index.html``.
            The files are written together when everything is measured. After an interruption, the same call continues
            after the last finished weight file. None writes nothing.
        top: how many singular values to report for each matrix.
        subspace: dimension of the leading subspaces that are compared; by default 16, or ``top`` if that is less.
        options: which weights are measured, and how accurately. It may set the options that are keywords here.
        recipe, split, include, exclude, revision, subfolder: as for ``factorize``; the revision is that of ``model``.
        seed, tolerance: seed and tolerance of the truncated SVD, see ``surgery.truncated_svd``.
        device: device of the linear algebra. On a CPU, one core works on each matrix: the numbers do not depend on the
            number of cores.
        overwrite: replace an earlier report in ``out``. The earlier report stays until the new one is complete.
        progress: receives the progress and the notes, such as a note if ``tuned`` does not look like a fine-tuned model
            (``surgery.tuned.likeness``). Without it, each note is a ``SurgeryWarning``.

    Returns:
        The numbers of each matrix, and the findings about all of them. ``as_json()`` is the content of
        ``spectra.json``.

    Raises:
        OutputError: ``out`` holds a report, or another unfinished run; it lies inside a model, is in use, or cannot be
            written.
        SurgeryError: a model cannot be found or read, holds NaN, or lacks a tensor; an option is not valid.
    """
    progress = listening()
    chosen = chosen_options("spectra", SpectraKeywords, options, keywords)
    subspace = min(16, top) if subspace is None else subspace
    for what, value in (("top", top), ("subspace", subspace)):
        if value < 1:
            raise OptionError(f"{what} must be at least 1", got=value)
    if subspace > top:
        raise OptionError("the subspaces need as many singular vectors", got=f"subspace {subspace}, top {top}")
    out = None if out is None else Path(out)
    if out is not None:
        _check_out(out, folders_of(model, tuned), overwrite=overwrite)
    models = open_models(model, tuned, chosen, revision, subfolder, device)
    source, plan, other, engine = models.source, models.plan, models.other, models.engine
    measure = SpectraMeasure(top, subspace, chosen.tolerance, chosen.seed, compared=other is not None)
    recorded = SpectraOptions(top, subspace, chosen.seed, chosen.tolerance, plan.recipe, chosen.include, chosen.exclude)
    with ExitStack() as stack:
        journal = place = None
        if out is not None:
            run = stack.enter_context(Run(out))
            run.identify(_identity(source, other, plan, recorded, engine.device_and_processor))
            stack.enter_context(run.locked(()))
            place = stack.enter_context(run.files_together(_FILES, overwrite=overwrite))
            journal = run.journal
        targets = measured_matrices(models, measure, journal)
        report = SpectraReport(
            tool=f"surgery {__version__}",
            torch=torch.__version__,
            device=engine.device_and_processor,
            base=_named(source),
            tuned=None if other is None else _named(other),
            options=recorded,
            targets=tuple(targets),
            findings=findings_of(targets, subspace, compared=other is not None),
        )
        if place is not None:
            _write(report, place, progress)
    if other is not None:
        note_what_is_unlikely(other.name, [_norms(target) for target in targets])
    hint = "Their figures are less certain: in the report they have converged false"
    note_unconverged(targets, chosen.tolerance, hint)
    return report


def _check_out(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output folder before any work. Files of an unfinished run in it are checked later, when it is locked."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no folder", hint="-o chooses another one")
    for name in _FILES:
        check_output_path(out / name, inputs, overwrite=overwrite or (out / JOURNAL_DIR).is_dir())


def _identity(source: Source, other: Source | None, plan: Plan, options: SpectraOptions, device: str) -> dict[str, Any]:
    """All that the figures depend on, as JSON."""
    targets = [target_identity(t.key, t.shape, t.view) for t in plan.targets]
    models = {
        which: None if studied is None else {**asdict(studied.record), "files": studied.stamps()}
        for which, studied in (("base", source), ("tuned", other))
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


def _write(report: SpectraReport, place: Path, progress: Progress) -> None:
    """Write the files of a report; the page only if matplotlib is installed."""
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


def _named(source: Source) -> StudiedModel:
    return StudiedModel(source.name, source.record.repo_id, source.record.commit)
