"""The results of all shards of a run: from the journal where an earlier start has finished them, else by doing their jobs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from surgery.progress import listening
from surgery.run.journal import Journal

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Recorded(Generic[_Result]):
    """The result of a shard, taken from the journal; a wrapper, since the result itself may be None."""

    result: _Result


class RecordedJobs(Protocol[_Result]):
    """The jobs of a run whose results a journal keeps: one for each shard, known by the shard's index."""

    @property
    def shard_files(self) -> Sequence[str]:
        """The weight file of each shard, by its name in the source."""

    def as_json(self, index: int, result: _Result) -> Any:
        """A result as JSON, for the journal."""

    def recorded(self, index: int, value: Any) -> Recorded[_Result] | None:
        """The result that the journal keeps as ``value``, if it still holds; None if the job has to be done again.

        It holds if the value is whole and as planned, and if neither the files that were written nor those that they were
        made from have changed.
        """

    def tell(self, index: int) -> None:
        """Tell the progress that a shard was done in another process, or by an earlier start."""


def shard_results(
    jobs: RecordedJobs[_Result],
    begin: Callable[[Sequence[int]], Generator[tuple[int, _Result]]],
    journal: Journal | None,
    on_finished: Callable[[_Result], object] | None = None,
    *,
    note_resumed: bool = True,
) -> list[_Result]:
    """The results of all shards, by index.

    Args:
        jobs: of the run.
        begin: starts the jobs of some shards, see ``Engine.run``.
        journal: of the run; None to keep and look up nothing.
        on_finished: called with each result, after it is in the journal.
        note_resumed: whether to tell a note of how many shards an earlier start has finished.
    """
    progress, count = listening(), len(jobs.shard_files)
    results: dict[int, _Result] = {}
    for index, file in enumerate(jobs.shard_files):
        value = None if journal is None else journal.recorded(index, file)
        if value is not None and (known := jobs.recorded(index, value)) is not None:
            results[index] = known.result
            if on_finished is not None:
                on_finished(known.result)
            jobs.tell(index)
    if results and note_resumed:
        progress.note(f"continuing after {len(results)} of {count} shards")
    with closing(begin([index for index in range(count) if index not in results])) as finished:
        for index, result in finished:
            results[index] = result
            if journal is not None:
                journal.record(index, jobs.shard_files[index], jobs.as_json(index, result))
            if on_finished is not None:
                on_finished(result)
    return [results[index] for index in range(count)]
