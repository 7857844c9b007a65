"""Jobs on lanes, windows through a lane and lent memory, with toy work: order, bounds, errors, and leaving early."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from surgery.engine import buffers as lending
from surgery.engine.buffers import Buffers
from surgery.engine.lane import Lane
from surgery.engine.local import run_jobs
from surgery.engine.resources import Memory
from surgery.engine.threads import Stopped
from surgery.engine.walk import Bytes, Piece

CPU = torch.device("cpu")
#: The smallest buffer that is counted.
UNIT = lending._SMALL
#: Seconds that nothing here takes unless it hangs.
LONG = 10.0
Read = Callable[[], object]


def wait(event: threading.Event) -> None:
    assert event.wait(LONG), "this was to happen meanwhile"


def in_time(call: Callable[[], Any], seconds: float = LONG) -> bool:
    """Whether a call comes back. If it does not, its thread is left behind."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _threads() -> list[str]:
    """The names of our threads, but for those that work for the GPUs of this process as long as it lasts."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("surgery-") and not name.startswith("surgery-host")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    end = time.monotonic() + LONG
    while (left := _threads()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


class _Counted:
    """How much there is at a time, and how much there has been at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._one = threading.Lock()

    def add(self, more: int) -> None:
        with self._one:
            self.now += more
            self.most = max(self.most, self.now)


def lane_of(workers: int = 2, units: int = 8) -> Lane:
    return Lane(CPU, Memory(workers, UNIT, units * UNIT))


# Jobs.


def test_results_come_in_the_order_in_which_jobs_finish() -> None:
    others_done = threading.Event()

    def work(job: int, lane: Lane, read: Read) -> str:
        read()
        if job == 0:
            wait(others_done)
        return f"result {job}"

    came = []
    for job, result in run_jobs(work, iter(range(5)), [lane_of()]):
        assert result == f"result {job}"
        came.append(job)
        if len(came) == 4:
            others_done.set()
    assert came[-1] == 0
    assert sorted(came) == [0, 1, 2, 3, 4]


def test_no_jobs_no_results() -> None:
    assert list(run_jobs(lambda *_: None, iter(()), [lane_of()])) == []


def test_a_lane_reads_a_shard_when_the_one_before_has_been_read() -> None:
    begun, over = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]

    def not_yet(job: int) -> None:
        assert not begun[job].wait(0.1)

    def work(job: int, lane: Lane, read: Read) -> None:
        begun[job].set()
        if job == 0:
            not_yet(1)
            read()
            read()  # says nothing new
            wait(begun[1])
        elif job == 1:
            wait(over[0])
            not_yet(2)  # though there is somebody to do it
            read()
            wait(begun[2])
        # One that never says that it has been read has been when it is done.

    for job, _ in run_jobs(work, iter(range(4)), [lane_of()]):
        over[job].set()
    assert all(event.is_set() for event in over)


def test_each_lane_reads_a_shard_of_its_own() -> None:
    lanes, here = [lane_of(), lane_of()], threading.Barrier(2)

    def work(job: int, lane: Lane, read: Read) -> Lane:
        if job < 2:
            here.wait(LONG)  # two that have not been read, at a time
        return lane

    results = dict(run_jobs(work, iter(range(6)), lanes))
    assert {id(results[0]), id(results[1])} == {id(lane) for lane in lanes}
    assert len(results) == 6


def test_the_next_job_is_made_while_others_are_worked_on() -> None:
    third_is_made = threading.Event()

    def jobs() -> Iterator[int]:
        yield 0
        yield 1
        third_is_made.set()
        yield 2

    def work(job: int, lane: Lane, read: Read) -> None:
        read()
        if job < 2:
            wait(third_is_made)

    assert sorted(job for job, _ in run_jobs(work, jobs(), [lane_of()])) == [0, 1, 2]


def test_an_error_comes_after_the_results_of_what_had_been_read() -> None:
    second_fails = threading.Event()
    begun = []

    def work(job: int, lane: Lane, read: Read) -> None:
        begun.append(job)
        if job == 0:
            read()
            wait(second_fails)
            time.sleep(0.1)
        if job == 1:
            second_fails.set()
            raise OSError("the disk is gone")

    finished = run_jobs(work, itertools.count(), [lane_of()])
    came = []
    with pytest.raises(OSError, match="the disk is gone"):
        for job, _ in finished:
            came.append(job)
    assert came == [0]
    assert sorted(begun) == [0, 1]


def test_an_error_in_making_a_job_is_raised_where_it_would_have_come() -> None:
    def jobs() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("the network is gone")

    came = []
    with pytest.raises(OSError, match="the network is gone"):
        for job, _ in run_jobs(lambda *_: None, jobs(), [lane_of()]):
            came.append(job)
    assert sorted(came) == [0, 1]


def test_a_shard_that_is_being_read_is_given_up_when_another_lane_fails() -> None:
    """It waits for memory that nobody gives back; what is told is why, not that it was given up."""
    lanes = [lane_of(units=1), lane_of(units=1)]
    waits = threading.Event()

    def work(job: int, lane: Lane, read: Read) -> None:
        if job == 0:
            lane.buffers.take(UNIT)
            waits.set()
            lane.buffers.take(UNIT)
        wait(waits)
        time.sleep(0.05)
        raise OSError("the disk is gone")

    start = time.monotonic()
    with pytest.raises(OSError, match="the disk is gone"):
        list(run_jobs(work, iter(range(2)), lanes))
    assert time.monotonic() - start < LONG


def test_of_two_shards_on_a_lane_the_error_is_told_not_that_the_other_was_given_up() -> None:
    """The first fails in its writer, which wakes the second out of its waiting for memory, and is the last to be cleared."""
    lane = lane_of(units=1)
    second_waits = threading.Event()

    def pieces(job: int) -> Iterator[Piece]:
        if job == 1:
            second_waits.set()
        yield Bytes(lane.buffers.take(UNIT))  # for the second there is none until the first gives it back

    def finish(window: Sequence[Piece], result: object) -> None:
        wait(second_waits)
        time.sleep(0.05)
        raise OSError("the disk is full")

    def work(job: int, lane: Lane, read: Read) -> None:
        try:
            lane.flow(pieces(job), UNIT, lambda window: None, finish, read)
        finally:
            if job == 0:
                time.sleep(0.1)  # a large file that is removed

    with pytest.raises(OSError, match="the disk is full"):
        list(run_jobs(work, iter(range(2)), [lane]))


@pytest.mark.parametrize("units", [2, 20])
def test_leaving_early_stops_at_once(units: int) -> None:
    """With a shard being read that waits for memory, windows that wait for a worker, and jobs without an end."""
    lane, worked = lane_of(workers=1, units=units), []

    def endless() -> Iterator[Piece]:
        while True:
            yield Bytes(lane.buffers.take(UNIT))

    def slow(window: Sequence[Piece]) -> None:
        worked.append(window)
        time.sleep(0.1)

    def work(job: int, lane: Lane, read: Read) -> None:
        if job > 0:
            lane.flow(endless(), UNIT, slow, lambda *_: None, read)

    finished = run_jobs(work, itertools.count(), [lane])
    assert next(finished) == (0, None)
    time.sleep(0.15)
    leaves_at_once(finished)
    assert worked


def test_leaving_early_wakes_who_waits_for_memory() -> None:
    waits = threading.Event()

    def work(job: int, lane: Lane, read: Read) -> None:
        read()
        if job == 1:
            lane.buffers.take(UNIT)
            waits.set()
            lane.buffers.take(UNIT)

    finished = run_jobs(work, itertools.count(), [lane_of(units=1)])
    assert next(finished) == (0, None)
    wait(waits)
    leaves_at_once(finished)


def leaves_at_once(finished: Generator[Any, None, None]) -> None:
    assert in_time(finished.close)
    assert not _threads()


def test_an_interruption_where_results_are_used_stops_at_once() -> None:
    downloaded = threading.Event()

    def jobs() -> Iterator[int]:
        yield 0
        downloaded.wait(2 * LONG)
        yield 1

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(run_jobs(lambda *_: None, jobs(), [lane_of()])) as finished:
        for _ in finished:
            raise KeyboardInterrupt
    assert time.monotonic() - start < LONG
    downloaded.set()


def test_a_worker_computes_in_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def work(job: int, lane: Lane, read: Read) -> int:
            return lane.submit(lambda _: torch.get_num_threads(), None).result()

        assert [threads for _, threads in run_jobs(work, iter(range(2)), [lane_of()])] == [1, 1]
    finally:
        torch.set_num_threads(before)


# Windows.


def marked(lane: Lane, count: int, n_bytes: int = UNIT) -> Iterator[Piece]:
    """Pieces that know their place."""
    for i in range(count):
        buffer = lane.buffers.take(n_bytes)
        buffer.fill_(i)
        yield Bytes(buffer)


def places(window: Sequence[Piece]) -> list[int]:
    return [int(piece.buffer[0]) for piece in window]


def test_windows_are_finished_in_order_though_worked_on_at_once() -> None:
    lane, read, begun, ended, finished = lane_of(workers=3, units=4), threading.Event(), [], [], []
    second_has_ended = threading.Event()

    def work(window: Sequence[Piece]) -> int:
        (place,) = places(window)
        begun.append(place)
        if place == 0:
            wait(second_has_ended)
        ended.append(place)
        if place == 1:
            second_has_ended.set()
        return 10 * place

    def finish(window: Sequence[Piece], result: int) -> None:
        assert result == 10 * places(window)[0]  # nor has its memory gone to another one
        finished.append(places(window)[0])

    with lane:
        lane.flow(marked(lane, 12), UNIT, work, finish, read.set)
        assert in_time(lambda: lane.buffers.take(4 * UNIT))  # everything has been given back
    assert finished == list(range(12))
    assert ended.index(1) < ended.index(0)
    assert read.is_set()


def test_what_is_between_reading_and_writing_is_bounded() -> None:
    lane, taken, finished = lane_of(workers=1, units=3), [], []

    def pieces() -> Iterator[Piece]:
        for piece in marked(lane, 20):
            taken.append(piece)
            assert len(taken) - len(finished) <= 3
            yield piece

    def finish(window: Sequence[Piece], result: object) -> None:
        time.sleep(0.005)
        finished.append(window)

    with lane:
        lane.flow(pieces(), UNIT, lambda window: None, finish, lambda: None)
    assert len(finished) == 20


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_windows_are_worked_on_at_a_time_as_there_are_workers(workers: int) -> None:
    lane, counted, all_at_once = lane_of(workers=workers, units=10), _Counted(), threading.Event()

    def work(window: Sequence[Piece]) -> None:
        counted.add(1)
        if counted.most >= workers:
            all_at_once.set()
        wait(all_at_once)
        time.sleep(0.005)
        counted.add(-1)

    with lane:
        lane.flow(marked(lane, 20), UNIT, work, lambda *_: None, lambda: None)
    assert counted.most == workers


def test_windows_hold_as_many_pieces_as_it_takes() -> None:
    lane, seen = lane_of(units=20), []
    with lane:
        lane.flow(marked(lane, 7), 3 * UNIT - 1, lambda _: None, lambda window, _: seen.append(places(window)), lambda: None)
        assert in_time(lambda: lane.buffers.take(20 * UNIT))
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]


def test_what_is_said_when_all_has_been_read_comes_before_the_end_of_the_writing() -> None:
    lane, read = lane_of(), threading.Event()
    with lane:
        lane.flow(marked(lane, 3), UNIT, lambda window: None, lambda *_: wait(read), read.set)


@pytest.mark.parametrize("where", ["work", "finish", "pieces"])
@pytest.mark.parametrize("units", [1, 100])
def test_the_error_that_is_raised_is_the_one_that_happened(where: str, units: int) -> None:
    """With little memory the reader waits for some when it happens."""
    lane, finished = lane_of(units=units), []

    def fail(at: str, place: int) -> None:
        if at == where and place == 5:
            raise KeyError(where)

    def pieces() -> Iterator[Piece]:
        for i, piece in enumerate(marked(lane, 50)):
            fail("pieces", i)
            yield piece

    def work(window: Sequence[Piece]) -> None:
        fail("work", places(window)[0])

    def finish(window: Sequence[Piece], result: object) -> None:
        fail("finish", places(window)[0])
        finished.extend(places(window))

    with pytest.raises(KeyError, match=where), lane:
        lane.flow(pieces(), UNIT, work, finish, lambda: None)
    # What came before it may have been finished, nothing behind it has.
    assert finished == list(range(len(finished)))
    assert len(finished) <= 5


# Memory.


def test_many_threads_never_get_more_than_there_is_nor_the_same_memory() -> None:
    limit, pool, counted, wrong = 10 * UNIT, Buffers(10 * UNIT), _Counted(), []

    def borrow(me: int) -> None:
        some = random.Random(me)
        for _ in range(150):
            n_bytes = some.choice([1, 1, 2, 3, 5]) * UNIT
            buffer = pool.take(n_bytes)
            counted.add(n_bytes)
            mine = buffer.view(-1)[:: UNIT // 4]
            mine.fill_(me)
            if some.random() < 0.3:
                time.sleep(0.0002)
            if len(buffer) != n_bytes or bool((mine != me).any()):
                wrong.append(me)
            counted.add(-n_bytes)
            pool.give(buffer)

    threads = [threading.Thread(target=borrow, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert limit - 5 * UNIT < counted.most <= limit  # the limit has been what they waited for
    assert in_time(lambda: pool.take(limit))


def test_who_asks_for_too_much_waits_until_some_is_given_back() -> None:
    pool = Buffers(3 * UNIT)
    first, second = pool.take(UNIT), pool.take(2 * UNIT)
    got = threading.Event()
    waiter = threading.Thread(target=lambda: (pool.take(2 * UNIT), got.set()), daemon=True)
    waiter.start()
    assert not got.wait(0.1)
    pool.give(first)
    assert not got.wait(0.1)
    pool.give(second)
    wait(got)


def test_one_that_is_larger_than_the_limit_is_lent_alone() -> None:
    pool = Buffers(2 * UNIT)
    small = pool.take(UNIT)
    assert not in_time(lambda: _back(pool, 5 * UNIT), 0.3)
    pool.give(small)  # now the one that waits gets it, and gives it back
    large = pool.take(5 * UNIT)
    assert len(large) == 5 * UNIT
    assert not in_time(lambda: _back(pool, UNIT), 0.3)
    pool.give(large)
    assert in_time(lambda: pool.take(2 * UNIT))


def _back(pool: Buffers, n_bytes: int) -> None:
    pool.give(pool.take(n_bytes))


def test_memory_is_lent_again_and_what_is_kept_stays_within_the_limit() -> None:
    limit, pool = 8 * UNIT, Buffers(8 * UNIT)
    first = pool.take(2 * UNIT)
    for _ in range(10):
        pool.give(first)
        assert pool.take(2 * UNIT) is first
    pool.give(first)
    del first
    exist: list[weakref.ref[torch.Tensor]] = []
    for units in (1, 2, 3, 4, 5, 6, 7, 8, 8, 20, 3, 1):
        buffers = [pool.take(units * UNIT) for _ in range(max(1, 8 // units))]
        exist += map(weakref.ref, buffers)
        for buffer in buffers:
            pool.give(buffer)
        del buffers, buffer
        alive = {id(tensor): len(tensor) for ref in exist if (tensor := ref()) is not None}
        assert sum(alive.values()) <= limit


def test_small_ones_are_no_matter() -> None:
    pool = Buffers(UNIT)
    whole = pool.take(UNIT)
    small = [pool.take(UNIT - 1) for _ in range(20)]
    for buffer in small:
        pool.give(buffer)
    assert not in_time(lambda: pool.take(UNIT), 0.3)  # they have not been counted as given back
    pool.give(whole)


def test_stopping_wakes_who_waits_and_refuses_who_asks_later() -> None:
    pool, told = Buffers(UNIT), []
    pool.take(UNIT)

    def ask() -> None:
        try:
            pool.take(UNIT)
        except Stopped:
            told.append("stopped")

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not told
    pool.stop()
    for thread in threads:
        thread.join(LONG)
    assert told == ["stopped"] * 3
    with pytest.raises(Stopped):
        pool.take(UNIT)


@pytest.mark.parametrize("good", range(1, 6))
def test_a_thread_that_cannot_start(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have been started are waited for: none is at work when the error comes out."""
    start, started = threading.Thread.start, itertools.count(1)

    def failing(thread: threading.Thread) -> None:
        if next(started) > good:
            raise RuntimeError("can't start new thread")
        start(thread)

    def work(job: int, lane: Lane, read: Read) -> int:
        read()
        time.sleep(0.05)
        return lane.submit(lambda item: item, job).result()

    monkeypatch.setattr(threading.Thread, "start", failing)
    with (
        pytest.raises(RuntimeError, match="can't start new thread") if good < 4 else contextlib.nullcontext(),
        closing(run_jobs(work, iter(range(50)), [Lane(CPU, Memory(1, UNIT, 10 * UNIT))])) as finished,
    ):
        list(finished)
    monkeypatch.undo()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("surgery-job")]
