"""The verb ``project``: the scales that bring a factorized checkpoint closest to a fine-tuned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surgery.device import as_memory_allows, choose_device, on_its_own_terms
from surgery.engine.walk import ShardWalk, TargetPiece, with_progress
from surgery.errors import FormatError
from surgery.files.access import read_errors
from surgery.files.file_records import file_sha256
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.format.scales import write_scales
from surgery.format.tensor_view import by_tensor
from surgery.lossless.blocks import BLOCK_ENTRIES, DEVICE_BLOCKS
from surgery.lossless.factors import Factors
from surgery.names import SCALES_FILE
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.run.disk_room import check_room, download_needs
from surgery.run.output_paths import check_not_the_source, check_output_path
from surgery.source.open import open_part
from surgery.weights.checkpoint import FactorizedWeights, weights_of
from surgery.weights.matrix import StoredMatrix
from surgery.weights.protocol import check_entry
from surgery.weights.tuned import Norms, Original, TunedModel, note_what_is_unlikely


@dataclass(frozen=True, slots=True)
class Projection:
    """How far a fine-tuned weight W_t is from the original W, and how much of that scales can express.

    Attributes:
        key: of the target, or of all.
        change: ``||W_t - W|| / ||W||``, Frobenius norms; None where W is zero and W_t is not.
        explained: the share of ``||W_t - W||^2`` that the scales take away; None where nothing has changed.
        largest: the largest ``|g - 1|``.
    """

    key: str
    change: float | None
    explained: float | None
    largest: float


@dataclass(frozen=True, slots=True)
class ProjectReport(Report):
    """What a projection found.

    Attributes:
        out: the scales file.
        fingerprint: of the factors that they belong to.
        trainable: how many scales.
        targets: each of them, in the order of the manifest.
        total: all of them together, as if they were one long vector.
    """

    out: Path
    fingerprint: str
    trainable: int
    targets: tuple[Projection, ...]
    total: Projection


@on_its_own_terms
def project(
    factorized: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ProjectReport:
    """Write the scales that bring a factorized checkpoint closest to a fully fine-tuned model.

    ``g_i = 1 + u_i^T (W_t - W) v_i / s_i``. As ``u_i v_i^T`` are orthonormal matrices, this is the one minimiser of
    ``||W + U diag(s (g - 1)) V^T - W_t||``, the Frobenius norm; where s_i is 0, or so small that g_i is beyond float32,
    g_i has no use and stays 1. W is the original weight, for FP8 in float32; for a residual without a correction it is
    what a fold with untouched scales gives. Computed in float64 from the difference of the weights.

    Streams both models: the memory needed is that of the largest target, for a stack of some of its matrices, in both.

    Args:
        factorized: a folder written by ``factorize``.
        tuned: the fine-tuned model, folder or hub id. Its tensors have the names and shapes of the original ones, or others
            that are known for them: with the names of wrapping modules, or one prefix or suffix, or stored in another way
            that transformers loads as the same, such as stacked experts; in bfloat16, float16, float32, or FP8 with scales;
            in shards of any kind.
        out: the scales file to write.
        base: for an overlay, the model it was made from (folder or hub id), if the one that the manifest names is
            not to be used.
        device: where the arithmetic runs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: replace ``out`` if it is there.
        progress: told how far it is, and what the user should know, such as where ``tuned`` does
            not look like a fine-tuned model (``surgery.weights.tuned``); without it that is a ``SurgeryWarning``.

    Returns:
        How much each target has changed, and how much of that its scales explain.

    Raises:
        SourceError: a model is not there, or lacks a target; a target has another shape there.
        WeightError: a fine-tuned weight holds NaN or infinity.
        ReadError: a file cannot be read.
        FormatError: a file is damaged, or is not the one that the manifest describes.
        OutputError: ``out`` is there already, is an input, or cannot be written.
        OptionError: a base that is not needed; no such device.
    """
    progress = listening()
    where = choose_device(str(device))
    where = torch.device("cpu") if where.type == "mps" else where  # which has no float64
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    weights = weights_of(factorized, manifest, base)
    source = open_part(tuned, manifest.source.subfolder)
    inputs = [factorized, *weights.files.folders(), *source.folders()]
    check_output_path(out, inputs, overwrite=overwrite, but=factorized / SCALES_FILE)
    check_room(*download_needs(source, weights.files))
    check_not_the_source(out, manifest)
    wanted = {target.tensor: target.tensors[1:] for target in manifest.targets}
    with ExitStack() as stack:
        with phase(progress, "reading headers"):
            shapes = {
                entry.name: entry.shape for shard in manifest.shards for entry in weights.header(shard.source.file).tensors
            }
            shapes |= {tensor: tuple(target.shape) for target in manifest.targets for tensor in target.tensors}
            model = stack.enter_context(TunedModel(source, Original(wanted, shapes, lambda: factorized)))
        projector = _Projector(stack.enter_context(FactorizedWeights(factorized, manifest, weights)), model, where)
        projector.run(progress)
        found = projector.found
    for read in (source, weights):
        read.watch.check()
    write_scales(out, {key: one.scales for key, one in found.items()}, manifest.fingerprint)
    note_what_is_unlikely(source.name, [one.sums.norms(key) for key, one in found.items()])
    total = _Sums()
    for one in found.values():
        total.add(one.sums)
    return ProjectReport(
        out,
        manifest.fingerprint,
        sum(target.trainable for target in manifest.targets),
        tuple(found[target.key].sums.projection(target.key) for target in manifest.targets),
        total.projection("all"),
    )


@dataclass(slots=True)
class _Sums:
    """Sums over matrices of squared Frobenius norms: of W, of W_t, of W_t - W, and of the part of it that scales explain."""

    weight: float = 0.0
    tuned: float = 0.0
    change: float = 0.0
    explained: float = 0.0
    largest: float = 0.0

    def add(self, other: _Sums) -> None:
        self.weight += other.weight
        self.tuned += other.tuned
        self.change += other.change
        self.explained += other.explained
        self.largest = max(self.largest, other.largest)

    def norms(self, key: str) -> Norms:
        return Norms(key, math.sqrt(self.weight), math.sqrt(self.tuned), math.sqrt(self.change))

    def projection(self, key: str) -> Projection:
        change = math.sqrt(self.change / self.weight) if self.weight else None if self.change else 0.0
        # Rounding may take a change that is explained in full beyond 1.
        return Projection(key, change, min(1.0, self.explained / self.change) if self.change else None, self.largest)


@dataclass(slots=True)
class _Found:
    """The result of a target: its scales, float32 (k,), or (B, k) for a stack, and its norms."""

    scales: torch.Tensor
    sums: _Sums = field(default_factory=_Sums)


class _Projector:
    """Compares the two models shard by shard, in one thread.

    Args:
        checkpoint: the factorized checkpoint.
        tuned: the fine-tuned model.
        device: where the arithmetic runs; it must have float64.
    """

    def __init__(self, checkpoint: FactorizedWeights, tuned: TunedModel, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._tuned = tuned
        self._device = device
        checkpoint.weights.check_quantized()
        targets = checkpoint.manifest.targets
        self.found = {target.key: _Found(torch.ones(target.scales_shape, dtype=torch.float32)) for target in targets}

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
            rows = found.scales.view(-1, target.rank)
            for i, (stored, new) in enumerate(zip(view.matrices(weight), view.matrices(tuned), strict=True), piece.first):
                rows[i] = self._matrix(self._checkpoint.matrix(target, i, stored), new, found.sums)

    def _matrix(self, matrix: StoredMatrix, tuned: torch.Tensor, sums: _Sums) -> torch.Tensor:
        """The scales of one matrix, float32 (k,); its norms are added to ``sums``."""
        factors = matrix.factors
        assert factors is not None

        def compute(some: Sequence[torch.Tensor], where: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
            components, norms = _components(matrix.original(where), some[0].to(where), factors.to(where))
            return [(components.cpu(), norms.cpu())]

        components, norms = as_memory_allows(compute, [tuned], self._device)[0]
        scales = (1 + components / factors.s.double()).float()
        scales = torch.where((factors.s > 0) & torch.isfinite(scales), scales, 1)
        explained = components[scales != 1].square().sum().item()
        largest = (scales.double() - 1).abs().max().item()
        before, after, change = norms.tolist()
        sums.add(_Sums(before, after, change, explained, largest))
        return scales


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
