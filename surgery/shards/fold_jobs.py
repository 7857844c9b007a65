"""The jobs of a fold, one for each weight file, and how their results are kept in a journal and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from surgery.engine.lane import Lane
from surgery.errors import FormatError
from surgery.files.file_records import FileRecord
from surgery.format.decoding import decode
from surgery.progress import listening
from surgery.run.contents import is_as_recorded
from surgery.run.resume import Recorded
from surgery.shards.fold_shard import FoldedShard, FoldPlaces, RemoteFold, ShardFold
from surgery.shards.held_files import HeldFiles
from surgery.timing import Timing, timed
from surgery.updates.dense import DenseTensors
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint, SourceShard


class FoldJobs:
    """The ``WritingJobs`` of a fold or a merge.

    Args:
        checkpoint: what is folded into.
        update: what is added to its weights.
        dense: what its tensors become.
        places: where they are written to, or that they are only compared.
        timing: told how long downloads take; None if nobody asks.

    Attributes:
        shard_files: the weight file of each job.
        checkpoint, update, dense, places: as given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        update: Update,
        dense: DenseTensors,
        places: FoldPlaces,
        timing: Timing | None,
    ) -> None:
        self.shard_files = [shard.file for shard in checkpoint.shards]
        self.checkpoint = checkpoint
        self.update = update
        self.dense = dense
        self.places = places
        self._weights = checkpoint.weights
        self._timing = timing
        self._progress = listening()

    def _shard(self, index: int) -> SourceShard:
        return self.checkpoint.shards[index]

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """See ``LocalJobs``."""
        files = self._weights.files
        if self._timing is not None and files.room_to_fetch():
            self._timing.watch("download")
        for index in which:
            files.wait_for_room()
            with timed("download"):
                for file in self.dense.files(self.shard_files[index]):
                    files.acquire(file)
            yield index

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> FoldedShard:
        """See ``LocalJobs``."""
        shard = self._shard(index)
        with HeldFiles(self.dense.files(shard.file), self._weights.release) as held:

            def on_shard_read() -> None:
                if not self._weights.quantized:  # else scales are read until the job is done
                    held.release()
                on_read()

            return ShardFold(shard, self.checkpoint, self.dense, self.places, self._progress).run(lane, on_shard_read, None)

    def remote(self, index: int) -> RemoteFold:
        """See ``ShardJobs``."""
        shard, places = self._shard(index), self.places
        files = self.dense.files(shard.file)
        # Only these are sent to the task: with thousands of weight files, all the others would be most of what is sent.
        names = {entry.name for file in files for entry in self._weights.header(file).tensors}
        checkpoint = self.checkpoint.sent(files, names)
        return RemoteFold(
            shard,
            checkpoint,
            self._weights.files.origin(files),
            self.update.part(checkpoint.keys, names),
            self.dense.writing,
            dataclasses.replace(places, out=places.out.resolve(), place=places.place.resolve()),
        )

    def tell(self, index: int) -> None:
        """See ``ShardJobs``."""
        shard = self._shard(index)
        self._progress.item(shard.file)
        self._progress.advance(shard.size)

    def close(self) -> None:
        """See ``LocalJobs``."""
        self._weights.files.close()

    def files_of(self, result: FoldedShard) -> list[FileRecord]:
        """See ``WritingJobs``."""
        return [result.file]

    def as_json(self, index: int, result: FoldedShard) -> Any:
        """See ``RecordedJobs``."""
        return asdict(result)

    def recorded(self, index: int, value: Any) -> Recorded[FoldedShard] | None:
        """See ``RecordedJobs``."""
        shard, place = self._shard(index), self.places.place
        try:
            result = decode(FoldedShard, value, f"{place}: the journal of shard {index + 1}")
        except FormatError:  # a damaged record: the job is done again, else the same command would fail for ever
            return None
        holds = (result.file.file, result.file.size) == (shard.file, self._size(shard))
        return Recorded(result) if holds and is_as_recorded(place, result.file) else None

    def _size(self, shard: SourceShard) -> int:
        """Bytes of the weight file that is written for a shard."""
        if not self.dense.writing.is_stored_otherwise:
            return shard.size
        return self.dense.size(self._weights.header(shard.file))
