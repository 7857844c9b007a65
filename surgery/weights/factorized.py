"""A factorized checkpoint, opened to be read tensor by tensor: the public way to its factors and its original weights."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from surgery.format.sample import SampleHash, sampled, sampled_dtype
from surgery.lossless.factors import Factors
from surgery.names import FACTORIZABLE_DTYPES, STREAM_DIR, told_dtype
from surgery.weights.checkpoint import FactorizedWeights, weights_of
from surgery.weights.overlay import BASE_HINT
from surgery.weights.protocol import Weights, check_entry

#: How many weight files of a streamed base are kept at a time: that of a tensor, and that of its scales.
_FILES_AT_A_TIME = 2


class _FilesInUse:
    """Fetches the weight files of a checkpoint as they are needed, and drops those unused for longest. Threads may share it.

    Args:
        weights: of the checkpoint.
        at_a_time: how many are kept, unless threads use more of them at one time; None for all.
    """

    def __init__(self, weights: Weights, at_a_time: int | None) -> None:
        self._weights = weights
        self._at_a_time = at_a_time
        self._users: dict[str, int] = {}  # in the order of their last use
        self._lock = threading.Lock()

    @contextmanager
    def holding(self, shard: str) -> Iterator[None]:
        """Keep a weight file for as long as the context lasts. One of the hub is compared with its hash before its first use.

        Raises:
            SourceError: it cannot be fetched, or is damaged.
        """
        files = self._weights.files
        with self._lock:
            if shard not in self._users:
                self._make_room()
                try:
                    files.acquire(shard)
                except BaseException:
                    files.release(shard)
                    raise
            self._users[shard] = self._users.pop(shard, 0) + 1
        try:
            files.fetch(shard)
            yield
        finally:
            with self._lock:
                self._users[shard] -= 1

    def _make_room(self) -> None:
        """Drop files that nobody uses until one more may be fetched."""
        for shard in [shard for shard, users in self._users.items() if not users]:
            if self._at_a_time is None or len(self._users) < self._at_a_time:
                break
            del self._users[shard]
            try:
                self._weights.forget(shard)
            finally:
                self._weights.files.release(shard)


class Factorized:
    """A factorized checkpoint, opened for reading by ``Factorized.open``. It is a context manager; threads may share it.

    Attributes:
        manifest: the targets, the tensors that were passed over, and the source.
    """

    def __init__(self, checkpoint: FactorizedWeights, open_files: ExitStack, files_at_a_time: int | None) -> None:
        self.manifest = checkpoint.manifest
        self._checkpoint = checkpoint
        self._files = _FilesInUse(checkpoint.weights, files_at_a_time)
        self._open = open_files
        self._is_closed = False

    @classmethod
    @on_its_own_terms
    def open(cls, folder: str | Path, base: str | Path | None = None, stream: bool = False) -> Self:
        """Open a factorized checkpoint for reading.

        Args:
            folder: a folder that ``factorize`` has written.
            base: for an overlay, the model that it was made from (folder or hub id). By default the one that the
                manifest names.
            stream: for an overlay on a hub model: keep at most two weight files at a time, in a temporary folder, in
                place of all of them in the hub's cache. If you read one file after the other, each file is downloaded
                once.

        Returns:
            The checkpoint. Use it in a ``with`` statement, or call ``close`` at the end.

        Raises:
            SourceError: the folder is not a factorized checkpoint; or the base does not exist, or is another model.
            OptionError: a base, or ``stream``, was given for a checkpoint that holds its own weights.
            ReadError, FormatError: a file cannot be read, or is damaged.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        with ExitStack() as stack:
            streaming = None
            if stream:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-")))
                streaming = (place / STREAM_DIR, _FILES_AT_A_TIME)
            weights = weights_of(folder, manifest, base, streaming, all_quantized=True)
            weights.check_files()
            weights.check_quantized()
            stack.callback(weights.files.close)
            checkpoint = stack.enter_context(FactorizedWeights(folder, manifest, weights))
            return cls(checkpoint, stack.pop_all(), _FILES_AT_A_TIME if stream else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closed = True
        self._open.__exit__(kind, error, trace)

    def close(self) -> None:
        """Close all files of the checkpoint and of its base. Nothing can be read afterwards. A second call does nothing.

        Raises:
            FormatError: a file has changed since it was read.
        """
        self.__exit__(None, None, None)

    @property
    def targets(self) -> Mapping[str, tuple[TargetRecord, ...]]:
        """The targets of each tensor: one for the whole tensor, or one for each slice.

        An alias, which holds the same parameter as the tensor of a target, has the targets of that tensor.
        """
        return self._checkpoint.targets

    @on_its_own_terms
    def factors(self, key: str, index: int | None = None) -> Factors:
        """The kept directions of a target: U (m, k), s (k,) and V (n, k), float32, on the CPU.

        Args:
            key: the key of the target, as in ``manifest.targets`` and in scales.
            index: which matrix of a stack. None for all of them, (B, m, k), (B, k) and (B, n, k), and for a target that
                is not a stack.

        Returns:
            U, s and V.

        Raises:
            OptionError: there is no such target or no such matrix; or the checkpoint is closed.
            ReadError, FormatError: the factors cannot be read, or are damaged.
        """
        self._check_open()
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

        Without a correction the result is ``round(R + U diag(s) V^T)``, which differs in the last bits of some weights.
        If the result is bit for bit and the tensor has targets, it is checked against the samples in the manifest.
        Weight files in a folder are not hashed. So damage to other numbers and other tensors is found only by
        ``verify``.

        Args:
            tensor: the name of the tensor: of a target, or any other in bfloat16, float16 or float32, or a quantized
                one of a base.
            index: which matrix of a stack, to read only that one, (1, m, n); it is not checked. None for the whole
                tensor.

        Returns:
            The tensor on the CPU, in its own shape and dtype; float32 if it is quantized.

        Raises:
            OptionError: there is no such tensor or no such matrix, or the tensor has another dtype; or the checkpoint
                is closed.
            SourceError: a weight file of the base cannot be downloaded, or is damaged.
            ReadError, FormatError: a file cannot be read or is damaged, or the base is another model.
        """
        self._check_open()
        shard = self._shards.get(tensor)
        if shard is None:
            what = f"the model of {self._checkpoint.folder} has no tensor {tensor!r}"
            raise OptionError(what, hint="surgery inspect lists them")
        self._check_index(self.targets[tensor][0] if tensor in self.targets else None, index)
        with self._files.holding(shard):
            return self._original(tensor, shard, index)

    def _original(self, tensor: str, shard: str, index: int | None) -> torch.Tensor:
        """``original`` of a tensor in a weight file that is held."""
        checkpoint = self._checkpoint
        targets, first = self.targets.get(tensor, ()), index or 0
        with checkpoint.weights.reader(shard) as reader:
            entry = reader.entries.get(tensor)
            if entry is None:
                raise FormatError(f"{shard}: {tensor!r} is not there", hint=self._hint)
            for target in targets:
                check_entry(entry, target)
            if entry.dtype not in TORCH_DTYPES and entry.packed is None:
                what, hint = f"{tensor!r} holds no weights", f"it is stored unchanged in {shard}"
                raise OptionError(what, got=entry.dtype, expected=", ".join(TORCH_DTYPES), hint=hint)
            stored = reader.read(entry) if index is None else reader.read(entry, first, 1)
        if not targets or not checkpoint.is_residual(tensor):
            if index is None:
                self._check_sample(targets, tensor, stored)
            return stored if entry.dtype in FACTORIZABLE_DTYPES else self._dequantized(tensor, stored, entry.dtype, first)
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

    def _dequantized(self, tensor: str, stored: torch.Tensor, dtype: str, first: int) -> torch.Tensor:
        """The numbers of a quantized tensor, or of its matrices from ``first`` on, float32."""
        quantized = self._checkpoint.weights.quantized.get(tensor)
        if quantized is None:
            raise OptionError(
                f"{tensor!r} is {told_dtype(dtype)}, and it is not known how its numbers are scaled",
                hint="its bytes are in the weight file as they were",
            )
        with ExitStack() as stack:
            for shard in sorted(quantized.shards):
                stack.enter_context(self._files.holding(shard))
            return self._checkpoint.weights.exact(tensor, stored, first)

    def _check_open(self) -> None:
        if self._is_closed:
            raise OptionError(f"{self._checkpoint.folder} is closed", hint="open it again: surgery.Factorized.open")

    def _check_sample(self, targets: Sequence[TargetRecord], tensor: str, weight: torch.Tensor) -> None:
        for target in targets:
            sample = SampleHash(sampled_dtype(target))
            sample.update(sampled(target, weight))
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
