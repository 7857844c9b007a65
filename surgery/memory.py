"""Memory: the bytes of a tensor, temporaries that a thread keeps, what is available, and returning what is free."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy. It is writable, and keeps the tensor alive.

    Raises:
        ValueError: the tensor is not contiguous, or not on the CPU.
    """
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("bytes_of needs a contiguous tensor on the CPU")
    array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # arrays are buffers; the stubs know it from 3.12 on


_kept = threading.local()


def keep_scratch() -> None:
    """From now on, keep the buffers of ``scratch`` in this thread from one matrix to the next, until the thread ends.

    The system clears every page of fresh memory: converting 15 million bfloat16 weights to float32 takes ten times as long
    into new memory.
    """
    _kept.buffers = {}


def scratch(purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised temporary tensor, which may be used until this thread calls ``scratch`` with the same purpose again."""
    buffers: dict[str, torch.Tensor] | None = getattr(_kept, "buffers", None)
    if buffers is None or device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if purpose not in buffers or buffers[purpose].numel() < size:
        buffers.pop(purpose, None)  # freed before the larger one is made
        buffers[purpose] = torch.empty(size, dtype=torch.uint8)
    return buffers[purpose][:size].view(dtype).view(tuple(shape))


def available_memory() -> int | None:
    """Bytes that this process can still allocate, also by the limit of its container; None if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (KeyError, OSError, ValueError):  # no such group, or one without a limit
        return free
    return min(free, max(0, limit - used))


def return_free_memory() -> None:
    """Return freed memory to the system (glibc's ``malloc_trim``); does nothing with other C libraries.

    glibc keeps freed blocks below 32 MB in its heaps, one per thread that allocates. With matrices that come and go in three
    threads, the heaps grow during the run: by a third over 1 GB of weights, measured.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None
