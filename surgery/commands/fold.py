"""The verb ``fold``: trained scales or cores go back into dense weights, one job per shard, the other way round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgery.device import on_its_own_terms
from surgery.engine.sharing import share_out
from surgery.errors import FormatError, OptionError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, check_size_of, file_sha256, not_as_described
from surgery.files.json_files import read_json_object
from surgery.format.factors import DAMAGED_HINT
from surgery.format.header import TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import check_scales, train_of_values
from surgery.lossless.update import Rounding
from surgery.names import CONFIG_FILE, MANIFEST_FILE, STREAM_DIR, Train
from surgery.planning.memory import known_bytes, need_to_fold
from surgery.progress import Progress, listening, phase
from surgery.publish.results import publish_folded, submit_files
from surgery.publish.told import FoldedChanges
from surgery.reports import Report
from surgery.run.engines import EngineName, EngineOptions, float64_device
from surgery.run.merging import MergedTensor, merged_tensors
from surgery.run.output_paths import check_not_the_source
from surgery.run.run import Run
from surgery.run.written_model import FileAlong, WrittenModel
from surgery.shards.fold_jobs import FoldJobs
from surgery.shards.fold_shard import FoldedShard, FoldPlaces
from surgery.source.weight_files import is_index
from surgery.timing import Timing
from surgery.trained.reading import read_update, trained_path
from surgery.updates.adapters.reading import read_adapters
from surgery.updates.dense import DenseTensors, Writing
from surgery.updates.kept_updates import KeptSummary
from surgery.updates.protocol import ScalesUpdate, Update, UpdateSum
from surgery.version import __version__
from surgery.weights.checkpoint import FactorizedWeights, weights_of
from surgery.weights.protocol import Weights
from surgery.weights.quantized import config_of_rewritten, is_kept
from surgery.weights.recognition import check_dequantizable, check_not_unread, finding_unread, with_unread


@dataclass(frozen=True, slots=True)
class FoldReport(Report):
    """What a fold wrote.

    Attributes:
        out: the folder.
        files: the weight files that were written.
        targets: how many targets there are.
        changed: how many targets have scales other than 1, or a core other than the identity.
        shards: how many weight files there are.
        restored: how many weight files are identical to the source's, bit for bit.
        lossless: whether a weight with untouched scales equals the source's weight; false after ``--no-correction``.
        dequantized: whether FP8 weights have become bfloat16.
        adapted: how many tensors a LoRA adapter changed.
        merged: these tensors.
        kept: share of the update that is in the weights after rounding: ``<W_out - W, D> / <D, D>`` over all targets,
            where W are the source's weights and D is the update; None if nothing was changed.
        kept_least: the smallest such share of any target.
        kept_least_in: the key of that target.
        error: for weights that were rounded in the directions of the update, the error within these directions:
            ``||P^T (W_out - W - D) Q||`` relative to the update, in Frobenius norms; None if all weights were rounded
            to nearest.
        bytes_written: size of the weight files.
    """

    out: Path
    files: tuple[FileRecord, ...]
    targets: int
    changed: int
    shards: int
    restored: int
    lossless: bool
    dequantized: bool
    adapted: int
    merged: tuple[MergedTensor, ...]
    kept: float | None
    kept_least: float | None
    kept_least_in: str | None
    error: float | None
    bytes_written: int


@on_its_own_terms
def fold(
    factorized: str | Path,
    scales: str | Path | Mapping[str, torch.Tensor],
    out: str | Path = "folded",
    *,
    base: str | Path | None = None,
    lora: str | Path | None = None,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    engine: EngineName = "local",
    dequantize: bool = False,
    rounding: Rounding | None = None,
    stream: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    timing: Timing | None = None,
) -> FoldReport:
    """Write dense weights ``round(W + U diag(s (g - 1)) V^T + B A)`` with the source's tensor names, dtypes and shards.

    With cores, surgery writes ``round(W + U diag(sqrt s) (C - I) diag(sqrt s) V^T + B A)``; scales g are the cores
    ``diag(g)``. ``B A`` is the update of a LoRA adapter, if one is given, scaled by its alpha.

    W is recovered bit for bit. The update is added with one rounding at the end. So a target whose scales are all 1, or
    whose core is the identity, keeps its bytes. If the residual has no correction, surgery writes
    ``round(R + U diag(s g) V^T)``, or the same with a core.

    Args:
        factorized: a folder that ``factorize`` has written.
        scales: a scales file, or a folder that holds one; or a mapping of the key of each target to ``g``, (k,), or (B,
            k) for a stack, or to its core ``C``, (k, k), or (B, k, k) for a stack. Or the folder of an adapter that
            ``export`` has written as ``peft-trainable`` or ``peft-pissa`` and that PEFT has trained.
        out: folder to write, empty or new.
        base: for an overlay, the model that it was made from (folder or hub id). By default the one that the manifest
            names.
        lora: folder of a LoRA adapter that was trained together with the scales or cores, as PEFT saves it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or ``all`` CUDA devices.
        max_memory, max_device_memory, engine: as for ``factorize``. With Ray, all machines must also see
            ``factorized``.
        dequantize: write every quantized weight as bfloat16, without its scales, and remove the quantization from the
            config. Otherwise a changed weight is quantized again.
        rounding: how changed weights are rounded. ``nearest``: each number to the nearest one. ``directions``: such
            that as much of the update as possible is kept in its directions (docs/lossless.md). The default is
            ``directions`` for quantized weights. For other weights it is ``directions`` if a sample shows that
            ``nearest`` would keep less than 99.5 % of the update of a matrix, and ``nearest`` otherwise.
        stream: for an overlay, download each weight file of the base from the hub when it is needed, and delete it
            after it has been read.
        push_to_hub, private: as for ``factorize``.
        overwrite: replace an earlier result in ``out``. The earlier result stays until the new one is complete.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.
        timing: records how long each stage takes.

    Returns:
        What was written. If ``out`` holds the result of the same fold already, the report is about this result.

    Raises:
        SourceError: the folder is not a factorized checkpoint; or the base does not exist, or is another model.
        ScalesError: the scales or cores do not belong to this checkpoint, or are not finite.
        OptionError: an option is not valid for this checkpoint, or the adapter is of a kind that cannot be folded.
        ReadError, FormatError: a file cannot be read, or is damaged.
        OutputError: ``out`` holds something else or is in use, or the disk is full or fails.
        ClusterError: with Ray, the cluster cannot be reached or is lost.
        MissingExtra: Ray is not installed; or transformers, which an adapter needs, is not installed.
        SurgeryError: any of these. ``config.json`` is written last, so no loader accepts an unfinished folder as a
            model. The same call continues after the last finished shard.

    Warns:
        SurgeryWarning: the file does not say which factors it belongs to, or has other names or shapes than the
            targets; or as for ``read_scales``.
    """
    progress = listening()
    factorized, out = Path(factorized), Path(out)
    with Run(out) as run:
        manifest = Manifest.read(factorized)
        others = _files_along(factorized, manifest, progress)
        if not isinstance(scales, Mapping):
            scales = trained_path(Path(scales))
        # A fold computes in float64.
        by = run.start_engine(EngineOptions(engine, float64_device(str(device)), max_memory, max_device_memory, timing))
        streaming = (out / STREAM_DIR, by.files_at_a_time) if stream else None
        weights = weights_of(factorized, manifest, base, streaming, all_quantized=dequantize or lora is not None)
        weights.check_files()
        inputs = [factorized, *weights.files.folders()]
        if not isinstance(scales, Mapping):
            inputs.append(scales)
        entries = partial(_entries, manifest, weights)
        adapters = []
        if isinstance(scales, Mapping):
            values = check_scales(scales, manifest)
        else:
            values, of_residual = read_update(scales, factorized, manifest, entries)
            adapters.append(of_residual)
        if lora is not None:
            inputs.append(Path(lora))
            hint = "factorize the original model, before it was quantized, and fold into that"
            with phase(progress, "reading adapters"), finding_unread(weights.quantization, hint):
                there = with_unread(entries(), weights.quantization)
                adapters.append(read_adapters([(Path(lora), 1.0)], factorized, there).tied(manifest.targets))
            check_not_unread(adapters[-1].changed, weights.quantization, hint)
        update = UpdateSum([ScalesUpdate(values), *adapters])
        train = train_of_values(values, manifest)
        weights.check_quantized()
        if dequantize:
            check_dequantizable(str(factorized), weights.quantization, "the original model, before it was quantized")
            if not weights.quantized:
                raise OptionError("there is nothing to dequantize: no weight is quantized", hint="drop --dequantize")
        kept = known_bytes(manifest.targets, len(manifest.targets) + len(manifest.skipped))
        memory = share_out([need_to_fold(target) for target in manifest.targets], by.resources, kept=kept)
        if overwrite:
            check_not_the_source(out, manifest)
        with (
            run.uploading(push_to_hub, private=private),
            run.locked(inputs),
            FactorizedWeights(factorized, manifest, weights) as checkpoint,
        ):
            dense = DenseTensors(checkpoint, update, Writing(rounding, to_dense=dequantize))
            if update.tensors():
                dense.check(weights.header(shard.source.file) for shard in manifest.shards)
            config = partial(config_of_rewritten, dtype=None, dequantized=True) if dequantize else None
            along = [FileAlong(one, factorized / one.file) for one in others if is_kept(one.file, dequantized=dequantize)]
            written = WrittenModel(out, checkpoint.shards, along, config)
            places = FoldPlaces(out, out, True, memory.window_bytes)
            if not overwrite and written.looks_finished():
                jobs = FoldJobs(checkpoint, update, dense, places, timing)
                report = _report(written.compared(run, jobs, memory), jobs, manifest)
                run.forget()
                for record in report.files:
                    submit_files(run.upload, out, [record])
                publish_folded(run.upload, out, manifest, _changes(report, train))
                return report
            # Scales and cores give the same bytes on every processor; of an adapter LAPACK makes bases first.
            made_on = by.device_and_processor if any(adapter.tensors() for adapter in adapters) else by.device_name
            run.identify(_identity(checkpoint, update, others, made_on, dense.writing))
            # The journal is there until the upload is over: a fold keeps no other record to go on with.
            with run.result(written.files(), [weights.files], overwrite=overwrite) as place:
                places = dataclasses.replace(places, place=place, to_compare=False)
                jobs = FoldJobs(checkpoint, update, dense, places, timing)
                with phase(progress, "folding", sum(shard.source.size for shard in manifest.shards)):
                    results = run.shards(jobs, memory, note_resumed=False)
                written.copy_others(place)
                report = _report(results, jobs, manifest)
                publish_folded(run.upload, place, manifest, _changes(report, train))
    return report


def _changes(report: FoldReport, train: Train) -> FoldedChanges:
    """What the card of the result tells."""
    return FoldedChanges(report.changed, report.adapted, report.dequantized, train)


def _entries(manifest: Manifest, weights: Weights) -> dict[str, TensorEntry]:
    """Those of all tensors of the source, by name."""
    return {entry.name: entry for shard in manifest.shards for entry in weights.header(shard.source.file).tensors}


def _report(results: Sequence[FoldedShard], jobs: FoldJobs, manifest: Manifest) -> FoldReport:
    """The report of a fold, from the results of all shards; with a note if rounding has lost much of the update."""
    files = [result.file for result in results]
    kept = KeptSummary.of(one for result in results for one in result.kept)
    writing = jobs.dense.writing
    note = kept.note(writing.rounding, is_quantized=bool(jobs.checkpoint.weights.quantized) and not writing.to_dense)
    if note is not None:
        listening().note(note)
    originals = {shard.file: shard.sha256 for shard in jobs.checkpoint.shards}
    headers = {file: jobs.checkpoint.weights.header(file) for file in originals}
    return FoldReport(
        out=jobs.places.out,
        files=tuple(files),
        targets=len(manifest.targets),
        changed=sum(map(jobs.update.changes, manifest.targets)),
        shards=len(files),
        restored=sum(file.sha256 == originals[file.file] for file in files),
        lossless=manifest.lossless,
        dequantized=writing.to_dense,
        adapted=len(jobs.update.tensors()),
        merged=merged_tensors(headers, jobs.update, [one for result in results for one in result.kept]),
        kept=kept.share,
        kept_least=kept.least,
        kept_least_in=kept.least_in,
        error=kept.error,
        bytes_written=sum(file.size for file in files),
    )


def _identity(
    checkpoint: FactorizedWeights, update: Update, others: Iterable[FileRecord], device: str, writing: Writing
) -> dict[str, Any]:
    """All that the bytes of the result depend on, as JSON."""
    return {
        "command": "fold",
        "tool": f"surgery {__version__}",
        "torch": torch.__version__,
        "device": device,
        "manifest": file_sha256(checkpoint.folder / MANIFEST_FILE),
        "edited": {record.file: record.sha256 for record in others if record not in checkpoint.manifest.files},
        **update.digests(),
        **asdict(writing),
        "base": checkpoint.weights.files.stamps(),
    }


def _files_along(factorized: Path, manifest: Manifest, progress: Progress) -> list[FileRecord]:
    """Hash the files that go along with the weights. Config, tokenizer and the like may have been edited since factorizing.

    Also the sizes of residual and factors files are checked here.

    Raises:
        FormatError: a file of the checkpoint is missing or has another size; one that must not be edited was.
    """
    for shard in manifest.shards:
        for record in shard.written:
            check_size_of(factorized, record, DAMAGED_HINT)
    found = []
    for record in manifest.files:
        path = factorized / record.file
        if not path.is_file():
            raise FormatError(f"{path} is not there", expected="a file that is copied with the weights", hint=DAMAGED_HINT)
        with read_errors(path):
            found.append(FileRecord(record.file, path.stat().st_size, file_sha256(path)))
        is_inside = factorized.resolve() in path.resolve().parents
        if found[-1] != record and (is_index(record.file) or not is_inside):
            raise not_as_described(path, found[-1].sha256, record, DAMAGED_HINT)
    if edited := [now.file for now, before in zip(found, manifest.files, strict=True) if now != before]:
        if CONFIG_FILE in edited:
            read_json_object(factorized / CONFIG_FILE, str(factorized / CONFIG_FILE))
        progress.note(
            f"these files have changed since {factorized} was made, and are copied as they are now: {', '.join(edited)}"
        )
    return found
