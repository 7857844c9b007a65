"""``Checkpoint``: weights that are gone through tensor by tensor, with the factors that belong to them if there are any.

The kinds: a factorized checkpoint (``FactorizedWeights``), and a model as it is (``PlainWeights``).
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

import torch

from surgery.errors import SourceError
from surgery.format.factors import FactorsReaders
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.factors import Factors
from surgery.names import MANIFEST_FILE
from surgery.quantized.recognize import Quantization
from surgery.quantized.weight import Quantized
from surgery.source.protocol import Source, WeightFiles
from surgery.weights.matrix import StoredMatrix, stored_residual
from surgery.weights.model import ModelWeights
from surgery.weights.overlay import OverlayWeights, base_of, no_base_needed, quantization_of_base
from surgery.weights.protocol import Weights
from surgery.weights.residual import FolderFiles, ResidualWeights, quantization_of_residual


@dataclass(frozen=True, slots=True)
class SourceShard:
    """A weight file of the model that a checkpoint is or was made from.

    Attributes:
        file: its name there.
        size: in bytes.
        sha256: of its bytes; None where that is not known before it is read.
    """

    file: str
    size: int
    sha256: str | None


class Checkpoint(Protocol):
    """Weights that an update is added to. A context manager that any number of threads may use.

    Attributes:
        weights: the weight files.
        shards: what the source has of them, in the order in which they are gone through.
        lossless: whether the source's weights are recovered bit for bit.
        targets: tensor -> its targets: one for the whole tensor, or one for each slice. Only of a factorized checkpoint.
    """

    weights: Weights
    shards: Sequence[SourceShard]

    @property
    def lossless(self) -> bool: ...

    @property
    def targets(self) -> Mapping[str, tuple[TargetRecord, ...]]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def missing(self, shard: str, there: Collection[str]) -> list[str]:
        """The tensors that must be in a weight file and are not ``there``."""

    def is_residual(self, tensor: str) -> bool:
        """Whether a tensor with targets is stored as its residual."""

    def residual(self, target: TargetRecord, index: int, stored: torch.Tensor) -> StoredMatrix:
        """One matrix that is stored as its residual (m, n)."""

    def weight(self, target: TargetRecord, index: int, stored: torch.Tensor, *, scaled: bool) -> StoredMatrix:
        """One matrix that is stored as the original weight (m, n), with its factors only if scales change it (``scaled``)."""

    def sent(self, shards: Collection[str], tensors: Collection[str]) -> SentCheckpoint:
        """What another process needs to open the part of it in these weight files.

        Args:
            shards: the weight files.
            tensors: all tensors in them.
        """


class SentCheckpoint(Protocol):
    """A part of a checkpoint on its way to another process, perhaps on another machine."""

    @property
    def keys(self) -> Collection[str]:
        """The keys of its targets."""

    def open(self, files: WeightFiles) -> Checkpoint:
        """Open it there.

        Args:
            files: its weight files, in that process.

        Raises:
            SourceError: a folder that it needs is not on that machine.
        """


class FactorizedWeights:
    """The weights of a factorized checkpoint with its factors: a ``Checkpoint``.

    Args:
        folder, manifest: of the checkpoint.
        weights: the weight files that the factors belong to: residuals, or those of the base; see ``weights_of``.

    Attributes:
        folder, manifest, weights: as given.
        shards: see ``Checkpoint``.
    """

    def __init__(self, folder: Path, manifest: Manifest, weights: Weights) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = weights
        self.shards: Sequence[SourceShard] = [
            SourceShard(one.source.file, one.source.size, one.source.sha256) for one in manifest.shards
        ]
        self._factors = FactorsReaders(folder, manifest)
        self._open = ExitStack()
        self._open.push(weights)
        self._open.push(self._factors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def lossless(self) -> bool:
        return self.manifest.lossless

    def missing(self, shard: str, there: Collection[str]) -> list[str]:
        """The tensors that the manifest has targets or aliases of in a weight file, and that are not ``there``."""
        return sorted(self.manifest.edited_in(shard).keys() - set(there))

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

    def sent(self, shards: Collection[str], tensors: Collection[str]) -> SentFactorized:
        return SentFactorized(self.folder.resolve(), self.manifest.part(shards), self.weights.quantized_among(tensors))


@dataclass(frozen=True, slots=True)
class SentFactorized:
    """A part of a factorized checkpoint on its way to another process.

    Attributes:
        folder: of the checkpoint, which every machine sees.
        manifest: of the weight files alone that are needed.
        quantized: quantized weight in them -> how it is stored.
    """

    folder: Path
    manifest: Manifest
    quantized: Mapping[str, Quantized]

    @property
    def keys(self) -> Collection[str]:
        return [target.key for target in self.manifest.targets]

    def open(self, files: WeightFiles) -> FactorizedWeights:
        if not (self.folder / MANIFEST_FILE).is_file():
            raise SourceError(
                f"{self.folder} is not there on {socket.gethostname()}",
                hint="the factorized checkpoint must be in a folder that every machine sees under the same path",
            )
        weights: Weights
        if self.manifest.layout == "residual":
            weights = ResidualWeights(files, self.folder, self.manifest, lambda: Quantization(self.quantized))
        else:
            there = frozenset(shard.source.file for shard in self.manifest.shards)
            weights = OverlayWeights(files, "the base", self.manifest, there, lambda: Quantization(self.quantized))
        return FactorizedWeights(self.folder, self.manifest, weights)


class PlainWeights:
    """The weights of a model, without any factors: a ``Checkpoint``.

    Args:
        weights: of the model.
        shards: its weight files.

    Attributes:
        weights, shards: as given.
        lossless, targets: see ``Checkpoint``.
    """

    lossless = True
    targets: Mapping[str, tuple[TargetRecord, ...]] = MappingProxyType({})

    def __init__(self, weights: ModelWeights, shards: Sequence[SourceShard]) -> None:
        self.weights: Weights = weights
        self.shards = shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.weights.__exit__(kind, error, trace)

    def missing(self, shard: str, there: Collection[str]) -> list[str]:
        return []

    def is_residual(self, tensor: str) -> bool:
        return False

    def residual(self, target: TargetRecord, index: int, stored: torch.Tensor) -> StoredMatrix:
        raise AssertionError("a model holds no residuals")

    def weight(self, target: TargetRecord, index: int, stored: torch.Tensor, *, scaled: bool) -> StoredMatrix:
        raise AssertionError("a model has no targets")

    def sent(self, shards: Collection[str], tensors: Collection[str]) -> SentModel:
        needed = [shard for shard in self.shards if shard.file in shards]
        return SentModel(needed, self.weights.quantized_among(tensors))


@dataclass(frozen=True, slots=True)
class SentModel:
    """A part of a model on its way to another process.

    Attributes:
        shards: the weight files that are needed.
        quantized: quantized weight in them -> how it is stored.
    """

    shards: Sequence[SourceShard]
    quantized: Mapping[str, Quantized]

    @property
    def keys(self) -> Collection[str]:
        return ()

    def open(self, files: WeightFiles) -> PlainWeights:
        return PlainWeights(ModelWeights(files, lambda: Quantization(self.quantized)), self.shards)


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
        all_quantized: whether to find all that is quantized, also where no target is.

    Raises:
        OptionError: a base, or a stream, for a checkpoint that holds its own weights.
        SourceError: an overlay on a local model, and no base; or one to be streamed.
    """
    if manifest.layout == "residual":
        no_base_needed(base, streaming)
        files = FolderFiles(folder)
        find = partial(quantization_of_residual, files, folder, manifest) if all_quantized else Quantization
        return ResidualWeights(files, folder, manifest, find)
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
    find = partial(quantization_of_base, source, folder, manifest, all_of_them=all_quantized)
    return OverlayWeights(source, source.name, manifest, frozenset(source.selection.shards), find)
