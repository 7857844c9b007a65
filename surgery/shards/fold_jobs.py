"""The jobs of a fold, one for each weight file, and what a journal knows of those that are done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from surgery.engine.lane import Lane
from surgery.errors import FormatError
from surgery.files.files import FileRecord
from surgery.format.manifest import Manifest, decode_file
from surgery.progress import listening
from surgery.run.contents import is_as_recorded
from surgery.run.resume import Recorded
from surgery.shards.dense import DenseWeights
from surgery.shards.fold_shard import FoldSettings, RemoteFold, ShardFold
from surgery.timing import Timing, timed
from surgery.weights.base import BaseWeights, OwnWeights


class FoldJobs:
    """The jobs of a fold, see ``WritingJobs``: each gives the weight file that it writes, or None if nothing is left of it.

    Args:
        manifest: of the checkpoint.
        weights: where its weight files come from.
        dense: the weights that they become.
        settings: of the fold.
        timing: told how long downloads take.
        to_compare: whether the files are not written, and only told what they would be.

    Attributes:
        shard_files: the weight file of each job.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: OwnWeights | BaseWeights,
        dense: DenseWeights,
        settings: FoldSettings,
        timing: Timing | None,
        *,
        to_compare: bool = False,
    ) -> None:
        self.shard_files = [shard.source.file for shard in manifest.shards]
        self._manifest = manifest
        self._weights = weights
        self._dense = dense
        self._settings = settings
        self._timing = timing
        self._to_compare = to_compare
        self._progress = listening()

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """See ``LocalJobs``."""
        if self._timing is not None and self._weights.room_to_fetch():
            self._timing.watch("download")
        for index in which:
            self._weights.wait_for_room()
            with timed("download"):
                for file in self._dense.files(self._manifest.shards[index]):
                    self._weights.acquire(file)
            yield index

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> FileRecord | None:
        """See ``LocalJobs``."""
        shard = self._manifest.shards[index]
        files = self._dense.files(shard)

        def release() -> None:
            while files:
                file = files.pop()
                try:
                    self._dense.forget(file)
                finally:
                    self._weights.release(file)

        def has_been_read() -> None:
            if not self._dense.quantized:  # else scales are looked up until the end
                release()
            on_read()

        try:
            fold = ShardFold(shard, self._manifest, self._weights, self._dense, self._settings, self._progress)
            return fold.run(lane, has_been_read, partial=None, to_compare=self._to_compare)
        finally:
            release()

    def remote(self, index: int) -> RemoteFold:
        """See ``ShardJobs``."""
        settings, shard = self._settings, self._manifest.shards[index]
        files = self._dense.files(shard)
        manifest = self._manifest.part(files)
        # Of all others a task need not hear: with thousands of weight files that would be most of what is sent.
        names = {entry.name for one in manifest.shards for entry in self._weights.header(one).tensors}
        weights = {self._quantized_with[name] for name in names if name in self._quantized_with}
        settings = dataclasses.replace(
            settings,
            out=settings.out.resolve(),
            place=settings.place.resolve(),
            scales={target.key: settings.scales[target.key] for target in manifest.targets},
            additions={name: settings.additions[name] for name in names if name in settings.additions},
            quantized={name: settings.quantized[name] for name in weights},
        )
        return RemoteFold(shard, manifest, self._weights.origin(files), settings, self._to_compare)

    @functools.cached_property
    def _quantized_with(self) -> dict[str, str]:
        """The tensors of each FP8 weight, itself, its scales and those of its activations -> its name."""
        quantized = self._settings.quantized.items()
        return {part: name for name, scaled in quantized for part in (name, scaled.scale, *scaled.activations)}

    def tell(self, index: int) -> None:
        """See ``ShardJobs``."""
        record = self._manifest.shards[index].source
        self._progress.item(record.file)
        self._progress.advance(record.size)

    def close(self) -> None:
        """See ``LocalJobs``."""
        self._weights.close()

    def files_of(self, result: FileRecord | None) -> list[FileRecord]:
        """See ``WritingJobs``."""
        return [] if result is None else [result]

    def as_json(self, index: int, result: FileRecord | None) -> Any:
        """See ``RecordedJobs``."""
        return {"file": None if result is None else asdict(result)}

    def recorded(self, index: int, value: Any) -> Recorded[FileRecord | None] | None:
        """See ``RecordedJobs``."""
        file, place = self.shard_files[index], self._settings.place
        try:
            record = decode_file(value, f"{place}: the journal of shard {index + 1}")
        except FormatError:  # made again like any other that is damaged: the same command would meet it for ever
            return None
        size = self._size(index)
        if record is None or size is None:
            holds = record is None and size is None
        else:
            holds = (record.file, record.size) == (file, size) and is_as_recorded(place, record)
        return Recorded(record) if holds else None

    def _size(self, index: int) -> int | None:
        """Of the weight file that is written for a shard; None if there is none."""
        shard = self._manifest.shards[index]
        return self._dense.size(self._weights.header(shard)) if self._settings.dequantize else shard.source.size
