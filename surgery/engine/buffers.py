"""A bounded pool of memory for the bytes between the reader and the writer of a shard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch

from surgery.device import as_memory_allows
from surgery.engine.ring import Ring
from surgery.engine.threads import Stopped
from surgery.memory import bytes_of

#: Buffers of fewer bytes are neither counted nor kept.
_SMALL = 1 << 16


class Buffers:
    """Lends buffers, and blocks in ``take`` while too many bytes are lent. Safe for any number of threads.

    Buffers that come back are lent again: the system clears fresh pages first, which takes longer than reading a file from
    its cache.

    Args:
        limit: bytes that may exist at a time, lent or kept; a single buffer may be larger.
        ring: through which the buffers are filled: they are memory of its GPU. None: memory of the host.

    Attributes:
        ring: as given.
    """

    def __init__(self, limit: int, ring: Ring | None = None) -> None:
        self._limit = limit
        self.ring = ring
        self._free: list[torch.Tensor] = []
        self._lent = 0
        self._kept = 0
        self._changed = threading.Condition()
        self._stopped = False

    def take(self, n_bytes: int) -> torch.Tensor:
        """Uninitialised memory, uint8 (n_bytes,), to be returned with ``give``.

        It is of the host where the GPU is full, with a note.

        Raises:
            Stopped: ``stop`` was called.
        """
        if n_bytes < _SMALL:
            return self._allocated(n_bytes)
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
        return self._allocated(n_bytes)

    def _allocated(self, n_bytes: int) -> torch.Tensor:
        if self.ring is None:
            return torch.empty(n_bytes, dtype=torch.uint8)
        with torch.cuda.device(self.ring.device), torch.cuda.stream(self.ring.up):
            return as_memory_allows(
                lambda sizes, where: [torch.empty(sizes[0], dtype=torch.uint8, device=where)], [n_bytes], self.ring.device
            )[0]

    def fill(self, buffer: torch.Tensor, read: Callable[[memoryview, int], object]) -> None:
        """Fill a buffer of ``take``. On a GPU this may still be going on when it returns, in the stream ``ring.up``.

        Args:
            buffer: to be filled.
            read: called with memory to be filled, and how many bytes of the buffer come before it; in order.
        """
        if self.ring is None or buffer.device.type == "cpu":
            read(bytes_of(buffer), 0)
        else:
            self.ring.upload(read, buffer)

    def parts(self, buffer: torch.Tensor) -> Iterable[memoryview]:
        """The bytes of a buffer on the host: in parts, each of which may be used until the next one is asked for."""
        if self.ring is None or buffer.device.type == "cpu":
            return [bytes_of(buffer)]
        return self.ring.download(buffer)

    def give(self, buffer: torch.Tensor) -> None:
        """Return a buffer of ``take``, once nothing uses it any more."""
        if len(buffer) < _SMALL:
            return
        with self._changed:
            self._lent -= len(buffer)
            elsewhere = self.ring is not None and buffer.device.type == "cpu"  # there was no room on the GPU
            if self._lent + self._kept + len(buffer) <= self._limit and not elsewhere:
                self._free.append(buffer)
                self._kept += len(buffer)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the pool: ``take`` raises ``Stopped`` from now on, also where it is waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
