"""Host memory for what is between the reader and the writer: bounded, and used again."""

from __future__ import annotations

import threading

import torch

from surgery.engine.threads import Stopped

#: Below this it is not worth keeping.
_SMALL = 1 << 16


class Buffers:
    """Lends memory, and makes who asks wait while too much of it is out. For any number of threads.

    Memory that comes back is lent again: fresh pages are cleared by the system first, which takes longer than reading a
    file from its cache; and pinned memory, from which a GPU copies by itself, is dear to make.

    Args:
        limit: bytes that may exist at a time, lent or waiting; one buffer alone may be larger.
        pinned: whether it is page-locked.
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
        """Uninitialised uint8 (n_bytes,), to be given back.

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
                self._kept -= len(self._free.pop(0))  # the one that has not been asked for the longest
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: torch.Tensor) -> None:
        """Back, when nobody looks at it any more."""
        if len(buffer) < _SMALL:
            return
        with self._changed:
            self._lent -= len(buffer)
            if self._lent + self._kept + len(buffer) <= self._limit:
                self._free.append(buffer)
                self._kept += len(buffer)
            self._changed.notify_all()

    def stop(self) -> None:
        """Whoever waits, or asks from now on, is told that nothing comes any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
