"""The projection of a changed model onto the directions of a factorized checkpoint, weight file by weight file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surgery.device import as_memory_allows
from surgery.engine.walk import ShardWalk, TargetPiece, with_progress
from surgery.errors import FormatError
from surgery.files.access import read_errors
from surgery.files.file_records import file_sha256
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.format.tensor_view import by_tensor
from surgery.lossless.blocks import BLOCK_ENTRIES, DEVICE_BLOCKS
from surgery.lossless.factors import Factors
from surgery.progress import Progress, phase
from surgery.source.protocol import Source
from surgery.tuned.likeness import Norms
from surgery.tuned.model import TunedModel
from surgery.tuned.search import Original, find_tuned
from surgery.weights.checkpoint import FactorizedWeights
from surgery.weights.matrix import StoredMatrix
from surgery.weights.protocol import Weights, check_entry


@dataclass(slots=True)
class Sums:
    """Sums over matrices of squared Frobenius norms: of W, of W_t, of W_t - W, and of the part of it that scales explain."""

    weight: float = 0.0
    tuned: float = 0.0
    change: float = 0.0
    explained: float = 0.0
    largest: float = 0.0

    def add(self, other: Sums) -> None:
        self.weight += other.weight
        self.tuned += other.tuned
        self.change += other.change
        self.explained += other.explained
        self.largest = max(self.largest, other.largest)

    def norms(self, key: str) -> Norms:
        return Norms(key, math.sqrt(self.weight), math.sqrt(self.tuned), math.sqrt(self.change))


@dataclass(slots=True)
class Found:
    """The result of a target.

    Attributes:
        scales: that bring it closest to the changed weight, float32 (k,), or (B, k) for a stack.
        components: ``u_i^T (W_t - W) v_i``, float64, in the same shape.
        s: the kept singular values, float32, in the same shape.
        sums: its norms.
    """

    scales: torch.Tensor
    components: torch.Tensor
    s: torch.Tensor
    sums: Sums = field(default_factory=Sums)


class Projector:
    """Compares a factorized checkpoint with a changed model, shard by shard, in one thread.

    Args:
        checkpoint: the factorized checkpoint.
        tuned: the changed model.
        device: where the arithmetic runs; it must have float64.
    """

    def __init__(self, checkpoint: FactorizedWeights, tuned: TunedModel, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._tuned = tuned
        self._device = device
        checkpoint.weights.check_quantized()
        targets = checkpoint.manifest.targets
        self.found = {
            target.key: Found(
                torch.ones(target.scales_shape, dtype=torch.float32),
                torch.zeros(target.scales_shape, dtype=torch.float64),
                torch.zeros(target.scales_shape, dtype=torch.float32),
            )
            for target in targets
        }

    def run(self, progress: Progress) -> None:
        """Compare all targets, and put their results into ``found``. Shards with neither targets nor scales are not read."""
        manifest, weights = self._checkpoint.manifest, self._checkpoint.weights
        owners = {target.shard for target in manifest.targets}
        scales = {weights.quantized[target.tensor].shard for target in manifest.targets if target.tensor in weights.quantized}
        for shard in sorted(scales - owners):  # the others are hashed while they are read
            path = weights.path(shard)
            with read_errors(path):
                weights.check(shard, file_sha256(path))
        shards = [shard for shard in manifest.shards if shard.source.file in owners]
        with phase(progress, "projecting", sum(shard.source.size for shard in shards)):
            for record in shards:
                self._shard(record.source.file, progress)

    def _shard(self, shard: str, progress: Progress) -> None:
        weights, path = self._checkpoint.weights, self._checkpoint.weights.path(shard)
        targets = by_tensor(self._checkpoint.manifest.targets_of(shard))
        with (
            ShardReader(path, name=path.name, watch=weights.watch) as stored,
            ShardWalk(stored, {name: some[0].at_a_time for name, some in targets.items()}) as walk,
        ):
            if lost := sorted(targets.keys() - {entry.name for entry in stored.header.tensors}):
                raise FormatError(f"{path}: a target of the manifest is not there", got="nothing", expected=lost[0])
            for piece in with_progress(walk, progress):
                if isinstance(piece, TargetPiece):
                    self._piece(piece, targets[piece.entry.name])
        weights.check(shard, walk.sha256)

    def _piece(self, piece: TargetPiece, targets: Sequence[TargetRecord]) -> None:
        for target in targets:
            check_entry(piece.entry, target)
        tuned = self._tuned.weight(piece)
        weight = self._checkpoint.weights.exact_piece(piece)
        for target in targets:
            view, found = target.seen_as, self.found[target.key]
            rows, components, s = (part.view(-1, target.rank) for part in (found.scales, found.components, found.s))
            for i, (stored, new) in enumerate(zip(view.matrices(weight), view.matrices(tuned), strict=True), piece.first):
                matrix = self._checkpoint.matrix(target, i, stored)
                assert matrix.factors is not None
                s[i] = matrix.factors.s
                rows[i], components[i] = self._matrix(matrix, matrix.factors, new, found.sums)

    def _matrix(
        self, matrix: StoredMatrix, factors: Factors, tuned: torch.Tensor, sums: Sums
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, float32 (k,), and components, float64 (k,), of one matrix; its norms are added to ``sums``."""

        def compute(some: Sequence[torch.Tensor], where: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
            components, norms = _components(matrix.original(where), some[0].to(where), factors.to(where))
            return [(components.cpu(), norms.cpu())]

        components, norms = as_memory_allows(compute, [tuned], self._device)[0]
        scales = (1 + components / factors.s.double()).float()
        scales = torch.where((factors.s > 0) & torch.isfinite(scales), scales, 1)
        explained = components[scales != 1].square().sum().item()
        largest = (scales.double() - 1).abs().max().item()
        before, after, change = norms.tolist()
        sums.add(Sums(before, after, change, explained, largest))
        return scales, components


def _components(weight: torch.Tensor, tuned: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """The components of a change D = tuned - weight along each ``u_i v_i^T``, and the sizes of weights and change.

    Args:
        weight, tuned: (m, n), any float dtypes.
        factors: of the weight, on the same device, one with float64.

    Returns:
        ``u_i^T D v_i``, float64 (k,), and ``||weight||^2``, ``||tuned||^2`` and ``||D||^2``, float64 (3,).
    """
    (m, n), left, right = weight.shape, factors.U.double(), factors.V.double()
    step = min(m, max(1, BLOCK_ENTRIES // n) * (1 if weight.device.type == "cpu" else DEVICE_BLOCKS))
    components, norms = right.new_zeros(right.shape[1]), right.new_zeros(3)
    # The memory is used for every block: allocating it anew would take many times as long as the arithmetic.
    wide, difference, product = (right.new_empty(step, columns) for columns in (n, n, right.shape[1]))
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        count = rows.stop - first
        before = wide[:count].copy_(weight[rows])
        after = difference[:count].copy_(tuned[rows])
        size = torch.linalg.vector_norm(after)
        change = after.sub_(before)
        components += torch.mm(change, right, out=product[:count]).mul_(left[rows]).sum(dim=0)
        norms += torch.stack([torch.linalg.vector_norm(before), size, torch.linalg.vector_norm(change)]).square()
    return components, norms


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
