"""The verb ``merge``: adapters go into the weights of a model, one job per weight file, by the walk that folds scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgery.commands.fold import FoldReport, fold
from surgery.device import on_its_own_terms
from surgery.engine.resources import Memory
from surgery.errors import OptionError
from surgery.escapes import quoted
from surgery.files.file_records import FileRecord, file_sha256
from surgery.format.manifest import Manifest
from surgery.format.scales.no_scales import adapters_below
from surgery.lossless.update import Rounding
from surgery.names import ADAPTER_CONFIG, CONFIG_FILE, DTYPES, MANIFEST_FILE, STREAM_DIR, Dtype
from surgery.progress import Progress, listening, phase
from surgery.publish.results import publish_merged, submit_files
from surgery.reports import Report
from surgery.run.engines import EngineName, EngineOptions, LocalEngine, float64_device
from surgery.run.merging import MergedTensor, MergeOptions, Merging
from surgery.run.run import Run
from surgery.run.written_model import FileAlong, WrittenModel
from surgery.shards.fold_jobs import FoldJobs
from surgery.shards.fold_shard import FoldedShard, FoldPlaces
from surgery.source.no_model import OnlyAdapter
from surgery.source.open import open_source
from surgery.source.protocol import Source
from surgery.timing import Timing
from surgery.trained.reading import adapter_kind
from surgery.updates.dense import Writing
from surgery.updates.kept_updates import KeptSummary
from surgery.weights.quantized import config_of_rewritten, is_kept


@dataclass(frozen=True, slots=True)
class MergePlan(Report):
    """What a merge would do, from headers and adapters.

    Attributes:
        tensors: the tensors that would change.
        accounts: for each adapter, the name of each tensor in its file, with the tensors of the model that it would
            change; empty for a tensor that is only compared.
        shards: how many weight files there are.
        changed_shards: how many of them would change.
        bytes_read: bytes of weight files that would be read.
        bytes_written: bytes of weight files that would be written.
        download_bytes: bytes of a hub model that still have to be downloaded.
        workers: how many matrices are processed at the same time.
        peak_memory_bytes: memory that the run needs on this machine; an upper estimate.
        device_memory_bytes: memory that the run needs on each GPU; 0 without a GPU.
    """

    tensors: tuple[MergedTensor, ...]
    accounts: tuple[Mapping[str, tuple[str, ...]], ...]
    shards: int
    changed_shards: int
    bytes_read: int
    bytes_written: int
    download_bytes: int
    workers: int
    peak_memory_bytes: int
    device_memory_bytes: int


@dataclass(frozen=True, slots=True)
class MergeReport(Report):
    """What a merge wrote.

    Attributes:
        out: the folder.
        files: the weight files that were written.
        tensors: the tensors that have changed.
        shards: how many weight files there are.
        restored: how many weight files are identical to the source's, bit for bit.
        dequantized: whether FP8 weights have become bfloat16.
        kept: share of the update that is in the weights after rounding: ``<W_out - W, D> / <D, D>`` over all tensors,
            where W are the source's weights and D is what is added to them; None if nothing is added.
        kept_least: the smallest such share of any tensor.
        kept_least_in: the name of that tensor.
        error: for weights that were rounded in the directions of the update, the error within these directions:
            ``||P^T (W_out - W - D) Q||`` relative to the update, in Frobenius norms; None if all weights were rounded
            to nearest.
        bytes_written: size of the weight files.
    """

    out: Path
    files: tuple[FileRecord, ...]
    tensors: tuple[MergedTensor, ...]
    shards: int
    restored: int
    dequantized: bool
    kept: float | None
    kept_least: float | None
    kept_least_in: str | None
    error: float | None
    bytes_written: int


@on_its_own_terms
def plan_merge(
    model: str | Path,
    adapters: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    rounding: Rounding | None = None,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    progress: Progress | None = None,
) -> MergePlan:
    """What ``merge`` would do with the same arguments, from the headers of the model and the adapters. Nothing is written.

    Args:
        model, adapters, weights, revision, subfolder, rounding, dtype, dequantize: see ``merge``.
        device, max_memory, max_device_memory: see ``merge``; they change only the estimates of memory.
        progress: receives the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        The tensors that would change, which tensors of the model each tensor of the adapters changes, and upper
        estimates of bytes.

    Raises:
        OptionError, SourceError, FormatError, ReadError, MissingExtra: as for ``merge``.
    """
    options = MergeOptions.of(adapters, weights, rounding, dtype, dequantize)
    if (Path(model) / MANIFEST_FILE).is_file():
        raise OptionError(f"{model} is a factorized checkpoint, for which merge has no dry run", hint="merge without a dry run")
    by = LocalEngine(float64_device(str(device)), max_memory, max_device_memory)
    merging = Merging(_opened(model, options, revision, subfolder), options)
    with merging.checkpoint:
        return _plan(merging, merging.memory(by.resources))


@on_its_own_terms
def merge(
    model: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path = "merged",
    *,
    weights: Sequence[float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    rounding: Rounding | None = None,
    dtype: Dtype | None = None,
    dequantize: bool = False,
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
) -> MergeReport:
    """Write a model with adapters merged into its weights. It keeps its tensor names, dtypes and weight files.

    The model is not loaded. surgery streams its weight files: each weight is read, changed, rounded once and written.
    What adapters do not change keeps its bytes. Every tensor of an adapter must belong to a tensor of the model,
    otherwise surgery refuses the adapter.

    Args:
        model: local folder or Hugging Face repo id. It may also be a factorized folder, with one adapter that was
            trained on its residual (``export`` to ``peft-pissa``). Then surgery writes the original model with what was
            trained, as ``fold`` does.
        adapters: LoRA adapters as PEFT saves them or, for a diffusion model, in the layouts of diffusers and kohya:
            folders, files or repo ids. One, or several whose updates are summed before the one rounding.
        out: folder to write, empty or new.
        weights: the weight of each adapter in the sum; 1 for each by default.
        revision: revision of a hub model.
        subfolder: the subfolder that holds the model, in a folder or repository with several models, such as a
            diffusion pipeline.
        rounding: as for ``fold``.
        dtype: the dtype to write for all weights of 16 and 32 bits; by default each keeps its own.
        dequantize: write every FP8 weight as bfloat16, or as ``dtype``, without its scales, and remove the quantization
            from the config. Otherwise a changed FP8 weight is quantized again.
        device: as for ``fold``.
        max_memory, max_device_memory, engine, stream: as for ``factorize``.
        push_to_hub, private: as for ``factorize``.
        overwrite: replace an earlier result in ``out``. The earlier result stays until the new one is complete.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.
        timing: records how long each stage takes.

    Returns:
        What was written. If ``out`` holds the result of the same merge already, the report is about this result.

    Raises:
        OptionError: an option is not valid for this model; or an adapter does not fit the model, changes nothing, or is
            of a kind that cannot be merged. The error names the tensor.
        SourceError: the model or an adapter cannot be found or used, or has a format that surgery does not read.
        ReadError, FormatError: a file cannot be read, or is damaged.
        ScalesError: a weight with its update is outside the range of its dtype.
        OutputError: ``out`` holds something else or is in use, or the disk is full or fails.
        ClusterError: with Ray, the cluster cannot be reached or is lost.
        MissingExtra: Ray is not installed; or transformers is not installed, and the modules of an adapter are not
            found by their names.
        SurgeryError: any of these. ``config.json`` is written last, so no loader accepts an unfinished folder as a
            model. The same call continues after the last finished shard.
    """
    progress = listening()
    out = Path(out)
    options = MergeOptions.of(adapters, weights, rounding, dtype, dequantize)
    if (Path(model) / MANIFEST_FILE).is_file():
        adapter = _only_adapter(Path(model), options, revision=revision, subfolder=subfolder)
        given: dict[str, Any] = {"device": device, "max_memory": max_memory, "max_device_memory": max_device_memory}
        given |= {"engine": engine, "dequantize": dequantize, "rounding": rounding, "stream": stream, "timing": timing}
        given |= {"push_to_hub": push_to_hub, "private": private, "overwrite": overwrite, "progress": progress}
        return _as_merged(fold(model, adapter, out, **given))
    with Run(out) as run:
        by = run.start_engine(EngineOptions(engine, float64_device(str(device)), max_memory, max_device_memory, timing))
        source = _opened(model, options, revision, subfolder)
        if stream:
            from surgery.source.stream import streamed  # the hub client is slow to import

            source = streamed(source, out / STREAM_DIR, by.files_at_a_time)
        merging = Merging(source, options)
        memory = merging.memory(by.resources)
        inputs = [*source.folders(), *(path for path, _ in options.adapters)]
        with run.uploading(push_to_hub, private=private), run.locked(inputs), merging.checkpoint as checkpoint:
            written = WrittenModel(out, checkpoint.shards, _files_along(source, options.writing), _new_config(options.writing))
            places = FoldPlaces(out, out, True, memory.window_bytes)
            if not overwrite and written.looks_finished():
                jobs = FoldJobs(checkpoint, merging.update, merging.dense, places, timing)
                report = _report(out, written.compared(run, jobs, memory), merging)
                run.forget()
                for record in report.files:
                    submit_files(run.upload, out, [record])
                _publish(run, out, report, written, merging)
                return report
            run.identify(merging.identity(by.device_and_processor))
            with run.result(written.files(), [source], overwrite=overwrite) as place:
                jobs = FoldJobs(
                    checkpoint, merging.update, merging.dense, replace(places, place=place, to_compare=False), timing
                )
                with phase(progress, "merging", sum(shard.size for shard in checkpoint.shards)):
                    results = run.shards(jobs, memory)
                source.watch.check()
                written.copy_others(place)
                report = _report(out, results, merging)
                _publish(run, place, report, written, merging)
    return report


def _opened(model: str | Path, options: MergeOptions, revision: str | None, subfolder: str | None) -> Source:
    """The model; one that is an adapter has been given in the wrong place, or the model is not given at all."""
    try:
        return open_source(model, revision=revision, subfolder=subfolder)
    except OnlyAdapter as error:
        given = [path for path, _ in options.adapters]
        models = [one for one in given if (one / CONFIG_FILE).is_file() and not (one / ADAPTER_CONFIG).is_file()]
        first = quoted(models[0]) if models else error.base
        others = [quoted(one) for one in (model, *given) if one not in models[:1]]
        error.hint = f"the model comes first, then the adapters: surgery merge {' '.join([first, *others])}"
        raise


def _only_adapter(model: Path, options: MergeOptions, *, revision: str | None, subfolder: str | None) -> Path:
    """The adapter that is merged into the residual of a factorized folder, where nothing else can be asked for."""
    if Manifest.read(model).layout != "residual":
        raise OptionError(
            f"{model} is a factorized checkpoint that holds no residual", hint="merge into the model that it was made from"
        )
    (path, weight), *others = options.adapters
    if others or weight != 1:
        raise OptionError(f"{model} is a factorized checkpoint, into which exactly one adapter is merged, with weight 1")
    if options.writing.dtype is not None or revision is not None or subfolder is not None:
        raise OptionError(
            f"{model} is a factorized checkpoint, for which dtype, revision and subfolder cannot be chosen",
            hint="leave dtype, revision and subfolder out",
        )
    below = adapters_below(path) if adapter_kind(path) is None else []
    if adapter_kind(path) != "LORA":
        raise OptionError(
            f"{model} is a factorized checkpoint: only a LoRA that was trained on its residual can be merged into it",
            got=str(path),
            hint=f"give the one that is meant of the adapters in it, such as {quoted(below[-1])}"
            if below
            else f"surgery fold {quoted(model)} SCALES takes scales, and adapters that hold them; else give the original model",
        )
    return path


def _as_merged(report: FoldReport) -> MergeReport:
    names = {field.name for field in fields(MergeReport)} - {"tensors"}
    return _told(MergeReport(tensors=report.merged, **{name: getattr(report, name) for name in names}))


def _publish(run: Run, place: Path, report: MergeReport, written: WrittenModel, merging: Merging) -> None:
    """Upload what goes along with the weights, which have been submitted already; nothing without an upload."""
    along = [other.record.file for other in written.others]
    publish_merged(
        run.upload, place, along, merging.source.record, adapters=len(merging.options.adapters), changed=len(report.tensors)
    )


def _files_along(source: Source, writing: Writing) -> list[FileAlong]:
    """The files of a model that go along with its weights, hashed."""
    progress, found = listening(), []
    with phase(progress, "reading"):
        for name in source.selection.others:
            if not is_kept(name, dequantized=writing.to_dense):
                continue
            progress.item(name)
            path = source.fetch(name)
            found.append(FileAlong(FileRecord(name, path.stat().st_size, file_sha256(path)), path))
    return found


def _new_config(writing: Writing) -> Callable[[Path], bytes] | None:
    """What makes the new ``config.json`` of the old one; None where weights are stored as before."""
    if not writing.is_stored_otherwise:
        return None
    dtype = next((name for name, stored in DTYPES.items() if stored == writing.dtype), None)
    return partial(config_of_rewritten, dtype=dtype, dequantized=writing.to_dense)


def _plan(merging: Merging, memory: Memory) -> MergePlan:
    """What the merge would do."""
    changed = [file for file, header in merging.headers.items() if not merging.dense.keeps(header)]
    sizes = [merging.dense.size(header) for header in merging.headers.values()]
    return MergePlan(
        tensors=merging.tensors(),
        accounts=tuple(merging.update.accounts),
        shards=len(merging.headers),
        changed_shards=len(changed),
        bytes_read=sum(shard.size for shard in merging.checkpoint.shards),
        bytes_written=sum(sizes),
        download_bytes=merging.source.bytes_to_fetch(),
        workers=memory.workers,
        peak_memory_bytes=memory.peak_bytes,
        device_memory_bytes=memory.device_bytes,
    )


def _report(out: Path, results: Sequence[FoldedShard], merging: Merging) -> MergeReport:
    """The report from the results of all shards, with notes if rounding has lost much of the update, or nothing has changed."""
    writing, files = merging.options.writing, [result.file for result in results]
    kept = KeptSummary.of(one for result in results for one in result.kept)
    is_quantized = bool(merging.checkpoint.weights.quantized) and not writing.to_dense
    if (note := kept.note(writing.rounding, is_quantized=is_quantized)) is not None:
        listening().note(note)
    report = MergeReport(
        out=out,
        files=tuple(files),
        tensors=merging.tensors(one for result in results for one in result.kept),
        shards=len(files),
        restored=sum(result.is_as_before for result in results),
        dequantized=writing.to_dense,
        kept=kept.share,
        kept_least=kept.least,
        kept_least_in=kept.least_in,
        error=kept.error,
        bytes_written=sum(file.size for file in files),
    )
    return _told(report)


def _told(report: MergeReport) -> MergeReport:
    """The report, with a note if the weights that were written are those of the source."""
    if report.restored == report.shards:
        if not report.tensors:
            why = "nothing of the adapter has been trained"
        elif report.kept is None:
            why = "the adapter replaces tensors with what they are already"
        else:
            why = "rounding undid the update"
        listening().note(f"all weight files have the bytes of the source's: {why}")
    return report
