"""The memory of tensors and of the process."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. Writable; keeps the tensor alive."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("bytes_of needs a contiguous tensor on the CPU")
    array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # arrays are buffers; the stubs know it from 3.12 on


def return_free_memory() -> None:
    """Give freed memory back to the system, where the C library has to be told to.

    glibc keeps blocks below 32 MB in its heaps, one per thread that allocates. With matrices that come and go in three
    threads the heaps grow with the length of the run: by a third over 1 GB of weights, measured.
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
