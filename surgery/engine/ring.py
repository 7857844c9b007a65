"""Page-locked memory of a fixed size, through which bytes go to a GPU and come back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

from surgery.memory import bytes_of
from surgery.progress import note

#: Bytes of a ring where there is memory enough, and the fewest. Powers of two: torch rounds page-locked memory up to these, and
#: keeps it until the process ends.
RING_BYTES = 512 << 20
LEAST_RING_BYTES = 64 << 20
#: Parts that a ring is divided into, each of which is filled, copied or read on its own.
_SLOTS = 8


class Ring:
    """Copies bytes between files and the memory of a GPU, part by part through page-locked memory. For any number of threads.

    All memory is allocated at once, and none besides: what goes through may be larger. Where the system gives no page-locked
    memory, ordinary memory takes its place, which a GPU copies more slowly.

    Args:
        device: the GPU.
        n_bytes: of the memory, a power of two.

    Attributes:
        device: as given.
        up, down: the streams of copies to the GPU and from it.
    """

    def __init__(self, device: torch.device, n_bytes: int) -> None:
        self.device = device
        self.up, self.down = new_stream(device), new_stream(device)
        self._slot_bytes = n_bytes // _SLOTS
        memory = _page_locked(n_bytes)
        # A slot that comes back from a copy may be filled when the event has happened.
        self._free: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque(
            (memory[start : start + self._slot_bytes], None) for start in range(0, n_bytes, self._slot_bytes)
        )
        self._returned = threading.Condition()

    def upload(self, fill: Callable[[memoryview, int], object], target: torch.Tensor) -> None:
        """Fill memory of the GPU. The copies may still be going on when this returns: ``up`` has to be waited for.

        Args:
            fill: called with a buffer to be filled, and how many bytes come before it; in order.
            target: uint8 (bytes,), on the GPU; not in use in any stream.
        """
        for start in range(0, len(target), self._slot_bytes):
            part = target[start : start + self._slot_bytes]
            slot, copied = self._take(), None
            try:
                fill(bytes_of(slot[: len(part)]), start)
                copied = self._copy(part, slot[: len(part)], self.up)
            finally:
                self._give(slot, copied)

    def download(self, source: torch.Tensor) -> Iterator[memoryview]:
        """The bytes of memory of a GPU, in parts, each of which may be used until the next one is asked for.

        Args:
            source: uint8 (bytes,), which no stream is writing to.
        """
        ahead: tuple[torch.Tensor, torch.cuda.Event] | None = None
        try:
            parts = [source[start : start + self._slot_bytes] for start in range(0, len(source), self._slot_bytes)]
            for part, after in zip(parts, (*parts[1:], None), strict=True):
                (slot, copied), ahead = ahead or self._begun(part, self._take()), None
                try:
                    # The next one is copied meanwhile, if a slot is free: with one in hand no thread waits for another's.
                    if after is not None and (free := self._take_free()) is not None:
                        ahead = self._begun(after, free)
                    copied.synchronize()
                    yield bytes_of(slot[: len(part)])
                finally:
                    self._give(slot, None)
        finally:
            if ahead is not None:  # the caller stopped early
                self._give(*ahead)

    def _begun(self, part: torch.Tensor, slot: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A slot that ``part`` of a GPU's memory is being copied into, and when it has been."""
        try:
            return slot, self._copy(slot[: len(part)], part, self.down)
        except BaseException:
            self._give(slot, None)
            raise

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        return copied

    def _take(self) -> torch.Tensor:
        with self._returned:
            while not self._free:
                self._returned.wait()
            slot, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()
        return slot

    def _take_free(self) -> torch.Tensor | None:
        """A slot, if there is one that need not be waited for."""
        with self._returned:
            if not self._free or ((copied := self._free[0][1]) is not None and not copied.query()):  # type: ignore[no-untyped-call]
                return None
            return self._free.popleft()[0]

    def _give(self, slot: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        with self._returned:
            self._free.append((slot, copied))
            self._returned.notify()


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a GPU; the one that all share, where the GPU is too full for another."""
    try:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return torch.cuda.default_stream(device)


def _page_locked(n_bytes: int) -> torch.Tensor:
    try:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        note(f"the system gives no page-locked memory, so that copies to the GPU and back are slower ({error})")
        return torch.empty(n_bytes, dtype=torch.uint8)
