"""Where the weight files of a factorized checkpoint lie: in its own folder, or in the model it was made from."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import FormatError, SourceError
from surgery.format.files import FileRecord
from surgery.format.manifest import ShardRecord, TargetRecord
from surgery.format.safetensors import TensorEntry
from surgery.planning.quantization import Scaled, read_quantization
from surgery.source.model import Source


class OwnWeights:
    """The residual layout: weights lie in the factorized folder itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self) -> Path | None:
        return None  # the factorized folder is an input anyway

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        """Where a shard's weights are, and what that file must be."""
        if shard.residual is None:
            raise FormatError(
                f"{self._folder}: the manifest of a residual checkpoint lacks a weight file", got=shard.source.file
            )
        return self._folder / shard.residual.file, shard.residual


class BaseWeights:
    """The overlay layout: weights lie in the model that was factorized."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def folder(self) -> Path | None:
        return self._source.folder()

    def quantized(self) -> dict[str, Scaled]:
        """Its FP8 weights and where their scales are."""
        headers = {shard: self._source.header(shard) for shard in self._source.selection.shards}
        return read_quantization(self._source.config(), headers, self._source.name)

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        if shard.source.file not in self._source.selection.shards:
            raise SourceError(f"{self._source.name} is not the base of this overlay: it has no {shard.source.file}")
        return self._source.fetch(shard.source.file), shard.source


def check_entry(entry: TensorEntry, target: TargetRecord) -> None:
    """Refuse a tensor that is not what the manifest says.

    Raises:
        FormatError: another dtype or shape.
    """
    if entry.dtype != target.dtype or list(entry.shape) != target.shape:
        raise FormatError(
            f"{target.shard}: {target.tensor!r} is not as the manifest describes it",
            got=f"{entry.dtype} {list(entry.shape)}",
            expected=f"{target.dtype} {target.shape}",
        )
