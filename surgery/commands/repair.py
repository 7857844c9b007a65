"""``verify --repair``: damaged files of a factorized checkpoint are made again from its base, to the recorded bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.resources import Memory
from surgery.engine.sharing import share_out
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import FormatError, OptionError, OutputError, SourceError, SurgeryError
from surgery.files.access import write_errors
from surgery.files.file_records import FileRecord, not_as_described
from surgery.files.file_writer import FileWriter, copy_file, sync_directory
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.format.scales.writing import write_untouched
from surgery.format.tensor_view import by_tensor
from surgery.lossless.split import split
from surgery.names import JOURNAL_DIR, SCALES_FILE
from surgery.planning.memory import collected_bytes, need_to_factorize
from surgery.planning.plan import Layout, ShardPlan
from surgery.planning.recipes import Recipe, find_recipe
from surgery.planning.targets import Target, extent
from surgery.progress import Progress, note, phase
from surgery.quantized.weight import Quantized, packed_in
from surgery.run.contents import not_as_recorded
from surgery.run.disk_room import DiskNeed, check_room, download_needs
from surgery.run.engines import LocalEngine
from surgery.run.lock import locked
from surgery.shards.factorize_shard import Job, run_job
from surgery.source.open import open_source
from surgery.source.protocol import Source
from surgery.weights.overlay import BASE_HINT, open_base, quantized_targets
from surgery.weights.protocol import check_entry
from surgery.weights.recognition import quantization_in

#: The folder that files are made in before they take their places.
_PLACE = f"{JOURNAL_DIR}/repaired"


@dataclass(frozen=True, slots=True)
class Repaired:
    """The outcome of a repair.

    Attributes:
        files: names of the files that were made again.
        failed: name of a file that could not be -> why.
    """

    files: tuple[str, ...]
    failed: Mapping[str, SurgeryError]


def source_to_repair_from(manifest: Manifest, base: str | Path | None) -> Source:
    """Open the base of a checkpoint: the model that the user gives, else the one on the hub that the manifest names.

    Raises:
        OptionError: there is neither.
        SourceError, FormatError: see ``open_source``.
    """
    record = manifest.source
    if base is None and record.repo_id is not None:
        return open_source(record.repo_id, revision=record.commit, subfolder=record.subfolder)
    if base is None:
        raise OptionError(
            "--repair needs the model that was factorized, and the manifest does not say where that is",
            hint="--base MODEL: damaged files are made again from it, or copied",
        )
    return open_base(base, manifest)


def repair_files(folder: Path, manifest: Manifest, source: Source, by: LocalEngine, progress: Progress) -> Repaired:
    """Make again the files that are missing or not as recorded, each whole or not at all.

    A residual is computed from the weights and whole factors, with the same bits on any machine. Factors need the SVD again,
    and the same bits come only from the same versions on the same kind of device. A file is replaced only by one with the
    recorded hash. Missing scales are written as factorize writes them, all 1. Scales that are there are never touched.

    Args:
        folder, manifest: of the checkpoint.
        source: the model it was made from; only read.
        by: the engine.
        progress: told how far it is.

    Raises:
        OutputError: another run holds the folder, or has put another result there; the folder is the source's own; or the
            disk has too little room or fails.
    """
    files: list[str] = []
    failed: dict[str, SurgeryError] = {}
    with locked(folder, source.folders()):
        # Opening the source may take long, and meanwhile another run may have put another result in the place of this one.
        if Manifest.read(folder) != manifest:
            raise OutputError(f"{folder} has been replaced by another checkpoint meanwhile", hint="run the same command again")
        lost = set(not_as_recorded(folder, manifest.output_files()))
        try:
            for record in manifest.files:
                if record.file in lost:
                    _copy(folder, source, record, files, failed)
            which = [i for i, shard in enumerate(manifest.shards) if any(record.file in lost for record in shard.written)]
            if which:
                needed = sum(record.size for i in which for record in manifest.shards[i].written)
                check_room(DiskNeed(folder, needed, "what is repaired"), *download_needs(source))
                jobs = _RepairJobs(folder, manifest, source, lost, progress)
                memory = jobs.memory(by)
                with phase(progress, "repairing", sum(manifest.shards[i].source.size for i in which)):
                    with closing(by.run(jobs, which, memory)) as finished:
                        for _, (done, error, wanted) in finished:
                            files += done
                            if error is not None:
                                failed.update(dict.fromkeys(wanted, error))
        finally:
            source.close()
            shutil.rmtree(folder / _PLACE, ignore_errors=True)
        if not (folder / SCALES_FILE).exists() and not (folder / SCALES_FILE).is_symlink():
            write_untouched(folder / SCALES_FILE, manifest.targets, manifest.fingerprint)
            files.append(SCALES_FILE)
            note(
                f"{SCALES_FILE} was missing and has been written as factorize writes it, with scales that are all 1; if you "
                "have a trained file, put it in its place"
            )
    return Repaired(tuple(files), failed)


def _copy(folder: Path, source: Source, record: FileRecord, files: list[str], failed: dict[str, SurgeryError]) -> None:
    try:
        if record.file not in source.selection.others:
            raise SourceError(f"{source.name} has no {record.file}", hint=BASE_HINT)
        copy_file(source.fetch(record.file), folder / record.file, record.file, record)
        files.append(record.file)
    except SurgeryError as error:
        failed[record.file] = error


class _RepairJobs:
    """The ``LocalJobs`` of a repair, for damaged shards.

    The result of a job: the files that were made; an error, or None; and the files that could not be made because of it.
    """

    def __init__(self, folder: Path, manifest: Manifest, source: Source, lost: set[str], progress: Progress) -> None:
        self._folder = folder
        self._manifest = manifest
        self._source = source
        self._there = frozenset(source.selection.shards)
        self._lost = lost
        self._progress = progress
        self._window = 0
        self._not_there: dict[int, SurgeryError] = {}
        self._recipe = _recipe_of(manifest)
        self._layout: Layout = "overlay" if manifest.layout == "overlay" else "residual"
        self._quantized: Mapping[str, Quantized] = {}
        if quantized_targets(manifest):
            headers = {shard: source.header(shard) for shard in source.selection.shards}
            self._quantized = quantization_in(source, headers).weights

    def memory(self, by: LocalEngine) -> Memory:
        """Memory for the jobs, with windows as in the run that made the files: the same matrices share a batch."""
        targets = [self._target(one) for one in self._manifest.targets]
        memory = share_out(
            [need_to_factorize(target, prove=self._manifest.options.prove) for target in targets],
            by.resources,
            kept=collected_bytes(targets, len(self._manifest.targets) + len(self._manifest.skipped)),
            windows="resident",
            longest=max(shard.source.size for shard in self._manifest.shards),
        )
        self._window = memory.window_bytes
        return memory

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        for index in which:
            shard = self._manifest.shards[index]
            try:
                if shard.source.file not in self._there:
                    raise SourceError(f"{self._source.name} has no {shard.source.file}", hint=BASE_HINT)
                self._source.fetch(shard.source.file)
            except SurgeryError as error:  # told by the job; other shards can be repaired all the same
                self._not_there[index] = error
            yield index

    def do_shard(
        self, index: int, lane: Lane, on_read: Callable[[], object]
    ) -> tuple[list[str], SurgeryError | None, list[str]]:
        shard = self._manifest.shards[index]
        wanted = [record.file for record in shard.written if record.file in self._lost]
        place = self._folder / _PLACE / str(index)
        try:
            if index in self._not_there:
                raise self._not_there[index]
            path = self._source.fetch(shard.source.file)
            if (size := path.stat().st_size) != shard.source.size:
                raise not_as_described(path, f"of {size} bytes", shard.source, BASE_HINT)
            if shard.factors is None or shard.factors.file not in self._lost:
                made = [self._residual(shard, path, place, lane, on_read)]
            else:
                made = self._all(index, path, place, lane, on_read)
            return self._put(shard, made, place), None, []
        except SurgeryError as error:
            return [], error, wanted

    def close(self) -> None:
        self._source.close()

    def _put(self, shard: ShardRecord, made: Sequence[FileRecord], place: Path) -> list[str]:
        """Move the files of a shard from ``place`` to the checkpoint, if all that are needed have the recorded hashes.

        Raises:
            FormatError: one has another hash; then none is moved.
        """
        expected = {record.file: record for record in shard.written}
        for record in made:
            if record.file in self._lost and record != expected[record.file]:
                raise FormatError(
                    f"{record.file} cannot be made again with the same bytes, and is not replaced",
                    got=f"sha256 {record.sha256}",
                    expected=f"sha256 {expected[record.file].sha256}",
                    hint=f"the SVD gives other bits with another version of torch (now {torch.__version__}, then "
                    f"{self._manifest.torch}) or of surgery, or on another kind of device (then {self._manifest.device}): "
                    "use the same ones, or factorize again",
                )
        done = []
        for record in made:
            if record.file in self._lost:
                target = self._folder / record.file
                with write_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (place / record.file).replace(target)
                    sync_directory(target.parent)
                done.append(record.file)
        return done

    def _all(self, index: int, path: Path, place: Path, lane: Lane, on_read: Callable[[], object]) -> list[FileRecord]:
        """Make residual and factors of a shard in ``place``, by factorizing it again."""
        shards, shard = self._manifest.shards, self._manifest.shards[index]
        targets = tuple(self._target(record) for record in self._manifest.targets_of(shard.source.file))
        packed = packed_in(target.quantized for target in targets if target.quantized is not None)
        with ShardReader(path, name=shard.source.file, watch=self._source.watch, packed=packed) as reader:
            planned = ShardPlan(shard.source.file, shard.source.size, reader.header, targets)
            for record in self._manifest.targets_of(shard.source.file):
                if (entry := reader.entries.get(record.tensor)) is None:
                    raise SourceError(f"{path} has no {record.tensor}", hint=BASE_HINT)
                check_entry(entry, record)
        job = Job(planned, index, len(shards), self._source, place, None, self._window, self._layout, self._manifest.options)
        result = run_job(job, lane, self._progress, on_read)
        if result.shard.source != shard.source:
            raise not_as_described(path, result.shard.source.sha256, shard.source, BASE_HINT)
        return result.shard.written

    def _residual(self, shard: ShardRecord, path: Path, place: Path, lane: Lane, on_read: Callable[[], object]) -> FileRecord:
        """Make the residual of a shard in ``place``, from the weights and the factors that are there."""
        assert shard.residual is not None
        by_name = by_tensor(self._manifest.targets_of(shard.source.file))
        with ExitStack() as stack:
            source = stack.enter_context(ShardReader(path, name=shard.source.file, watch=self._source.watch))
            factors = stack.enter_context(FactorsReader(self._folder, shard)) if by_name else None
            writer = stack.enter_context(FileWriter(place / shard.residual.file))
            for name, targets in by_name.items():
                if (entry := source.entries.get(name)) is None:
                    raise SourceError(f"{path} has no {name}", hint=BASE_HINT)
                check_entry(entry, targets[0])
            portions = {name: targets[0].at_a_time for name, targets in by_name.items()}
            writer.write(source.header.raw)

            def split_window(window: Sequence[Piece]) -> None:
                for piece in window:
                    if isinstance(piece, TargetPiece) and factors is not None:
                        for target in by_name[piece.entry.name]:
                            _split(piece, target, factors, lane.device)

            def finish(window: Sequence[Piece], _: None) -> None:
                for piece in window:
                    if isinstance(piece, TargetPiece):
                        self._progress.item(piece.entry.name)
                    for data in lane.buffers.parts(piece.buffer):
                        writer.write(data)
                    self._progress.advance(len(piece))

            walk = stack.enter_context(ShardWalk(source, portions, lane.buffers, lane.timing))
            lane.flow(walk, self._window, split_window, finish, on_read)
            if walk.sha256 != shard.source.sha256:
                raise not_as_described(path, walk.sha256, shard.source, BASE_HINT)
            return writer.commit(shard.residual.file)

    def _target(self, record: TargetRecord) -> Target:
        """The planned target that a recorded one was made from."""
        most, energy = extent(
            self._manifest.options, self._recipe.rule_for(record.tensor) if self._recipe is not None else None
        )
        short = min(record.matrices[1:])
        return Target(
            tensor=record.tensor,
            shard=record.shard,
            dtype=record.dtype,
            shape=tuple(record.shape),
            view=record.seen_as,
            rank=record.rank if energy is None else min(most, short),
            energy=energy,
            asked=record.rank,
            quantized=self._quantized.get(record.tensor),
            aliases=tuple(record.aliases),
        )


def _recipe_of(manifest: Manifest) -> Recipe | None:
    """The recipe that the checkpoint was made with; None if there is none of its name here, which matters for energies only."""
    if manifest.options.recipe is None:
        return None
    try:
        return find_recipe(manifest.options.recipe)
    except SurgeryError:
        return None


def _split(piece: TargetPiece, target: TargetRecord, factors: FactorsReader, device: torch.device) -> None:
    """Overwrite the weights of a target in a piece with their residuals."""
    matrices = target.seen_as.matrices(piece.tensor)
    for i, matrix in enumerate(matrices):
        kept = factors.factors(target, piece.first + i)

        def residual(weight: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
            return [split(weight[0].to(where), kept.to(where), correct=False).residual]  # noqa: B023  # used at once

        matrix.copy_(as_memory_allows(residual, [matrix], device)[0])
    if target.slice is not None:
        target.seen_as.store(matrices, piece.tensor)
