"""The job of one shard of a fold: write its dense weights, or only hash them to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import FormatError
from surgery.files.file_records import FileRecord
from surgery.files.file_writer import FileWriter, HashSink
from surgery.format.factors import RECORDED_DAMAGED_HINT
from surgery.format.safetensors import ShardReader
from surgery.memory import bytes_of
from surgery.names import PARTIALS_DIR
from surgery.progress import Progress, Silent
from surgery.shards.factorize_shard import check_shared
from surgery.source.origin import Origin
from surgery.updates.apply import Updated
from surgery.updates.dense import DenseTensors, Writing
from surgery.updates.kept_updates import KeptUpdate
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint, SentCheckpoint, SourceShard
from surgery.weights.sent import SentFiles


@dataclass(frozen=True, slots=True)
class FoldPlaces:
    """Where a fold writes to.

    Attributes:
        out: the output folder.
        place: the folder that is written to: ``out``, or one inside of it.
        to_compare: whether to write nothing, and only hash what would be written.
        window_bytes: how much of a shard is worked on together.
    """

    out: Path
    place: Path
    to_compare: bool
    window_bytes: int


@dataclass(frozen=True, slots=True)
class FoldedShard:
    """What the fold of a shard gives.

    Attributes:
        file: the weight file that was written, or would be.
        kept: what the rounding kept of each update in it.
        is_as_before: whether its bytes are those of the source's file.
    """

    file: FileRecord
    kept: list[KeptUpdate]
    is_as_before: bool


@dataclass(frozen=True, slots=True)
class RemoteFold:
    """The fold of one shard as an object that is sent to another process, perhaps on another machine.

    Attributes:
        shard: which.
        checkpoint: the part of the checkpoint that this job needs.
        origin: where the process takes its weight files from.
        update: what is added to the weights in them.
        writing: how they are written.
        places: where the result is written to.
    """

    needs_like_machines: ClassVar[bool] = False

    shard: SourceShard
    checkpoint: SentCheckpoint
    origin: Origin
    update: Update
    writing: Writing
    places: FoldPlaces

    def __call__(self, lane: Lane, attempt: str) -> FoldedShard:
        """Do the job. ``attempt`` names the folder for unfinished files, so that two attempts at one time do not clash."""
        if not self.places.to_compare:
            check_shared(self.places.out)
        partial = self.places.out / PARTIALS_DIR / attempt / self.shard.file.replace("/", "--")
        with SentFiles(self.origin) as files, self.checkpoint.open(files) as checkpoint:
            dense = DenseTensors(checkpoint, self.update, self.writing)
            return ShardFold(self.shard, checkpoint, dense, self.places, Silent()).run(lane, lambda: None, partial)


@dataclass(frozen=True, slots=True)
class ShardFold:
    """The fold of one shard.

    Attributes:
        shard: which.
        checkpoint: which it is part of.
        dense: what its tensors become.
        places: where the result is written to.
        progress: told of each tensor that is done; called from threads.
    """

    shard: SourceShard
    checkpoint: Checkpoint
    dense: DenseTensors
    places: FoldPlaces
    progress: Progress

    def run(self, lane: Lane, on_read: Callable[[], object], partial: Path | None) -> FoldedShard:
        """Write the weight file, or only hash what would be written.

        Args:
            lane: the device, threads and memory to do it with.
            on_read: called when the shard has been read.
            partial: the path of the file until it is finished; None: beside its place.
        """
        file, weights = self.shard.file, self.checkpoint.weights
        with weights.opened(file) as reader:
            if self.places.to_compare:
                sink = HashSink()
                kept, source = self._write(reader, sink, lane, on_read)
                record = FileRecord(file, self.dense.size(reader.header), sink.sha256)
            else:
                with FileWriter(self.places.place / file, partial) as writer:
                    kept, source = self._write(reader, writer, lane, on_read)
                    record = writer.commit(file)
            return FoldedShard(record, kept, record.sha256 == source)

    def _write(
        self, reader: ShardReader, writer: FileWriter | HashSink, lane: Lane, on_read: Callable[[], object]
    ) -> tuple[list[KeptUpdate], str]:
        """Write the header and, in the order of the shard, the bytes of each window.

        Returns:
            What rounding kept, and the sha256 of the source's file.
        """
        shard, dense, progress, weights = self.shard, self.dense, self.progress, self.checkpoint.weights
        path, header = weights.path(shard.file), dense.header(reader.header)
        if lost := self.checkpoint.missing(shard.file, [entry.name for entry in reader.header.tensors]):
            raise FormatError(f"{path}: a target of the manifest is not there", got="nothing", expected=lost[0])
        writer.write(header)
        total = Updated(torch.empty(0))

        def fold(window: Sequence[Piece]) -> list[Updated | None]:
            return [
                dense.of(piece, lane.device) if isinstance(piece, TargetPiece) else Updated(piece.buffer) for piece in window
            ]

        def finish(window: Sequence[Piece], folded: Sequence[Updated | None]) -> None:
            for piece, updated in zip(window, folded, strict=True):
                if isinstance(piece, TargetPiece):
                    progress.item(piece.entry.name)
                if updated is not None:
                    writer.write(bytes_of(updated.tensor.contiguous()))
                    for more in updated.kept.values():
                        total.keep(more)
                progress.advance(len(piece))

        with ShardWalk(reader, dense.touched(reader.header), lane.buffers, lane.timing) as walk:
            lane.flow(walk, self.places.window_bytes, fold, finish, on_read)
        weights.check(shard.file, walk.sha256)
        source = shard.sha256 or walk.sha256
        if header == reader.header.raw and dense.keeps(reader.header) and writer.sha256 != source:
            raise FormatError(f"{path}: untouched weights do not give the source back", hint=RECORDED_DAMAGED_HINT)
        return list(total.kept.values()), source
