"""The verb ``extract``: the change from a model to its fine-tuned version, as a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError, few
from surgery.escapes import quoted
from surgery.extraction.extents import Extent, Rank
from surgery.extraction.extraction import Extraction, ExtractOptions
from surgery.extraction.jobs import ExtractJobs
from surgery.extraction.matrices import Extracting
from surgery.extraction.reporting import WrittenAdapter, report_of, tell_of, tell_what_is_missing
from surgery.extraction.result_file import complete_result, earlier_result, finished_result, replaced_result, write_result
from surgery.extraction.shard import ExtractJob
from surgery.extraction.told import ExtractReport, ranks_in_words
from surgery.format.options import ExtractKeywords, Options, chosen_options
from surgery.names import DTYPES, EXTRACTION_FILE, STREAM_DIR, TUNED_STREAM_DIR, Dtype
from surgery.planning.summary import PlannedTarget
from surgery.progress import Progress, listening, phase
from surgery.publish.results import ExtractedCard, publish_extracted
from surgery.reports import Report
from surgery.run.engines import EngineName, EngineOptions, LocalEngine, float64_device
from surgery.run.run import Run
from surgery.source.component import component_of, config_folder
from surgery.source.no_model import OnlyAdapter
from surgery.source.open import open_part, open_source
from surgery.source.protocol import Source
from surgery.timing import Timing
from surgery.updates.writing.low_rank import AdapterForm, Layout
from surgery.updates.writing.single_experts import note_older_peft


@dataclass(frozen=True, slots=True)
class ExtractPlan(Report):
    """What an extraction would do, from headers.

    Attributes:
        targets: the weights whose changes would become low-rank pairs. If the ranks are not given, each has the largest
            rank possible.
        saved: tensors that the adapter would hold whole, if they have changed.
        compared: how many other tensors would only be compared.
        resized: of these other tensors, those that have another shape in the tuned model.
        gone: tensors of the base that the tuned model does not have.
        further: tensors of the tuned model that the base does not have.
        layout: layout of the adapter.
        notes: what the user should know before the run.
        bytes_read: bytes that would be read of both models.
        bytes_written: bytes that would be written, including temporary files; an upper estimate.
        download_bytes: bytes of hub models that still have to be downloaded.
        workers: how many matrices are processed at the same time.
        peak_memory_bytes: memory that the run needs on this machine; an upper estimate.
        device_memory_bytes: memory that the run needs on each GPU; 0 without a GPU.
    """

    targets: tuple[PlannedTarget, ...]
    saved: tuple[str, ...]
    compared: int
    resized: tuple[str, ...]
    gone: tuple[str, ...]
    further: tuple[str, ...]
    layout: str
    notes: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    download_bytes: int
    workers: int
    peak_memory_bytes: int
    device_memory_bytes: int


@on_its_own_terms
def plan_extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: Rank | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    layout: Layout = "peft",
    dtype: Dtype = "float32",
    uniform: bool = False,
    full: tuple[str, ...] | list[str] = (),
    options: Options | None = None,
    revision: str | None = None,
    tuned_revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    progress: Progress | None = None,
    **keywords: Unpack[ExtractKeywords],
) -> ExtractPlan:
    """What ``extract`` would do with the same arguments, from the headers of both models. Nothing is written.

    Args:
        base, tuned, rank, energy, budget, max_rank, layout, dtype, uniform, full, options: see ``extract``.
        recipe, include, exclude, seed, tolerance, revision, tuned_revision, subfolder: see ``extract``.
        device, max_memory, max_device_memory: see ``extract``; they change only the estimates of memory.
        progress: receives the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        The targets, the other tensors that would be compared or saved, and upper estimates of bytes.

    Raises:
        OptionError, SourceError, FormatError, ReadError, MissingExtra: as for ``extract``.
    """
    progress = listening()
    chosen = chosen_options("extract", ExtractKeywords, options, keywords)
    extent = Extent(rank, energy, budget, max_rank)
    by = LocalEngine(float64_device(str(device)), max_memory, max_device_memory)
    source, other = _opened(base, tuned, (revision, tuned_revision), subfolder)
    asked = ExtractOptions(extent, _form(source, layout, dtype, uniform), tuple(full), chosen)
    with phase(progress, "planning"):
        extraction = Extraction(source, other, asked, by.resources, aliases="local")
    plan = extraction.plan
    for note in plan.notes:
        progress.note(note)
    every = [name for some in extraction.compared.values() for name in some]
    gone = tuple(name for name in every if not extraction.tuned.has(name))
    return ExtractPlan(
        targets=tuple(map(PlannedTarget.of, plan.targets)),
        saved=extraction.saved,
        compared=len(every) - len(gone) - len(extraction.saved),
        resized=tuple(name for name in every if extraction.is_resized(name)),
        gone=gone,
        further=extraction.further(),
        layout=layout,
        notes=plan.notes,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        download_bytes=plan.download_bytes,
        workers=plan.memory.workers,
        peak_memory_bytes=plan.memory.peak_bytes,
        device_memory_bytes=plan.memory.device_bytes,
    )


@on_its_own_terms
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path = "adapter",
    *,
    rank: Rank | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    layout: Layout = "peft",
    dtype: Dtype = "float32",
    uniform: bool = False,
    full: tuple[str, ...] | list[str] = (),
    options: Options | None = None,
    revision: str | None = None,
    tuned_revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    engine: EngineName = "local",
    stream: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    timing: Timing | None = None,
    **keywords: Unpack[ExtractKeywords],
) -> ExtractReport:
    """Write the change from a model to its fine-tuned version as a LoRA adapter, and report what the adapter lacks.

    The weights are those of the linear layers, and others if the options choose them. For each weight W, the difference
    ``W_t - W`` is formed in float32 and approximated by ``B A`` of rank k, with nearly the least error
    (``surgery.linalg.low_rank``): ``B = U sqrt(s)``, ``A = sqrt(s) V^T``. Both models are streamed: the memory needed
    is that of the largest target. Every other tensor of the base is compared, and the report says how much it has
    changed.

    Args:
        base: local folder or Hugging Face repo id.
        tuned: the fine-tuned model, likewise, in any dtype and any shards. For the names of its tensors see
            ``project``.
        out: folder to write, empty or new. It gets the adapter, and ``extraction.json`` with the report.
        rank: k of each weight, at most its smaller side. ``auto`` keeps the directions that stand above the noise in
            the difference; this noise comes from rounding. Without a rank, an energy or a budget, the recipe decides;
            if it says nothing, the rank is 16.
        energy: keep as few directions of each weight as hold this share of its change's squared Frobenius norm.
        budget: how many numbers all pairs may have together, including zeros that pad them. surgery distributes them
            over the weights such that the pairs hold as much of all changes as possible.
        max_rank: with an energy, a budget or the rank ``auto``, the most directions of a weight; 256 if None.
        layout: ``peft``; for a component of a diffusion pipeline also ``diffusers``, which ``load_lora_weights`` takes,
            or ``kohya``, for ComfyUI and similar tools.
        dtype: dtype of the pairs.
        uniform: pad all pairs with zeros to one rank, for engines that ignore ranks by module.
        full: globs over the names of tensors that the adapter holds whole if they have changed: norms, biases, a small
            head.
        options: which weights are targets. It may set the options that are keywords here.
        recipe, include, exclude: as for ``factorize``; fused weights are not split.
        seed, tolerance: seed and tolerance of the approximation, see ``surgery.linalg.low_rank``.
        revision, tuned_revision: revisions of the two models on the hub.
        subfolder: subfolder in both models, such as ``unet`` of a diffusion pipeline.
        device: device of the linear algebra, as for ``factorize``.
        max_memory, max_device_memory, engine: as for ``factorize``.
        stream: for hub models (one or both): keep only the weight files on the disk that are in use.
        push_to_hub: id of a hub repository to which surgery also uploads the adapter. An earlier result of surgery
            there is replaced.
        private: whether a repository that surgery creates for this is private.
        overwrite: replace an earlier result in ``out``. The earlier result stays until the new one is complete.
        progress: receives the progress and the notes, such as a note if ``tuned`` does not look like a fine-tuned model
            (``surgery.tuned.likeness``). Without it, each note is a ``SurgeryWarning``.
        timing: records how long each stage takes.

    Returns:
        What was written, and what happened to each tensor of the base. If ``out`` holds the complete result of the same
        run already, the report is about this result.

    Raises:
        OptionError: the options are not valid for these models, an adapter cannot hold a target, or nothing has
            changed.
        SourceError: a model cannot be found or used, or the tuned model lacks a target or has it in another shape.
        ReadError, FormatError: a file cannot be read, or is damaged.
        WeightError: a weight of either model holds NaN or infinity.
        OutputError: ``out`` holds something else or is in use, or the disk is full or fails.
        ClusterError: with Ray, the cluster cannot be reached or is lost.
        MissingExtra: Ray is not installed; or transformers is not installed, and the names of modules differ from those
            of tensors.
        SurgeryError: any of these. What has been written until then is not an adapter. The same call continues after
            the last finished shard.

    Source: Eckart, Young, "The approximation of one matrix by another of lower rank" (Psychometrika 1, 1936).
    """
    progress = listening()
    out = Path(out)
    chosen = chosen_options("extract", ExtractKeywords, options, keywords)
    extent = Extent(rank, energy, budget, max_rank)
    with Run(out) as run:
        by = run.start_engine(EngineOptions(engine, float64_device(str(device)), max_memory, max_device_memory, timing))
        streams = (out, by.files_at_a_time) if stream else None
        source, other = _opened(base, tuned, (revision, tuned_revision), subfolder, streams)
        asked = ExtractOptions(extent, _form(source, layout, dtype, uniform), tuple(full), chosen)
        with phase(progress, "planning"):
            extraction = Extraction(source, other, asked, by.resources, aliases="fetch")
        for note in extraction.plan.notes:
            progress.note(note)
        identity = extraction.identity(by.device_and_processor)
        with (
            run.uploading(push_to_hub, private=private),
            run.locked([*source.folders(), *other.folders()]),
            extraction.weights,
            extraction.tuned,
        ):
            if not overwrite and (earlier := earlier_result(out)) is not None:
                report = complete_result(out, earlier, identity)
                run.forget()
                progress.note(f"{out} is already complete" + (": nothing to do" if run.upload is None else ""))
                _publish(run, out, report, extraction)
                tell_what_is_missing(report)
                return report
            run.identify(identity)
            files = extraction.files(out, replaced_result(out))
            with run.result(files, [source, other], overwrite=overwrite) as place:
                if (finished := finished_result(place, identity)) is not None:  # an earlier start was stopped after that
                    report = replace(finished, out=out)
                    _publish(run, place, report, extraction)
                    tell_what_is_missing(report)
                    return report
                jobs = ExtractJobs(_jobs(extraction, out), extraction.weights, extraction.tuned, timing)
                with phase(progress, "extracting", sum(shard.header.data_bytes for shard in extraction.plan.shards)):
                    results = run.shards(jobs, extraction.plan.memory)
                for model in (source, other):
                    model.watch.check()
                try:
                    ranks = extraction.ranks(results)
                    adapter, records = extraction.finish(out, place, results, ranks)
                except OptionError:  # the same command would fail again
                    run.forget()
                    raise
                report = report_of(extraction, results, ranks, WrittenAdapter(out, adapter, records))
                write_result(place, report, identity)
                _publish(run, place, report, extraction)
    tell_of(report, other.name, results)
    note_older_peft(adapter)
    return report


def _opened(
    base: str | Path,
    tuned: str | Path,
    revisions: tuple[str | None, str | None],
    subfolder: str | None,
    streams: tuple[Path, int] | None = None,
) -> tuple[Source, Source]:
    """The two models; ``streams`` is the output folder and how many weight files of each may be on the disk at a time."""
    source = open_source(base, revision=revisions[0], subfolder=subfolder)
    try:
        if revisions[1] is None:
            other = open_part(tuned, source.record.subfolder)
        else:
            other = open_source(tuned, revision=revisions[1], subfolder=subfolder)
    except OnlyAdapter as error:
        given = error.base if error.base != OnlyAdapter.base else quoted(base)
        error.hint = (
            f"TUNED must be a model, and this is an adapter already: surgery resize changes its rank. surgery merge {given} "
            f"{quoted(tuned)} -o merged makes a model of it"
        )
        raise
    if streams is None:
        return source, other
    from surgery.source.stream import streamed  # the hub client is slow to import

    out, at_a_time = streams
    if other.record.kind == "hub":
        other = streamed(other, out / TUNED_STREAM_DIR, at_a_time)
        if source.record.kind != "hub":  # it is read where it is
            return source, other
    return streamed(source, out / STREAM_DIR, at_a_time), other


def _form(source: Source, layout: Layout, dtype: Dtype, uniform: bool) -> AdapterForm:
    """What the adapter is written as. Raises OptionError for a layout or dtype that is not known."""
    for what, value, known in (("layout", layout, ("peft", "diffusers", "kohya")), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise OptionError(f"the {what} of an adapter is not known", got=repr(value), expected=few(known))
    record = source.record
    return AdapterForm(layout, DTYPES[dtype], component_of(source), uniform, record.repo_id, record.commit)


def _jobs(extraction: Extraction, out: Path) -> list[ExtractJob]:
    plan, options = extraction.plan, extraction.options
    extracting = Extracting(options.extent, options.form.dtype, options.chosen.tolerance, options.chosen.seed)
    return [
        ExtractJob(
            shard,
            extraction.compared[shard.file],
            tuple(name for name in extraction.compared[shard.file] if name in extraction.saved),
            index,
            len(plan.shards),
            extracting,
            out,
            plan.memory.window_bytes,
        )
        for index, shard in enumerate(plan.shards)
    ]


def _publish(run: Run, place: Path, report: ExtractReport, extraction: Extraction) -> None:
    """Upload the adapter; nothing without an upload."""
    size = f"{report.modules:,} modules {ranks_in_words(report, uniform=extraction.options.form.uniform_rank)}"
    if report.kept is not None:
        size += f", which hold {report.kept:.1%} of the squared norm of their weights' change"
    files = [*(one.file for one in report.files), EXTRACTION_FILE]
    told = ExtractedCard(size, extraction.options.form.component, files)
    folder = config_folder(extraction.source)
    publish_extracted(run.upload, place, extraction.source.record, folder, extraction.other.record, told)
