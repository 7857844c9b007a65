"""Keeping torch to one thread, so that several small problems can run at once with one thread each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread, for operations that are too short for several threads to pay off."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, in each of which torch uses one thread only."""
    with one_thread(), ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        yield pool
