"""A lane: one device with its worker threads and its host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from types import TracebackType
from typing import Self, TypeVar

import torch

from surgery.arithmetic import exact_arithmetic
from surgery.engine.buffers import Buffers
from surgery.engine.resources import Memory
from surgery.engine.ring import Ring, new_stream
from surgery.engine.threads import WriteBehind
from surgery.engine.walk import Piece, windows
from surgery.lossless.blocks import HOST_THREADS
from surgery.memory import keep_scratch, return_free_memory
from surgery.timing import Timing, timed

_In = TypeVar("_In")
_Out = TypeVar("_Out")

#: Windows that may be queued for the writer. Their memory is bounded by the buffers, not by this.
_WAITING = 64
#: Bytes of shards that pass before freed memory is returned to the system.
_TRIM_BYTES = 64 << 20


class Lane:
    """One device with worker threads, each of which computes one window of a shard at a time. A context manager.

    A worker is one thread, and on a CPU it uses one core: its results do not depend on how many workers there are. On a GPU
    each has its own stream, so that copies for one window overlap with the arithmetic of another. Where the memory of pieces is
    the GPU's (``Memory.resident_bytes``), two more streams bring them there, in the order in which they are read, and back.

    Args:
        device: where the arithmetic runs.
        memory: how many threads it has, and which memory.
        timing: records where the time goes.

    Attributes:
        device, timing: as given.
        readers: shards that are read at a time.
        buffers: memory for the pieces between the readers and the writers.
    """

    def __init__(self, device: torch.device, memory: Memory, timing: Timing | None = None) -> None:
        self.device = device
        self.timing = timing
        self.readers = memory.readers
        ring = Ring(device, memory.ring_bytes) if memory.resident_bytes and device.type == "cuda" else None
        self.buffers = Buffers(memory.resident_bytes or memory.buffer_bytes, ring)
        self._pool = ThreadPoolExecutor(memory.workers, thread_name_prefix="surgery-work", initializer=self._start_worker)
        self._streams = threading.local()
        self._passed = 0

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        return self

    def stop(self) -> None:
        """Cancel windows that no worker has begun, and end waits for buffers."""
        self.buffers.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # the workers' setting holds for the whole process

    def _start_worker(self) -> None:
        torch.set_num_threads(1)
        keep_scratch()
        if self.timing is not None:
            self.timing.watch("worker")
        if self.device.type == "cuda":
            self._streams.own = new_stream(self.device)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        stream, ring = self._streams.own, self.buffers.ring
        with _in_stream(self.device, stream):
            if ring is not None:
                stream.wait_stream(ring.up)  # on the GPU: what has been read may still be on its way there
            yield
            stream.synchronize()  # other threads use the results

    def submit(self, compute: Callable[[_In], _Out], item: _In) -> Future[_Out]:
        """Run ``compute(item)`` in the next free worker, with the arithmetic settings and on the device of the lane."""

        def run() -> _Out:
            with exact_arithmetic(), self._on_device():
                return compute(item)

        return self._pool.submit(copy_context().run, run)

    def on_host(self, compute: Callable[[], _Out]) -> Future[_Out]:
        """Run ``compute()`` in a thread of the host that no GPU waits for. There are as many of these as cores."""

        def run() -> _Out:
            if self.timing is not None:
                self.timing.watch("host")
            with timed("correction"):
                return compute()

        return HOST_THREADS.submit(copy_context().run, run)

    def flow(
        self,
        pieces: Iterable[Piece],
        window_bytes: int,
        compute: Callable[[Sequence[Piece]], _Out],
        finish: Callable[[Sequence[Piece], _Out], object],
        on_read: Callable[[], object],
    ) -> None:
        """Take a shard through the lane: ``finish(window, compute(window))`` for each window of it.

        Args:
            pieces: of the shard, whose memory is lent by this lane's ``buffers``. On a GPU they are asked for in the stream
                that brings them there.
            window_bytes: the least length of a window; the last one may be shorter.
            compute: called by the workers, for several windows at a time.
            finish: called in one other thread, in the order of the shard; on a GPU in the stream that brings pieces back. Then
                the memory of the window goes back.
            on_read: called when the last piece has been read.
        """
        ring = self.buffers.ring
        with (
            WriteBehind(_WAITING, on_failure=self.buffers.stop) as behind,
            nullcontext() if ring is None else _in_stream(ring.device, ring.up),
        ):
            for window in windows(pieces, window_bytes):
                behind.submit(self._finish, window, self.submit(compute, window), finish)
            on_read()

    def _finish(self, window: list[Piece], result: Future[_Out], finish: Callable[[Sequence[Piece], _Out], object]) -> None:
        """Finish a window in the writer's thread, then give its buffers back."""
        if self.timing is not None:
            self.timing.watch("writer")
        done, ring = result.result(), self.buffers.ring
        with nullcontext() if ring is None else _in_stream(ring.device, ring.down):
            finish(window, done)
        for piece in window:
            self._passed += len(piece)
            self.buffers.give(piece.buffer)
        if self._passed >= _TRIM_BYTES:
            self._passed = 0
            return_free_memory()


@contextmanager
def _in_stream(device: torch.device, stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
