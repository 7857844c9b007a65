"""The work of one shard of a fold: its dense weights written, or only compared."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import FormatError, SourceError
from surgery.files.files import FileRecord, FileWriter, HashSink, not_as_described
from surgery.format.factors import DAMAGED_HINT
from surgery.format.manifest import Manifest, ShardRecord
from surgery.format.safetensors import ShardReader
from surgery.linalg.lossless import Addition
from surgery.memory import bytes_of
from surgery.names import MANIFEST_FILE, PARTIALS_DIR
from surgery.progress import Progress, Silent
from surgery.shards.dense import DenseWeights
from surgery.shards.factorize_shard import check_shared
from surgery.source.origin import Origin
from surgery.weights.base import BASE_HINT, SentWeights, Weights
from surgery.weights.quantization import Scaled


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """What a fold depends on besides the checkpoint; see ``fold``.

    Attributes:
        factorized: the folder that is read.
        out: the output folder.
        place: the folder that is written to, that one or one inside of it.
        window_bytes: how much of a shard is worked on at a time.
        dequantize: whether FP8 weights become bfloat16.
        scales: by the key of a target.
        additions: by the name of a tensor, what an adapter adds to it.
        quantized: its FP8 weights and where their scales are.
    """

    factorized: Path
    out: Path
    place: Path
    window_bytes: int
    dequantize: bool
    scales: Mapping[str, torch.Tensor]
    additions: Mapping[str, Addition]
    quantized: Mapping[str, Scaled]


@dataclass(frozen=True, slots=True)
class RemoteFold:
    """The fold of one shard for another process, perhaps on another machine.

    Attributes:
        shard: which.
        manifest: what it says of the weight files that this one takes.
        origin: where they come from.
        settings: of the fold, with the scales, additions and FP8 weights in them.
        to_compare: whether nothing is written, and only told what it would be.
    """

    shard: ShardRecord
    manifest: Manifest
    origin: Origin
    settings: FoldSettings
    to_compare: bool

    def __call__(self, lane: Lane, attempt: str) -> FileRecord | None:
        """What it has become; unfinished files of several attempts do not meet."""
        settings, manifest = self.settings, self.manifest
        if not self.to_compare:
            check_shared(settings.out)
        if not (settings.factorized / MANIFEST_FILE).is_file():
            raise SourceError(
                f"{settings.factorized} is not there on {socket.gethostname()}",
                hint="the factorized checkpoint must be in a folder that every machine sees under the same path",
            )
        partial = settings.out / PARTIALS_DIR / attempt / self.shard.source.file.replace("/", "--")
        with ExitStack() as stack:
            weights = stack.enter_context(SentWeights(self.origin, manifest.layout))
            dense = stack.enter_context(
                DenseWeights(
                    manifest,
                    settings.factorized,
                    weights,
                    settings.quantized,
                    settings.scales,
                    to_dense=settings.dequantize,
                    additions=settings.additions,
                )
            )
            fold = ShardFold(self.shard, manifest, weights, dense, settings, Silent())
            return fold.run(lane, lambda: None, partial=partial, to_compare=self.to_compare)


@dataclass(frozen=True, slots=True)
class ShardFold:
    """The fold of one shard.

    Attributes:
        shard, manifest, weights, dense, settings: what is folded.
        progress: told of each tensor that is done; called from threads.
    """

    shard: ShardRecord
    manifest: Manifest
    weights: Weights
    dense: DenseWeights
    settings: FoldSettings
    progress: Progress

    def run(self, lane: Lane, on_read: Callable[[], object], *, partial: Path | None, to_compare: bool) -> FileRecord | None:
        """Write the weight file, or only tell what it would be; None if nothing of it is left.

        Args:
            lane: where.
            on_read: called when the shard has been read.
            partial: where the file is until it is finished, if not beside it.
            to_compare: nothing is written.
        """
        file = self.shard.source.file
        with ShardReader(self.weights.file(self.shard)[0], watch=self.weights.watch) as reader:
            if self.dense.size(reader.header) is None:
                self.progress.advance(reader.header.data_bytes)
                return None
            if to_compare:
                sink = HashSink()
                self._write(reader, sink, lane, on_read)
                return FileRecord(file, self.shard.source.size, sink.sha256)
            with FileWriter(self.settings.place / file, partial) as writer:
                self._write(reader, writer, lane, on_read)
                return writer.commit(file)

    def _write(self, reader: ShardReader, writer: FileWriter | HashSink, lane: Lane, on_read: Callable[[], object]) -> None:
        """The bytes of the weight file, in order."""
        shard, dense, progress = self.shard, self.dense, self.progress
        path, expected = self.weights.file(shard)
        header = dense.header(reader.header)
        if lost := dense.missing(shard, reader.header):
            raise FormatError(f"{path}: a target of the manifest is not there", got="nothing", expected=lost[0])
        writer.write(header)

        def fold(window: Sequence[Piece]) -> list[torch.Tensor | None]:
            return [dense.folded(piece, lane.device) if isinstance(piece, TargetPiece) else piece.buffer for piece in window]

        def finish(window: Sequence[Piece], folded: Sequence[torch.Tensor | None]) -> None:
            for piece, weight in zip(window, folded, strict=True):
                if isinstance(piece, TargetPiece):
                    progress.item(piece.entry.name)
                if weight is not None:
                    writer.write(bytes_of(weight.contiguous()))
                progress.advance(len(piece))

        with ShardWalk(reader, dense.touched(reader.header), lane.buffers, lane.timing) as walk:
            lane.flow(walk, self.settings.window_bytes, fold, finish, on_read)
        if walk.sha256 != expected.sha256:
            overlay = self.manifest.layout == "overlay"
            raise not_as_described(path, walk.sha256, expected, BASE_HINT if overlay else DAMAGED_HINT)
        if header == reader.header.raw and dense.keeps(shard, reader.header) and writer.sha256 != shard.source.sha256:
            raise FormatError(f"{path}: untouched scales do not give the source back", hint=DAMAGED_HINT)
