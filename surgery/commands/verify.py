"""The verb ``verify``: a factorized checkpoint is checked against its manifest, with everything measured again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.commands.repair import Repaired, repair_files, source_to_repair_from
from surgery.device import on_its_own_terms
from surgery.engine.lane import Lane
from surgery.engine.sharing import share_out
from surgery.errors import OptionError, SurgeryError
from surgery.files.watch import Watch
from surgery.format.manifest import Manifest, fingerprint_of
from surgery.format.scales.reading import read_scales
from surgery.format.top_k_records import TopKSummary
from surgery.names import MANIFEST_FILE, SCALES_FILE
from surgery.planning.memory import known_bytes, need_to_verify
from surgery.planning.targets import DEFAULT_MAX_RANK, matches
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.run.disk_room import check_room, download_needs
from surgery.run.engines import LocalEngine, float64_device
from surgery.shards.failures import CheckedCheckpoint, Failure, Failures, check_recorded_file
from surgery.shards.verify_shard import ShardCheck, ShardFound
from surgery.solvers.limits import check_accuracy
from surgery.weights.checkpoint import weights_of, weights_of_base
from surgery.weights.overlay import open_base
from surgery.weights.protocol import Weights


@dataclass(frozen=True, slots=True)
class VerifyReport(Report):
    """What ``verify`` found.

    Attributes:
        ok: whether everything that was checked is correct.
        files: how many files were checked.
        targets: how many targets were checked.
        failures: the checks that failed.
        unchecked: what could not be checked, and why.
        repaired: the files that were made again.
        top_k: for how many matrices it is known that no larger singular value was missed. This was measured now and
            does not come from the manifest. None if no weights were checked.
    """

    ok: bool
    files: int
    targets: int
    failures: tuple[Failure, ...]
    unchecked: tuple[str, ...]
    repaired: tuple[str, ...]
    top_k: TopKSummary | None


@on_its_own_terms
def verify(
    factorized: str | Path,
    *,
    base: str | Path | None = None,
    fast: bool = False,
    prove: bool = False,
    repair: bool = False,
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check files, factors, recovery, certificates and scales of a factorized checkpoint, and repair its files if asked to.

    The checkpoint is streamed. The memory needed depends on the largest target, and on how many targets are processed
    at the same time.

    Args:
        factorized: a folder that ``factorize`` has written.
        base: the model that it was made from, folder or hub id. An overlay, or residuals without a correction, need it
            to check the weights; otherwise ``unchecked`` names what was not checked. ``repair`` needs it if the
            manifest does not name it.
        fast: check hashes and headers only.
        prove: prove for each matrix that no larger singular value was missed, whatever the manifest says. If a proof
            fails, the check fails. Without ``prove``, surgery searches each matrix for such a value, from a random
            start that nobody can predict.
        repair: first make missing and damaged files again from the base, with the bytes that the manifest records. A
            file that would get other bytes is left unchanged, and so are existing scales.
        device: device of the arithmetic: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or
            ``all`` CUDA devices. Each device works on one shard at a time.
        max_memory, max_device_memory: as for ``factorize``.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        What is wrong, and what could not be checked. ``ok`` is true if everything that was checked is correct.

    Raises:
        OptionError: a base was given that is not needed; or ``repair`` has no base; or ``prove`` has no weights to work
            on, or is given together with ``fast``.
        OutputError: with ``repair``, another run uses the folder, the folder is the base, or the disk is too small or
            fails.
        SurgeryError: there is no manifest to check against, or no such base.
    """
    if fast and prove:
        raise OptionError("--fast and --prove contradict each other", hint="a proof needs the weights: leave --fast out")
    progress = listening()
    folder = Path(factorized)
    manifest = Manifest.read(folder)
    is_own = manifest.layout == "residual" and manifest.lossless
    if prove and not is_own and base is None:
        raise OptionError(
            f"a proof needs the weights, and {folder} does not hold them", hint="--base MODEL, which it was made from"
        )
    exact_on = float64_device(str(device))  # weights are recovered in float64
    done = Repaired((), {})
    if repair:
        makes = LocalEngine(str(device), max_memory, max_device_memory, None)
        done = repair_files(folder, manifest, source_to_repair_from(manifest, base), makes, progress)
    failures, unchecked = Failures(), list[str]()
    for file, error in done.failed.items():
        reason = "; ".join(str(part) for part in (error.what, error.hint) if part)
        failures.expect(False, file, "repair", reason, error.expected or "")
    _check_manifest(manifest, failures)
    _check_scales(folder, manifest, failures)
    weights = None if fast else _weights(folder, manifest, None if repair and is_own else base, unchecked)
    watch = weights.watch if weights is not None and weights.holds_residuals else Watch()
    checks = LocalEngine(exact_on, max_memory, max_device_memory, None)
    kept = known_bytes(manifest.targets, len(manifest.targets) + len(manifest.skipped))
    memory = share_out([need_to_verify(target, prove=prove) for target in manifest.targets], checks.resources, kept=kept)
    checkpoint = CheckedCheckpoint(folder, manifest, weights)
    if weights is not None:
        _ = weights.quantized  # fails before any work if the headers of a base cannot be had
    jobs = _VerifyJobs(checkpoint, watch, 0 if fast else memory.window_bytes, prove, progress)
    with phase(progress, "verifying", jobs.bytes_read):
        for record in manifest.files:
            progress.item(record.file)
            check_recorded_file(folder, record, watch, failures)
            progress.advance(record.size)
        found: dict[int, ShardFound] = {}
        with closing(checks.run(jobs, range(len(manifest.shards)), memory)) as finished:
            found.update(finished)
        for index in range(len(manifest.shards)):
            failures.found += found[index].failures
        _check_unchanged(checkpoint, watch, failures)
    if fast:
        unchecked.append("factors, recovery and certificates (--fast)")
    return VerifyReport(
        ok=not failures.found,
        files=len(manifest.output_files()),
        targets=len(manifest.targets),
        failures=tuple(failures.found),
        unchecked=tuple(unchecked),
        repaired=done.files,
        top_k=None if weights is None else TopKSummary.of(one for index in sorted(found) for one in found[index].top_k),
    )


class _VerifyJobs:
    """The ``LocalJobs`` of ``verify``. The result of a job is what was found of a shard.

    Args:
        checkpoint: what is checked.
        watch: of the checkpoint's own files.
        window_bytes: how much of a shard is worked on together; 0: only hashes and headers are checked.
        prove: whether it is proven of each matrix that no larger singular value was missed.
        progress: told how far it is.
    """

    def __init__(self, checkpoint: CheckedCheckpoint, watch: Watch, window_bytes: int, prove: bool, progress: Progress) -> None:
        self._checkpoint = checkpoint
        self._watch = watch
        self._window_bytes = window_bytes
        self._prove = prove
        self._progress = progress
        self._passed: dict[str, set[str]] = {}
        for skipped in checkpoint.manifest.skipped:
            self._passed.setdefault(skipped.shard, set()).add(skipped.tensor)

    @property
    def _base(self) -> Weights | None:
        """The weights, if they are those of a base; None if the checkpoint holds its own, or there are none."""
        weights = self._checkpoint.weights
        return None if weights is None or weights.holds_residuals else weights

    @property
    def bytes_read(self) -> int:
        """Bytes that will be read, for the progress: all recorded files, and the weight files of a base.

        Residuals whose weights are recovered count once, as they are hashed while they are read for that.
        """
        manifest = self._checkpoint.manifest
        written = sum(record.size for record in manifest.output_files())
        return written + (0 if self._base is None else sum(shard.source.size for shard in manifest.shards))

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        base = self._base
        is_fetched = base is not None and bool(download_needs(base.files))
        for index in which:
            if base is not None and is_fetched:
                shard = self._checkpoint.manifest.shards[index]
                self._progress.item(f"fetching {shard.source.file}")
                with suppress(SurgeryError):  # the check of the shard fails with it again, and tells it
                    base.path(shard.source.file)
            yield index

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> ShardFound:
        shard = self._checkpoint.manifest.shards[index]
        passed = self._passed.get(shard.source.file, set())
        check = ShardCheck(self._checkpoint, shard, passed, self._watch, self._window_bytes, self._prove, self._progress)
        return check.run(lane, on_read)

    def close(self) -> None:
        """Nothing to stop: files are fetched one by one, in ``acquired``."""


def _check_manifest(manifest: Manifest, failures: Failures) -> None:
    """Check that the entries of a manifest agree with each other."""
    options = manifest.options

    def expect(holds: bool, check: str, got: object = "", expected: object = "") -> None:
        failures.expect(holds, MANIFEST_FILE, check, got, expected)

    fingerprint = fingerprint_of(manifest.targets)
    expect(fingerprint == manifest.fingerprint, "fingerprint", manifest.fingerprint, fingerprint)
    try:
        check_accuracy(options.tolerance, options.seed)
    except SurgeryError as error:
        failures.fail(MANIFEST_FILE, error)
    shards = {shard.source.file for shard in manifest.shards}
    there = shards | {record.file for record in manifest.files}
    for left in manifest.left_out:
        expect(left.file not in there and bool(left.reason), "what is left out is not there", left.file)
    for file, count in Counter(left.file for left in manifest.left_out).items():
        expect(count == 1, "what is left out is named once", file)
    for (tensor, shard), count in Counter((skipped.tensor, skipped.shard) for skipped in manifest.skipped).items():
        expect(count == 1 and shard in shards, "what is passed over is in one of the weight files", f"{tensor} in {shard}")
    for skipped in manifest.skipped:
        expect(bool(skipped.reason), "what is passed over has a reason", skipped.tensor)
    for target in manifest.targets:
        chosen = not options.include or any(matches(tensor, options.include) for tensor in target.tensors)
        expect(chosen and not matches(target.tensor, options.exclude), "include and exclude choose the target", target.tensor)
        short = min(target.matrices[1:])
        if options.rank is not None:
            expect(target.rank == min(options.rank, short), f"rank of {target.key}", target.rank, min(options.rank, short))
        elif options.energy is not None and (options.max_rank is not None or options.recipe is None):
            most = min(options.max_rank or DEFAULT_MAX_RANK, short)
            expect(target.rank <= most, f"rank of {target.key}", target.rank, f"at most {most}")


def _check_scales(folder: Path, manifest: Manifest, failures: Failures) -> None:
    try:
        read_scales(folder / SCALES_FILE, manifest)
    except SurgeryError as error:
        failures.fail(SCALES_FILE, error)


def _check_unchanged(checkpoint: CheckedCheckpoint, watch: Watch, failures: Failures) -> None:
    """Check that no file has changed since it was read, so that the checks hold of all files at one time."""
    weights = checkpoint.weights
    watches = [watch] if weights is None or weights.watch is watch else [watch, weights.watch]
    for one in watches:
        try:
            one.check()
        except SurgeryError as error:
            failures.fail("at the end", error)
    if weights is not None:
        try:
            weights.close()
        except SurgeryError as error:
            failures.fail("at the end", error)


def _weights(folder: Path, manifest: Manifest, base: str | Path | None, unchecked: list[str]) -> Weights | None:
    """Open the weights to check: the checkpoint's own or those of a base. None, told in ``unchecked``, if neither is there."""
    if manifest.layout == "residual" and manifest.lossless:
        if base is not None:
            raise OptionError(
                "--base is not needed here: this checkpoint holds its own weights", hint="leave --base out, or add --repair"
            )
        return weights_of(folder, manifest)
    if base is not None:
        source = open_base(base, manifest)
        check_room(*download_needs(source))
        return weights_of_base(source, folder, manifest)
    kind = "an overlay" if manifest.layout == "overlay" else "a residual without a correction"
    unchecked.append(f"weights and certificates: {kind} does not hold its weights (--base MODEL)")
    return None
