"""Work on a matrix by blocks of its rows, on all cores of a CPU or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from surgery.torch_threads import one_thread, one_thread_each

#: Entries that are worked on at a time: few enough for their temporaries to stay in cache, enough for the threads not to
#: wait for the interpreter (2^15 to 2^22 measured: below 2^18 and above 2^20 it takes up to twice as long).
BLOCK_ENTRIES = 1 << 19
#: Blocks that a GPU works on at a time: fewer, larger steps are better there.
DEVICE_BLOCKS = 64
#: Encodes and decodes for GPUs, whose few threads would leave most cores of the host idle. It must do nothing that waits for
#: another task of its own. Its threads begin with the first task.
HOST_THREADS = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="surgery-host")
_T = TypeVar("_T")


def rows_at_a_time(n: int) -> int:
    return max(1, BLOCK_ENTRIES // n)


def row_slices(m: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def for_each(worker: Callable[[int], Callable[[slice], _T]], m: int, step: int, device: torch.device) -> list[_T]:
    """Process m rows, ``step`` at a time on a CPU and a multiple of it elsewhere; returns the results in order.

    On a CPU there is one single-threaded worker per core. ``worker(most)`` makes its function, with its own buffers for
    up to ``most`` rows: fresh memory for every block would cost as much as the arithmetic.
    """
    if device.type != "cpu":
        work = worker(min(m, step * DEVICE_BLOCKS))
        return [work(rows) for rows in row_slices(m, step * DEVICE_BLOCKS)]
    blocks = row_slices(m, step)
    workers = min(len(blocks), torch.get_num_threads())
    if workers < 2:
        with one_thread():
            work = worker(min(m, step))
            return [work(rows) for rows in blocks]
    results: list[_T | None] = [None] * len(blocks)
    waiting = iter(enumerate(blocks))

    def run(_: int) -> None:
        work = worker(step)
        for i, rows in waiting:
            results[i] = work(rows)

    with one_thread_each(workers) as pool:
        list(pool.map(run, range(workers)))
    return results  # type: ignore[return-value]  # every block has been taken by somebody
