"""Fold trained scales back into dense weights: the walk of factorize in the other direction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from surgery import __version__
from surgery.device import choose_devices, device_name
from surgery.engine.lane import Lane
from surgery.engine.local import run_jobs
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import FormatError, OptionError, OutputError
from surgery.format.factors import DAMAGED_HINT
from surgery.format.files import (
    RESTORE_HINT,
    FileRecord,
    FileWriter,
    HashSink,
    check_file,
    copy_file,
    file_sha256,
    not_as_described,
    write_file,
)
from surgery.format.lora import read_lora
from surgery.format.manifest import Manifest, ShardRecord, decode_file
from surgery.format.safetensors import ShardReader
from surgery.format.scales import check_scales, read_scales
from surgery.linalg.lossless import Addition
from surgery.memory import bytes_of
from surgery.names import CONFIG_FILE, MANIFEST_FILE, STREAM_DIR
from surgery.operations.base import BaseWeights, OwnWeights, weight_source
from surgery.operations.dense import DenseWeights
from surgery.operations.journal import Journal
from surgery.operations.lanes import lanes_of, resources_of
from surgery.operations.output import files_in, is_as_recorded, loading_order, locked, prepare_output
from surgery.operations.publish import publish_folded, submit_files, uploading
from surgery.operations.quantized import index_of, without_quantization
from surgery.planning.memory import need_to_fold, share_out
from surgery.progress import Progress, Shared, Silent
from surgery.source.select import INDEX_SUFFIX
from surgery.timing import Timing, timed

if TYPE_CHECKING:
    from surgery.source.upload import Upload
from surgery.training.adapter import additions_of

_T = TypeVar("_T")
_Work = Callable[[ShardRecord, Lane, Callable[[], object]], _T]

_BASE_HINT = "give the model that was factorized with --base"


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What a fold wrote.

    Attributes:
        out: the folder.
        files: its weight files.
        targets: how many tensors had scales.
        changed: how many of them had scales other than 1.
        restored: weight files that are the source's own, bit for bit.
        lossless: whether untouched weights are the source's: not after ``--no-correction``.
        dequantized: whether FP8 weights have become bfloat16.
        adapted: how many tensors a LoRA adapter changed.
    """

    out: Path
    files: tuple[FileRecord, ...]
    targets: int
    changed: int
    restored: int
    lossless: bool
    dequantized: bool
    adapted: int


def fold(
    factorized: str | Path,
    scales: str | Path | Mapping[str, torch.Tensor],
    out: str | Path = "folded",
    *,
    base: str | Path | None = None,
    lora: str | Path | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    max_device_memory: int | None = None,
    dequantize: bool = False,
    stream: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    timing: Timing | None = None,
) -> FoldReport:
    """Write dense weights ``round(W + U diag(s (g - 1)) V^T + B A)`` under the source's names, dtypes and shards.

    W is recovered bit for bit and the update added with one rounding at the end, so a target whose scales are all 1
    keeps its bytes. A residual without a correction gives ``round(R + U diag(s g) V^T)`` instead. ``B A`` is the update
    of a LoRA adapter, if one is given, scaled by its alpha.

    Args:
        factorized: a folder written by ``factorize``.
        scales: a scales file, or for the key of each target ``g``, (k,), or (B, k) for a stack.
        out: folder to write, empty or new.
        base: for an overlay, the model it was made from (folder or hub id), if the one that the manifest names is
            not to be used.
        lora: folder of a LoRA adapter that was trained together with the scales, as PEFT saves it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or ``all`` CUDA devices.
        max_memory, max_device_memory: as for ``factorize``.
        dequantize: write every FP8 weight as bfloat16, without its scales, and drop the quantization from the config;
            otherwise a changed FP8 weight is quantized again, with fresh scales for its blocks.
        stream: for an overlay, fetch each weight file of the base from the hub when its turn comes, and drop it when it has
            been read.
        push_to_hub, private: as for ``factorize``.
        overwrite: replace an earlier result in ``out``.
        progress: told how far it is.
        timing: told where the time goes.

    Raises:
        SurgeryError: see ``surgery.errors``. ``config.json`` comes last, so no loader takes what is there by then
            for a model; the same call goes on after the last finished shard.

    Warns:
        SurgeryWarning: see ``surgery.format.scales.read_scales``.
    """
    progress = progress or Silent()
    # Folding is float64 arithmetic, which an Apple GPU does not have.
    devices = [torch.device("cpu") if where.type == "mps" else where for where in choose_devices(device)]
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    values = check_scales(scales, manifest) if isinstance(scales, Mapping) else read_scales(Path(scales), manifest)
    weights = weight_source(factorized, manifest, base, (out / STREAM_DIR, len(devices) + 1) if stream else None)
    inputs = [factorized] + ([folder] if (folder := weights.folder()) else [])
    if not isinstance(scales, Mapping):
        inputs.append(Path(scales))
    additions: dict[str, Addition] = {}
    if lora is not None:
        inputs.append(Path(lora))
        additions = _additions(factorized, manifest, weights, Path(lora))
    resources = resources_of(devices, max_memory, max_device_memory)
    memory = share_out([need_to_fold(target) for target in manifest.targets], resources)
    with (
        uploading(push_to_hub, private=private) as upload,
        locked(out, inputs, progress),
        DenseWeights(manifest, factorized, weights, values, to_dense=dequantize, additions=additions) as dense,
        lanes_of(devices, memory, max_device_memory, timing) as lanes,
    ):
        work = _Folding(manifest, weights, dense, memory.window_bytes, Shared(progress))
        if dequantize and not dense.quantized:
            raise OptionError("there is nothing to dequantize: this is no overlay of an FP8 model", hint="drop --dequantize")
        if not overwrite and _looks_finished(out, manifest, dequantize):
            report = _compared(out, work, lanes, values, len(additions), progress)
            Journal.forget(out)
            _publish(upload, report, manifest, progress, submitted=False)
            return report
        journal = Journal(out, _identity(factorized, manifest, weights, values, additions, devices[0], dequantize))
        # What is FP8 takes twice as much in bfloat16.
        needed = sum(shard.source.size for shard in manifest.shards) * (2 if dequantize else 1)
        needed += sum(record.size for record in manifest.files)
        writes = [shard.source.file for shard in manifest.shards] + [record.file for record in manifest.files]
        prepare_output(out, journal, writes, needed, overwrite=overwrite)
        files = _fold_shards(work, lanes, out, journal, upload, progress)
        _copy_others(factorized, out, manifest, to_dense=dequantize)
        Journal.forget(out)
        report = _report(out, files, manifest, values, len(additions), dequantize=dequantize)
        _publish(upload, report, manifest, progress, submitted=True)
    return report


def _publish(upload: Upload | None, report: FoldReport, manifest: Manifest, progress: Progress, *, submitted: bool) -> None:
    if not submitted:
        for record in report.files:
            submit_files(upload, report.out, [record])
    publish_folded(
        upload,
        report.out,
        manifest,
        changed=report.changed,
        adapted=report.adapted,
        dequantized=report.dequantized,
        progress=progress,
    )


def _additions(factorized: Path, manifest: Manifest, weights: OwnWeights | BaseWeights, lora: Path) -> dict[str, Addition]:
    """What a LoRA adapter adds to which tensors."""
    shapes = {}
    for shard in manifest.shards:
        with ShardReader(weights.file(shard)[0]) as reader:
            shapes.update({entry.name: entry.shape for entry in reader.header.tensors})
    return additions_of(factorized, shapes, read_lora(lora))


def _report(
    out: Path,
    files: list[FileRecord],
    manifest: Manifest,
    values: Mapping[str, torch.Tensor],
    adapted: int,
    *,
    dequantize: bool,
) -> FoldReport:
    changed = sum(bool((value != 1).any()) for value in values.values())
    originals = {shard.source.file: shard.source.sha256 for shard in manifest.shards}
    restored = sum(file.sha256 == originals[file.file] for file in files)
    return FoldReport(out, tuple(files), len(values), changed, restored, manifest.lossless, dequantize, adapted)


def _looks_finished(out: Path, manifest: Manifest, dequantize: bool) -> bool:
    """Whether ``out`` may hold a complete fold of this checkpoint: its files, no others, and weights of the right sizes."""
    if Journal.is_there(out) or dequantize or any(path.is_symlink() for path in out.rglob("*")):
        return False
    expected = {record.file for record in manifest.files} | {shard.source.file for shard in manifest.shards}
    return files_in(out) == expected and all(
        (out / shard.source.file).stat().st_size == shard.source.size for shard in manifest.shards
    )


def _compared(
    out: Path, work: _Folding, lanes: Sequence[Lane], values: Mapping[str, torch.Tensor], adapted: int, progress: Progress
) -> FoldReport:
    """The report of a fold that is complete already. It keeps no record of itself, so it is done again and compared.

    Raises:
        OutputError: what is there is another fold, or something else.
    """
    manifest = work.manifest
    progress.start("comparing", sum(shard.source.size for shard in manifest.shards))
    hashes: dict[str, str] = {}

    def compare(shard: ShardRecord, lane: Lane, read: Callable[[], object]) -> None:
        sink = HashSink()
        with ShardReader(work.weights.file(shard)[0]) as reader:
            work.write(shard, reader, sink, lane, read)
        hashes[shard.source.file] = sink.sha256

    try:
        with closing(run_jobs(work.held(compare), work.acquired(manifest.shards), lanes)) as finished:
            for _ in finished:
                pass
    finally:
        work.weights.close()
        progress.finish()
    files = [FileRecord(shard.source.file, shard.source.size, hashes[shard.source.file]) for shard in manifest.shards]
    if not all(is_as_recorded(out, record) for record in (*files, *manifest.files)):
        raise OutputError(
            f"{out} holds files already, and they are not those of this fold",
            hint="--overwrite replaces an earlier result; -o chooses another folder",
        )
    progress.note(f"{out} is already complete: nothing to do")
    return _report(out, files, manifest, values, adapted, dequantize=False)


def _identity(
    factorized: Path,
    manifest: Manifest,
    weights: OwnWeights | BaseWeights,
    scales: Mapping[str, torch.Tensor],
    additions: Mapping[str, Addition],
    device: torch.device,
    dequantize: bool,
) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    digest, added = hashlib.sha256(), hashlib.sha256()
    for key, value in sorted(scales.items()):
        digest.update(f"{key}\0".encode() + bytes_of(value.contiguous()))
    for tensor, addition in sorted(additions.items()):
        added.update(f"{tensor}\0".encode() + bytes_of(addition.left.contiguous()) + bytes_of(addition.right.contiguous()))
    return {
        "command": "fold",
        "tool": f"surgery {__version__}",
        "torch": torch.__version__,
        "device": device_name(device),
        "manifest": file_sha256(factorized / MANIFEST_FILE),
        "scales": digest.hexdigest(),
        "lora": added.hexdigest(),
        "dequantize": dequantize,
        "base": weights.stamps(),
    }


def _fold_shards(
    work: _Folding, lanes: Sequence[Lane], out: Path, journal: Journal, upload: Upload | None, progress: Progress
) -> list[FileRecord]:
    """Write all weight files but those that an earlier start of this run has written."""
    shards = work.manifest.shards
    progress.start("folding", sum(shard.source.size for shard in shards))
    files: dict[int, FileRecord | None] = {}

    def fold_shard(shard: ShardRecord, lane: Lane, read: Callable[[], object]) -> FileRecord | None:
        return work.to_file(shard, out, lane, read)

    try:
        for index, shard in enumerate(shards):
            known = journal.recorded(index)
            record = None if known is None else decode_file(known, f"{out}: the journal of shard {index + 1}")
            if known is not None and (record is None or is_as_recorded(out, record)):
                files[index] = record
                submit_files(upload, out, [record] if record else [])
                progress.advance(shard.source.size)
        missing = [shard for index, shard in enumerate(shards) if index not in files]
        places = {shard.source.file: index for index, shard in enumerate(shards)}
        with closing(run_jobs(work.held(fold_shard), work.acquired(missing), lanes)) as finished:
            for shard, record in finished:
                index = places[shard.source.file]
                files[index] = record
                journal.record(index, {"file": None if record is None else asdict(record)})
                submit_files(upload, out, [record] if record else [])
    finally:
        work.weights.close()
        progress.finish()
    return [record for index in range(len(shards)) if (record := files[index]) is not None]


@dataclass(frozen=True, slots=True)
class _Folding:
    """What is done with a shard. ``progress`` is called from threads."""

    manifest: Manifest
    weights: OwnWeights | BaseWeights
    dense: DenseWeights
    window_bytes: int
    progress: Progress

    def acquired(self, shards: Iterable[ShardRecord]) -> Iterator[ShardRecord]:
        """The shards, each when its files are here."""
        for shard in shards:
            self.weights.wait_for_room()
            with timed("download"):
                for file in self.dense.files(shard):
                    self.weights.acquire(file)
            yield shard

    def held(self, work: _Work[_T]) -> _Work[_T]:
        """The same work, after which the files of the shard are released; earlier, if nobody looks into them again."""

        def and_release(shard: ShardRecord, lane: Lane, read: Callable[[], object]) -> _T:
            files = self.dense.files(shard)

            def release() -> None:
                while files:
                    self.dense.forget(files[-1])
                    self.weights.release(files.pop())

            def has_been_read() -> None:
                if not self.dense.quantized:
                    release()
                read()

            try:
                return work(shard, lane, has_been_read)
            finally:
                release()

        return and_release

    def to_file(self, shard: ShardRecord, out: Path, lane: Lane, read: Callable[[], object]) -> FileRecord | None:
        """Write one weight file; None if nothing of it is left."""
        with ShardReader(self.weights.file(shard)[0]) as reader:
            if reader.header.tensors and all(self.dense.drops(entry.name) for entry in reader.header.tensors):
                self.progress.advance(reader.header.data_bytes)
                return None
            with FileWriter(out / shard.source.file) as writer:
                self.write(shard, reader, writer, lane, read)
                return writer.commit(shard.source.file)

    def write(
        self, shard: ShardRecord, reader: ShardReader, writer: FileWriter | HashSink, lane: Lane, read: Callable[[], object]
    ) -> None:
        """The bytes of one weight file, in order."""
        path, expected = self.weights.file(shard)
        header = self.dense.header(reader.header)
        if lost := self.dense.missing(shard, reader.header):
            raise FormatError(f"{path}: a target of the manifest is not there", got="nothing", expected=lost[0])
        writer.write(header)

        def fold(window: Sequence[Piece]) -> list[torch.Tensor | None]:
            return [
                self.dense.folded(piece, lane.device) if isinstance(piece, TargetPiece) else piece.buffer for piece in window
            ]

        def finish(window: Sequence[Piece], folded: Sequence[torch.Tensor | None]) -> None:
            for piece, weight in zip(window, folded, strict=True):
                if isinstance(piece, TargetPiece):
                    self.progress.item(piece.entry.name)
                if weight is not None:
                    writer.write(bytes_of(weight.contiguous()))
                self.progress.advance(len(piece))

        with ShardWalk(reader, self.dense.touched(reader.header), lane.buffers, lane.timing) as walk:
            lane.flow(walk, self.window_bytes, fold, finish, read)
        if walk.sha256 != expected.sha256:
            overlay = self.manifest.layout == "overlay"
            raise not_as_described(path, walk.sha256, expected, _BASE_HINT if overlay else DAMAGED_HINT)
        if header == reader.header.raw and self.dense.keeps(shard, reader.header) and writer.sha256 != shard.source.sha256:
            raise FormatError(f"{path}: untouched scales do not give the source back", hint=DAMAGED_HINT)


def _copy_others(factorized: Path, out: Path, manifest: Manifest, *, to_dense: bool) -> None:
    """What goes along with the weights: as it is, but for what speaks of a quantization that is no more.

    What an earlier start has put in place stays: once ``config.json`` is there, nothing is in the making any more.
    """
    by_name = {record.file: record for record in manifest.files}
    for name in loading_order(by_name):
        is_index = name.endswith(INDEX_SUFFIX) and "/" not in name
        if to_dense and (name == CONFIG_FILE or is_index):
            check_file(factorized, by_name[name], RESTORE_HINT)
            data = index_of(out, factorized / name) if is_index else without_quantization(factorized / name)
            if not (out / name).is_file() or (out / name).read_bytes() != data:
                write_file(out / name, data)
        elif not is_as_recorded(out, by_name[name]):
            copy_file(factorized / name, out / name, name, by_name[name])
