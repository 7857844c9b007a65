"""What a run may use, and how it uses it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        lanes: how many devices.
        cores: threads that may compute, over all devices.
        memory: bytes of host memory; None: no matter.
        strict: whether a run that cannot keep to that is refused; otherwise it takes what one matrix at a time needs.
        device_memory: bytes of each GPU.
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
        workers: windows in work at a time on each device.
        window_bytes: how long a window is at least, but at the end of a shard; one target if that is more.
        buffer_bytes: host memory of each device for what is between the reader and the writer.
        peak_bytes: upper estimate of the host memory needed.
        device_bytes: the same of each GPU's, 0 without one. With less, batches become smaller, and what does not fit at
            all is done on the CPU.
    """

    workers: int
    window_bytes: int
    buffer_bytes: int
    peak_bytes: int
    device_bytes: int
