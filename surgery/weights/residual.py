"""The weight files of a factorized folder in the residual layout, from which the original weights are recovered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from surgery.errors import FormatError
from surgery.files.file_records import FileRecord, not_as_described
from surgery.files.watch import Watch
from surgery.format.factors import DAMAGED_HINT
from surgery.format.header import Header
from surgery.format.manifest import Manifest
from surgery.format.safetensors import ShardReader
from surgery.source.origin import FolderOrigin, Origin
from surgery.source.protocol import FilesInPlace, WeightFiles
from surgery.weights.protocol import Weights


class FolderFiles(FilesInPlace):
    """``WeightFiles`` of a factorized folder: all there already, with hashes in its manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.watch = Watch()

    def fetch(self, file: str) -> Path:
        return self._folder / file

    def size(self, file: str) -> int:
        return self.fetch(file).stat().st_size

    def header(self, shard: str) -> Header:
        with ShardReader(self.fetch(shard), watch=self.watch) as reader:
            return reader.header

    def origin(self, files: Iterable[str]) -> Origin:
        return FolderOrigin(self._folder.resolve(), {})


class ResidualWeights(Weights):
    """The weight files of the residual layout: they hold residuals of targets, and all other tensors as in the source.

    Args:
        files: the weight files of the factorized folder.
        folder, manifest: of the checkpoint.
    """

    holds_residuals = True

    def __init__(self, files: WeightFiles, folder: Path, manifest: Manifest) -> None:
        super().__init__(files)
        self._folder = folder
        self._records: Mapping[str, FileRecord | None] = {shard.source.file: shard.residual for shard in manifest.shards}

    def path(self, shard: str) -> Path:
        self.expected(shard)
        return super().path(shard)

    def expected(self, shard: str) -> FileRecord:
        record = self._records.get(shard)
        if record is None:
            raise FormatError(f"{self._folder}: the manifest of a residual checkpoint lacks a weight file", got=shard)
        return record

    def check(self, shard: str, sha256: str) -> None:
        """Refuse a weight file whose sha256 is not the one that the manifest records.

        Raises:
            FormatError: names both hashes.
        """
        record = self.expected(shard)
        if sha256 != record.sha256:
            raise not_as_described(self._folder / record.file, sha256, record, DAMAGED_HINT)
