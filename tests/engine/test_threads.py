"""Reading ahead and writing behind: order, bounds, and what happens when either side fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from surgery.engine.threads import ReadAhead, WriteBehind


def test_read_ahead_keeps_order_and_stays_one_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(6):
            made.append(i)
            yield i

    with ReadAhead(items()) as ahead:
        for expected, item in enumerate(ahead):
            assert item == expected
            time.sleep(0.01)
            assert len(made) <= item + 2
    assert made == list(range(6))


def test_read_ahead_raises_where_the_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"), ReadAhead(items()) as ahead:
        for item in ahead:
            seen.append(item)
    assert seen == [1]


def test_leaving_read_ahead_early_stops_it() -> None:
    def endless() -> Iterator[int]:
        i = 0
        while True:
            yield (i := i + 1)

    with ReadAhead(endless()) as ahead:
        assert next(iter(ahead)) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "surgery-read"]


def test_an_error_does_not_wait_for_a_slow_reader() -> None:
    read = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        read.wait(20)
        yield 2

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ReadAhead(slow()) as ahead:
        for _ in ahead:
            raise KeyboardInterrupt
    assert time.monotonic() - start < 10
    read.set()


def test_write_behind_runs_calls_in_order_and_waits_for_them() -> None:
    done: list[int] = []

    def slow(i: int) -> None:
        time.sleep(0.005)
        done.append(i)

    with WriteBehind() as behind:
        for i in range(10):
            behind.submit(slow, i)
    assert done == list(range(10))


def test_write_behind_reports_the_first_error_and_runs_nothing_after_it() -> None:
    done: list[int] = []

    def write(i: int) -> None:
        if i == 2:
            raise OSError("disk full")
        done.append(i)

    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        for i in range(100):
            behind.submit(write, i)
    assert done == [0, 1]
    with pytest.raises(OSError, match="disk full"), WriteBehind() as behind:
        behind.submit(write, 2)  # noticed only when leaving


def test_write_behind_drops_what_waits_when_the_caller_fails() -> None:
    started, go, done = threading.Event(), threading.Event(), []

    def first() -> None:
        started.set()
        go.wait(5)

    with pytest.raises(KeyError), WriteBehind() as behind:
        behind.submit(first)
        started.wait(5)
        behind.submit(done.append, 2)
        threading.Timer(0.05, go.set).start()
        raise KeyError
    assert done == []
