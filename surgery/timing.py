"""Where the time of a run goes: seconds by stage, summed over the threads of each kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Kind of thread -> the stages it does, in the order in which data passes through a run.
STAGES = {
    "download": ("download",),
    "reader": ("read", "hash"),
    "worker": ("read", "hash", "copy", "difference", "svd", "residual", "correction", "merge", "fold"),
    "host": ("correction",),
    "writer": ("hash", "write"),
}

#: Of each thread: the Timing that counts it, its kind, and the stack of (stage, start) that it is in.
_here = threading.local()

#: (kind of thread, stage) -> seconds.
Seconds = dict[tuple[str, str], float]


class Timing:
    """Adds up the seconds of each stage by kind of thread. The time of a nested stage does not count for the outer one.

    Args:
        wait_for_device: called at both ends of a stage, to wait for work that a GPU does asynchronously, so that it counts
            for the right stage. That prevents overlap, so it is for profiles only.

    Attributes:
        wall: seconds that the shards took, from beginning to end; with Ray the sum over all tasks.
        threads: kind of thread -> how many there were.
    """

    def __init__(self, wait_for_device: Callable[[], object] | None = None) -> None:
        self.wait_for_device = wait_for_device
        self.wall = 0.0
        self.threads: dict[str, int] = {}
        self._seconds: Seconds = {}
        self._lock = threading.Lock()

    def add(self, seconds: Seconds) -> None:
        """Add the seconds of another process or stage."""
        with self._lock:
            for key, value in seconds.items():
                self._seconds[key] = self._seconds.get(key, 0.0) + value

    @property
    def seconds(self) -> Seconds:
        """The seconds so far, by kind of thread and stage."""
        with self._lock:
            return dict(self._seconds)

    def watch(self, kind: str) -> None:
        """From now on, count the stages of the calling thread here, as those of a thread of this kind."""
        _here.timing, _here.kind, _here.stages = self, kind, []


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Counts the time of the block for a stage, if ``Timing.watch`` was called in this thread."""
    timing: Timing | None = getattr(_here, "timing", None)
    if timing is None:
        yield
        return
    stages: list[tuple[str, float]] = _here.stages
    _count(timing, stages)
    stages.append((stage, time.perf_counter()))
    try:
        yield
    finally:
        _count(timing, stages)
        stages.pop()
        if stages:
            stages[-1] = (stages[-1][0], time.perf_counter())


def _count(timing: Timing, stages: list[tuple[str, float]]) -> None:
    """Count the time of the current stage up to now."""
    if timing.wait_for_device is not None:
        timing.wait_for_device()
    if stages:
        current, since = stages[-1]
        timing.add({(_here.kind, current): time.perf_counter() - since})
