"""The jobs of a factorization, one for each weight file, and how their results are kept in a journal and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from surgery.engine.lane import Lane
from surgery.errors import FormatError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, file_sha256
from surgery.format.manifest import ShardResult
from surgery.names import factors_file
from surgery.planning.plan import Plan
from surgery.progress import listening
from surgery.run.contents import is_as_recorded
from surgery.run.factorization import has_other_rank, target_identity
from surgery.run.resume import Recorded
from surgery.shards.factorize_shard import Job, RemoteShard, files_of_parts, run_job
from surgery.shards.held_files import HeldFiles
from surgery.source.protocol import Source
from surgery.timing import Timing, timed


class FactorizeJobs:
    """The ``WritingJobs`` of a factorization, in this process or in others.

    Args:
        source: the model.
        plan: what is done with each of its weight files.
        out: the output folder of the run.
        place: the folder that is written to: ``out``, or one inside of it.
        timing: told how long downloads take; None if nobody asks.

    Attributes:
        shard_files: the weight file of each job.
    """

    def __init__(self, source: Source, plan: Plan, out: Path, place: Path, timing: Timing | None) -> None:
        self.shard_files = [shard.file for shard in plan.shards]
        self._source = source
        self._plan = plan
        self._out = out
        self._place = place
        self._timing = timing
        self._progress = listening()

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """See ``LocalJobs``."""
        if self._timing is not None and self._source.room_to_fetch():
            self._timing.watch("download")
        is_fetched = self._source.bytes_to_fetch() > 0
        for index in which:
            shard = self._plan.shards[index]
            self._source.wait_for_room()
            if is_fetched:
                self._progress.item(f"fetching {shard.file}")
            with timed("download"):
                for file in (shard.file, *files_of_parts(shard)):
                    self._source.acquire(file)
            yield index

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> ShardResult:
        """See ``LocalJobs``."""
        plan = self._plan
        shards, window = plan.shards, plan.memory.window_bytes
        parts = files_of_parts(shards[index])
        job = Job(shards[index], index, len(shards), self._source, self._place, None, window, plan.layout, plan.options)
        with HeldFiles([shards[index].file, *parts], self._source.release) as held:

            def on_shard_read() -> None:
                if not parts:  # those of quantized weights are read until the job is done
                    held.release()
                on_read()

            return run_job(job, lane, self._progress, on_shard_read)

    def remote(self, index: int) -> RemoteShard:
        """See ``ShardJobs``."""
        plan = self._plan
        shards, window = plan.shards, plan.memory.window_bytes
        origin = self._source.origin([shards[index].file, *files_of_parts(shards[index])])
        out, place = self._out.resolve(), self._place.resolve()
        return RemoteShard(shards[index], index, len(shards), origin, out, place, window, plan.layout, plan.options)

    def tell(self, index: int) -> None:
        """See ``ShardJobs``."""
        shard = self._plan.shards[index]
        self._progress.item(shard.file)
        self._progress.advance(shard.header.data_bytes)

    def close(self) -> None:
        """See ``LocalJobs``."""
        self._source.close()

    def files_of(self, result: ShardResult) -> list[FileRecord]:
        """See ``WritingJobs``: the residual file and the factors file, as far as there are any."""
        return result.shard.written

    def as_json(self, index: int, result: ShardResult) -> Any:
        """See ``RecordedJobs``."""
        return result.as_json()

    def recorded(self, index: int, value: Any) -> Recorded[ShardResult] | None:
        """See ``RecordedJobs``."""
        try:
            result = ShardResult.from_json(value, f"{self._place}: the journal of shard {index + 1}")
        except FormatError:  # a damaged record: the job is done again, else the same command would fail for ever
            return None
        if not self._is_planned(result, index) or not self._is_of_the_source(result):
            return None
        return Recorded(result) if all(is_as_recorded(self._place, record) for record in self.files_of(result)) else None

    def _is_planned(self, result: ShardResult, index: int) -> bool:
        """Whether a result has the files, targets and ranks that the plan has for a shard."""
        shard, residual = self._plan.shards[index], self._plan.layout == "residual"
        source = [(shard.file, shard.size)]
        weights = [(record.file, record.size) for record in (result.shard.source, result.shard.residual) if record is not None]
        factors = None if result.shard.factors is None else result.shard.factors.file
        if weights != (source * 2 if residual else source) or (result.shard.residual is not None) != residual:
            return False
        if factors != (factors_file(index, len(self._plan.shards)) if shard.targets else None):
            return False
        planned = [(*target_identity(t.key, t.shape, t.view), t.shard, t.dtype, list(t.aliases)) for t in shard.targets]
        found = [(*target_identity(t.key, t.shape, t.seen_as), t.shard, t.dtype, t.aliases) for t in result.targets]
        measured = {value is not None for t in result.targets for value in (t.residual_sample_sha256, t.inexact)}
        return found == planned and measured <= {residual} and not any(map(has_other_rank, result.targets, shard.targets))

    def _is_of_the_source(self, result: ShardResult) -> bool:
        """Whether the source shard still has the bytes that a result was made from; for a hub model its commit says so."""
        if self._source.record.kind != "folder":
            return True
        record = result.shard.source
        path = self._source.fetch(record.file)
        with read_errors(path):
            return file_sha256(path) == record.sha256
