"""Where the weight files of a factorized checkpoint lie: in its own folder, or in the model it was made from."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import FormatError, SourceError
from surgery.format.files import FileRecord
from surgery.format.manifest import ShardRecord
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

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        if shard.source.file not in self._source.selection.shards:
            raise SourceError(f"{self._source.name} is not the base of this overlay: it has no {shard.source.file}")
        return self._source.fetch(shard.source.file), shard.source
