"""Factorize a checkpoint: plan -> one job per shard -> manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from surgery.commands.inspect import largest_residual
from surgery.device import on_its_own_terms
from surgery.engine.lane import Lane
from surgery.errors import FormatError, OutputError, few
from surgery.files.files import copy_file, file_sha256, reading
from surgery.format.manifest import (
    LeftOutRecord,
    Manifest,
    ShardResult,
    SkippedRecord,
    TargetRecord,
    fingerprint_of,
    source_stamp,
)
from surgery.format.options import OptionKeywords, Options, chosen_options
from surgery.format.scales import write_untouched
from surgery.format.views import View
from surgery.names import FORMAT_VERSION, MANIFEST_FILE, SCALES_FILE, STREAM_DIR, factors_file
from surgery.planning.aliases import notes_of_equal
from surgery.planning.plan import Layout, Plan, make_plan
from surgery.planning.targets import Target
from surgery.progress import Progress, listening, phase
from surgery.publish.results import publish_factorized, submit_shard, uploading
from surgery.reports import NOT_IN_JSON, Report
from surgery.run.engines import Engine, EngineName, engine_of
from surgery.run.journal import Journal, differing
from surgery.run.output import (
    Interruptible,
    download_needs,
    is_as_recorded,
    loading_order,
    locked,
    not_as_recorded,
    result_folder,
)
from surgery.shards.accuracy import unconverged_note
from surgery.shards.factorize_shard import Job, RemoteShard, run_job, scale_files
from surgery.source.model import Source, open_source
from surgery.timing import Timing, timed
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.publish.upload import Upload


@dataclass(frozen=True, slots=True)
class FactorizeReport(Report):
    """What a factorization wrote.

    Attributes:
        out: the folder.
        layout: ``residual`` or ``overlay``.
        fingerprint: of the factors; scales carry it.
        device: what the linear algebra ran on.
        targets: how many tensors, or slices of one, have been factorized.
        matrices: how many matrices these are: a stack has several.
        skipped: how many tensors were passed over.
        trainable: how many scales there are to train.
        converged: whether the SVD of every target reached the tolerance.
        unconverged: the keys of those that did not.
        bytes_written: of all files but the manifest and the scales.
        manifest: all that is known of it, as written.
    """

    out: Path
    layout: str
    fingerprint: str
    device: str
    targets: int
    matrices: int
    skipped: int
    trainable: int
    converged: bool
    unconverged: tuple[str, ...]
    bytes_written: int
    manifest: Manifest = field(repr=False, metadata=NOT_IN_JSON)


@on_its_own_terms
def plan(
    model: str | Path,
    *,
    options: Options | None = None,
    layout: Layout | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    stream: bool = False,
    progress: Progress | None = None,
    **keywords: Unpack[OptionKeywords],
) -> Plan:
    """What ``factorize`` would do with the same arguments, from headers.

    Of a model that is here, weights that may be one parameter, stored twice, are compared. Nothing is written.

    Args:
        model, layout, revision, subfolder: see ``factorize``.
        options, rank, energy, max_rank, recipe, split, correction, include, exclude, seed, tolerance: see ``factorize``.
        device, max_memory, max_device_memory, stream: see ``factorize``; on them depend memory and room on the disk alone.
        progress: told the notes that the plan holds; without it each is a ``SurgeryWarning``.

    Returns:
        The targets by weight file, what is passed over and why, notes, and upper estimates of bytes.

    Raises:
        OptionError: an option makes no sense, for any model or for this one, or nothing is selected.
        SourceError: the model cannot be had, or is quantized in a way that is not supported.
        ReadError, FormatError: a file cannot be read, or is damaged.
    """
    progress = listening()
    chosen = chosen_options("plan", OptionKeywords, options, keywords)
    with engine_of("local", str(device), max_memory, max_device_memory, None) as by, phase(progress, "planning"):
        source = _open(model, revision, subfolder, (Path(STREAM_DIR), by.files_at_a_time) if stream else None)
        steps = make_plan(source, chosen, layout, by.resources, aliases="local")
    for note in steps.notes:
        progress.note(note)
    return steps


def _open(model: str | Path, revision: str | None, subfolder: str | None, stream: tuple[Path, int] | None) -> Source:
    source = open_source(model, revision=revision, subfolder=subfolder)
    if stream is None:
        return source
    from surgery.source.stream import streamed  # the hub client is slow to import

    return streamed(source, *stream)


@on_its_own_terms
def factorize(
    model: str | Path,
    out: str | Path = "factorized",
    *,
    options: Options | None = None,
    layout: Layout | None = None,
    revision: str | None = None,
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
    **keywords: Unpack[OptionKeywords],
) -> FactorizeReport:
    """Write the factorized form of a checkpoint (docs/format.md) and a file of scales, all ones.

    Each matrix W (m, n) of a target becomes U (m, k), s (k,), V (n, k), float32, and in the residual layout the residual
    ``round(W - U diag(s) V^T)`` in the dtype of W together with what makes W recoverable bit for bit. Shards are
    streamed: the memory needed is set by the largest target and by how many are worked on at a time.

    Args:
        model: local folder or Hugging Face repo id.
        out: folder to write, empty or new.
        options: what chooses the weights, and how accurately they are factorized. Each field may be given as a keyword as
            well, alone or where ``options`` does not set it.
        rank: k, directions to keep of each matrix, at most the smaller side; 16 if neither it, nor an energy, nor the
            recipe says anything.
        energy: keep as few directions of each target as hold this share of its squared Frobenius norm instead.
        max_rank: the most directions then; 256 if not given. Targets that would need more are named in a note.
        recipe: name or file of a recipe (``surgery.planning.recipes``); the one of the model's family by default.
        split: split fused weights into their projections, where the recipe knows them; as the recipe says by default.
        correction: with the residual layout, keep what makes it lossless: 0.06 to 0.15 bytes per weight. Without it a
            fold gives ``round(R + U diag(s g) V^T)``, in which some 8 to 18 % of the weights differ in their last bits.
        include, exclude: globs over tensor names, see ``Options``.
        seed, tolerance: of the truncated SVD, see ``surgery.truncated_svd``.
        layout: ``residual``, self-contained, or ``overlay``, factors only, the weights staying where they are; the
            residual one by default, the overlay where targets are FP8.
        revision: of a hub model.
        subfolder: of a folder or repository with several models, such as a diffusion pipeline.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``, several as ``cuda:0,cuda:1``, or ``all`` CUDA devices;
            where the linear algebra runs, a shard at a time on each. On a CPU each matrix is the work of one core: the
            result does not depend on how many there are.
        max_memory: bytes of host memory to keep to; as many matrices are worked on at a time as fit. By default half of
            what is free, and always enough for one.
        max_device_memory: the same of each GPU, by default four fifths of what it has.
        engine: ``local``, this process; or ``ray``: each shard is a task on the cluster that ``RAY_ADDRESS`` names or that
            runs on this machine, else on one of this machine alone. All machines must see ``out`` under the same path, and
            a local model as well.
        stream: fetch each weight file of a hub model when its turn comes, and drop it when it has been read: beside the
            result the disk holds one file more than there are devices. Without it the model stays in the hub's cache.
        push_to_hub: repo id that the result is uploaded to as well, each shard when it is finished. An earlier result of
            surgery there is replaced.
        private: whether a repository that is created for it is private.
        overwrite: replace an earlier result in ``out``, which stays as it is until the new one is whole.
        progress: told how far it is, and what the user should know; without it that is a ``SurgeryWarning``.
        timing: told where the time goes.

    Returns:
        What has been written, or what was there if ``out`` holds the complete result of the same run; with the manifest.

    Raises:
        OptionError, SourceError, ReadError, FormatError: as ``plan``.
        WeightError: a weight holds NaN or infinity, or a residual would overflow.
        OutputError: ``out`` holds something else, is in use, or the disk is full or fails.
        ClusterError: with Ray, the cluster cannot be reached or is lost.
        MissingExtra: Ray is not installed.
        SurgeryError: any of these. What has been written by then has no manifest and no ``config.json``,
            and so is taken for a checkpoint by nobody; the same call goes on after the last finished shard.
    """
    progress = listening()
    chosen = chosen_options("factorize", OptionKeywords, options, keywords)
    out = Path(out)
    with Interruptible(out) as run, engine_of(engine, str(device), max_memory, max_device_memory, timing) as by:
        with phase(progress, "planning"):
            source = _open(model, revision, subfolder, (out / STREAM_DIR, by.files_at_a_time) if stream else None)
            steps = make_plan(source, chosen, layout, by.resources, aliases="fetch")
        for note in steps.notes:
            progress.note(note)
        recorded = replace(chosen, recipe=steps.recipe)
        with (
            uploading(push_to_hub, private=private) as upload,
            locked(out, source.folders()),
        ):
            run.upload = upload
            if (out / MANIFEST_FILE).is_file() and not overwrite:
                manifest = _finished(out, source, steps, recorded, progress)
                Journal.forget(out)
                progress.note(f"{out} is already complete" + (": nothing to do" if upload is None else ""))
                for shard in manifest.shards:
                    submit_shard(upload, out, shard)
                publish_factorized(upload, out, manifest)
                for note in _accuracy_notes(manifest, steps):
                    progress.note(note)
                return _report(out, manifest)
            run.journal = journal = Journal(out, _identity(source, steps, recorded, by.device_name))
            writes, beside = _output_files(source, steps), download_needs(source)
            with result_folder(out, journal, writes, steps.bytes_written, overwrite=overwrite, beside=beside) as place:
                work = _Factorizing(source, steps, out, place, progress, timing)
                results = _run_jobs(by, work, journal, upload, progress)
                manifest = _finish(source, steps, place, results, recorded, by.device_name, progress)
                publish_factorized(upload, place, manifest)
    headers = {shard.file: shard.header for shard in steps.shards}
    for note in (*_accuracy_notes(manifest, steps), *notes_of_equal(source, headers, manifest)):
        progress.note(note)
    return _report(out, manifest)


def _run_jobs(
    engine: Engine, work: _Factorizing, journal: Journal, upload: Upload | None, progress: Progress
) -> list[ShardResult]:
    """The results of all shards: of those that an earlier start of this run has finished from its journal."""
    shards, place = work.steps.shards, work.place
    results: dict[int, ShardResult] = {}
    with phase(progress, "factorizing", work.steps.bytes_read):
        for index in range(len(shards)):
            done = _recorded(journal, index, work)
            if done is not None:
                results[index] = done
                submit_shard(upload, place, done.shard)
                work.tell(index)
        if results:
            progress.note(f"going on after {len(results)} of {len(shards)} shards")
        missing = [index for index in range(len(shards)) if index not in results]
        with closing(engine.run(work, missing, work.steps.memory)) as finished:
            for index, result in finished:
                results[index] = result
                journal.record(index, shards[index].file, result.as_json())
                submit_shard(upload, place, result.shard)
    return [results[index] for index in range(len(shards))]


class _Factorizing:
    """What is done with the shards of a run, see ``ShardWork``: of one that writes to ``place``, in or at ``out``."""

    def __init__(
        self,
        source: Source,
        steps: Plan,
        out: Path,
        place: Path,
        progress: Progress,
        timing: Timing | None,
    ) -> None:
        self.steps = steps
        self.place = place
        self._out = out
        self._source = source
        self._progress = progress
        self._timing = timing
        self._jobs: dict[int, Job] = {}

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        if self._timing is not None and self._source.room_to_fetch():
            self._timing.watch("download")
        is_fetched = self._source.bytes_to_fetch() > 0
        for index in which:
            shard = self.steps.shards[index]
            self._source.wait_for_room()
            if is_fetched:
                self._progress.item(f"fetching {shard.file}")
            with timed("download"):
                path = self._source.acquire(shard.file)
                scales = {other: self._source.acquire(other) for other in scale_files(shard)}
                sha256 = self._source.sha256(shard.file)
            self._jobs[index] = self._job(index, path, sha256, scales)
            yield index

    def _job(self, index: int, path: Path, sha256: str | None, scales: Mapping[str, Path]) -> Job:
        shards, window, watch = self.steps.shards, self.steps.memory.window_bytes, self._source.watch
        again = self._source.again(shards[index].file)
        return Job(
            shards[index],
            index,
            len(shards),
            path,
            sha256,
            again,
            self.place,
            None,
            scales,
            window,
            self.steps.layout,
            self.steps.options,
            watch,
        )

    def work(self, index: int, lane: Lane, read: Callable[[], object]) -> ShardResult:
        job = self._jobs.pop(index)
        held = [job.shard.file, *job.scales]

        def release() -> None:
            while held:
                self._source.release(held.pop())

        def has_been_read() -> None:
            if not job.scales:  # of FP8 weights, which are looked up until the end
                release()
            read()

        try:
            return run_job(job, lane, self._progress, has_been_read)
        finally:
            release()

    def remote(self, index: int) -> RemoteShard:
        shards, window = self.steps.shards, self.steps.memory.window_bytes
        origin = self._source.origin([shards[index].file, *scale_files(shards[index])])
        out, place = self._out.resolve(), self.place.resolve()
        steps = self.steps
        return RemoteShard(shards[index], index, len(shards), origin, out, place, window, steps.layout, steps.options)

    def is_of_the_source(self, result: ShardResult) -> bool:
        """Whether the shard of a local model still has the bytes that a result was made of. A commit pins those of others."""
        if self._source.record.kind != "folder":
            return True
        record = result.shard.source
        path = self._source.fetch(record.file)
        with reading(path):
            return file_sha256(path) == record.sha256

    def tell(self, index: int) -> None:
        shard = self.steps.shards[index]
        self._progress.item(shard.file)
        self._progress.advance(shard.header.data_bytes)

    def close(self) -> None:
        self._source.close()


def _recorded(journal: Journal, index: int, work: _Factorizing) -> ShardResult | None:
    """What the journal has of a shard, if its files are still what they were, and so is the one that they were made of."""
    value = journal.recorded(index, work.steps.shards[index].file)
    if value is None:
        return None
    try:
        result = ShardResult.from_json(value, f"{work.place}: the journal of shard {index + 1}")
    except FormatError:  # made again like any other that is damaged: the same command would meet it for ever
        return None
    if not _is_planned(result, index, work.steps) or not work.is_of_the_source(result):
        return None
    files = (record for record in (result.shard.residual, result.shard.factors) if record is not None)
    return result if all(is_as_recorded(work.place, record) for record in files) else None


def _is_planned(result: ShardResult, index: int, steps: Plan) -> bool:
    """Whether a result has the files and the targets that the plan has for a shard."""
    shard, residual = steps.shards[index], steps.layout == "residual"
    source = [(shard.file, shard.size)]
    weights = [(record.file, record.size) for record in (result.shard.source, result.shard.residual) if record is not None]
    factors = None if result.shard.factors is None else result.shard.factors.file
    if weights != (source * 2 if residual else source) or (result.shard.residual is not None) != residual:
        return False
    if factors != (factors_file(index, len(steps.shards)) if shard.targets else None):
        return False
    planned = [(*_seen(t.key, t.shape, t.view), t.shard, t.dtype, list(t.aliases)) for t in shard.targets]
    found = [(*_seen(t.key, t.shape, t.seen_as), t.shard, t.dtype, t.aliases) for t in result.targets]
    measured = {value is not None for t in result.targets for value in (t.residual_sample_sha256, t.inexact)}
    return found == planned and measured <= {residual} and not any(map(_has_other_rank, result.targets, shard.targets))


def _has_other_rank(target: TargetRecord, planned: Target) -> bool:
    """Than is asked for, or may come of the energy that is."""
    return target.rank > planned.rank or (planned.energy is None and target.rank != planned.rank)


def _identity(source: Source, steps: Plan, options: Options, device: str) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    chosen = [[*_seen(t.key, t.shape, t.view), t.rank, t.energy, [alias.tensor for alias in t.aliases]] for t in steps.targets]
    return {
        "command": "factorize",
        "format_version": FORMAT_VERSION,
        "tool": f"surgery {__version__}",
        "torch": torch.__version__,
        "device": device,
        "window_bytes": steps.memory.window_bytes,
        "layout": steps.layout,
        "options": asdict(options),
        "targets": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
        "source": {**asdict(source.record), "files": source.stamps()},
    }


def _seen(key: str, shape: Sequence[int], view: View) -> list[Any]:
    return [key, list(shape), view.kind, asdict(view.slice) if view.slice else None]


def _finished(out: Path, source: Source, steps: Plan, options: Options, progress: Progress) -> Manifest:
    """The manifest of a complete result, if it is that of this run.

    Raises:
        OutputError: it is of another one; says what differs.
    """
    manifest = Manifest.read(out)
    then = {"layout": manifest.layout, "options": asdict(manifest.options), "source": asdict(manifest.source)}
    now = {"layout": steps.layout, "options": asdict(options), "source": asdict(source.record)}
    differences = differing(then, now)
    found = {target.key: target for target in manifest.targets}
    planned = sorted(_seen(t.key, t.shape, t.view) for t in steps.targets)
    if sorted(_seen(t.key, t.shape, t.seen_as) for t in manifest.targets) != planned:
        differences.append("the targets are others")
    elif any(_has_other_rank(found[target.key], target) for target in steps.targets):
        differences.append("the ranks are others")
    if source.record.kind == "folder" and not differences:
        recorded = {record.file: record for record in (*(shard.source for shard in manifest.shards), *manifest.files)}
        files = (*(shard.file for shard in steps.shards), *source.selection.others)
        with phase(progress, "comparing", sum(map(source.size, files))):
            for file in files:
                progress.item(file)
                path = source.fetch(file)
                with reading(path):
                    same = file in recorded and recorded[file].sha256 == file_sha256(path)
                if not same:
                    differences.append(f"{file} of the model has changed")
                progress.advance(source.size(file))
        differences += [f"{file} of the model is gone" for file in sorted(recorded.keys() - set(files))]
    if differences:
        raise OutputError(
            f"{out} holds the complete result of another run",
            got=few(differences, between="; "),
            hint="--overwrite replaces it; -o chooses another folder",
        )
    lost = not_as_recorded(out, manifest.output_files())
    if lost or not (out / SCALES_FILE).is_file():
        lost = lost or [SCALES_FILE]
        raise OutputError(
            f"{out} holds a complete result that has lost files since, or whose files have changed",
            got=few(lost),
            hint="--overwrite makes it anew",
        )
    return manifest


def _output_files(source: Source, steps: Plan) -> set[str]:
    """Everything that the run will write, relative to the output folder."""
    files = {MANIFEST_FILE, SCALES_FILE, *source.selection.others}
    for index, shard in enumerate(steps.shards):
        if shard.targets:
            files.add(factors_file(index, len(steps.shards)))
        if steps.layout == "residual":
            files.add(shard.file)
    return files


def _finish(
    source: Source,
    steps: Plan,
    out: Path,
    results: list[ShardResult],
    options: Options,
    device: str,
    progress: Progress,
) -> Manifest:
    """Copy what goes along, write the scales and, last, the manifest: of a source that is still what was planned for."""
    selection = source.selection
    targets = [target for result in results for target in result.targets]
    source.watch.check()
    others = []
    with phase(progress, "copying"):
        for name in loading_order(selection.others):
            progress.item(name)
            others.append(copy_file(source.fetch(name), out / name, name, watch=source.watch))
    fingerprint = fingerprint_of(targets)
    write_untouched(out / SCALES_FILE, targets, fingerprint)
    shards, stamps = [result.shard for result in results], source.stamps()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tool=f"surgery {__version__}",
        torch=torch.__version__,
        device=device,
        layout=steps.layout,
        source=source.record,
        options=options,
        fingerprint=fingerprint,
        source_stamps=[source_stamp(shard.source, stamps[shard.source.file][1]) for shard in shards] if stamps else [],
        shards=shards,
        files=others,
        left_out=[LeftOutRecord(name, reason) for name, reason in sorted(selection.left_out.items())],
        targets=targets,
        skipped=[SkippedRecord(item.tensor, item.shard, item.reason) for item in steps.skipped],
    )
    source.watch.check()
    manifest.write(out)
    return manifest


def _accuracy_notes(manifest: Manifest, steps: Plan) -> list[str]:
    notes, targets = [], manifest.targets
    if failed := {target.key: largest_residual(target) for target in targets if not target.converged}:
        hint = (
            "A fold is as exact as ever, but these directions are less certain; surgery inspect tells how much. Try another "
            "--rank or --seed, or --exclude them; a larger --tolerance says that this is good enough"
        )
        notes.append(unconverged_note(failed, f"{len(targets)} targets", manifest.options.tolerance, hint))
    asked = {target.key: target.energy for target in steps.targets if target.energy is not None}
    short = [t for t in targets if t.key in asked and t.energy < (asked[t.key] or 0) and t.rank < min(t.matrices[1:])]
    if short:
        least = min(short, key=lambda target: target.energy)
        notes.append(
            f"{len(short)} of {len(targets)} targets hold less than {asked[least.key]:g} of their energy at rank "
            f"{least.rank}, the most allowed (least: {least.energy:g}, {least.key}); --max-rank allows more"
        )
    return notes


def _report(out: Path, manifest: Manifest) -> FactorizeReport:
    """Of a complete result."""
    unconverged = tuple(target.key for target in manifest.targets if not target.converged)
    return FactorizeReport(
        out=out,
        layout=manifest.layout,
        fingerprint=manifest.fingerprint,
        device=manifest.device,
        targets=len(manifest.targets),
        matrices=sum(target.matrices[0] for target in manifest.targets),
        skipped=len(manifest.skipped),
        trainable=sum(target.trainable for target in manifest.targets),
        converged=not unconverged,
        unconverged=unconverged,
        bytes_written=sum(record.size for record in manifest.output_files()),
        manifest=manifest,
    )
