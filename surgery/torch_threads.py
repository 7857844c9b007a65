"""Several small problems at once, instead of several threads on each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch starts no threads of its own, for operations too short to be worth their waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in which torch does not start threads of its own."""
    with one_thread(), ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        yield pool
