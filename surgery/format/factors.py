"""Reading the factors and corrections of a factorized checkpoint, checked against its manifest."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.errors import FormatError
from surgery.files.file_records import check_file
from surgery.files.pool import Pool
from surgery.files.watch import Watch
from surgery.format.header import TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.lossless.factors import Factors
from surgery.memory import bytes_of
from surgery.names import correction_key, factor_key

#: What to do about a file that is not as the manifest records it, and about one that was damaged before it was recorded.
DAMAGED_HINT = "surgery verify FACTORIZED --repair --base MODEL makes the file again from the original model"
RECORDED_DAMAGED_HINT = "factorize again: what the file holds is damaged"


class FactorsHash:
    """sha256 over the factors of a target: the bytes of U, s and V of each of its matrices in turn."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, factors: Factors) -> None:
        for part in (factors.U, factors.s, factors.V):
            self._digest.update(bytes_of(part))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class FactorsReader:
    """Reads the factors of the targets in one shard. A context manager; safe for any number of threads.

    Args:
        folder: the factorized checkpoint.
        shard: the record of the shard.
        check: whether to compare the sha256 of the whole file with the manifest first.
        watch: as for ``ShardReader``.

    Raises:
        FormatError: the file is missing or is not the one that the manifest describes. Also when the context is left without
            another error, if the file has changed since it was opened.
    """

    def __init__(self, folder: Path, shard: ShardRecord, *, check: bool = True, watch: Watch | None = None) -> None:
        if shard.factors is None:
            raise FormatError(f"{folder}: the manifest names no factors for {shard.source.file}")
        self._name = shard.factors.file
        watch = watch or Watch()
        if check:
            watch.see(folder / self._name, self._name)  # the file must not change between hashing and reading it
            check_file(folder, shard.factors, DAMAGED_HINT)
        self._reader = ShardReader(folder / self._name, name=self._name, watch=watch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.check_unchanged()
        finally:
            self.close()

    def check_unchanged(self) -> None:
        """Refuse the file if it has changed since it was opened. Raises FormatError, or ReadError if it is gone."""
        self._reader.check_unchanged()

    def close(self) -> None:
        """Close the file; may be called more than once."""
        self._reader.close()

    def factors(self, target: TargetRecord, index: int | None = None) -> Factors:
        """The factors of a target: U (m, k), s (k,), V (n, k), float32 on the CPU; of a stack those of matrix ``index``."""
        (_, m, n), k = target.matrices, target.rank
        return Factors(*(self._factor(target, part, size, index) for part, size in (("U", [m, k]), ("s", [k]), ("V", [n, k]))))

    def _factor(self, target: TargetRecord, part: str, shape: list[int], index: int | None) -> torch.Tensor:
        if target.view != "stack" or index is None:
            return self._reader.read(self._entry(target, factor_key(target.key, part), "F32", shape))
        entry = self._entry(target, factor_key(target.key, part), "F32", [target.matrices[0], *shape])
        return self._reader.read(entry, index, 1)[0]

    def correction(self, target: TargetRecord, index: int | None = None) -> torch.Tensor:
        """The encoded correction of a target, uint8 (bytes,), on the CPU; of a stack that of matrix ``index``."""
        key = correction_key(target.key, index if target.view == "stack" else None)
        return self._reader.read_bytes(self._entry(target, key, "U8", None))

    def _entry(self, target: TargetRecord, key: str, dtype: str, shape: list[int] | None) -> TensorEntry:
        """The entry of a tensor in the file of factors. Raises FormatError if it is missing or misshapen."""
        entry = self._reader.entries.get(key)
        if entry is None or entry.dtype != dtype or (shape is not None and list(entry.shape) != shape):
            raise FormatError(
                f"{self._name}: {key!r} is missing or misshapen",
                got="nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}",
                expected=f"{dtype} {shape or '(bytes,)'}",
            )
        return entry


class FactorsReaders:
    """The readers of all shards of a factorized checkpoint, each opened when it is needed. A context manager."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._shards = {shard.source.file: shard for shard in manifest.shards}
        self._watch = Watch()
        self._checked: set[str] = set()
        self._pool = Pool(self._reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, trace)

    def of(self, target: TargetRecord) -> AbstractContextManager[FactorsReader]:
        """The reader that has a target's factors, open for as long as the context lasts. Raises what ``FactorsReader`` does."""
        return self._pool.of(target.shard)

    def _reader(self, shard: str) -> FactorsReader:
        # The file is hashed only when it is first opened; after that the watch notices changes.
        reader = FactorsReader(self._folder, self._shards[shard], check=shard not in self._checked, watch=self._watch)
        self._checked.add(shard)
        return reader
