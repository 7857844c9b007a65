"""Where the time of a run goes: seconds by stage, summed over the threads of each kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The kinds of threads and what they do, in the order of the data's way through a run.
STAGES = {
    "download": ("download",),
    "reader": ("read", "hash"),
    "worker": ("hash", "copy", "svd", "residual", "correction", "fold"),
    "writer": ("hash", "write"),
}

_here = threading.local()

Seconds = dict[tuple[str, str], float]


class Timing:
    """Seconds of each stage by kind of thread. A stage within another counts for itself alone.

    Args:
        wait_for_device: called at both ends of a stage, so that work which a GPU does by itself is counted where it belongs.
            It takes away from the overlap: for profiles only.

    Attributes:
        wall: seconds that the shards took, from beginning to end.
        threads: how many there were of each kind.
    """

    def __init__(self, wait_for_device: Callable[[], object] | None = None) -> None:
        self.wait_for_device = wait_for_device
        self.wall = 0.0
        self.threads: dict[str, int] = {}
        self._seconds: Seconds = {}
        self._lock = threading.Lock()

    def add(self, seconds: Seconds) -> None:
        with self._lock:
            for key, value in seconds.items():
                self._seconds[key] = self._seconds.get(key, 0.0) + value

    @property
    def seconds(self) -> Seconds:
        """By kind of thread and stage."""
        with self._lock:
            return dict(self._seconds)

    def watch(self, kind: str) -> None:
        """Stages of the calling thread are counted here from now on."""
        _here.timing, _here.kind, _here.stages = self, kind, []


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Count the time of the block, if anybody counts in this thread."""
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
    """Count what the stage that goes on at this moment has taken."""
    if timing.wait_for_device is not None:
        timing.wait_for_device()
    if stages:
        current, since = stages[-1]
        timing.add({(_here.kind, current): time.perf_counter() - since})
