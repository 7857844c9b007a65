"""The jobs of a run in this process: a shard at a time on each device, the end of one beside the beginning of the next."""

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

#: Shards in hand on a lane: one being read, one whose last matrices are computed and written.
IN_HAND = 2


def run_jobs(
    do_job: Callable[[_Job, Lane, Callable[[], object]], _Result], jobs: Iterator[_Job], lanes: Sequence[Lane]
) -> Generator[tuple[_Job, _Result], None, None]:
    """Jobs with their results, in the order in which they are finished. To be closed when left early.

    The next job is made, which may be a download, while others are done.

    Args:
        do_job: ``do_job(job, lane, on_read)``, which calls ``on_read`` once the shard of the job has been read: then the lane
            turns to the next.
        jobs: in order.
        lanes: one for each device; entered and left here.

    Raises:
        The first error of a job, or of making one, when those that need not be read any more have been handed out.
    """
    finished: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
    with ExitStack() as stack:
        for lane in lanes:
            stack.enter_context(lane)
        ahead = stack.enter_context(ReadAhead(jobs))
        jobs_left = _JobsLeft(ahead)
        runners = []
        for lane in lanes:
            turn = threading.Semaphore(1)
            for _ in range(IN_HAND):
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
                    if first is None or isinstance(first, Stopped):  # which only says that there is another error
                        first = error
                    # What has been read already is brought to its end: nothing that is nearly done is lost.
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
    """The jobs that nobody has taken yet; several threads may take one at a time."""

    def __init__(self, ahead: ReadAhead[_Job]) -> None:
        self._ahead = ahead
        self._items = iter(ahead)
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> _Job | None:
        """The next job; None when there are no more, or none are wanted."""
        with self._lock:
            if self._closed:
                return None
            try:
                return next(self._items)
            except (StopIteration, Stopped):
                self._closed = True
                return None

    def close(self) -> None:
        """No more jobs are wanted. Wakes whoever waits for one."""
        self._closed = True
        self._ahead.stop()


def _do_jobs(
    do_job: Callable[[Any, Lane, Callable[[], object]], Any],
    jobs_left: _JobsLeft[Any],
    lane: Lane,
    turn: threading.Semaphore,
    finished: queue.SimpleQueue[tuple[Any, Any, BaseException | None]],
) -> None:
    """One thread of a lane: jobs as long as there are some, each begun when it is the thread's turn to read.

    Args:
        do_job: see ``run_jobs``.
        jobs_left: where the jobs come from.
        lane: theirs.
        turn: held while a shard of this lane is read.
        finished: told each job with its result, an error, and at the end three times None.
    """
    if lane.timing is not None:
        lane.timing.watch("writer")  # it puts finished files in their places
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
    except BaseException as error:  # raised in the thread that waits for results
        finished.put((None, None, error))
    finished.put((None, None, None))


class _Once:
    """A call that is made the first time only."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()
