"""A bounded pool of host memory for the bytes between the reader and the writer of a shard."""

from __future__ import annotations

import threading

import torch

from surgery.engine.threads import Stopped

#: Buffers of fewer bytes are neither counted nor kept.
_SMALL = 1 << 16


class Buffers:
    """Lends buffers, and blocks in ``take`` while too many bytes are lent. Safe for any number of threads.

    Buffers that come back are lent again: the system clears fresh pages first, which takes longer than reading a file from
    its cache, and pinned memory, from which a GPU copies by itself, is expensive to allocate.

    Args:
        limit: bytes that may exist at a time, lent or kept; a single buffer may be larger.
        pinned: whether the memory is page-locked.
    """

    def __init__(self, limit: int, *, pinned: bool = False) -> None:
        self._limit = limit
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self._lent = 0
        self._kept = 0
        self._changed = threading.Condition()
        self._stopped = False

    def take(self, n_bytes: int) -> torch.Tensor:
        """Uninitialised memory, uint8 (n_bytes,), to be returned with ``give``.

        Raises:
            Stopped: ``stop`` was called.
        """
        if n_bytes < _SMALL:
            return torch.empty(n_bytes, dtype=torch.uint8)
        with self._changed:
            while not self._stopped and self._lent and self._lent + n_bytes > self._limit:
                self._changed.wait()
            if self._stopped:
                raise Stopped
            self._lent += n_bytes
            found = next((buffer for buffer in self._free if len(buffer) == n_bytes), None)
            if found is not None:
                self._free = [buffer for buffer in self._free if buffer is not found]
                self._kept -= n_bytes
                return found
            while self._free and self._lent + self._kept > self._limit:
                self._kept -= len(self._free.pop(0))  # the one that has been free for longest
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: torch.Tensor) -> None:
        """Return a buffer of ``take``, once nothing uses it any more."""
        if len(buffer) < _SMALL:
            return
        with self._changed:
            self._lent -= len(buffer)
            if self._lent + self._kept + len(buffer) <= self._limit:
                self._free.append(buffer)
                self._kept += len(buffer)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the pool: ``take`` raises ``Stopped`` from now on, also where it is waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
