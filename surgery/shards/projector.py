"""The projection of a changed model onto the directions of a factorized checkpoint, weight file by weight file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.sharing import CPU_WINDOW_BYTES, share_out
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import FormatError
from surgery.files.access import read_errors
from surgery.files.file_records import file_sha256
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.scales.writing import distance
from surgery.format.tensor_view import by_tensor
from surgery.lossless.blocks import BLOCK_ENTRIES, DEVICE_BLOCKS
from surgery.lossless.factors import Factors
from surgery.names import Train
from surgery.planning.memory import known_bytes, need_to_project
from surgery.progress import listening, phase
from surgery.run.engines import LocalEngine
from surgery.source.protocol import Source
from surgery.tuned.likeness import Norms
from surgery.tuned.model import TunedModel
from surgery.tuned.search import Original, find_tuned
from surgery.weights.checkpoint import FactorizedWeights
from surgery.weights.matrix import StoredMatrix
from surgery.weights.protocol import Weights, check_entry


@dataclass(frozen=True, slots=True)
class Components:
    """What of the change ``D = W_t - W`` of one matrix lies along its kept directions. All on the CPU, float64.

    Attributes:
        values: ``u_i^T D v_i`` (k,) for scales; ``U^T D V`` (k, k) for cores.
        units: what ``g - 1`` is multiplied by to be such components: s (k,); for ``C - I`` ``sqrt(s s^T)`` (k, k).
        norms: ``||W||^2``, ``||W_t||^2`` and ``||D||^2``, Frobenius norms, (3,).
    """

    values: torch.Tensor
    units: torch.Tensor
    norms: torch.Tensor


@dataclass(slots=True)
class Sums:
    """Sums over matrices of squared Frobenius norms, and the largest distance of what is trained from what it is untouched.

    The norms are of W, of W_t, of W_t - W, and of the parts of it that are explained: by what is trained, and by scales.
    """

    weight: float = 0.0
    tuned: float = 0.0
    change: float = 0.0
    explained: float = 0.0
    explained_by_scales: float = 0.0
    largest: float = 0.0

    def add(self, other: Sums) -> None:
        self.weight += other.weight
        self.tuned += other.tuned
        self.change += other.change
        self.explained += other.explained
        self.explained_by_scales += other.explained_by_scales
        self.largest = max(self.largest, other.largest)

    def norms(self, key: str) -> Norms:
        return Norms(key, math.sqrt(self.weight), math.sqrt(self.tuned), math.sqrt(self.change))


class Closest:
    """The scales or cores of targets that bring them closest to a changed model.

    Args:
        targets: of the checkpoint.
        train: which of the two.

    Attributes:
        values: key of a target -> float32 (k,), or (B, k) for a stack; cores are (k, k), or (B, k, k).
        sums: key of a target -> its norms.
    """

    def __init__(self, targets: Iterable[TargetRecord], train: Train) -> None:
        self._train = train
        self.values: dict[str, torch.Tensor] = {}
        self.sums: dict[str, Sums] = {}
        for target in targets:
            self.values[target.key] = torch.empty(target.shape_of(train), dtype=torch.float32)
            self.sums[target.key] = Sums()

    def add(self, target: TargetRecord, index: int, found: Components) -> None:
        """Choose the scales, or the core, of matrix ``index`` of a target."""
        untouched = torch.ones(target.rank) if self._train == "scales" else torch.eye(target.rank)
        # Where a singular value is 0, or so small that the quotient is beyond float32, it has no use.
        values = (untouched + found.values / found.units).float()
        values = torch.where((found.units > 0) & torch.isfinite(values), values, untouched)
        self.values[target.key].view(-1, *values.shape)[index] = values
        moved = distance(values.double(), self._train)
        parts = torch.where(moved != 0, found.values, 0).square()
        by_scales = parts if self._train == "scales" else parts.diagonal()
        weight, tuned, change = found.norms.tolist()
        self.sums[target.key].add(
            Sums(weight, tuned, change, parts.sum().item(), by_scales.sum().item(), moved.abs().max().item())
        )


_Found = tuple[TargetRecord, int, Components]


class Projector:
    """Compares a factorized checkpoint with a changed model: ``LocalJobs``, one for each weight file with targets.

    Args:
        checkpoint: the factorized checkpoint.
        tuned: the changed model.
        train: what the components are for.
    """

    def __init__(self, checkpoint: FactorizedWeights, tuned: TunedModel, train: Train) -> None:
        self._checkpoint = checkpoint
        self._tuned = tuned
        self._train = train
        self._progress = listening()
        owners = {target.shard for target in checkpoint.manifest.targets}
        self._shards = [shard for shard in checkpoint.manifest.shards if shard.source.file in owners]
        checkpoint.weights.check_quantized()

    def run(self, engine: LocalEngine, take: Callable[[TargetRecord, int, Components], None]) -> None:
        """Compare all targets. Shards with neither targets nor parts of them are not read.

        Args:
            engine: does the jobs, on devices that have float64.
            take: given a target, the index of one of its matrices and what was found of it, for each matrix once, in the order
                of the files.
        """
        manifest, weights = self._checkpoint.manifest, self._checkpoint.weights
        quantized = [weights.quantized[target.tensor] for target in manifest.targets if target.tensor in weights.quantized]
        parts = set[str]().union(*(one.shards for one in quantized))
        for shard in sorted(parts - {one.source.file for one in self._shards}):  # the others are hashed while they are read
            path = weights.path(shard)
            with read_errors(path):
                weights.check(shard, file_sha256(path))
        kept = known_bytes(manifest.targets, len(manifest.targets))
        memory = share_out([need_to_project(target) for target in manifest.targets], engine.resources, kept=kept)
        done: dict[int, list[_Found]] = {}
        with (
            phase(self._progress, "projecting", sum(shard.source.size for shard in self._shards)),
            closing(engine.run(self, range(len(self._shards)), memory)) as finished,
        ):
            waiting = iter(range(len(self._shards)))
            following = next(waiting, None)
            for index, result in finished:
                done[index] = result
                while following in done:
                    for found in done.pop(following):
                        take(*found)
                    following = next(waiting, None)

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """See ``LocalJobs``."""
        for index in which:
            self._checkpoint.weights.path(self._shards[index].source.file)
            yield index

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> list[_Found]:
        """See ``LocalJobs``."""
        shard, weights = self._shards[index].source.file, self._checkpoint.weights
        path, results = weights.path(shard), list[_Found]()
        targets = by_tensor(self._checkpoint.manifest.targets_of(shard))

        def compute(window: Sequence[Piece]) -> list[_Found]:
            pieces = (piece for piece in window if isinstance(piece, TargetPiece))
            return [found for piece in pieces for found in self._piece(piece, targets[piece.entry.name], lane.device)]

        def finish(window: Sequence[Piece], found: list[_Found]) -> None:
            results.extend(found)
            for piece in window:
                if isinstance(piece, TargetPiece):
                    self._progress.item(piece.entry.name)
                self._progress.advance(len(piece))

        with (
            weights.opened(shard, path, path.name) as stored,
            ShardWalk(stored, {name: some[0].at_a_time for name, some in targets.items()}, lane.buffers, lane.timing) as walk,
        ):
            if lost := sorted(targets.keys() - {entry.name for entry in stored.header.tensors}):
                raise FormatError(f"{path}: a target of the manifest is not there", got="nothing", expected=lost[0])
            lane.flow(walk, CPU_WINDOW_BYTES, compute, finish, on_read)
        weights.check(shard, walk.sha256)
        return results

    def close(self) -> None:
        """Nothing to stop: files are fetched one by one, in ``acquired``."""

    def _piece(self, piece: TargetPiece, targets: Sequence[TargetRecord], device: torch.device) -> Iterator[_Found]:
        for target in targets:
            check_entry(piece.entry, target)
        tuned = self._tuned.weight(piece)
        weight = self._checkpoint.weights.exact_piece(piece)
        for target in targets:
            view = target.seen_as
            for i, (stored, new) in enumerate(zip(view.matrices(weight), view.matrices(tuned), strict=True), piece.first):
                matrix = self._checkpoint.matrix(target, i, stored)
                yield target, i, _compared(matrix, new, self._train, device)


def _compared(matrix: StoredMatrix, tuned: torch.Tensor, train: Train, device: torch.device) -> Components:
    factors = matrix.factors
    assert factors is not None

    def compute(some: Sequence[torch.Tensor], where: torch.device) -> list[Components]:
        return [_components(matrix.original(where), some[0].to(where), factors.to(where), train)]

    return as_memory_allows(compute, [tuned], device)[0]


def _components(weight: torch.Tensor, tuned: torch.Tensor, factors: Factors, train: Train) -> Components:
    """The components of a change D = tuned - weight, and the sizes of weights and change.

    Args:
        weight, tuned: (m, n), any float dtypes.
        factors: of the weight, on the same device, one with float64.
        train: what the components are for: scales have those along each ``u_i v_i^T``, cores along each ``u_i v_j^T``.
    """
    (m, n), left, right = weight.shape, factors.U.double(), factors.V.double()
    k = right.shape[1]
    step = min(m, max(1, BLOCK_ENTRIES // n) * (1 if weight.device.type == "cpu" else DEVICE_BLOCKS))
    components, norms = right.new_zeros((k,) if train == "scales" else (k, k)), right.new_zeros(3)
    # The memory is used for every block: allocating it again would take many times as long as the arithmetic.
    wide, difference, product = (right.new_empty(step, columns) for columns in (n, n, k))
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        count = rows.stop - first
        before = wide[:count].copy_(weight[rows])
        after = difference[:count].copy_(tuned[rows])
        size = torch.linalg.vector_norm(after)
        change = after.sub_(before)
        images = torch.mm(change, right, out=product[:count])
        if train == "scales":
            components += images.mul_(left[rows]).sum(dim=0)
        else:
            components.addmm_(left[rows].T, images)
        norms += torch.stack([torch.linalg.vector_norm(before), size, torch.linalg.vector_norm(change)]).square()
    s = factors.s.double().cpu()
    # The root of the product: on the diagonal it is s itself, so that the diagonal of a core is what scales would be.
    units = s if train == "scales" else torch.outer(s, s).sqrt_()
    return Components(components.cpu(), units, norms.cpu())


def tuned_model(source: Source, folder: Path, manifest: Manifest, weights: Weights) -> TunedModel:
    """Open a changed model, to be compared with a factorized checkpoint.

    Args:
        source: the changed model.
        folder, manifest, weights: of the checkpoint.

    Raises:
        SourceError: it lacks a target; a target has another shape there.
    """
    wanted = {target.tensor: target.tensors[1:] for target in manifest.targets}
    shapes = {entry.name: entry.shape for shard in manifest.shards for entry in weights.header(shard.source.file).tensors}
    shapes |= {tensor: tuple(target.shape) for target in manifest.targets for tensor in target.tensors}
    return find_tuned(source, Original(wanted, shapes, lambda: folder))
