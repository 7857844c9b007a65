"""The local engine: does the jobs of a run in this process, the end of one shard beside the beginning of the next."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from surgery.engine.lane import Lane
from surgery.engine.threads import ReadAhead, Stopped

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

#: Jobs that a lane works on for each shard that it reads at a time: that one, and one whose last windows are being written.
JOBS_PER_READER = 2


def run_jobs(
    do_job: Callable[[_Job, Lane, Callable[[], object]], _Result], jobs: Iterator[_Job], lanes: Sequence[Lane]
) -> Generator[tuple[_Job, _Result], None, None]:
    """Do jobs; yields each with its result, in the order in which they are finished. Close the generator to stop early.

    The next job is taken from ``jobs``, which may download a shard, while others are being done.

    Args:
        do_job: called as ``do_job(job, lane, on_read)``. It calls ``on_read`` once the shard of the job has been read; then
            the lane begins its next job.
        jobs: in order.
        lanes: one for each device; entered and left here.

    Raises:
        The first error of a job or of ``jobs``. Jobs whose shards had been read by then are finished and yielded first.
    """
    finished: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
    with ExitStack() as stack:
        for lane in lanes:
            stack.enter_context(lane)
        ahead = stack.enter_context(ReadAhead(jobs))
        jobs_left = _JobsLeft(ahead)
        runners = []
        for lane in lanes:
            turn = threading.Semaphore(lane.readers)
            for _ in range(JOBS_PER_READER * lane.readers):
                arguments = (_do_jobs, do_job, jobs_left, lane, turn, finished)
                runners.append(threading.Thread(target=copy_context().run, args=arguments, name="surgery-job"))
        going, first, begun = 0, None, time.perf_counter()
        try:
            for runner in runners:
                runner.start()
                going += 1
            while going:
                job, result, error = finished.get()
                if error is not None:
                    if first is None or isinstance(first, Stopped):  # Stopped only follows from another error
                        first = error
                    # Jobs whose shards have been read are finished, so that work that is nearly done is not lost.
                    jobs_left.close()
                    for lane in lanes:
                        lane.buffers.stop()
                elif job is None:
                    going -= 1
                else:
                    yield job, result
            if first is not None:
                raise first
        finally:
            jobs_left.close()
            if going:
                for lane in lanes:
                    lane.stop()
            for runner in runners:
                if runner.ident is not None:  # None where it could not be started
                    runner.join()
            if (timing := lanes[0].timing) is not None:
                timing.wall += time.perf_counter() - begun


class _JobsLeft(Generic[_Job]):
    """The jobs that have not been begun, for several threads to take from."""

    def __init__(self, ahead: ReadAhead[_Job]) -> None:
        self._ahead = ahead
        self._items = iter(ahead)
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> _Job | None:
        """The next job; None when there are no more, or after ``close``."""
        with self._lock:
            if self._closed:
                return None
            try:
                return next(self._items)
            except (StopIteration, Stopped):
                self._closed = True
                return None

    def close(self) -> None:
        """Hand out no more jobs, and end waits for one."""
        self._closed = True
        self._ahead.stop()


def _do_jobs(
    do_job: Callable[[Any, Lane, Callable[[], object]], Any],
    jobs_left: _JobsLeft[Any],
    lane: Lane,
    turn: threading.Semaphore,
    finished: queue.SimpleQueue[tuple[Any, Any, BaseException | None]],
) -> None:
    """One thread of a lane: does jobs until there are no more. As many shards are read at a time as the lane has readers.

    Args:
        do_job: as for ``run_jobs``.
        jobs_left: where the jobs are taken from.
        lane: that they are done on.
        turn: a semaphore that is held while a shard is read on this lane.
        finished: receives (job, result, None) for each job, (None, None, error) for an error, and (None, None, None) when the
            thread ends.
    """
    if lane.timing is not None:
        lane.timing.watch("writer")  # this thread syncs and renames finished files
    try:
        while True:
            turn.acquire()
            has_been_read = _Once(turn.release)
            try:
                job = jobs_left.take()
                if job is None:
                    break
                result = do_job(job, lane, has_been_read)
            finally:
                has_been_read()
            finished.put((job, result, None))
    except BaseException as error:  # raised by run_jobs, in its own thread
        finished.put((None, None, error))
    finished.put((None, None, None))


class _Once:
    """A callable that makes its call the first time only."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()
