"""The weights of a factorized checkpoint together with its factors, for code that goes through all of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.format.factors import FactorsReaders
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.factors import Factors
from surgery.source.protocol import Source, WeightFiles
from surgery.weights.matrix import StoredMatrix, stored_residual
from surgery.weights.overlay import OverlayWeights, base_of, no_base_needed, quantized_of
from surgery.weights.protocol import Weights
from surgery.weights.quantization import Scaled
from surgery.weights.residual import FolderFiles, ResidualWeights


class FactorizedWeights:
    """The weights of a factorized checkpoint with its factors. A context manager that any number of threads may use.

    Args:
        folder, manifest: of the checkpoint.
        weights: the weight files that the factors belong to: residuals, or those of the base; see ``weights_of``.

    Attributes:
        folder, manifest, weights: as given.
    """

    def __init__(self, folder: Path, manifest: Manifest, weights: Weights) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = weights
        self._factors = FactorsReaders(folder, manifest)
        self._open = ExitStack()
        self._open.push(weights)
        self._open.push(self._factors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    @cached_property
    def targets(self) -> Mapping[str, tuple[TargetRecord, ...]]:
        """Tensor -> its targets: one for the whole tensor, or one for each slice.

        An alias, which holds the same parameter as a target's tensor, has the targets of that tensor.
        """
        found: dict[str, tuple[TargetRecord, ...]] = {}
        for target in self.manifest.targets:
            for tensor in target.tensors:
                found[tensor] = (*found.get(tensor, ()), target)
        return found

    def is_residual(self, tensor: str) -> bool:
        """Whether a tensor with targets is stored as its residual. An alias never is: its original weight is stored."""
        return self.weights.holds_residuals and self.targets[tensor][0].tensor == tensor

    def factors(self, target: TargetRecord, index: int | None = None) -> Factors:
        """Read U, s and V of a target, float32, on the CPU.

        Args:
            target: whose.
            index: which matrix of a stack; None for a target that is no stack.
        """
        with self._factors.of(target) as reader:
            return reader.factors(target, index)

    def matrix(self, target: TargetRecord, index: int, stored: torch.Tensor) -> StoredMatrix:
        """One matrix of a target with its factors; ``stored`` (m, n) is what the weight file has of it."""
        if self.weights.holds_residuals:
            return self.residual(target, index, stored)
        return self.weight(target, index, stored, scaled=True)

    def residual(self, target: TargetRecord, index: int, stored: torch.Tensor) -> StoredMatrix:
        """One matrix that is stored as its residual (m, n), with the factors and the correction that give the original back."""
        with self._factors.of(target) as reader:
            return stored_residual(reader, target, index, stored, lossless=self.manifest.lossless)

    def weight(self, target: TargetRecord, index: int, stored: torch.Tensor, *, scaled: bool) -> StoredMatrix:
        """One matrix that is stored as the original weight (m, n), with its factors only if scales change it (``scaled``)."""
        return StoredMatrix(target, stored, False, self.factors(target, index) if scaled else None, None)


def weights_of(
    folder: Path,
    manifest: Manifest,
    base: str | Path | None = None,
    streaming: tuple[Path, int] | None = None,
    *,
    all_quantized: bool = False,
) -> Weights:
    """Open the weights of a factorized checkpoint: its own residuals or, for an overlay, those of its base.

    Args:
        folder, manifest: of the checkpoint.
        base: the model under an overlay, if not the one that the manifest names.
        streaming: to fetch each weight file of the base when its turn comes: the folder it is in meanwhile, and how many may be
            there at a time. None: they stay in the hub's cache.
        all_quantized: whether to find all FP8 weights of a base, also where no target is FP8.

    Raises:
        OptionError: a base, or a stream, for a checkpoint that holds its own weights.
        SourceError: an overlay on a local model, and no base; or one to be streamed.
    """
    if manifest.layout == "residual":
        no_base_needed(base, streaming)
        return ResidualWeights(FolderFiles(folder), folder, manifest)
    source = base_of(folder, manifest, base)
    if streaming is not None:
        from surgery.source.stream import streamed  # the hub client is slow to import

        source = streamed(source, *streaming)
    return weights_of_base(source, folder, manifest, all_quantized=all_quantized)


def weights_of_base(source: Source, folder: Path, manifest: Manifest, *, all_quantized: bool = False) -> OverlayWeights:
    """Open the weights of the model that a checkpoint was made from, also where the checkpoint holds residuals of its own.

    Args:
        source: that model.
        folder, manifest, all_quantized: as for ``weights_of``.
    """
    find = partial(quantized_of, source, folder, manifest, all_of_them=all_quantized)
    return OverlayWeights(source, source.name, manifest, frozenset(source.selection.shards), find)


def sent_weights(files: WeightFiles, folder: Path, manifest: Manifest, quantized: Mapping[str, Scaled]) -> Weights:
    """The weights of a factorized checkpoint in the process of a remote task, which does not open the base itself.

    Args:
        files: the weight files that the task needs.
        folder, manifest: of the checkpoint; the manifest may tell of these weight files alone.
        quantized: FP8 weight of the base -> where its scales are.
    """
    if manifest.layout == "residual":
        return ResidualWeights(files, folder, manifest)
    there = frozenset(shard.source.file for shard in manifest.shards)
    return OverlayWeights(files, "the base", manifest, there, lambda: quantized)
