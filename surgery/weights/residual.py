"""The weight files of a factorized folder in the residual layout, from which the original weights are recovered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import FormatError
from surgery.files.file_records import FileRecord, not_as_described
from surgery.files.watch import Watch
from surgery.format.factors import DAMAGED_HINT
from surgery.format.header import Header
from surgery.format.manifest import Manifest
from surgery.format.safetensors import ShardReader
from surgery.quantized.recognize import MODELOPT_FILE, Quantization, read_quantization
from surgery.source.origin import FolderOrigin, Origin
from surgery.source.protocol import FilesInPlace, WeightFiles
from surgery.weights.overlay import own_config
from surgery.weights.protocol import FindQuantization, Weights
from surgery.weights.recognition import with_modelopt


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
        find_quantization: see ``Weights``. What is quantized in this layout is no target, and stored as in the source.
    """

    holds_residuals = True

    def __init__(
        self,
        files: WeightFiles,
        folder: Path,
        manifest: Manifest,
        find_quantization: FindQuantization = Quantization,
    ) -> None:
        super().__init__(files, find_quantization)
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


def quantization_of_residual(files: FolderFiles, folder: Path, manifest: Manifest) -> Quantization:
    """What is quantized of a factorized folder in the residual layout: what was passed over for that when it was made."""
    config: Mapping[str, Any] = own_config(folder, manifest)[0]
    if (path := folder / MODELOPT_FILE).is_file():
        config = with_modelopt(config, path, str(path))
    headers = {shard.source.file: files.header(shard.source.file) for shard in manifest.shards}
    return read_quantization(config, headers, str(folder))
