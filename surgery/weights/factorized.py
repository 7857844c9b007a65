"""A factorized checkpoint, opened: its manifest, its targets, their factors, and the weights that it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.device import on_its_own_terms
from surgery.errors import FormatError, OptionError
from surgery.format.factors import DAMAGED_HINT, FactorsReaders
from surgery.format.manifest import Manifest, TargetRecord
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.sample import SampleHash
from surgery.linalg.lossless import Factors
from surgery.names import STREAM_DIR
from surgery.source.model import Source
from surgery.weights.matrix import StoredMatrix, stored_residual
from surgery.weights.overlay import BASE_HINT, OverlayWeights, base_of, no_base_needed, quantized_of
from surgery.weights.protocol import WeightFiles, Weights, check_entry
from surgery.weights.quantization import Scaled
from surgery.weights.residual import FolderFiles, ResidualWeights

#: Of a checkpoint whose tensors are asked for one by one, the weight files that may be here at a time when they pass through.
_FILES_AT_A_TIME = 2


class Factorized:
    """A factorized checkpoint, opened. A context manager, for any number of threads.

    Made by ``open``; the other way to make one is for commands that have its weights already.

    Args:
        folder, manifest: of the checkpoint.
        weights: those that it has the factors of, see ``weights_of``.

    Attributes:
        folder: written by ``factorize``.
        manifest: what it is.
        weights: what is stored of the weights, in the folder or in the model under an overlay.
    """

    def __init__(self, folder: Path, manifest: Manifest, weights: Weights) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = weights
        self._open = ExitStack()
        self._factors = FactorsReaders(folder, manifest)
        self._open.push(weights)
        self._open.push(self._factors)

    @classmethod
    @on_its_own_terms
    def open(cls, folder: str | Path, base: str | Path | None = None, stream: bool = False) -> Self:
        """Open a factorized checkpoint to read from it.

        Args:
            folder: written by ``factorize``.
            base: for an overlay, the model it was made from (folder or hub id), if the one that the manifest names is not to be
                used.
            stream: for an overlay on a model of the hub, drop each weight file again instead of keeping it in the hub's cache.

        Returns:
            The checkpoint; to be used in a ``with`` statement, or closed by ``close``.

        Raises:
            SourceError: the folder is no factorized checkpoint, or the base is not there or another model.
            OptionError: a base, or a stream, for a checkpoint that holds its own weights.
            ReadError, FormatError: a file cannot be read, or is damaged.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        with ExitStack() as stack:
            passing = None
            if stream:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-")))
                passing = (place / STREAM_DIR, _FILES_AT_A_TIME)
            weights = weights_of(folder, manifest, base, passing)
            weights.check_files()
            weights.check_quantized()
            opened = cls(folder, manifest, weights)
            opened._open.callback(opened.weights.files.close)
            opened._open.push(stack.pop_all())
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def close(self) -> None:
        """Nothing more is wanted of it.

        Raises:
            FormatError: a file has changed since it was read.
        """
        self.__exit__(None, None, None)

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

    @on_its_own_terms
    def factors(self, key: str, index: int | None = None) -> Factors:
        """The kept directions of a target: U (m, k), s (k,) and V (n, k), float32, on the CPU.

        Args:
            key: of the target, as ``manifest.targets`` and scales have it.
            index: which matrix of a stack; None for all of them, (B, m, k), (B, k) and (B, n, k), and for what is no stack.

        Raises:
            OptionError: no such target, or no such matrix.
            FormatError: the factors are damaged.
        """
        target = self._by_key.get(key)
        if target is None:
            raise OptionError(f"{self.folder} has no target {key!r}", hint="its targets: surgery inspect")
        self._check_index(target, index)
        return self.factors_of(target, index)

    def factors_of(self, target: TargetRecord, index: int | None = None) -> Factors:
        """``factors`` of a target at hand."""
        with self._factors.of(target) as reader:
            return reader.factors(target, index)

    @on_its_own_terms
    def original(self, tensor: str, index: int | None = None) -> torch.Tensor:
        """A tensor of the model that was factorized, bit for bit; without a correction, what its residual has kept of it.

        Targets are compared with the sample of the original that the manifest has.

        Args:
            tensor: its name: a target's, or any other in bfloat16, float16 or float32.
            index: which matrix of a stack, for it alone.

        Returns:
            In its own shape and dtype, float32 where it is FP8; on the CPU.

        Raises:
            OptionError: no such tensor, or no such matrix.
            FormatError: it is damaged, or the base is another model.
        """
        shard = self._shards.get(tensor)
        if shard is None:
            raise OptionError(f"the model of {self.folder} has no tensor {tensor!r}", hint="its tensors: surgery inspect --all")
        targets = self.targets.get(tensor, ())
        self._check_index(targets[0] if targets else None, index)
        first, count = (0, None) if index is None else (index, 1)
        with self.weights.reader(shard) as reader:
            entry = reader.entries.get(tensor)
            if entry is None:
                raise FormatError(f"{shard}: {tensor!r} is not there", hint=self._hint)
            for target in targets:
                check_entry(entry, target)
            stored = reader.read(entry, first, count) if count else reader.read(entry)
        if not targets or not self.is_residual(tensor):
            self._check_sample(targets, tensor, stored, index)
            return self.weights.exact(tensor, stored, first)
        for target in targets:
            view = target.seen_as
            matrices = view.matrices(stored)
            for i, matrix in enumerate(matrices):
                matrix.copy_(self.residual(target, first + i, matrix).original(torch.device("cpu")))
            if view.slice is not None:
                view.store(matrices, stored)
        self._check_sample(targets if self.manifest.lossless else (), tensor, stored, index)
        return stored

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
        return StoredMatrix(target, stored, False, self.factors_of(target, index) if scaled else None, None)

    def _check_sample(self, targets: tuple[TargetRecord, ...], tensor: str, weight: torch.Tensor, index: int | None) -> None:
        """The tensors of one parameter have one sample; that of a stack is of all its matrices."""
        for target in targets if index is None else ():
            sample = SampleHash(TORCH_DTYPES[target.dtype])
            sample.update(target.seen_as.matrices(weight))
            if (found := sample.hexdigest()) != target.sample_sha256:
                raise FormatError(
                    f"{target.shard}: {tensor!r} is not the tensor that was factorized",
                    got=f"sample {found}",
                    expected=f"sample {target.sample_sha256}",
                    hint=self._hint,
                )

    def _check_index(self, target: TargetRecord | None, index: int | None) -> None:
        count = target.matrices[0] if target is not None and target.view == "stack" else 0
        if index is not None and not 0 <= index < count:
            expected = f"from 0 to {count - 1}" if count else "none: it is no stack"
            raise OptionError("there is no such matrix", got=f"index {index}", expected=expected)

    @property
    def _hint(self) -> str:
        return DAMAGED_HINT if self.weights.holds_residuals else BASE_HINT

    @cached_property
    def _by_key(self) -> dict[str, TargetRecord]:
        return {target.key: target for target in self.manifest.targets}

    @cached_property
    def _shards(self) -> dict[str, str]:
        """Tensor -> the weight file that it is in."""
        found = {skipped.tensor: skipped.shard for skipped in self.manifest.skipped}
        for target in self.manifest.targets:
            found |= {target.tensor: target.shard, **{alias.tensor: alias.shard for alias in target.aliases}}
        return found


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
