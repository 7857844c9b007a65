"""The job of one shard of a factorization: factorize its targets, and write its residual file and its factors file."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece, looked_at
from surgery.errors import OutputError, SourceError
from surgery.files.file_records import FileRecord
from surgery.files.file_writer import FileWriter
from surgery.format.factors import FactorsHash
from surgery.format.manifest import ShardResult
from surgery.format.manifest_records import CertificateRecord, ShardRecord, TargetRecord
from surgery.format.options import Options
from surgery.format.safetensors import ShardReader, TensorFileWriter
from surgery.format.sample import SampleHash, sampled, sampled_dtype
from surgery.format.tensor_view import by_tensor
from surgery.format.top_k_records import TopKRecord
from surgery.format.views import View
from surgery.linalg.top_k import TopK
from surgery.names import PARTIALS_DIR, RUN_FILE, correction_key, factor_key, factors_file
from surgery.planning.plan import Layout, ShardPlan
from surgery.planning.targets import Target
from surgery.progress import Progress, Silent
from surgery.quantized.recognize import Quantization
from surgery.reports import rounded_to
from surgery.shards.matrices import Matrix, Result, factorize_matrices, truncate
from surgery.source.origin import Origin
from surgery.source.protocol import WeightFiles
from surgery.weights.model import ModelWeights
from surgery.weights.sent import SentFiles


@dataclass(frozen=True, slots=True)
class Job:
    """All that the factorization of one shard depends on. Done twice, a job writes the same bytes.

    Attributes:
        shard: the source's weight file and its targets.
        index, count: the index of the shard, from 0, and how many there are.
        files: gives this weight file, and those that hold parts of its quantized targets.
        out: the folder that is written to.
        partials: folder for unfinished files; None: they are beside the finished ones.
        window_bytes: how much of the shard is worked on together, so that small matrices of one shape are solved in a batch.
        layout: of the result.
        options: what was asked for.
    """

    shard: ShardPlan
    index: int
    count: int
    files: WeightFiles
    out: Path
    partials: Path | None
    window_bytes: int
    layout: Layout
    options: Options

    def partial(self, file: str) -> Path | None:
        """The path of a file until it is finished; None: beside its place."""
        return None if self.partials is None else self.partials / file.replace("/", "--")


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """The factorization of one shard as an object that is sent to another process, perhaps on another machine.

    Attributes:
        shard, index, count, window_bytes, layout, options: as for ``Job``.
        origin: where the process takes the weight files from.
        out: the output folder of the run.
        place: the folder that is written to: ``out``, or one inside of it.
    """

    shard: ShardPlan
    index: int
    count: int
    origin: Origin
    out: Path
    place: Path
    window_bytes: int
    layout: Layout
    options: Options

    def __call__(self, lane: Lane, attempt: str) -> ShardResult:
        """Do the job. ``attempt`` names the folder for unfinished files, so that two attempts at one time do not clash."""
        check_shared(self.out)
        partials = self.out / PARTIALS_DIR / attempt
        with SentFiles(self.origin) as files:
            job = Job(
                self.shard, self.index, self.count, files, self.place, partials, self.window_bytes, self.layout, self.options
            )
            return run_job(job, lane, Silent(), lambda: None)


def files_of_parts(shard: ShardPlan) -> list[str]:
    """The weight files that hold parts of its quantized targets."""
    return sorted(set[str]().union(*(target.quantized.shards for target in shard.targets if target.quantized)))


def check_shared(out: Path) -> None:
    """Refuse to work on a machine where the output folder is not the one that the run was begun in.

    Raises:
        OutputError: names the machine.
    """
    if not (out / RUN_FILE).is_file():
        raise OutputError(
            f"{out} on {socket.gethostname()} is not the output folder of this run",
            hint="-o must be a folder that every machine sees under the same path",
        )


def run_job(job: Job, lane: Lane, progress: Progress, on_read: Callable[[], object]) -> ShardResult:
    """Factorize the targets of one shard and write its files.

    Args:
        job: what to do.
        lane: the device, threads and memory to do it with.
        progress: told of each tensor that is done; called from threads.
        on_read: called when the shard has been read.

    Returns:
        Records of the files and of the targets, for the manifest.

    Raises:
        SourceError: the weight file has changed since the plan, or is not the one that the hub has.
        WeightError: a matrix holds NaN or infinity, or has a residual beyond the range of its dtype.
        ReadError, FormatError, OutputError: a file cannot be read, changes meanwhile, or cannot be written.
    """
    factors_name = factors_file(job.index, job.count)
    quantized = {target.tensor: target.quantized for target in job.shard.targets if target.quantized is not None}
    with ExitStack() as stack:
        weights = stack.enter_context(ModelWeights(job.files, lambda: Quantization(quantized)))
        reader = stack.enter_context(weights.opened(job.shard.file))
        _check_unchanged(reader, job.shard)
        ranked = (_with_rank(target, reader, weights, job.options, lane) for target in job.shard.targets)
        # By tensor; several where its slices are targets.
        collected = {name: [_Collected(target) for target in targets] for name, targets in by_tensor(ranked).items()}
        residuals = (
            stack.enter_context(FileWriter(job.out / job.shard.file, job.partial(job.shard.file)))
            if job.layout == "residual"
            else None
        )
        keys = [key for parts in collected.values() for part in parts for key in _keys(part.target, job)]
        factors = (
            stack.enter_context(TensorFileWriter(job.out / factors_name, keys, job.partial(factors_name))) if keys else None
        )
        portions = {name: parts[0].target.at_a_time for name, parts in collected.items()}
        walk = stack.enter_context(ShardWalk(reader, portions, lane.buffers, lane.timing))
        if residuals:
            residuals.write(reader.header.raw)

        def factorize(window: Sequence[Piece]) -> _WindowResults:
            return _factorize(window, collected, weights, job, lane)

        def finish(window: Sequence[Piece], done: _WindowResults) -> None:
            for piece in window:
                if isinstance(piece, TargetPiece):
                    for part in collected[piece.entry.name]:
                        _collect(part, piece, done, job, factors)
                if residuals:
                    for data in lane.buffers.parts(piece.buffer):
                        residuals.write(data)
                if isinstance(piece, TargetPiece):
                    progress.item(piece.entry.name)
                progress.advance(len(piece))

        def sample(piece: TargetPiece) -> None:
            for part in collected[piece.entry.name]:
                _add_sample(part.sample, part.target, piece.tensor)

        lane.flow(looked_at(walk, sample), job.window_bytes, factorize, finish, on_read)
        weights.check(job.shard.file, walk.sha256)
        source = FileRecord(job.shard.file, reader.header.file_bytes, walk.sha256)
        residual_record = residuals.commit(job.shard.file) if residuals else None
        factors_record = factors.commit(factors_name) if factors else None
    records = [part.record(job) for parts in collected.values() for part in parts]
    return ShardResult(ShardRecord(source, residual_record, factors_record), records)


def _check_unchanged(reader: ShardReader, shard: ShardPlan) -> None:
    if not reader.header.is_like(shard.header):
        raise SourceError(
            f"{shard.file} has changed since the run was planned", hint="start again when nothing writes to the model"
        )


def _add_sample(hashed: SampleHash, target: Target, stored: torch.Tensor) -> None:
    """Add the sample of a target's matrices in a piece, wherever that is; a GPU may be too full to cut out slices."""
    hashed.update(as_memory_allows(lambda some, where: [sampled(target, some[0].to(where))], [stored], stored.device)[0])


def _with_rank(target: Target, reader: ShardReader, weights: ModelWeights, options: Options, lane: Lane) -> Target:
    """A target with the rank it will have: for a stack with an energy, the largest that any of its matrices needs.

    The matrices of a stack share one rank, so that their scales are one tensor, and it must be known before the first of them
    is written. So such a stack is read and solved twice, and the second time proven. Any other target is returned unchanged.
    """
    if target.energy is None or target.view.kind != "stack":
        return target
    entry, options = reader.entries[target.tensor], dataclasses.replace(options, prove=False)

    def rank_of(index: int) -> int:
        weight = weights.exact(target.tensor, reader.read(entry, index, 1), index)
        matrix = target.view.matrices(weight)[0].to(lane.device)
        return len(truncate(target, matrix, options).s)

    ranks = [lane.submit(rank_of, index) for index in range(target.matrices[0])]
    return dataclasses.replace(target, rank=max(rank.result() for rank in ranks), energy=None)


def _keys(target: Target, job: Job) -> list[str]:
    """The names of the tensors that the factors file will hold of a target, in no order."""
    parts = [factor_key(target.key, part) for part in ("U", "s", "V")]
    if job.layout == "residual" and job.options.correction:
        parts += [correction_key(target.key, target.place(i)) for i in range(target.matrices[0])]
    return parts


@dataclass(slots=True)
class _Collected:
    """The results of a target, collected matrix by matrix until its factors can be written and its record made.

    Attributes:
        target: which.
        done: how many of its matrices are done.
        factors: U, s and V of each.
        certificates: of each.
        kept, total: squared Frobenius norms of what the kept directions hold, and of the matrices.
        s_first, s_last: the largest and the smallest kept singular value.
        inexact: the sum of the matrices' shares of entries that residual and factors alone do not give back.
        factors_sha256, sample, residual_sample: hashes of U, s and V, and of samples of weight and residual.
    """

    target: Target
    done: int = 0
    factors: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    certificates: list[CertificateRecord] = field(default_factory=list)
    kept: float = 0.0
    total: float = 0.0
    s_first: float = 0.0
    s_last: float = float("inf")
    inexact: float = 0.0
    factors_sha256: FactorsHash = field(default_factory=FactorsHash)
    sample: SampleHash = field(init=False)
    residual_sample: SampleHash = field(init=False)

    def __post_init__(self) -> None:
        dtype = sampled_dtype(self.target)
        self.sample, self.residual_sample = SampleHash(dtype), SampleHash(dtype)

    def add(self, result: Result) -> None:
        factors, certificate = result.factors, result.certificate
        assert isinstance(certificate.top_k, TopK)  # of one matrix
        self.done += 1
        self.factors.append((factors.U, factors.s, factors.V))
        self.factors_sha256.update(factors)
        self.certificates.append(
            CertificateRecord(
                method=str(certificate.method),
                passes=int(certificate.passes),
                converged=bool(certificate.converged),
                residual=[rounded_to(value, 3) for value in certificate.residual.tolist()],
                gap=[rounded_to(value, 3) for value in certificate.gap.tolist()],
                top_k=TopKRecord.of(certificate.top_k),
            )
        )
        self.kept += factors.s.double().square().sum().item()
        self.total += result.norm**2
        self.s_first, self.s_last = max(self.s_first, factors.s[0].item()), min(self.s_last, factors.s[-1].item())
        self.inexact += result.inexact

    def finished_factors(self) -> dict[str, torch.Tensor]:
        """U (m, k), s (k,) and V (n, k), stacked along a first dimension for a stack; they are dropped here."""
        stack = self.target.view.kind == "stack"
        U, s, V = (torch.stack(part) if stack else part[0] for part in zip(*self.factors, strict=True))
        self.factors.clear()
        return {"U": U, "s": s, "V": V}

    def record(self, job: Job) -> TargetRecord:
        target, residual = self.target, job.layout == "residual"
        return TargetRecord(
            tensor=target.tensor,
            shard=target.shard,
            dtype=target.dtype,
            shape=list(target.shape),
            view=target.view.kind,
            slice=target.view.slice,
            rank=len(self.certificates[0].residual),
            energy=rounded_to(min(self.kept / self.total, 1.0) if self.total else 1.0, 6),
            s_first=self.s_first,
            s_last=self.s_last,
            sample_sha256=self.sample.hexdigest(),
            residual_sample_sha256=self.residual_sample.hexdigest() if residual else None,
            inexact=rounded_to(self.inexact / self.done, 3) if residual else None,
            factors_sha256=self.factors_sha256.hexdigest(),
            certificates=self.certificates,
            aliases=list(target.aliases),
        )


#: The results of a window: key of a target and index of a matrix -> result.
_WindowResults = dict[tuple[str, int], Result]


def _factorize(
    window: Sequence[Piece],
    collected: Mapping[str, list[_Collected]],
    weights: ModelWeights,
    job: Job,
    lane: Lane,
) -> _WindowResults:
    """Factorize all matrices in a window. In the residual layout the residuals take the place of the weights in its pieces."""
    matrices: list[Matrix] = []
    slices: list[tuple[TargetPiece, View, torch.Tensor]] = []
    for piece in window:
        if not isinstance(piece, TargetPiece):
            continue
        weight = weights.exact_piece(piece, lane.device)
        for part in collected[piece.entry.name]:
            seen = part.target.view.matrices(weight)
            matrices += [Matrix(part.target, piece.first + i, matrix) for i, matrix in enumerate(seen)]
            if part.target.view.slice is not None:
                slices.append((piece, part.target.view, seen))
    results = factorize_matrices(matrices, job.layout, job.options, lane, job.window_bytes)
    if job.layout == "residual":
        for piece, view, residuals in slices:  # the matrices of slices are copies, and have to be put back
            view.store(residuals, piece.tensor)
    return {(result.target.key, result.index): result for result in results}


def _collect(part: _Collected, piece: TargetPiece, done: _WindowResults, job: Job, factors: TensorFileWriter | None) -> None:
    """Take the results of the matrices of a target in a piece, and write to the factors file what is complete."""
    target, stack = part.target, part.target.view.kind == "stack"
    if job.layout == "residual":
        _add_sample(part.residual_sample, target, piece.tensor)
    for i in range(len(piece.tensor) if stack else 1):
        result = done.pop((target.key, piece.first + i))
        part.add(result)
        if factors is not None and (correction := result.correction()) is not None:
            factors.add(correction_key(target.key, target.place(result.index)), correction)
    if factors is not None and part.done == target.matrices[0]:
        for name, tensor in part.finished_factors().items():
            factors.add(factor_key(target.key, name), tensor)
