"""The jobs of an extraction, one for each weight file of the base, and how their results are kept in a journal and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from surgery.engine.lane import Lane
from surgery.errors import FormatError
from surgery.extraction.records import ExtractedShard
from surgery.extraction.shard import ExtractJob, RemoteExtract, ShardExtraction
from surgery.files.file_records import FileRecord
from surgery.format.decoding import decode
from surgery.progress import listening
from surgery.run.contents import is_as_recorded
from surgery.run.resume import Recorded
from surgery.shards.factorize_shard import files_of_parts
from surgery.shards.held_files import HeldFiles
from surgery.source.protocol import WeightFiles
from surgery.timing import Timing, timed
from surgery.tuned.model import TunedModel
from surgery.weights.model import ModelWeights


class ExtractJobs:
    """The ``WritingJobs`` of an extraction.

    Args:
        jobs: one for each weight file of the base.
        weights: of the base.
        tuned: the tuned model.
        timing: told how long downloads take; None if nobody asks.

    Attributes:
        shard_files: the weight file of each job.
    """

    def __init__(self, jobs: Sequence[ExtractJob], weights: ModelWeights, tuned: TunedModel, timing: Timing | None) -> None:
        self.shard_files = [job.shard.file for job in jobs]
        self._jobs = jobs
        self._weights = weights
        self._tuned = tuned
        self._timing = timing
        self._progress = listening()
        self._local = tuple(frozenset(one.files.stamps()) for one in (weights, tuned.weights))

    def _files(self, job: ExtractJob) -> tuple[list[str], list[str]]:
        """The weight files that a job reads, of the base and of the tuned model."""
        parts = set[str]().union(*(one.shards for one in self._weights.quantized_among(job.tensors).values()))
        base = [job.shard.file, *sorted({*files_of_parts(job.shard), *parts} - {job.shard.file})]
        return base, self._tuned.shards_of(tensor for tensor in job.tensors if self._tuned.has(tensor))

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """See ``LocalJobs``."""
        base, tuned = self._weights.files, self._tuned.weights.files
        if self._timing is not None and (base.room_to_fetch() or tuned.room_to_fetch()):
            self._timing.watch("download")
        before: list[str] = []
        for index in which:
            of_base, of_tuned = self._files(self._jobs[index])
            # What the job before reads too is held at once, or it would go with that job and be fetched again.
            shared = [file for file in of_tuned if file in before]
            self._acquire(tuned, shared)
            base.wait_for_room()
            self._acquire(base, of_base)
            if not shared:
                tuned.wait_for_room()
            self._acquire(tuned, [file for file in of_tuned if file not in shared])
            before = of_tuned
            yield index

    @staticmethod
    def _acquire(model: WeightFiles, files: Iterable[str]) -> None:
        with timed("download"):
            for file in files:
                model.acquire(file)

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> ExtractedShard:
        """See ``LocalJobs``."""
        job = self._jobs[index]
        base, tuned = self._files(job)
        with ExitStack() as stack:
            stack.enter_context(HeldFiles(base, self._weights.release))
            stack.enter_context(HeldFiles(tuned, self._tuned.weights.release))
            return ShardExtraction(job, self._weights, self._tuned, self._progress).run(lane, on_read, None)

    def remote(self, index: int) -> RemoteExtract:
        """See ``ShardJobs``."""
        job = self._jobs[index]
        base, tuned = self._files(job)
        return RemoteExtract(
            job,
            self._weights.quantized_among(job.tensors),
            self._weights.files.origin(base),
            self._tuned.weights.files.origin(tuned),
            self._tuned.sent(job.tensors),
        )

    def tell(self, index: int) -> None:
        """See ``ShardJobs``."""
        shard = self._jobs[index].shard
        self._progress.item(shard.file)
        self._progress.advance(shard.header.data_bytes)

    def close(self) -> None:
        """See ``LocalJobs``."""
        self._weights.files.close()
        self._tuned.weights.files.close()

    def files_of(self, result: ExtractedShard) -> list[FileRecord]:
        """See ``WritingJobs``: none, as what the jobs write is not the result yet."""
        return []

    def as_json(self, index: int, result: ExtractedShard) -> Any:
        """See ``RecordedJobs``: the result, and when the local files that it was made of were changed last."""
        return {"changed": self._changed(index), "result": asdict(result)}

    def _changed(self, index: int) -> list[list[str | int]]:
        """Name and ctime, which nobody can set back, of each local file that a job reads; a hub model has its commit.

        Raises:
            FormatError: one has changed since the run was planned.
        """
        models = zip((self._weights.files, self._tuned.weights.files), self._local, self._files(self._jobs[index]), strict=True)
        return [
            [file, model.watch.see(model.unchecked(file), file).ctime_ns]
            for model, local, files in models
            for file in files
            if file in local
        ]

    def recorded(self, index: int, value: Any) -> Recorded[ExtractedShard] | None:
        """See ``RecordedJobs``."""
        job = self._jobs[index]
        if not isinstance(value, dict) or value.get("changed") != self._changed(index):
            return None
        try:
            result = decode(ExtractedShard, value.get("result"), f"{job.out}: the journal of shard {index + 1}")
        except FormatError:  # a damaged record: the job is done again, else the same command would fail for ever
            return None
        if not _is_planned(result, job):
            return None
        return Recorded(result) if result.file is None or is_as_recorded(job.out, result.file) else None


def _is_planned(result: ExtractedShard, job: ExtractJob) -> bool:
    """Whether a result has the file and the tensors that the plan has for a shard, and no more directions."""
    targets = job.shard.targets
    planned = ([target.tensor for target in targets], list(job.compared))
    if ([one.tensor for one in result.targets], [one.tensor for one in result.others]) != planned:
        return False
    file = job.file if targets or job.saved else None
    if (None if result.file is None else result.file.file) != file:
        return False
    possible = (one.is_possible(target.matrices[0], target.rank) for one, target in zip(result.targets, targets, strict=True))
    return all(possible) and all(one.is_possible() for one in result.others)
