"""From what a user allows to the lanes of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from surgery.engine.lane import Lane
from surgery.memory import available_memory
from surgery.planning.memory import Memory, Resources
from surgery.timing import Timing


def resources_of(devices: Sequence[torch.device], max_memory: int | None, max_device_memory: int | None) -> Resources:
    """What a run on these devices may use: by default half of the memory there is, and most of a GPU's."""
    kind = devices[0].type
    memory, available = max_memory, available_memory()
    if memory is None and available is not None:
        memory = available // 2
    device_memory = max_device_memory
    if kind == "cuda" and device_memory is None:
        device_memory = min(torch.cuda.get_device_properties(device).total_memory for device in devices) * 4 // 5
    cores = torch.get_num_threads() if kind == "cpu" else os.cpu_count() or 1
    return Resources(kind, len(devices), cores, memory, max_memory is not None, device_memory)


@contextmanager
def lanes_of(
    devices: Sequence[torch.device], memory: Memory, max_device_memory: int | None, timing: Timing | None
) -> Iterator[list[Lane]]:
    """The lanes of a run, which nothing has entered yet; a limit on a GPU's memory is torch's own meanwhile."""
    limited = [device for device in devices if device.type == "cuda" and max_device_memory is not None]
    for device in limited:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (max_device_memory or 0) / total), device)
    if timing is not None:
        count = len(devices)
        timing.threads = {"download": 1, "reader": count, "worker": count * memory.workers, "writer": count}
        if devices[0].type == "cuda":
            timing.wait_for_device = lambda: torch.cuda.current_stream().synchronize()
    try:
        yield [Lane(device, memory.workers, memory.buffer_bytes, timing) for device in devices]
    finally:
        for device in limited:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
