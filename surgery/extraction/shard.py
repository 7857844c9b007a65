"""The job of one weight file of an extraction: approximate the changes of its targets, measure those of other tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import SourceError, WeightError
from surgery.extraction.matrices import ApproximatedMatrix, ChangedMatrix, Extracting, StoredAs, extract_matrices
from surgery.extraction.records import ComparedTensor, ExtractedShard, ExtractedTensor, saved_key
from surgery.format.header import TensorEntry
from surgery.format.safetensors import TensorFileWriter, same_bytes
from surgery.lossless.rounding import all_finite, bits_of
from surgery.memory import bytes_of
from surgery.names import FACTORIZABLE_DTYPES, PARTIALS_DIR, factor_key, part_file
from surgery.planning.plan import ShardPlan
from surgery.planning.targets import Target
from surgery.progress import Progress, Silent
from surgery.quantized.recognize import Quantization
from surgery.quantized.weight import Quantized
from surgery.shards.factorize_shard import check_shared
from surgery.source.origin import Origin
from surgery.timing import timed
from surgery.tuned.model import SentTuned, TunedModel
from surgery.weights.model import ModelWeights
from surgery.weights.protocol import Weights
from surgery.weights.sent import SentFiles

#: Bytes of a tensor that is no target that are compared at a time.
COMPARED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ExtractJob:
    """All that the extraction of one weight file depends on, besides the models.

    Attributes:
        shard: the base's weight file, and the targets in it.
        compared: the names of its other tensors that are compared with those of the tuned model.
        saved: those of them whose new numbers are kept.
        index, count: the index of the shard, from 0, and how many there are.
        extracting: how changes are approximated.
        out: the output folder of the run, inside of which its file is until the run is over.
        window_bytes: how much of the shard is worked on together.
    """

    shard: ShardPlan
    compared: tuple[str, ...]
    saved: tuple[str, ...]
    index: int
    count: int
    extracting: Extracting
    out: Path
    window_bytes: int

    @property
    def file(self) -> str:
        """The file that it writes, relative to the output folder."""
        return part_file(self.index, self.count)

    @property
    def tensors(self) -> list[str]:
        """All tensors of the base that are looked at."""
        return [*dict.fromkeys(target.tensor for target in self.shard.targets), *self.compared]


@dataclass(frozen=True, slots=True)
class RemoteExtract:
    """A job as an object that is sent to another process, perhaps on another machine.

    Attributes:
        job: which.
        quantized: quantized weight of the base in it -> how it is stored.
        origin, tuned_origin: where the process takes the weight files of both models from.
        tuned: the part of the tuned model that is needed.
    """

    needs_like_machines: ClassVar[bool] = True

    job: ExtractJob
    quantized: Mapping[str, Quantized]
    origin: Origin
    tuned_origin: Origin
    tuned: SentTuned

    def __call__(self, lane: Lane, attempt: str) -> ExtractedShard:
        """Do the job. ``attempt`` names the folder for unfinished files, so that two attempts at one time do not clash."""
        check_shared(self.job.out)
        partial = self.job.out / PARTIALS_DIR / attempt / self.job.file.replace("/", "--")
        with (
            SentFiles(self.origin) as files,
            SentFiles(self.tuned_origin) as tuned_files,
            ModelWeights(files, lambda: Quantization(self.quantized)) as weights,
            self.tuned.open(tuned_files) as tuned,
        ):
            return ShardExtraction(self.job, weights, tuned, Silent()).run(lane, lambda: None, partial)


def _stacked(done: Sequence[ApproximatedMatrix], target: Target, rank: int) -> dict[str, torch.Tensor]:
    """U (m, k), s (k,) and V (n, k) of all matrices of a target, of a stack along a first dimension; zeros up to one rank."""
    padded = [
        [torch.nn.functional.pad(part, (0, rank - part.shape[-1])) for part in (one.factors.U, one.factors.s, one.factors.V)]
        for one in done
    ]
    parts = (torch.stack(several) if target.view.kind == "stack" else several[0] for several in zip(*padded, strict=True))
    return dict(zip(("U", "s", "V"), parts, strict=True))


@dataclass(frozen=True, slots=True)
class _Compared:
    """What was found of some rows of a tensor that is no target: sums of squares of it and of its change; its new numbers."""

    norm: float
    change: float
    saved: torch.Tensor | None


class ShardExtraction:
    """One job.

    Args:
        job: what is done.
        weights: of the base.
        tuned: the tuned model.
        progress: told of each tensor that is done; called from threads.
    """

    def __init__(self, job: ExtractJob, weights: Weights, tuned: TunedModel, progress: Progress) -> None:
        self._job, self._weights, self._tuned, self._progress = job, weights, tuned, progress
        self._entries = {entry.name: entry for entry in job.shard.header.tensors}
        self._targets = {target.tensor: target for target in job.shard.targets}
        self._done: dict[str, list[ApproximatedMatrix]] = {tensor: [] for tensor in self._targets}
        self._extracted: dict[str, ExtractedTensor] = {}
        self._sums: dict[str, list[float]] = {}

    def run(self, lane: Lane, on_read: Callable[[], object], partial: Path | None) -> ExtractedShard:
        """Write the file of factors, and return what was found.

        Args:
            lane: the device, threads and memory to do it with.
            on_read: called when the shard has been read.
            partial: the path of the file until it is finished; None: beside its place.

        Raises:
            WeightError: a weight of either model holds NaN or infinity.
            SourceError, FormatError, ReadError: a file has changed since the plan, or cannot be read.
            OutputError: the file cannot be written.
        """
        job, file = self._job, self._job.shard.file
        keys = [factor_key(target.tensor, part) for target in job.shard.targets for part in ("U", "s", "V")]
        keys += [saved_key(tensor) for tensor in job.saved]
        with ExitStack() as stack:
            reader = stack.enter_context(self._weights.opened(file))
            if not reader.header.is_like(job.shard.header):
                raise SourceError(
                    f"{file} has changed since the run was planned", hint="start again when nothing writes to the model"
                )
            writer = stack.enter_context(TensorFileWriter(job.out / job.file, keys, partial)) if keys else None
            walk = stack.enter_context(ShardWalk(reader, self._portions(), lane.buffers, lane.timing))

            def compute(window: Sequence[Piece]) -> tuple[list[ApproximatedMatrix], dict[str, list[_Compared]]]:
                return self._compute([piece for piece in window if isinstance(piece, TargetPiece)], lane.device)

            def finish(window: Sequence[Piece], done: tuple[list[ApproximatedMatrix], dict[str, list[_Compared]]]) -> None:
                self._finish(*done, writer)
                for piece in window:
                    if isinstance(piece, TargetPiece):
                        self._progress.item(piece.entry.name)
                    self._progress.advance(len(piece))

            lane.flow(walk, job.window_bytes, compute, finish, on_read)
            self._weights.check(file, walk.sha256)
            others = [self._found(name) for name in job.compared]
            record = writer.commit(job.file) if writer is not None else None
        return ExtractedShard(record, [self._extracted[tensor] for tensor in self._targets], others)

    def _portions(self) -> dict[str, int | None]:
        """The tensors that are walked through, and how many rows of each at a time."""
        portions = {name: target.at_a_time for name, target in self._targets.items()}
        for name in self._job.compared:
            if self._has_numbers(name):
                is_whole = name in self._job.saved or name in self._weights.quantized or self._tuned.is_quantized(name)
                portions[name] = None if is_whole else _rows_compared(self._entries[name])
        return portions

    def _has_numbers(self, name: str) -> bool:
        """Whether the change of a tensor that is compared can be computed: both are floating-point numbers with common rows."""
        entry = self._entries[name]
        if not self._tuned.has(name) or not (entry.dtype in FACTORIZABLE_DTYPES or name in self._weights.quantized):
            return False
        there = self._tuned.entry(name)
        if there is None:
            return True
        is_number = there.dtype in FACTORIZABLE_DTYPES or self._tuned.is_quantized(name)
        return is_number and len(there.shape) == len(entry.shape) and there.shape[1:] == entry.shape[1:]

    def _compute(
        self, pieces: Sequence[TargetPiece], device: torch.device
    ) -> tuple[list[ApproximatedMatrix], dict[str, list[_Compared]]]:
        changed: list[ChangedMatrix] = []
        compared: dict[str, list[_Compared]] = {}
        for piece in pieces:
            name = piece.entry.name
            if name in self._targets:
                changed += self._changed(piece, self._targets[name])
            else:
                compared.setdefault(name, []).append(self._compare(piece))
        return extract_matrices(changed, self._job.extracting, device), compared

    def _changed(self, piece: TargetPiece, target: Target) -> list[ChangedMatrix]:
        before = self._weights.exact_piece(piece)
        with timed("read"):
            after = self._tuned.weight(piece)
        quantized = self._weights.quantized.get(target.tensor)
        parts = None if quantized is None else self._weights.parts(target.tensor)
        found = []
        for i, (old, new) in enumerate(zip(target.view.matrices(before), target.view.matrices(after), strict=True)):
            index = piece.first + i
            stored = None
            if quantized is not None and parts is not None:
                stored = StoredAs(quantized.codec, quantized.parts_of_matrix(parts, index))
            found.append(ChangedMatrix(target, index, old, new, stored))
        return found

    def _compare(self, piece: TargetPiece) -> _Compared:
        """Compare the rows of a piece with those that the tuned model has of them, which may be fewer."""
        name, there = piece.entry.name, self._tuned.entry(piece.entry.name)
        rows = len(piece.tensor) if piece.tensor.ndim else 1
        common = rows if there is None or not there.shape else min(rows, there.shape[0] - piece.first)
        if common <= 0 or not piece.tensor.numel():
            return _Compared(_square_norm(piece.tensor), 0.0, None)
        before = self._weights.exact_piece(piece)
        given = piece if common == rows else replace(piece, tensor=piece.tensor[:common])
        # Buffers such as masks may hold infinity, or numbers that are beyond a smaller dtype.
        after = self._tuned.weight(given, check=all_finite(before.to(self._tuned.dtype_of_numbers(name))))
        saved = after if name in self._job.saved else None
        old = before if common == rows else before[:common]
        if old.dtype == after.dtype and torch.equal(bits_of(old), bits_of(after)):
            return _Compared(_square_norm(before), 0.0, saved)
        if before.isnan().any():
            raise WeightError(f"{self._job.shard.file}: {name!r} holds NaN", hint="take a sound copy of the model")
        wide = torch.promote_types(torch.promote_types(old.dtype, after.dtype), torch.float32)
        old, after = old.to(wide), after.to(wide)
        # The difference of two infinities would be no number.
        change = 0.0 if torch.equal(old, after) else _square_norm(after - old)
        return _Compared(_square_norm(before), change, saved)

    def _finish(
        self,
        approximated: Sequence[ApproximatedMatrix],
        compared: Mapping[str, Sequence[_Compared]],
        writer: TensorFileWriter | None,
    ) -> None:
        for one in sorted(approximated, key=lambda one: one.index):
            target, done = one.target, self._done[one.target.tensor]
            done.append(one)
            if len(done) == target.matrices[0]:
                rank = max(len(matrix.factors.s) for matrix in done)
                self._extracted[target.tensor] = ExtractedTensor(target.tensor, rank, [matrix.found for matrix in done])
                if writer is not None and rank:
                    for which, tensor in _stacked(done, target, rank).items():
                        writer.add(factor_key(target.tensor, which), tensor)
                done.clear()  # its numbers are on the disk
        for name, parts in compared.items():
            for part in parts:
                sums = self._sums.setdefault(name, [0.0, 0.0])
                sums[0] += part.norm
                sums[1] += part.change
                if part.saved is not None and writer is not None:
                    data = torch.frombuffer(bytearray(bytes_of(part.saved.contiguous())), dtype=torch.uint8)
                    writer.add(saved_key(name), torch.nn.functional.pad(data, (0, -len(data) % 4)))

    def _found(self, name: str) -> ComparedTensor:
        """What was found of a tensor that is no target; one without numbers is compared byte by byte now."""
        if not self._tuned.has(name):
            return ComparedTensor(name, "gone", None, None, None)
        entry = self._entries[name]
        there = self._tuned.entry(name)
        shape = list(entry.shape if there is None else there.shape)
        norm, change = (math.sqrt(value) if math.isfinite(value) else None for value in self._sums.get(name, (math.nan,) * 2))
        if shape != list(entry.shape):
            return ComparedTensor(name, "resized", norm, change, shape)
        if change is None and there is not None:
            shard = self._tuned.found.places[there.name][0]
            with self._weights.reader(self._job.shard.file) as here, self._tuned.weights.reader(shard) as other:
                same = same_bytes(here, entry, other, there)
        else:
            same = change == 0
        return ComparedTensor(name, "same" if same else "changed", norm, change, shape)


def _rows_compared(entry: TensorEntry) -> int | None:
    """How many rows of a tensor are compared at a time; None for all of it."""
    if len(entry.shape) < 2 or entry.nbytes <= COMPARED_BYTES:
        return None
    return max(1, COMPARED_BYTES * entry.shape[0] // entry.nbytes)


def _square_norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 if tensor.numel() else 0.0
