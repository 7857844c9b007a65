"""The weights of a factorized checkpoint together with their factors, for whoever goes through all of them."""

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
from surgery.linalg.lossless import Factors
from surgery.source.protocol import Source, WeightFiles
from surgery.weights.matrix import StoredMatrix, stored_residual
from surgery.weights.overlay import OverlayWeights, base_of, no_base_needed, quantized_of
from surgery.weights.protocol import Weights
from surgery.weights.quantization import Scaled
from surgery.weights.residual import FolderFiles, ResidualWeights


class FactorizedWeights:
    """The weights of a factorized checkpoint with their factors. A context manager, for any number of threads.

    Args:
        folder, manifest: of the checkpoint.
        weights: those that it has the factors of, see ``weights_of``.

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
        """The targets by tensor: one, or those of its slices. A tensor that is one parameter with another has that one's."""
        found: dict[str, tuple[TargetRecord, ...]] = {}
        for target in self.manifest.targets:
            for tensor in target.tensors:
                found[tensor] = (*found.get(tensor, ()), target)
        return found

    def is_residual(self, tensor: str) -> bool:
        """Whether what is stored of a tensor with targets is its residual; of an alias it is the original."""
        return self.weights.holds_residuals and self.targets[tensor][0].tensor == tensor

    def factors(self, target: TargetRecord, index: int | None = None) -> Factors:
        """The kept directions of a target, of a stack those of the matrix ``index``; float32, on the CPU."""
        with self._factors.of(target) as reader:
            return reader.factors(target, index)

    def matrix(self, target: TargetRecord, index: int, stored: torch.Tensor) -> StoredMatrix:
        """One matrix of a target, of which ``stored`` is stored (m, n), with its factors."""
        if self.weights.holds_residuals:
            return self.residual(target, index, stored)
        return self.weight(target, index, stored, scaled=True)

    def residual(self, target: TargetRecord, index: int, stored: torch.Tensor) -> StoredMatrix:
        """One matrix of which the residual is stored, with what makes the original of it."""
        with self._factors.of(target) as reader:
            return stored_residual(reader, target, index, stored, lossless=self.manifest.lossless)

    def weight(self, target: TargetRecord, index: int, stored: torch.Tensor, *, scaled: bool) -> StoredMatrix:
        """One matrix of which the weight itself is stored; with its factors if it is to be ``scaled``."""
        return StoredMatrix(target, stored, False, self.factors(target, index) if scaled else None, None)


def weights_of(
    folder: Path,
    manifest: Manifest,
    base: str | Path | None = None,
    passing: tuple[Path, int] | None = None,
    *,
    all_quantized: bool = False,
) -> Weights:
    """The weights of a factorized checkpoint: with itself, or in the model that it was made from.

    Args:
        folder, manifest: of the checkpoint.
        base: the model, if not the one that the manifest names.
        passing: where its weight files pass through, and how many at a time; None: they stay in the hub's cache.
        all_quantized: whether all FP8 weights of a base are wanted, and not only those that are targets.

    Raises:
        OptionError: a base, or a stream, for a checkpoint that holds its own weights.
        SourceError: an overlay on a local model, and no base; or one to be streamed.
    """
    if manifest.layout == "residual":
        no_base_needed(base, passing)
        return ResidualWeights(FolderFiles(folder), folder, manifest)
    source = base_of(folder, manifest, base)
    if passing is not None:
        from surgery.source.stream import streamed  # the hub client is slow to import

        source = streamed(source, *passing)
    return weights_of_base(source, folder, manifest, all_quantized=all_quantized)


def weights_of_base(source: Source, folder: Path, manifest: Manifest, *, all_quantized: bool = False) -> OverlayWeights:
    """The weights of the model that a checkpoint was made from, also where it holds residuals of them; see ``weights_of``."""
    find = partial(quantized_of, source, folder, manifest, all_of_them=all_quantized)
    return OverlayWeights(source, source.name, manifest, frozenset(source.selection.shards), find)


def sent_weights(files: WeightFiles, folder: Path, manifest: Manifest, quantized: Mapping[str, Scaled]) -> Weights:
    """The same in a process that was sent to its weight files, and told which of them are quantized."""
    if manifest.layout == "residual":
        return ResidualWeights(files, folder, manifest)
    there = frozenset(shard.source.file for shard in manifest.shards)
    return OverlayWeights(files, "the base", manifest, there, lambda: quantized)
