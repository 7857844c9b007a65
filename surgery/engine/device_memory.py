"""The memory of GPUs: how much nobody uses, and a limit that torch itself keeps to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def total_memory(devices: Sequence[torch.device]) -> int:
    """Bytes of memory of the smallest of some GPUs."""
    return min(int(torch.cuda.get_device_properties(device).total_memory) for device in devices)


def free_memory(devices: Sequence[torch.device]) -> int:
    """Bytes that this process may still use of the fullest of some GPUs: what nobody uses, and what torch keeps for itself."""
    return min(_free(device) for device in devices)


def _free(device: torch.device) -> int:
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError:  # there is not even room for what CUDA needs to tell
        return 0
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def limited(devices: Sequence[torch.device], most: int | None) -> Iterator[None]:
    """Make torch itself keep to so many bytes of each GPU until the context is left; no effect for None, or without a GPU."""
    before: list[tuple[int, float]] = []
    try:
        if most is not None and devices[0].type == "cuda":
            for device in devices:
                index = torch.cuda.current_device() if device.index is None else device.index
                before.append((index, torch.cuda.get_per_process_memory_fraction(index)))
                torch.cuda.set_per_process_memory_fraction(min(1.0, most / total_memory([device])), index)
        yield
    finally:
        for index, fraction in before:
            torch.cuda.set_per_process_memory_fraction(fraction, index)
