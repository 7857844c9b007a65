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
        device_memory: bytes of memory of each GPU, whoever uses them; None without one.
        device_free: those of them that nobody used when the run began; None where that is not known.
    """

    device: str = "cpu"
    lanes: int = 1
    cores: int = 1
    memory: int | None = None
    strict: bool = False
    device_memory: int | None = None
    device_free: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """How a run uses its memory, on each device.

    Attributes:
        workers: windows that are worked on at a time.
        window_bytes: the least length of a window, except at the end of a shard; a larger target is a window of its own.
        buffer_bytes: host memory for the pieces between the reader and the writer.
        peak_bytes: upper estimate of the host memory that the run needs on all devices.
        device_bytes: upper estimate of each GPU's memory, 0 without one. With less, batches become smaller, and what does
            not fit at all is done on the CPU.
        readers: shards that are read at a time.
        resident_bytes: memory of the GPU for the pieces between the reader and the writer, where they lie there; 0 where
            they do not.
        ring_bytes: page-locked host memory through which they go there and back; 0 where they do not.
    """

    workers: int
    window_bytes: int
    buffer_bytes: int
    peak_bytes: int = 0
    device_bytes: int = 0
    readers: int = 1
    resident_bytes: int = 0
    ring_bytes: int = 0
