"""The verbs ``factorize`` and ``plan``: plan -> one job per shard -> manifest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import torch

from surgery.commands.inspect import largest_residual
from surgery.device import on_its_own_terms
from surgery.escapes import quoted
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import summary_of
from surgery.format.options import OptionKeywords, Options, chosen_options
from surgery.format.top_k_records import TopKSummary
from surgery.names import MANIFEST_FILE, STREAM_DIR, Train
from surgery.planning.aliases import notes_of_equal
from surgery.planning.plan import Layout, Plan, make_plan
from surgery.progress import Progress, listening, phase
from surgery.publish.results import publish_factorized, submit_shard
from surgery.reports import NOT_IN_JSON, Report
from surgery.run.engines import EngineName, EngineOptions, LocalEngine
from surgery.run.factorization import Factorization
from surgery.run.run import Run
from surgery.shards.accuracy import unconverged_note, unproven_note
from surgery.shards.factorize_jobs import FactorizeJobs
from surgery.source.no_model import OnlyAdapter
from surgery.source.open import open_source
from surgery.source.protocol import Source
from surgery.timing import Timing


@dataclass(frozen=True, slots=True)
class FactorizeReport(Report):
    """What a factorization wrote.

    Attributes:
        out: the folder.
        layout: ``residual`` or ``overlay``.
        fingerprint: the fingerprint of the factors, which scales files record.
        device: the device of the linear algebra.
        targets: how many tensors, or slices of tensors, have been factorized.
        matrices: how many matrices the targets have: a stack has several.
        skipped: how many tensors were passed over.
        train: what the trainable file holds: ``scales``, or ``core`` for cores.
        trainable: how many numbers there are to train.
        converged: whether the SVD of every target reached the tolerance.
        unconverged: the keys of the targets whose SVD did not.
        top_k: for how many matrices it is known that no larger singular value was missed.
        bytes_written: size of all files except the manifest and the scales.
        manifest: the whole manifest, as written.
    """

    out: Path
    layout: str
    fingerprint: str
    device: str
    targets: int
    matrices: int
    skipped: int
    train: Train
    trainable: int
    converged: bool
    unconverged: tuple[str, ...]
    top_k: TopKSummary
    bytes_written: int
    manifest: Manifest = field(repr=False, metadata=NOT_IN_JSON)


@on_its_own_terms
def plan(
    model: str | Path,
    *,
    options: Options | None = None,
    layout: Layout | None = None,
    train: Train = "scales",
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    stream: bool = False,
    progress: Progress | None = None,
    **keywords: Unpack[OptionKeywords],
) -> Plan:
    """What ``factorize`` would do with the same arguments, from headers. Nothing is written.

    In a local model, surgery also compares weights that may be one parameter stored twice.

    Args:
        model, layout, train, revision, subfolder: see ``factorize``.
        options, rank, energy, max_rank, recipe, split, correction, include, exclude, seed, tolerance, prove: see
            ``factorize``.
        device, max_memory, max_device_memory, stream: see ``factorize``; they change only the estimates of memory and
            disk space.
        progress: receives the notes that the plan holds. Without it, each note is a ``SurgeryWarning``.

    Returns:
        The targets by weight file, the tensors that are passed over and why, notes, and upper estimates of bytes.

    Raises:
        OptionError: an option is not valid, in general or for this model, or no weight is selected.
        SourceError: the model cannot be found or used, or is quantized in a way that is not supported.
        ReadError, FormatError: a file cannot be read, or is damaged.
    """
    progress = listening()
    chosen = chosen_options("plan", OptionKeywords, options, keywords)
    by = LocalEngine(str(device), max_memory, max_device_memory)
    with phase(progress, "planning"):
        source = _open(model, revision, subfolder, (Path(STREAM_DIR), by.files_at_a_time) if stream else None)
        planned = make_plan(source, chosen, layout, by.resources, aliases="local", train=train)
    for note in planned.notes:
        progress.note(note)
    return planned


def _open(model: str | Path, revision: str | None, subfolder: str | None, stream: tuple[Path, int] | None) -> Source:
    try:
        source = open_source(model, revision=revision, subfolder=subfolder)
    except OnlyAdapter as error:
        error.hint = (
            f"surgery factorize {error.base}; with the trained scales: surgery fold FACTORIZED SCALES --lora {quoted(model)}. "
            f"Or first: surgery merge {error.base} {quoted(model)} -o merged, and factorize what that gives"
        )
        raise
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
    train: Train = "scales",
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
    """Write the factorized form of a checkpoint (docs/format.md), and a trainable file: scales, all ones, or untouched cores.

    Each matrix W (m, n) of a target becomes U (m, k), s (k,) and V (n, k), all float32. In the residual layout, surgery
    also writes the residual ``round(W - U diag(s) V^T)`` in the dtype of W, and the correction that makes W recoverable
    bit for bit. Shards are streamed. The memory needed depends on the largest target, and on how many targets are
    processed at the same time.

    Args:
        model: local folder or Hugging Face repo id.
        out: folder to write, empty or new.
        options: which weights are factorized, and how accurately. Each field may also be given as a keyword: alone, or
            if ``options`` does not set it.
        rank: k, the directions to keep of each matrix, at most its smaller side. The rank is 16 if neither a rank nor
            an energy is given and the recipe has none.
        energy: use this in place of a rank: keep as few directions of each target as hold this share of its squared
            Frobenius norm.
        max_rank: with an energy, the most directions to keep; 256 by default. A note names targets that would need
            more.
        recipe: name or file of a recipe (``surgery.planning.recipes``). By default surgery takes the recipe of the
            model's family.
        split: split fused weights into their projections, where the recipe knows them. By default the recipe decides.
        correction: with the residual layout, keep the correction that makes it lossless: 0.06 to 0.15 bytes per weight.
            Without it a fold gives ``round(R + U diag(s g) V^T)``, in which some 8 to 18 % of the weights differ in
            their last bits.
        include, exclude: globs over tensor names, see ``Options``.
        seed, tolerance: seed and tolerance of the truncated SVD, see ``surgery.truncated_svd``.
        prove: prove for each matrix that no larger singular value was missed. This takes longer. If a proof fails, a
            note and ``top_k`` of the report say so.
        layout: ``residual`` is self-contained. ``overlay`` holds factors only, and the weights stay where they are. The
            default is ``residual``, or ``overlay`` if targets are quantized.
        train: what the trainable file holds: ``scales``, one multiplier for each kept direction; or ``core``, a matrix
            (k, k) between the kept directions of each matrix. Everything else that is written is the same for both.
        revision: revision of a hub model.
        subfolder: the subfolder that holds the model, in a folder or repository with several models, such as a
            diffusion pipeline.
        device: device of the linear algebra: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``, several as
            ``cuda:0,cuda:1``, or ``all`` CUDA devices. Each device works on one shard at a time. On a CPU, one core
            works on each matrix: the result does not depend on the number of cores.
        max_memory: limit of host memory in bytes. surgery processes as many matrices at the same time as fit. By
            default the limit is half of the free memory, and always enough for one matrix.
        max_device_memory: the same limit for each GPU; by default four fifths of its memory.
        engine: ``local``: this process. ``ray``: each shard is a task on a Ray cluster: the one that ``RAY_ADDRESS``
            names or that runs on this machine; otherwise one on this machine alone. All machines must see ``out`` under
            the same path, and a local model as well.
        stream: download each weight file of a hub model when it is needed, and delete it after it has been read. Beside
            the result, the disk then holds one file more than there are devices. Without it the model stays in the
            hub's cache.
        push_to_hub: id of a hub repository to which surgery also uploads the result, each shard when it is finished. An
            earlier result of surgery there is replaced.
        private: whether a repository that surgery creates for this is private.
        overwrite: replace an earlier result in ``out``. The earlier result stays until the new one is complete.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.
        timing: records how long each stage takes.

    Returns:
        What was written, with the manifest. If ``out`` holds the complete result of the same run already, the report is
        about this result. If ``train`` differs from the trainable file there, surgery writes this file again, provided
        that it is untouched.

    Raises:
        OptionError, SourceError, ReadError, FormatError: as for ``plan``.
        WeightError: a weight holds NaN or infinity, or a residual would overflow.
        OutputError: ``out`` holds something else, or trained numbers of the other kind; or it is in use, or the disk is
            full or fails.
        ClusterError: with Ray, the cluster cannot be reached or is lost.
        MissingExtra: Ray is not installed.
        SurgeryError: any of these. An unfinished folder has no manifest and no ``config.json``, so nothing accepts it
            as a checkpoint. The same call continues after the last finished shard.
    """
    progress = listening()
    chosen = chosen_options("factorize", OptionKeywords, options, keywords)
    out = Path(out)
    with Run(out) as run:
        by = run.start_engine(EngineOptions(engine, str(device), max_memory, max_device_memory, timing))
        with phase(progress, "planning"):
            source = _open(model, revision, subfolder, (out / STREAM_DIR, by.files_at_a_time) if stream else None)
            planned = make_plan(source, chosen, layout, by.resources, aliases="fetch", train=train)
        for note in planned.notes:
            progress.note(note)
        factorization = Factorization(source, planned, replace(chosen, recipe=planned.recipe), by.device_and_processor)
        with run.uploading(push_to_hub, private=private), run.locked(source.folders()):
            if (out / MANIFEST_FILE).is_file() and not overwrite:
                manifest = factorization.complete_in(out)
                run.forget()
                _publish_complete(run, manifest, train)
                for note in _accuracy_notes(manifest, planned):
                    progress.note(note)
                return _report(out, manifest, train)
            run.identify(factorization.identity())
            with run.result(factorization.files(), [source], overwrite=overwrite) as place:
                jobs = FactorizeJobs(source, planned, out, place, timing)
                with phase(progress, "factorizing", planned.bytes_read):
                    results = run.shards(jobs, planned.memory)
                manifest = factorization.finish(place, results)
                publish_factorized(run.upload, place, manifest, train)
    headers = {shard.file: shard.header for shard in planned.shards}
    for note in (*_accuracy_notes(manifest, planned), *notes_of_equal(source, headers, manifest)):
        progress.note(note)
    return _report(out, manifest, train)


def _publish_complete(run: Run, manifest: Manifest, train: Train) -> None:
    """Upload a result that was complete before the run, if it is to be uploaded."""
    listening().note(f"{run.out} is already complete" + (": nothing to do" if run.upload is None else ""))
    for shard in manifest.shards:
        submit_shard(run.upload, run.out, shard)
    publish_factorized(run.upload, run.out, manifest, train)


def _accuracy_notes(manifest: Manifest, plan: Plan) -> list[str]:
    """Notes about targets whose SVD did not converge or was not proven, and those with less energy than was asked for."""
    notes, targets = [], manifest.targets
    if failed := {target.key: largest_residual(target) for target in targets if not target.converged}:
        hint = (
            "This does not make a fold less exact, but these directions are less certain; surgery inspect tells how much. Try "
            "another --rank or --seed, leave them out with --exclude, or accept them with a larger --tolerance"
        )
        notes.append(unconverged_note(failed, f"{len(targets)} targets", manifest.options.tolerance, hint))
    unproven = {target.key: target.worst_top_k for target in targets if target.worst_top_k.verdict != "proven"}
    if manifest.options.prove and unproven:
        notes.append(unproven_note(unproven, f"{len(targets)} targets"))
    asked = {target.key: target.energy for target in plan.targets if target.energy is not None}
    short = [t for t in targets if t.key in asked and t.energy < (asked[t.key] or 0) and t.rank < min(t.matrices[1:])]
    if short:
        least = min(short, key=lambda target: target.energy)
        notes.append(
            f"{len(short)} of {len(targets)} targets hold less than {asked[least.key]:g} of their energy at rank "
            f"{least.rank}, the largest allowed (least: {least.energy:g}, {least.key}); --max-rank allows more"
        )
    return notes


def _report(out: Path, manifest: Manifest, train: Train) -> FactorizeReport:
    """The report of a complete result, from its manifest."""
    unconverged = tuple(target.key for target in manifest.targets if not target.converged)
    return FactorizeReport(
        out=out,
        layout=manifest.layout,
        fingerprint=manifest.fingerprint,
        device=manifest.device,
        targets=len(manifest.targets),
        matrices=sum(target.matrices[0] for target in manifest.targets),
        skipped=len(manifest.skipped),
        train=train,
        trainable=sum(target.numbers_of(train) for target in manifest.targets),
        converged=not unconverged,
        unconverged=unconverged,
        top_k=summary_of(manifest.targets),
        bytes_written=sum(record.size for record in manifest.output_files()),
        manifest=manifest,
    )
