"""Check a factorized checkpoint against its manifest, everything measured anew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from surgery.device import as_memory_allows, choose_device
from surgery.engine.pipeline import ShardWalk, TargetPiece
from surgery.errors import OptionError, SurgeryError
from surgery.format.factors import FactorsReader, factors_hash
from surgery.format.files import FileRecord, file_sha256
from surgery.format.manifest import Manifest, ShardRecord, TargetRecord, fingerprint_of
from surgery.format.safetensors import ShardReader
from surgery.format.scales import read_scales
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.lossless import Factors, join
from surgery.linalg.precision import full_precision
from surgery.linalg.triplets import residuals_of
from surgery.memory import bytes_of
from surgery.names import MANIFEST_FILE, SCALES_FILE, factor_key
from surgery.operations.base import BaseWeights, OwnWeights
from surgery.operations.output import check_room
from surgery.progress import Progress, Silent
from surgery.source.model import open_source

#: Largest entry of ``U^T U - I`` that passes: vectors are rounded to float32.
_ORTHONORMAL = 1e-5
#: What rounding s to float32, and residuals to three digits, adds to a residual.
_ROUNDED = 2e-7


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that does not hold: where, what was checked, what was found and what belongs there."""

    where: str
    check: str
    got: str
    expected: str


@dataclass(slots=True)
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        files, targets: how many were looked at.
        failures: what does not hold.
        unchecked: what could not be looked at, and why.
    """

    files: int = 0
    targets: int = 0
    failures: list[Failure] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def fail(self, where: str, error: SurgeryError) -> None:
        got, expected = ("" if part is None else str(part) for part in (error.got, error.expected))
        self.failures.append(Failure(where, error.what, got, expected))

    def expect(self, holds: bool, where: str, check: str, got: object = "", expected: object = "") -> bool:
        if not holds:
            self.failures.append(Failure(where, check, str(got), str(expected)))
        return holds


def verify(
    factorized: str | Path,
    *,
    base: str | Path | None = None,
    fast: bool = False,
    device: str = "auto",
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
        progress: told how far it is.

    Raises:
        SurgeryError: there is no manifest to check against, no such base, or one that is not needed.
    """
    progress = progress or Silent()
    where = choose_device(device)
    where = torch.device("cpu") if where.type == "mps" else where
    folder = Path(factorized)
    manifest = Manifest.read(folder)
    report = VerifyReport()
    fingerprint = fingerprint_of(manifest.targets)
    report.expect(fingerprint == manifest.fingerprint, MANIFEST_FILE, "fingerprint", manifest.fingerprint, fingerprint)
    _check_scales(folder, manifest, report)
    weights = None if fast else _weights(folder, manifest, base, report)
    by_reading = 0 if fast else sum(shard.source.size for shard in manifest.shards)
    progress.start("verifying", by_reading + sum(record.size for record in manifest.output_files()))
    try:
        for record in manifest.output_files():
            progress.item(record.file)
            _check_file(folder, record, report)
            progress.advance(record.size)
        for shard in manifest.shards:
            targets = manifest.targets_of(shard.source.file)
            report.targets += len(targets)
            try:
                _check_headers(folder, shard, targets, manifest, report)
                if targets and not fast:
                    _check_shard(folder, shard, targets, weights, where, report, progress)
            except SurgeryError as error:  # a file that cannot even be read; the others may be well
                report.fail(shard.source.file, error)
    finally:
        progress.finish()
    if fast:
        report.unchecked.append("factors, recovery and certificates (--fast)")
    return report


def _check_scales(folder: Path, manifest: Manifest, report: VerifyReport) -> None:
    try:
        read_scales(folder / SCALES_FILE, manifest)
    except SurgeryError as error:
        report.fail(SCALES_FILE, error)


def _check_file(folder: Path, record: FileRecord, report: VerifyReport) -> None:
    report.files += 1
    path = folder / record.file
    if not report.expect(path.is_file(), record.file, "the file is there", "nothing"):
        return
    try:
        size = path.stat().st_size
        if report.expect(size == record.size, record.file, "size", size, record.size):
            found = file_sha256(path)
            report.expect(found == record.sha256, record.file, "sha256", found, record.sha256)
    except OSError as error:
        report.expect(False, record.file, "the file can be read", error)


def _check_headers(
    folder: Path, shard: ShardRecord, targets: list[TargetRecord], manifest: Manifest, report: VerifyReport
) -> None:
    """Each target is there with its dtype and shape, and so are its factors."""
    expected: dict[str, dict[str, tuple[str, list[int] | None]]] = {}
    if shard.residual is not None:
        expected[shard.residual.file] = {target.tensor: (target.dtype, target.shape) for target in targets}
    if shard.factors is not None:
        parts = expected[shard.factors.file] = {}
        for target in targets:
            (m, n), k = target.shape, target.rank
            shapes: list[tuple[str, list[int]]] = [("U", [m, k]), ("s", [k]), ("V", [n, k])]
            parts.update((factor_key(target.tensor, part), ("F32", shape)) for part, shape in shapes)
            if manifest.layout == "residual" and manifest.options.correction:
                parts[factor_key(target.tensor, "correction")] = ("U8", None)
    for file, tensors in expected.items():
        with ShardReader(folder / file, name=file) as reader:
            found = {entry.name: (entry.dtype, list(entry.shape)) for entry in reader.header.tensors}
        for name, (dtype, shape) in tensors.items():
            got = found.get(name)
            good = got is not None and got[0] == dtype and (shape is None or got[1] == shape)
            report.expect(good, f"{file}: {name}", "dtype and shape", got or "nothing", f"{dtype} {shape or ''}")


def _weights(
    folder: Path, manifest: Manifest, base: str | Path | None, report: VerifyReport
) -> OwnWeights | BaseWeights | None:
    if manifest.layout == "residual" and manifest.lossless:
        if base is not None:
            raise OptionError("--base is not needed here: this checkpoint holds its own weights", hint="leave --base out")
        return OwnWeights(folder)
    if base is not None:
        source = open_source(base)
        if (download := source.bytes_to_fetch()) is not None:
            check_room(*download)
        return BaseWeights(source)
    kind = "an overlay" if manifest.layout == "overlay" else "a residual without a correction"
    report.unchecked.append(f"weights and certificates: {kind} does not hold its weights (--base MODEL)")
    return None


def _check_shard(
    folder: Path,
    shard: ShardRecord,
    targets: list[TargetRecord],
    weights: OwnWeights | BaseWeights | None,
    device: torch.device,
    report: VerifyReport,
    progress: Progress,
) -> None:
    by_name = {target.tensor: target for target in targets}
    with ExitStack() as stack:
        reader = stack.enter_context(FactorsReader(folder, shard, check=False))
        for target in targets:
            progress.item(target.tensor)
            _check_factors(target, reader.factors(target), report)
        if weights is None:
            progress.advance(shard.source.size)
            return
        path, expected = weights.file(shard)
        walk = stack.enter_context(ShardWalk(stack.enter_context(ShardReader(path, name=path.name)), by_name, progress))
        seen = set()
        for piece in walk:
            if not isinstance(piece, TargetPiece):
                continue
            target = by_name[piece.entry.name]
            seen.add(target.tensor)
            got, right = f"{piece.entry.dtype} {list(piece.entry.shape)}", f"{target.dtype} {target.shape}"
            if report.expect(got == right, f"{path.name}: {target.tensor}", "dtype and shape", got, right):
                check = partial(_check_weight, target, reader, isinstance(weights, OwnWeights), report)
                as_memory_allows(check, [piece.tensor], device)
        for name in by_name.keys() - seen:
            report.expect(False, f"{path.name}: {name}", "the tensor is there", "nothing")
        if isinstance(weights, BaseWeights):
            report.expect(walk.sha256 == expected.sha256, path.name, "sha256 of the base", walk.sha256, expected.sha256)


def _check_factors(target: TargetRecord, factors: Factors, report: VerifyReport) -> None:
    name = target.tensor
    found = factors_hash(factors)
    report.expect(found == target.factors_sha256, name, "sha256 of U, s, V", found, target.factors_sha256)
    eye = torch.eye(target.rank, dtype=torch.float64)
    for part, vectors in (("U", factors.U), ("V", factors.V)):
        wide = vectors.double()
        off = (wide.T @ wide - eye).abs().max().item()
        report.expect(off <= _ORTHONORMAL, name, f"{part} is orthonormal", f"off by {off:.1e}", f"at most {_ORTHONORMAL:.0e}")
    s = factors.s
    report.expect(bool((s >= 0).all() and (s[:-1] >= s[1:]).all()), name, "s descends", s.tolist())
    ends = (s[0].item(), s[-1].item())
    report.expect(ends == (target.s_first, target.s_last), name, "s_1, s_k", ends, (target.s_first, target.s_last))


def _check_weight(
    target: TargetRecord,
    reader: FactorsReader,
    own: bool,
    report: VerifyReport,
    stored: Sequence[torch.Tensor],
    device: torch.device,
) -> list[None]:
    """Recovery and certificate of one target. ``stored`` holds its residual, or with ``own`` false its weight."""
    weight, factors = stored[0], reader.factors(target).to(device)
    if own:
        found = hashlib.sha256(bytes_of(weight)).hexdigest()
        expected = target.residual_sha256
        try:
            weight = join(weight.to(device), factors, reader.correction(target)).cpu()
        except CorruptCorrection as error:
            report.expect(False, target.tensor, "the correction decodes", error)
            return []
        report.expect(found == expected, target.tensor, "sha256 of the residual", found, expected)
    found = hashlib.sha256(bytes_of(weight)).hexdigest()
    if not report.expect(found == target.sha256, target.tensor, "sha256 of the original weight", found, target.sha256):
        return []
    with full_precision(device):
        measured = residuals_of(weight.to(device), factors.U, factors.s, factors.V)
    recorded = torch.tensor(target.certificate.residual, dtype=torch.float64)
    worst = int((measured - recorded).argmax())
    report.expect(
        bool((measured <= 1.01 * recorded + _ROUNDED).all()),
        target.tensor,
        "certificate",
        f"residual {measured[worst].item():.2e} of direction {worst + 1}",
        f"{recorded[worst].item():.2e}",
    )
    report.expect(target.certificate.converged, target.tensor, "the SVD has converged", "no")
    return []
