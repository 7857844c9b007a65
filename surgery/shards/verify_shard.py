"""The job of one shard of ``verify``: check its files, factors, weights and certificates, all measured again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece, looked_at
from surgery.errors import FormatError, SurgeryError
from surgery.files.watch import Watch
from surgery.format.factors import FactorsReader
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.format.sample import sampled
from surgery.format.tensor_view import by_tensor
from surgery.format.top_k_records import TopKRecord
from surgery.linalg.measured import measure
from surgery.lossless.correction import CorruptCorrection
from surgery.lossless.split import split
from surgery.memory import bytes_of
from surgery.progress import Progress
from surgery.shards.failures import SHA256, CheckedCheckpoint, Failure, Failures, check_recorded_file
from surgery.shards.verify_headers import check_headers
from surgery.shards.verify_target import CheckedTarget, MeasuredMatrix, factors_found
from surgery.weights.matrix import stored_residual
from surgery.weights.protocol import Weights, check_entry

_HASHED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ShardFound:
    """What the check of one shard has found.

    Attributes:
        failures: the checks that failed. A file that cannot be read is one, and no error.
        top_k: of each matrix that was measured, with the key of its target, whether its kept values are the largest.
    """

    failures: list[Failure]
    top_k: list[tuple[str, TopKRecord]]


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """The check of one shard.

    Attributes:
        checkpoint: what is checked.
        shard: which of its weight files.
        passed: the tensors in it that the manifest records as passed over.
        watch: of the checkpoint's own files.
        window_bytes: how much of a shard is worked on together; 0: only hashes and headers are checked.
        prove: whether it is proven of each matrix that no larger singular value was missed.
        progress: told of each tensor that is done; called from threads.
    """

    checkpoint: CheckedCheckpoint
    shard: ShardRecord
    passed: AbstractSet[str]
    watch: Watch
    window_bytes: int
    prove: bool
    progress: Progress

    @property
    def targets(self) -> list[TargetRecord]:
        """The targets in the shard."""
        return self.checkpoint.manifest.targets_of(self.shard.source.file)

    def run(self, lane: Lane, on_read: Callable[[], object]) -> ShardFound:
        """Check the shard.

        Args:
            lane: the device, threads and memory to do it with.
            on_read: called when the shard has been read.
        """
        failures, top_k = Failures(), list[tuple[str, TopKRecord]]()
        try:
            self._run(lane, on_read, failures, top_k)
        except SurgeryError as error:  # a file that cannot be read; other shards are checked all the same
            failures.fail(self.shard.source.file, error)
        return ShardFound(failures.found, top_k)

    def _run(self, lane: Lane, on_read: Callable[[], object], failures: Failures, top_k: list[tuple[str, TopKRecord]]) -> None:
        shard, weights = self.shard, self.checkpoint.weights
        headers_only = not self.window_bytes
        for record in shard.written:
            self.progress.item(record.file)
            # The file whose weights are checked is hashed while they are read.
            walked = record is shard.residual and weights is not None and weights.holds_residuals and not headers_only
            there = check_recorded_file(self.checkpoint.folder, record, self.watch, failures, hashed=not walked)
            if not walked or not there:
                self.progress.advance(record.size)
        if shard.residual is not None and not self.targets:
            alike = shard.residual == shard.source
            failures.expect(alike, shard.source.file, "without targets it is the source's", shard.residual, shard.source)
        try:
            check_headers(self.checkpoint, shard, self.passed, self.watch, failures)
        except SurgeryError as error:  # nothing can be said of the weights; the factors may be well
            failures.fail(shard.source.file, error)
            weights = None
        if headers_only:
            return
        with ExitStack() as stack:
            factors, done = None, []
            if self.targets:
                opened = FactorsReader(self.checkpoint.folder, shard, check=False, watch=self.watch)
                factors = stack.enter_context(opened)
                # By the lane's workers, where no result depends on the number of threads.
                done = [lane.submit(lambda target: factors_found(target, opened), target) for target in self.targets]
            try:
                if weights is not None:
                    check = _WeightsCheck(self, weights, factors, failures)
                    check.run(lane, on_read, stack)
                    top_k += check.top_k
            except SurgeryError as error:  # what is found of the factors is told all the same
                failures.fail(shard.source.file, error)
            for found in done:
                failures.found += found.result()


class _WeightsCheck:
    """The check of the weights of one shard, in one pass over its weight file.

    Args:
        check: of the shard.
        weights: the residuals in the checkpoint, or the base.
        factors: of the targets in the shard; None if it has no targets.
        failures: failed checks are added to it.
    """

    def __init__(self, check: ShardCheck, weights: Weights, factors: FactorsReader | None, failures: Failures) -> None:
        self._check = check
        self._weights = weights
        self._factors = factors
        self._failures = failures
        self._residuals: ShardReader | None = None
        options = check.checkpoint.manifest.options
        self._by_name = {
            name: [CheckedTarget(target, options, check.prove) for target in targets]
            for name, targets in by_tensor(check.targets).items()
        }

    @property
    def top_k(self) -> list[tuple[str, TopKRecord]]:
        """What is known of each matrix that has been measured, with the key of its target."""
        return [(one.target.key, record) for parts in self._by_name.values() for one in parts for record in one.top_k]

    def run(self, lane: Lane, on_read: Callable[[], object], stack: ExitStack) -> None:
        """Read the weight file, and check targets, aliases and the whole file against the manifest.

        Args:
            lane: the device, threads and memory to do it with.
            on_read: called when the file has been read.
            stack: closes the files that are opened here.
        """
        shard, weights, failures = self._check.shard, self._weights, self._failures
        file, own = shard.source.file, weights.holds_residuals
        path, expected = weights.path(file), weights.expected(file)
        assert expected is not None  # there is a manifest
        source = stack.enter_context(weights.opened(file, path, path.name))
        if not own and shard.residual is not None:
            residuals = self._check.checkpoint.folder / shard.residual.file
            self._residuals = stack.enter_context(ShardReader(residuals, name=shard.residual.file, watch=self._check.watch))
        sound = self._sound(source, path.name)
        portions = {name: parts[0].target.at_a_time for name, parts in sound.items() if parts}
        recovered, tied = hashlib.sha256(source.header.raw), _TiedTensors(self._by_name)

        def compute(window: Sequence[Piece]) -> list[list[list[MeasuredMatrix]] | SurgeryError]:
            return [self._measured(piece, sound, lane.device) for piece in window]

        def finish(window: Sequence[Piece], found: list[list[list[MeasuredMatrix]] | SurgeryError]) -> None:
            for piece, parts in zip(window, found, strict=True):
                if isinstance(piece, TargetPiece):
                    self._check.progress.item(piece.entry.name)
                    self._take(piece, sound[piece.entry.name], parts)
                    tied.update(piece)
                recovered.update(bytes_of(piece.buffer))
                self._check.progress.advance(len(piece))

        def sample(piece: TargetPiece) -> None:
            for checked in sound[piece.entry.name]:
                checked.stored.update(sampled(checked.target, piece.tensor))

        walk = stack.enter_context(ShardWalk(source, portions, lane.buffers, lane.timing))
        errors: list[SurgeryError] = []
        lane.flow(looked_at(_until_error(walk, errors), sample), self._check.window_bytes, compute, finish, on_read)
        if errors:
            failures.fail(path.name, errors[0])
            return
        for parts in self._by_name.values():
            for checked in parts:
                checked.conclude(path.name, failures, is_recovered=own)
        where = SHA256 if own else "sha256 of the base"
        failures.expect(walk.sha256 == expected.sha256, path.name, where, walk.sha256, expected.sha256)
        if own:
            found, original = recovered.hexdigest(), shard.source.sha256
            failures.expect(found == original, path.name, "sha256 of the original file", found, original)
        for target, digest in tied.digests():
            self._check_aliases(target, digest)

    def _sound(self, source: ShardReader, file: str) -> dict[str, list[CheckedTarget]]:
        """Tensor -> those of its targets whose dtype and shape in the file are the recorded ones. The others are failures."""
        for name, parts in self._by_name.items():
            entry = source.entries.get(name)
            for checked in parts:
                if entry is None:
                    checked.spoiled = True  # check_headers has told it
                    continue
                try:
                    check_entry(entry, checked.target)
                except FormatError as error:
                    self._failures.fail(f"{file}: {checked.target.key}", error)
                    checked.spoiled = True
        return {name: [checked for checked in parts if not checked.spoiled] for name, parts in self._by_name.items()}

    def _measured(
        self, piece: Piece, sound: Mapping[str, Sequence[CheckedTarget]], device: torch.device
    ) -> list[list[MeasuredMatrix]] | SurgeryError:
        """Measure each matrix of each target in a piece, or return the error that prevents it.

        Where the piece holds residuals, the recovered weights overwrite them.
        """
        if not isinstance(piece, TargetPiece) or self._factors is None:
            return []
        try:
            return self._measured_target(piece, sound[piece.entry.name], self._factors, device)
        except SurgeryError as error:  # the lane goes on
            return error

    def _measured_target(
        self, piece: TargetPiece, parts: Sequence[CheckedTarget], factors: FactorsReader, device: torch.device
    ) -> list[list[MeasuredMatrix]]:
        weight, beside = self._weights.exact_piece(piece, device), None
        if self._residuals is not None:
            count = None if parts[0].target.at_a_time is None else len(piece.tensor)
            beside = self._residuals.read(self._residuals.entries[piece.entry.name], piece.first, count)
        result, prove = [], self._check.prove
        for checked in parts:
            view, target = checked.target.seen_as, checked.target
            matrices = view.matrices(weight)
            others = None if beside is None else view.matrices(beside)
            seen = []
            for i, matrix in enumerate(matrices):
                if self._weights.holds_residuals:
                    seen.append(_recovered(target, piece.first + i, matrix, factors, device, prove))
                else:
                    other = None if others is None else others[i]
                    seen.append(_compared(target, piece.first + i, (matrix, other), factors, device, prove))
            if self._weights.holds_residuals and view.slice is not None:
                view.store(matrices, piece.tensor)
            result.append(seen)
        return result

    def _take(
        self, piece: TargetPiece, parts: Sequence[CheckedTarget], found: list[list[MeasuredMatrix]] | SurgeryError
    ) -> None:
        """Add what was measured of a piece to its targets."""
        for i, checked in enumerate(parts):
            if isinstance(found, SurgeryError):
                self._failures.fail(checked.target.key, found)
                checked.spoiled = True
                continue
            for one in found[i]:
                checked.take(one)
            if self._weights.holds_residuals:  # the piece now holds the recovered weights
                checked.recovered.update(checked.target.seen_as.matrices(piece.tensor))

    def _check_aliases(self, target: TargetRecord, digest: str) -> None:
        """Check that the aliases of a target hold the bytes with this sha256, those of its own tensor."""
        for alias in target.aliases:
            try:
                path = self._weights.path(alias.shard)
                with ShardReader(path, name=alias.shard, watch=self._weights.watch) as reader:
                    if (entry := reader.entries.get(alias.tensor)) is None:
                        continue  # check_headers has told it
                    found = hashlib.sha256()
                    for start in range(entry.start, entry.end, _HASHED_BYTES):
                        part = bytes_of(reader.empty(min(_HASHED_BYTES, entry.end - start)))
                        reader.read_into(part, start)
                        found.update(part)
            except SurgeryError as error:
                self._failures.fail(alias.shard, error)
                continue
            same = found.hexdigest() == digest
            where = f"{alias.shard}: {alias.tensor}"
            self._failures.expect(same, where, f"the same as {target.tensor}", "other bytes")


def _recovered(
    target: TargetRecord, index: int, stored: torch.Tensor, factors: FactorsReader, device: torch.device, prove: bool
) -> MeasuredMatrix:
    """Recover the weight of a residual ``stored`` (m, n), which it overwrites, and measure it against its factors."""
    matrix = stored_residual(factors, target, index, stored, lossless=True)
    kept = matrix.factors
    assert kept is not None

    def compute(_: Sequence[torch.Tensor], where: torch.device) -> list[MeasuredMatrix]:
        try:
            weight, inexact = matrix.recovered(where)
        except CorruptCorrection as error:
            return [MeasuredMatrix(index, kept, None, None, True, str(error))]
        measured = MeasuredMatrix(index, kept, measure(weight, kept.to(where), prove=prove), inexact, True)
        stored.copy_(weight)  # last: where the memory of a GPU does not suffice, all this is done again from it
        return [measured]

    return as_memory_allows(compute, [stored], device)[0]


def _compared(
    target: TargetRecord,
    index: int,
    stored: tuple[torch.Tensor, torch.Tensor | None],
    factors: FactorsReader,
    device: torch.device,
    prove: bool,
) -> MeasuredMatrix:
    """Measure a weight (m, n) of the base against its factors, and compare the checkpoint's residual of it, if there is one.

    Args:
        target, index: which matrix of which target.
        stored: the weight, and its residual in the checkpoint; None in the overlay layout.
        factors: of the shard.
        device: where the arithmetic runs.
        prove: whether it is proven that no larger singular value was missed.
    """
    kept = factors.factors(target, index)

    def compute(some: Sequence[tuple[torch.Tensor, torch.Tensor | None]], where: torch.device) -> list[MeasuredMatrix]:
        (weight, residual), there, inexact, agrees = some[0], kept.to(where), None, True
        weight = weight.to(where)
        if residual is not None:
            parts = split(weight, there, correct=False)
            inexact, agrees = parts.inexact, torch.equal(parts.residual.cpu().view(torch.uint8), residual.view(torch.uint8))
        return [MeasuredMatrix(index, kept, measure(weight, there, prove=prove), inexact, agrees)]

    return as_memory_allows(compute, [stored], device)[0]


class _TiedTensors:
    """The sha256 of each tensor that has aliases, of its bytes after recovery."""

    def __init__(self, by_name: Mapping[str, Sequence[CheckedTarget]]) -> None:
        targets = (parts[0].target for parts in by_name.values())
        self._tied = {target.tensor: (target, hashlib.sha256()) for target in targets if target.aliases}

    def update(self, piece: TargetPiece) -> None:
        if piece.entry.name in self._tied:
            self._tied[piece.entry.name][1].update(bytes_of(piece.buffer))

    def digests(self) -> list[tuple[TargetRecord, str]]:
        return [(target, digest.hexdigest()) for target, digest in self._tied.values()]


def _until_error(pieces: Iterable[Piece], errors: list[SurgeryError]) -> Iterator[Piece]:
    """Pieces until one cannot be read. That error goes to ``errors``, so that the lane goes on with other shards."""
    try:
        yield from pieces
    except SurgeryError as error:
        errors.append(error)
