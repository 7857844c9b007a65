"""A factorized checkpoint, opened to be read tensor by tensor: the public way to its factors and its original weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.device import on_its_own_terms
from surgery.errors import FormatError, OptionError
from surgery.format.factors import DAMAGED_HINT
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.sample import SampleHash
from surgery.linalg.lossless import Factors
from surgery.names import STREAM_DIR
from surgery.weights.checkpoint import FactorizedWeights, weights_of
from surgery.weights.overlay import BASE_HINT
from surgery.weights.protocol import check_entry

#: How many weight files of a streamed base are kept at a time: tensors are asked for one by one, in any order.
_FILES_AT_A_TIME = 2


class Factorized:
    """A factorized checkpoint, opened by ``Factorized.open`` to read from it. A context manager that threads may share.

    Attributes:
        manifest: its targets, what was passed over, and where it came from.
    """

    def __init__(self, checkpoint: FactorizedWeights, open_files: ExitStack) -> None:
        self.manifest = checkpoint.manifest
        self._checkpoint = checkpoint
        self._open = open_files

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
            streaming = None
            if stream:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-")))
                streaming = (place / STREAM_DIR, _FILES_AT_A_TIME)
            weights = weights_of(folder, manifest, base, streaming)
            weights.check_files()
            weights.check_quantized()
            stack.callback(weights.files.close)
            checkpoint = stack.enter_context(FactorizedWeights(folder, manifest, weights))
            return cls(checkpoint, stack.pop_all())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def close(self) -> None:
        """Close all files of the checkpoint and of its base.

        Raises:
            FormatError: a file has changed since it was read.
        """
        self.__exit__(None, None, None)

    @property
    def targets(self) -> Mapping[str, tuple[TargetRecord, ...]]:
        """Tensor -> its targets: one for the whole tensor, or one for each slice.

        An alias, which holds the same parameter as a target's tensor, has the targets of that tensor.
        """
        return self._checkpoint.targets

    @on_its_own_terms
    def factors(self, key: str, index: int | None = None) -> Factors:
        """The kept directions of a target: U (m, k), s (k,) and V (n, k), float32, on the CPU.

        Args:
            key: of the target, as ``manifest.targets`` and scales have it.
            index: which matrix of a stack; None for all of them, (B, m, k), (B, k) and (B, n, k), and for what is no stack.

        Returns:
            U, s and V.

        Raises:
            OptionError: no such target, or no such matrix.
            FormatError: the factors are damaged.
        """
        target = self._by_key.get(key)
        if target is None:
            raise OptionError(f"{self._checkpoint.folder} has no target {key!r}", hint="surgery inspect lists its targets")
        self._check_index(target, index)
        if index is not None or target.view != "stack":
            return self._checkpoint.factors(target, index)
        each = [self._checkpoint.factors(target, i) for i in range(target.matrices[0])]
        return Factors(*(torch.stack([getattr(one, part) for one in each]) for part in ("U", "s", "V")))

    @on_its_own_terms
    def original(self, tensor: str, index: int | None = None) -> torch.Tensor:
        """A tensor of the model that was factorized, bit for bit.

        Without a correction it is ``round(R + U diag(s) V^T)``, which differs in the last bits of some weights. A tensor with
        targets that comes back bit for bit is checked against the samples that the manifest has of it.

        Args:
            tensor: its name: a target's, or any other in bfloat16, float16 or float32.
            index: which matrix of a stack, to read that one alone, (1, m, n); it is not checked. None for the whole tensor.

        Returns:
            In its own shape and dtype, float32 where it is FP8; on the CPU.

        Raises:
            OptionError: no such tensor, or no such matrix.
            FormatError: it is damaged, or the base is another model.
        """
        checkpoint, shard = self._checkpoint, self._shards.get(tensor)
        if shard is None:
            raise OptionError(f"the model of {checkpoint.folder} has no tensor {tensor!r}", hint="surgery inspect lists them")
        targets, first = self.targets.get(tensor, ()), index or 0
        self._check_index(targets[0] if targets else None, index)
        with checkpoint.weights.reader(shard) as reader:
            entry = reader.entries.get(tensor)
            if entry is None:
                raise FormatError(f"{shard}: {tensor!r} is not there", hint=self._hint)
            for target in targets:
                check_entry(entry, target)
            stored = reader.read(entry) if index is None else reader.read(entry, first, 1)
        if not targets or not checkpoint.is_residual(tensor):
            if index is None:
                self._check_sample(targets, tensor, stored)
            return checkpoint.weights.exact(tensor, stored, first)
        for target in targets:
            view = target.seen_as
            matrices = view.matrices(stored)
            for i, matrix in enumerate(matrices):
                matrix.copy_(checkpoint.residual(target, first + i, matrix).original(torch.device("cpu")))
            if view.slice is not None:
                view.store(matrices, stored)
        if index is None and self.manifest.lossless:
            self._check_sample(targets, tensor, stored)
        return stored

    def _check_sample(self, targets: Sequence[TargetRecord], tensor: str, weight: torch.Tensor) -> None:
        for target in targets:
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
        return DAMAGED_HINT if self._checkpoint.weights.holds_residuals else BASE_HINT

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
