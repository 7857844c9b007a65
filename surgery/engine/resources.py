"""The devices, cores and memory that a run may use, and how it divides the memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        lanes: how many devices.
        cores: threads that may compute, over all devices.
        memory: bytes of host memory; None: no limit.
        strict: whether a run that needs more than ``memory`` is refused; otherwise it takes what one matrix at a time needs.
        device_memory: bytes of memory of each GPU; None without one.
    """

    device: str = "cpu"
    lanes: int = 1
    cores: int = 1
    memory: int | None = None
    strict: bool = False
    device_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """How a run uses its memory.

    Attributes:
        workers: windows that are worked on at a time on each device.
        window_bytes: the least length of a window, except at the end of a shard; a larger target is a window of its own.
        buffer_bytes: host memory of each device for the pieces between the reader and the writer.
        peak_bytes: upper estimate of the host memory needed.
        device_bytes: upper estimate of each GPU's memory, 0 without one. With less, batches become smaller, and what does
            not fit at all is done on the CPU.
    """

    workers: int
    window_bytes: int
    buffer_bytes: int
    peak_bytes: int
    device_bytes: int
