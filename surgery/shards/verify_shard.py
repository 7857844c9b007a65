"""What is checked of one shard of a factorized checkpoint: its files, factors, weights and certificates, measured anew."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece, looked_at
from surgery.errors import FormatError, ReadError, SurgeryError
from surgery.files.files import FileRecord, Watch, file_sha256, reading
from surgery.format.factors import FactorsHash, FactorsReader
from surgery.format.manifest import Manifest, ShardRecord, TargetRecord
from surgery.format.safetensors import TORCH_DTYPES, ShardReader
from surgery.format.sample import SampleHash
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.lossless import Factors, recover, split
from surgery.linalg.measured import Measured, could_come_from, gap_limits, measure, overstated, says_converged
from surgery.memory import bytes_of
from surgery.names import correction_key, factor_key
from surgery.progress import Progress
from surgery.shards.factorize_shard import rounded_to
from surgery.weights.base import BaseWeights, OwnWeights, check_entry, shard_path
from surgery.weights.quantization import Scaled
from surgery.weights.quantized import Dequantizer

#: Largest entry of ``U^T U - I`` that passes: vectors are rounded to float32.
_ORTHONORMAL = 1e-5
#: By how much float64 products may differ: what rounding to float32 takes is in the residuals that are recorded.
_ROUNDED = 1e-9
#: How far the energy may be off, relatively: half a unit in its sixth digit, and what float32 sums of squares are off by.
_ENERGY = 8e-6
_HASHED_BYTES = 8 << 20


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


@dataclass(slots=True)
class Failures:
    """What has been found not to hold, in order."""

    found: list[Failure] = field(default_factory=list)

    def fail(self, where: str, error: SurgeryError) -> None:
        """An error in the place of a figure; of what the system refuses, with what to do."""
        got, expected = ("" if part is None else str(part) for part in (error.got, error.expected))
        check = f"{error.what}; {error.hint}" if isinstance(error, ReadError) and error.hint else error.what
        self.found.append(Failure(where, check, got, expected))

    def expect(self, holds: bool, where: str, check: str, got: object = "", expected: object = "") -> bool:
        if not holds:
            self.found.append(Failure(where, check, str(got), str(expected)))
        return holds


def check_output_file(folder: Path, record: FileRecord, watch: Watch, failures: Failures, *, hashed: bool = True) -> bool:
    """A file of the checkpoint: that it is there, its size, and its hash unless others take that while they read it."""
    path = folder / record.file
    if not failures.expect(path.is_file(), record.file, "the file is there", "nothing"):
        return False
    try:
        size = watch.see(path, record.file).size
        if not failures.expect(size == record.size, record.file, "size", size, record.size):
            return False
        if hashed:
            with reading(path, record.file):
                found = file_sha256(path)
            return failures.expect(found == record.sha256, record.file, "sha256", found, record.sha256)
    except SurgeryError as error:
        failures.fail(record.file, error)
        return False
    return True


@dataclass(slots=True)
class _Checked:
    """What has been seen of a target so far: of its matrices as they are stored, and as they are recovered."""

    target: TargetRecord
    matrices: int = 0
    spoiled: bool = False
    kept: float = 0.0
    total: float = 0.0
    inexact: float = 0.0
    residuals_agree: bool = True
    misses: list[tuple[str, str, str]] = field(default_factory=list)
    stored: SampleHash = field(init=False)
    recovered: SampleHash = field(init=False)

    def __post_init__(self) -> None:
        dtype = TORCH_DTYPES[self.target.dtype]
        self.stored, self.recovered = SampleHash(dtype), SampleHash(dtype)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of one matrix. ``inexact`` is None in the overlay layout; ``agrees``: the residual in its file is that of the weight."""

    index: int
    factors: Factors
    measured: Measured | None
    inexact: float | None
    agrees: bool
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """The check of one shard.

    Attributes:
        folder, manifest: the checkpoint.
        shard: which.
        passed: the tensors in it that are passed over.
        shards: all, by their names in the source.
        weights: where its weights are; None where they are not to be had.
        quantized: the FP8 weights of the base.
        watch: of the checkpoint's files.
        headers_only: whether hashes and headers are all that is looked at.
        window_bytes: how much of a shard is worked on at a time.
        progress: told of each tensor that is done; called from threads.
    """

    folder: Path
    manifest: Manifest
    shard: ShardRecord
    passed: AbstractSet[str]
    shards: Mapping[str, ShardRecord]
    weights: OwnWeights | BaseWeights | None
    quantized: Mapping[str, Scaled]
    watch: Watch
    headers_only: bool
    window_bytes: int
    progress: Progress

    @property
    def targets(self) -> list[TargetRecord]:
        """Those in it."""
        return self.manifest.targets_of(self.shard.source.file)

    def run(self, lane: Lane, on_read: Callable[[], object]) -> list[Failure]:
        """What does not hold; whatever cannot be read is among it.

        Args:
            lane: where the arithmetic is done.
            on_read: called when the shard has been read.
        """
        failures = Failures()
        try:
            self._run(lane, on_read, failures)
        except SurgeryError as error:  # a file that cannot even be read; the others may be well
            failures.fail(self.shard.source.file, error)
        return failures.found

    def _run(self, lane: Lane, on_read: Callable[[], object], failures: Failures) -> None:
        shard, own = self.shard, isinstance(self.weights, OwnWeights)
        files = [record for record in (shard.residual, shard.factors) if record is not None]
        for record in files:
            self.progress.item(record.file)
            # What is walked is hashed on the way.
            walked = record is shard.residual and own and not self.headers_only
            there = check_output_file(self.folder, record, self.watch, failures, hashed=not walked)
            if not walked or not there:
                self.progress.advance(record.size)
        if shard.residual is not None and not self.targets:
            alike = shard.residual == shard.source
            failures.expect(alike, shard.source.file, "without targets it is the source's", shard.residual, shard.source)
        self._check_headers(failures)
        if self.headers_only:
            return
        with ExitStack() as stack:
            checked: dict[str, list[_Checked]] = {}
            for target in self.targets:
                checked.setdefault(target.tensor, []).append(_Checked(target))
            if self.targets:
                factors = stack.enter_context(FactorsReader(self.folder, shard, check=False, watch=self.watch))
                # In a lane's own threads: nothing that is computed there depends on how many there are.
                done = [lane.submit(lambda target: _factors_found(target, factors), target) for target in self.targets]
                self._walk(lane, on_read, stack, checked, factors, failures)
                for found in done:
                    failures.found += found.result()
            else:
                self._walk(lane, on_read, stack, checked, None, failures)

    def _check_headers(self, failures: Failures) -> None:
        """Each target is there with its dtype and shape, and so are its factors; all others are on record as passed over."""
        shard, manifest = self.shard, self.manifest
        edited = manifest.edited_in(shard.source.file)
        tensors: dict[str, tuple[str, list[int] | None]] = {
            tensor: (target.dtype, target.shape) for tensor, target in edited.items()
        }
        if shard.residual is not None:
            self._check_header(self.folder / shard.residual.file, self.watch, tensors, self.passed, failures)
        if isinstance(self.weights, BaseWeights):
            self._check_header(self.weights.file(shard)[0], self.weights.watch, tensors, self.passed, failures)
        if shard.factors is not None:
            parts: dict[str, tuple[str, list[int] | None]] = {}
            for target in self.targets:
                (count, m, n), k = target.matrices, target.rank
                stack = [count] if target.view == "stack" else []
                shapes: list[tuple[str, list[int]]] = [("U", [m, k]), ("s", [k]), ("V", [n, k])]
                parts.update((factor_key(target.key, part), ("F32", stack + shape)) for part, shape in shapes)
                if manifest.layout == "residual" and manifest.options.correction:
                    places = range(count) if stack else [None]
                    parts.update((correction_key(target.key, place), ("U8", None)) for place in places)
            self._check_header(self.folder / shard.factors.file, self.watch, parts, set(), failures)

    def _check_header(
        self,
        path: Path,
        watch: Watch,
        tensors: Mapping[str, tuple[str, list[int] | None]],
        passed: AbstractSet[str],
        failures: Failures,
    ) -> None:
        name = path.relative_to(self.folder).as_posix() if self.folder in path.parents else path.name
        with ShardReader(path, name=name, watch=watch) as reader:
            found = {entry.name: (entry.dtype, list(entry.shape)) for entry in reader.header.tensors}
        for tensor, (dtype, shape) in tensors.items():
            got = found.get(tensor)
            good = got is not None and got[0] == dtype and (shape is None or got[1] == shape)
            failures.expect(good, f"{name}: {tensor}", "dtype and shape", got or "nothing", f"{dtype} {shape or ''}")
        for tensor in sorted(passed - found.keys()):
            failures.expect(False, f"{name}: {tensor}", "what was passed over is there", "nothing")
        for tensor in sorted(found.keys() - tensors.keys() - passed):
            failures.expect(False, f"{name}: {tensor}", "the manifest knows the tensor", "it does not")

    def _walk(
        self,
        lane: Lane,
        on_read: Callable[[], object],
        stack: ExitStack,
        by_name: dict[str, list[_Checked]],
        factors: FactorsReader | None,
        failures: Failures,
    ) -> None:
        """Through the weights of the shard, once."""
        if self.weights is None:
            return
        own = isinstance(self.weights, OwnWeights)
        path, expected = self.weights.file(self.shard)
        watch = self.watch if own else self.weights.watch
        source = stack.enter_context(ShardReader(path, name=path.name, watch=watch))
        weights = self.weights
        dequantizer = stack.enter_context(Dequantizer(lambda file: shard_path(weights, self.shards, file), watch))
        residuals = None
        if not own and self.shard.residual is not None:
            file = self.shard.residual.file
            residuals = stack.enter_context(ShardReader(self.folder / file, name=file, watch=self.watch))
        for name, parts in list(by_name.items()):
            entry = source.entries.get(name)
            for checked in parts:
                if entry is None:
                    checked.spoiled = True  # its header has been found fault with
                    continue
                try:
                    check_entry(entry, checked.target)
                except FormatError as error:
                    failures.fail(f"{path.name}: {checked.target.key}", error)
                    checked.spoiled = True
        sound = {name: [checked for checked in parts if not checked.spoiled] for name, parts in by_name.items()}
        portions = {name: parts[0].target.at_a_time for name, parts in sound.items() if parts}
        recovered, tied = hashlib.sha256(source.header.raw), _Tied(by_name)

        def seen(piece: Piece) -> list[list[_Seen]] | SurgeryError:
            if not isinstance(piece, TargetPiece) or factors is None:
                return []
            try:
                return self._seen(piece, sound[piece.entry.name], factors, dequantizer, residuals, lane.device)
            except SurgeryError as error:  # the lane goes on
                return error

        def compute(window: Sequence[Piece]) -> list[list[list[_Seen]] | SurgeryError]:
            return [seen(piece) for piece in window]

        def finish(window: Sequence[Piece], found: list[list[list[_Seen]] | SurgeryError]) -> None:
            for piece, parts in zip(window, found, strict=True):
                if isinstance(piece, TargetPiece):
                    self.progress.item(piece.entry.name)
                    for i, checked in enumerate(sound[piece.entry.name]):
                        if isinstance(parts, SurgeryError):
                            failures.fail(checked.target.key, parts)
                            checked.spoiled = True
                            continue
                        for one in parts[i]:
                            self._take(checked, one)
                        if own:  # from here on the piece holds what it was in the source
                            checked.recovered.update(checked.target.seen_as.matrices(piece.tensor))
                    tied.update(piece)
                recovered.update(bytes_of(piece.buffer))
                self.progress.advance(len(piece))

        walk = stack.enter_context(ShardWalk(source, portions, lane.buffers, lane.timing))
        errors: list[SurgeryError] = []

        def sample(piece: TargetPiece) -> None:
            for checked in sound[piece.entry.name]:
                checked.stored.update(checked.target.seen_as.matrices(piece.tensor))

        lane.flow(looked_at(_until_error(walk, errors), sample), self.window_bytes, compute, finish, on_read)
        if errors:
            failures.fail(path.name, errors[0])
            return
        for parts in by_name.values():
            for checked in parts:
                self._conclude(checked, path.name, failures)
        where = "sha256" if own else "sha256 of the base"
        failures.expect(walk.sha256 == expected.sha256, path.name, where, walk.sha256, expected.sha256)
        if own:
            found, original = recovered.hexdigest(), self.shard.source.sha256
            failures.expect(found == original, path.name, "sha256 of the original file", found, original)
        for target, digest in tied.digests():
            self._check_aliases(target, digest, failures)

    def _seen(
        self,
        piece: TargetPiece,
        parts: Sequence[_Checked],
        factors: FactorsReader,
        dequantizer: Dequantizer,
        residuals: ShardReader | None,
        device: torch.device,
    ) -> list[list[_Seen]]:
        """Of each matrix of a piece. Where it holds residuals, its weights take their place."""
        weight = dequantizer.weight(piece.tensor, piece.first, self.quantized.get(piece.entry.name))
        beside = None
        if residuals is not None:
            count = None if parts[0].target.at_a_time is None else len(piece.tensor)
            beside = residuals.read(residuals.entries[piece.entry.name], piece.first, count)
        result = []
        for checked in parts:
            view, target = checked.target.seen_as, checked.target
            matrices = view.matrices(weight)
            others = None if beside is None else view.matrices(beside)
            seen = []
            for i, matrix in enumerate(matrices):
                index, other = piece.first + i, None if others is None else others[i]

                def compute(
                    stored: Sequence[torch.Tensor],
                    where: torch.device,
                    target: TargetRecord = target,
                    index: int = index,
                    other: torch.Tensor | None = other,
                ) -> list[_Seen]:
                    return [self._matrix(target, index, stored[0], other, factors, where)]

                seen += as_memory_allows(compute, [matrix], device)
            if isinstance(self.weights, OwnWeights) and view.slice is not None:
                view.store(matrices, piece.tensor)
            result.append(seen)
        return result

    def _matrix(
        self,
        target: TargetRecord,
        index: int,
        stored: torch.Tensor,
        residual: torch.Tensor | None,
        factors: FactorsReader,
        device: torch.device,
    ) -> _Seen:
        """``stored``: the residual, whose place the weight takes; with a base the weight, and ``residual`` what is beside."""
        kept = factors.factors(target, index)
        here, there = kept.to(device), stored.to(device)
        inexact, agrees = None, True
        if isinstance(self.weights, OwnWeights):
            try:
                there, inexact = recover(there, here, factors.correction(target, index))
            except CorruptCorrection as error:
                return _Seen(index, kept, None, None, True, str(error))
            stored.copy_(there)
        elif residual is not None:
            parts = split(there, here, correct=False)
            inexact, agrees = parts.inexact, torch.equal(parts.residual.cpu().view(torch.uint8), residual.view(torch.uint8))
        return _Seen(index, kept, measure(there, here), inexact, agrees)

    def _take(self, checked: _Checked, seen: _Seen) -> None:
        """A matrix into what is known of its target."""
        target, measured, certificate = checked.target, seen.measured, checked.target.certificates[seen.index]
        checked.matrices += 1
        if measured is None:
            checked.misses.append(("the correction decodes", seen.damage or "", ""))
            checked.spoiled = True
            return
        s = seen.factors.s.double()
        checked.kept += s.square().sum().item()
        checked.total += measured.energy
        checked.inexact += seen.inexact or 0.0
        checked.residuals_agree &= seen.agrees
        which = f", matrix {seen.index}" if target.view == "stack" else ""

        def miss(check: str, got: str, expected: str = "") -> None:
            checked.misses.append((check, got + which, expected))

        residual, gap = (torch.tensor(part, dtype=torch.float64) for part in (certificate.residual, certificate.gap))
        worst = int((measured.residual - residual).argmax())
        if not bool((measured.residual <= 1.01 * residual + _ROUNDED).all()):
            got = f"residual {measured.residual[worst].item():.2e} of direction {worst + 1}"
            miss("certificate", f"{got}, recorded {residual[worst].item():.2e}")
            return  # of other factors than these, as is all else
        if bool((over := overstated(residual, measured)).any()):
            i = int(over.nonzero()[0])
            miss("residual", f"{residual[i].item():.3g} of direction {i + 1}", f"{measured.residual[i].item():.3g}")
        (_, m, n), short = target.matrices, min(target.matrices[1:])
        least, most = gap_limits(s, measured, gap, short, max(m, n))
        if bool((wrong := ~((least <= gap) & (gap <= most))).any()):
            i = int(wrong.nonzero()[0])
            limits = f"from {max(0.0, least[i].item()):.3g} to {max(0.0, most[i].item()):.3g}"
            miss("gap", f"{gap[i].item():.3g} of direction {i + 1}", limits)
        converged = says_converged(s, residual, self.manifest.options.tolerance)
        if converged is not None and converged != certificate.converged:
            miss("converged", str(certificate.converged), f"{converged}, by its residuals")
        asked = self.manifest.options.rank
        ranks = range(target.rank, (target.rank if asked is not None else short) + 1)
        if not could_come_from(certificate.method, certificate.passes, short, ranks, zeros=measured.energy == 0):
            miss("method and passes", f"{certificate.method}, {certificate.passes}", "those of a solve of this shape")

    def _conclude(self, checked: _Checked, file: str, failures: Failures) -> None:
        """What can be told of a target once all of its matrices have been seen."""
        target, own = checked.target, isinstance(self.weights, OwnWeights)
        if checked.spoiled:
            for miss in checked.misses:
                failures.expect(False, target.key, *miss)
            return
        if not failures.expect(checked.matrices > 0, f"{file}: {target.tensor}", "the tensor is there", "nothing"):
            return
        if own:
            found, sample = checked.stored.hexdigest(), target.residual_sample_sha256
            failures.expect(found == sample, target.key, "sample of the residual", found, sample)
        found, sample = (checked.recovered if own else checked.stored).hexdigest(), target.sample_sha256
        if not failures.expect(found == sample, target.key, "sample of the original weight", found, sample):
            return  # its certificates are those of another matrix
        for miss in checked.misses:
            failures.expect(False, target.key, *miss)
        failures.expect(target.converged, target.key, "the SVD has converged", "no")
        energy = min(checked.kept / checked.total, 1.0) if checked.total else 1.0
        near = abs(target.energy - energy) <= _ENERGY * energy
        failures.expect(near, target.key, "energy", target.energy, f"{energy:.6g}")
        if target.inexact is not None:
            inexact = rounded_to(checked.inexact / checked.matrices, 3)
            failures.expect(target.inexact == inexact, target.key, "inexact", target.inexact, inexact)
        failures.expect(checked.residuals_agree, target.key, "residual of the base's weight", "another")

    def _check_aliases(self, target: TargetRecord, digest: str, failures: Failures) -> None:
        """The tensors that are one parameter with a target hold its bytes."""
        assert self.weights is not None
        for alias in target.aliases:
            try:
                path = shard_path(self.weights, self.shards, alias.shard)
                with ShardReader(path, name=alias.shard, watch=self.weights.watch) as reader:
                    if (entry := reader.entries.get(alias.tensor)) is None:
                        continue  # its header has been found fault with
                    found = hashlib.sha256()
                    for start in range(entry.start, entry.end, _HASHED_BYTES):
                        part = bytes_of(reader.empty(min(_HASHED_BYTES, entry.end - start)))
                        reader.read_into(part, start)
                        found.update(part)
            except SurgeryError as error:
                failures.fail(alias.shard, error)
                continue
            same = found.hexdigest() == digest
            failures.expect(same, f"{alias.shard}: {alias.tensor}", f"the same as {target.tensor}", "other bytes")


class _Tied:
    """Hashes of the recovered bytes of the tensors that have aliases."""

    def __init__(self, by_name: Mapping[str, Sequence[_Checked]]) -> None:
        targets = (parts[0].target for parts in by_name.values())
        self._tied = {target.tensor: (target, hashlib.sha256()) for target in targets if target.aliases}

    def update(self, piece: TargetPiece) -> None:
        if piece.entry.name in self._tied:
            self._tied[piece.entry.name][1].update(bytes_of(piece.buffer))

    def digests(self) -> list[tuple[TargetRecord, str]]:
        return [(target, digest.hexdigest()) for target, digest in self._tied.values()]


def _factors_found(target: TargetRecord, reader: FactorsReader) -> list[Failure]:
    """What does not hold of U, s and V of a target by themselves."""
    failures, name, count = Failures(), target.key, target.matrices[0]
    eye = torch.eye(target.rank, dtype=torch.float64)
    first, last, descends, off = 0.0, float("inf"), True, {"U": 0.0, "V": 0.0}
    hashes = FactorsHash()
    try:
        for i in range(count):
            factors = reader.factors(target, i)
            hashes.update(factors)
            for part, vectors in (("U", factors.U), ("V", factors.V)):
                wide = vectors.double()
                off[part] = max(off[part], (wide.T @ wide - eye).abs().max().item())
            s = factors.s
            descends &= bool((s >= 0).all() and (s[:-1] >= s[1:]).all())
            first, last = max(first, s[0].item()), min(last, s[-1].item())
    except SurgeryError as error:
        failures.fail(name, error)
        return failures.found
    digest, recorded = hashes.hexdigest(), target.factors_sha256
    failures.expect(digest == recorded, name, "sha256 of U, s, V", digest, recorded)
    for part, most in off.items():
        failures.expect(
            most <= _ORTHONORMAL, name, f"{part} is orthonormal", f"off by {most:.1e}", f"at most {_ORTHONORMAL:.0e}"
        )
    failures.expect(descends, name, "s descends")
    ends = (first, last)
    failures.expect(ends == (target.s_first, target.s_last), name, "s_1, s_k", ends, (target.s_first, target.s_last))
    return failures.found


def _until_error(pieces: Iterable[Piece], errors: list[SurgeryError]) -> Iterator[Piece]:
    """Pieces up to the first that cannot be read: the lane goes on with other shards."""
    try:
        yield from pieces
    except SurgeryError as error:
        errors.append(error)
