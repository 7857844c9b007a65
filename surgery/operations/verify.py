"""Check a factorized checkpoint against its manifest, everything measured anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from surgery.device import as_memory_allows, choose_device, on_its_own_terms
from surgery.engine.walk import ShardWalk, TargetPiece, reported
from surgery.errors import FormatError, OptionError, SurgeryError
from surgery.format.factors import FactorsHash, FactorsReader
from surgery.format.files import FileRecord, Watch, file_sha256, reading
from surgery.format.manifest import Manifest, ShardRecord, TargetRecord, fingerprint_of
from surgery.format.safetensors import TORCH_DTYPES, ShardReader
from surgery.format.sample import SampleHash
from surgery.format.scales import read_scales
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.lossless import join
from surgery.linalg.precision import full_precision
from surgery.linalg.triplets import residuals_of
from surgery.memory import bytes_of
from surgery.names import MANIFEST_FILE, SCALES_FILE, correction_key, factor_key
from surgery.operations.base import BaseWeights, OwnWeights, check_entry, open_base, shard_path
from surgery.operations.output import check_room, download_needs
from surgery.operations.quantized import Dequantizer
from surgery.planning.quantization import FP8, Scaled
from surgery.progress import Progress, listening, phase
from surgery.reports import Report

#: Largest entry of ``U^T U - I`` that passes: vectors are rounded to float32.
_ORTHONORMAL = 1e-5
#: What rounding s to float32, and residuals to three digits, adds to a residual.
_ROUNDED = 2e-7


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that does not hold.

    Attributes:
        where: the file, or the target.
        check: what was checked.
        got, expected: what was found, and what belongs there; empty where there is nothing to tell.
    """

    where: str
    check: str
    got: str
    expected: str


@dataclass(frozen=True, slots=True)
class VerifyReport(Report):
    """What ``verify`` found.

    Attributes:
        ok: whether all that was looked at holds.
        files, targets: how many were looked at.
        failures: what does not hold.
        unchecked: what could not be looked at, and why.
    """

    ok: bool
    files: int
    targets: int
    failures: tuple[Failure, ...]
    unchecked: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """See ``VerifyReport``, on the way."""

    files: int = 0
    targets: int = 0
    failures: list[Failure] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def fail(self, where: str, error: SurgeryError) -> None:
        got, expected = ("" if part is None else str(part) for part in (error.got, error.expected))
        self.failures.append(Failure(where, error.what, got, expected))

    def expect(self, holds: bool, where: str, check: str, got: object = "", expected: object = "") -> bool:
        if not holds:
            self.failures.append(Failure(where, check, str(got), str(expected)))
        return holds

    def report(self) -> VerifyReport:
        return VerifyReport(not self.failures, self.files, self.targets, tuple(self.failures), tuple(self.unchecked))


@on_its_own_terms
def verify(
    factorized: str | Path,
    *,
    base: str | Path | None = None,
    fast: bool = False,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> VerifyReport:
    """Check files, factors, recovery, certificates and scales of a factorized checkpoint.

    Streams: the memory needed is that of the largest target.

    Args:
        factorized: a folder written by ``factorize``.
        base: the model it was made from, folder or hub id: for an overlay, or residuals without a correction, whose weights
            cannot be looked at otherwise; ``unchecked`` says so.
        fast: hashes and headers only.
        device: where the arithmetic runs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: told how far it is, and what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        What does not hold, and what could not be looked at; ``ok`` where all holds that was looked at.

    Raises:
        SurgeryError: there is no manifest to check against, no such base, or one that is not needed.
    """
    progress = listening()
    where = choose_device(str(device))
    where = torch.device("cpu") if where.type == "mps" else where
    folder = Path(factorized)
    manifest = Manifest.read(folder)
    report = _Found()
    fingerprint = fingerprint_of(manifest.targets)
    watch = Watch()
    report.expect(fingerprint == manifest.fingerprint, MANIFEST_FILE, "fingerprint", manifest.fingerprint, fingerprint)
    _check_scales(folder, manifest, report)
    quantized: dict[str, Scaled] = {}
    weights = None if fast else _weights(folder, manifest, base, report)
    if isinstance(weights, BaseWeights) and any(target.dtype == FP8 for target in manifest.targets):
        quantized = weights.quantized(folder, manifest)
    shards = {shard.source.file: shard for shard in manifest.shards}
    by_reading = 0 if fast else sum(shard.source.size for shard in manifest.shards)
    with phase(progress, "verifying", by_reading + sum(record.size for record in manifest.output_files())):
        for record in manifest.output_files():
            progress.item(record.file)
            _check_file(folder, record, watch, report)
            progress.advance(record.size)
        for shard in manifest.shards:
            targets = manifest.targets_of(shard.source.file)
            report.targets += len(targets)
            try:
                _check_headers(folder, shard, targets, manifest, watch, report)
                if targets and not fast:
                    _check_shard(folder, shard, targets, shards, weights, quantized, where, watch, report, progress)
                elif isinstance(weights, BaseWeights):
                    progress.item(shard.source.file)
                    _check_base_file(shard, weights, report)
                    progress.advance(shard.source.size)
            except SurgeryError as error:  # a file that cannot even be read; the others may be well
                report.fail(shard.source.file, error)
        _check_unchanged([watch] if weights is None else [watch, weights.watch], report)
    if fast:
        report.unchecked.append("factors, recovery and certificates (--fast)")
    return report.report()


def _check_scales(folder: Path, manifest: Manifest, report: _Found) -> None:
    try:
        read_scales(folder / SCALES_FILE, manifest)
    except SurgeryError as error:
        report.fail(SCALES_FILE, error)


def _check_file(folder: Path, record: FileRecord, watch: Watch, report: _Found) -> None:
    report.files += 1
    path = folder / record.file
    if not report.expect(path.is_file(), record.file, "the file is there", "nothing"):
        return
    try:
        size = watch.see(path, record.file).size
        if report.expect(size == record.size, record.file, "size", size, record.size):
            found = file_sha256(path)
            report.expect(found == record.sha256, record.file, "sha256", found, record.sha256)
    except SurgeryError as error:
        report.fail(record.file, error)
    except OSError as error:
        report.expect(False, record.file, "the file can be read", error)


def _check_unchanged(watches: list[Watch], report: _Found) -> None:
    """What was found must hold of all files at the same time."""
    for watch in watches:
        try:
            watch.check()
        except SurgeryError as error:
            report.fail("at the end", error)


def _check_headers(
    folder: Path, shard: ShardRecord, targets: list[TargetRecord], manifest: Manifest, watch: Watch, report: _Found
) -> None:
    """Each target is there with its dtype and shape, and so are its factors."""
    expected: dict[str, dict[str, tuple[str, list[int] | None]]] = {}
    if shard.residual is not None:
        edited = manifest.edited_in(shard.source.file)
        expected[shard.residual.file] = {tensor: (target.dtype, target.shape) for tensor, target in edited.items()}
    if shard.factors is not None:
        parts = expected[shard.factors.file] = {}
        for target in targets:
            (count, m, n), k = target.matrices, target.rank
            stack = [count] if target.view == "stack" else []
            shapes: list[tuple[str, list[int]]] = [("U", [m, k]), ("s", [k]), ("V", [n, k])]
            parts.update((factor_key(target.key, part), ("F32", stack + shape)) for part, shape in shapes)
            if manifest.layout == "residual" and manifest.options.correction:
                places = range(count) if stack else [None]
                parts.update((correction_key(target.key, place), ("U8", None)) for place in places)
    for file, tensors in expected.items():
        with ShardReader(folder / file, name=file, watch=watch) as reader:
            found = {entry.name: (entry.dtype, list(entry.shape)) for entry in reader.header.tensors}
        for name, (dtype, shape) in tensors.items():
            got = found.get(name)
            good = got is not None and got[0] == dtype and (shape is None or got[1] == shape)
            report.expect(good, f"{file}: {name}", "dtype and shape", got or "nothing", f"{dtype} {shape or ''}")


def _weights(folder: Path, manifest: Manifest, base: str | Path | None, report: _Found) -> OwnWeights | BaseWeights | None:
    if manifest.layout == "residual" and manifest.lossless:
        if base is not None:
            raise OptionError("--base is not needed here: this checkpoint holds its own weights", hint="leave --base out")
        return OwnWeights(folder)
    if base is not None:
        weights = BaseWeights(open_base(base, manifest))
        check_room(*download_needs(weights))
        return weights
    kind = "an overlay" if manifest.layout == "overlay" else "a residual without a correction"
    report.unchecked.append(f"weights and certificates: {kind} does not hold its weights (--base MODEL)")
    return None


def _check_base_file(shard: ShardRecord, weights: BaseWeights, report: _Found) -> None:
    """A weight file of the base that holds no targets: a fold copies it."""
    path, expected = weights.file(shard)
    with reading(path):
        found = file_sha256(path)
    report.expect(found == expected.sha256, path.name, "sha256 of the base", found, expected.sha256)


def _check_shard(
    folder: Path,
    shard: ShardRecord,
    targets: list[TargetRecord],
    shards: Mapping[str, ShardRecord],
    weights: OwnWeights | BaseWeights | None,
    quantized: dict[str, Scaled],
    device: torch.device,
    watch: Watch,
    report: _Found,
    progress: Progress,
) -> None:
    by_name: dict[str, list[_Checked]] = {}
    with ExitStack() as stack:
        reader = stack.enter_context(FactorsReader(folder, shard, check=False, watch=watch))
        for target in targets:
            progress.item(target.key)
            _check_factors(target, reader, report)
            by_name.setdefault(target.tensor, []).append(_Checked(target))
        if weights is None:
            progress.advance(shard.source.size)
            return
        path, expected = weights.file(shard)
        watch = watch if isinstance(weights, OwnWeights) else weights.watch
        source = stack.enter_context(ShardReader(path, name=path.name, watch=watch))
        portions = {name: checks[0].target.at_a_time for name, checks in by_name.items()}
        walk = stack.enter_context(ShardWalk(source, portions))
        dequantizer = stack.enter_context(Dequantizer(lambda file: shard_path(weights, shards, file), watch))
        recovered = hashlib.sha256(source.header.raw)
        for piece in reported(walk, progress):
            if not isinstance(piece, TargetPiece):
                recovered.update(piece.data)
                continue
            for checked in by_name[piece.entry.name]:
                try:
                    check_entry(piece.entry, checked.target)
                except FormatError as error:
                    report.fail(f"{path.name}: {checked.target.key}", error)
                    checked.spoiled = True
                    continue
                view = checked.target.seen_as
                checked.stored.update(view.matrices(piece.tensor))
                weight = dequantizer.weight(piece.tensor, piece.first, quantized.get(piece.entry.name))
                own = isinstance(weights, OwnWeights)
                matrices = view.matrices(weight)
                for i, matrix in enumerate(matrices):
                    check = partial(_check_matrix, checked, piece.first + i, reader, own, report)
                    matrix.copy_(as_memory_allows(check, [matrix], device)[0])
                if own:  # from here on the piece holds what it was in the source
                    checked.recovered.update(matrices)
                    view.store(matrices, piece.tensor)
            recovered.update(bytes_of(piece.buffer))
        for checks in by_name.values():
            for checked in checks:
                _check_samples(checked, path.name, isinstance(weights, OwnWeights), report)
        if isinstance(weights, BaseWeights):
            report.expect(walk.sha256 == expected.sha256, path.name, "sha256 of the base", walk.sha256, expected.sha256)
        else:
            found = recovered.hexdigest()
            report.expect(found == shard.source.sha256, path.name, "sha256 of the original file", found, shard.source.sha256)


@dataclass(slots=True)
class _Checked:
    """What has been seen of a target so far: of its matrices as they are stored, and as they are recovered."""

    target: TargetRecord
    matrices: int = 0
    spoiled: bool = False
    misses: list[str] = field(default_factory=list)
    stored: SampleHash = field(init=False)
    recovered: SampleHash = field(init=False)

    def __post_init__(self) -> None:
        dtype = TORCH_DTYPES[self.target.dtype]
        self.stored, self.recovered = SampleHash(dtype), SampleHash(dtype)


def _check_factors(target: TargetRecord, reader: FactorsReader, report: _Found) -> None:
    name, count = target.key, target.matrices[0]
    eye = torch.eye(target.rank, dtype=torch.float64)
    first, last, descends, off = 0.0, float("inf"), True, {"U": 0.0, "V": 0.0}
    hashes = FactorsHash()
    for i in range(count):
        factors = reader.factors(target, i)
        hashes.update(factors)
        for part, vectors in (("U", factors.U), ("V", factors.V)):
            wide = vectors.double()
            off[part] = max(off[part], (wide.T @ wide - eye).abs().max().item())
        s = factors.s
        descends &= bool((s >= 0).all() and (s[:-1] >= s[1:]).all())
        first, last = max(first, s[0].item()), min(last, s[-1].item())
    report.expect(
        hashes.hexdigest() == target.factors_sha256, name, "sha256 of U, s, V", hashes.hexdigest(), target.factors_sha256
    )
    for part, most in off.items():
        report.expect(most <= _ORTHONORMAL, name, f"{part} is orthonormal", f"off by {most:.1e}", f"at most {_ORTHONORMAL:.0e}")
    report.expect(descends, name, "s descends")
    ends = (first, last)
    report.expect(ends == (target.s_first, target.s_last), name, "s_1, s_k", ends, (target.s_first, target.s_last))


def _check_matrix(
    checked: _Checked,
    index: int,
    reader: FactorsReader,
    own: bool,
    report: _Found,
    stored: Sequence[torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """Recovery and certificate of one matrix, and its weight. ``stored`` holds its residual, or with ``own`` false that."""
    target, weight, factors = checked.target, stored[0], reader.factors(checked.target, index).to(device)
    checked.matrices += 1
    if own:
        try:
            weight = join(weight.to(device), factors, reader.correction(target, index)).cpu()
        except CorruptCorrection as error:
            report.expect(False, target.key, "the correction decodes", error)
            checked.spoiled = True
            return [weight]
    with full_precision(device):
        measured = residuals_of(weight.to(device), factors.U, factors.s, factors.V)
    recorded = torch.tensor(target.certificates[index].residual, dtype=torch.float64)
    worst = int((measured - recorded).argmax())
    if not bool((measured <= 1.01 * recorded + _ROUNDED).all()):
        checked.misses.append(
            f"residual {measured[worst].item():.2e} of direction {worst + 1}, recorded {recorded[worst].item():.2e}"
            + (f", matrix {index}" if target.view == "stack" else "")
        )
    return [weight]


def _check_samples(checked: _Checked, file: str, own: bool, report: _Found) -> None:
    """What can be told of a target once all of its matrices have been seen."""
    target = checked.target
    if checked.spoiled:
        return
    if not report.expect(checked.matrices > 0, f"{file}: {target.tensor}", "the tensor is there", "nothing"):
        return
    if own:
        found, sample = checked.stored.hexdigest(), target.residual_sample_sha256
        report.expect(found == sample, target.key, "sample of the residual", found, sample)
    found, sample = (checked.recovered if own else checked.stored).hexdigest(), target.sample_sha256
    if not report.expect(found == sample, target.key, "sample of the original weight", found, sample):
        return  # its certificates are those of another matrix
    for miss in checked.misses:
        report.expect(False, target.key, "certificate", miss)
    report.expect(target.converged, target.key, "the SVD has converged", "no")
