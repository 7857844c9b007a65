"""One device with the threads and the memory that serve it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from types import TracebackType
from typing import Self, TypeVar

import torch

from surgery.arithmetic import exact_arithmetic
from surgery.engine.buffers import Buffers
from surgery.engine.threads import WriteBehind
from surgery.engine.walk import Piece, windows
from surgery.memory import keep_scratch, return_free_memory
from surgery.timing import Timing

_In = TypeVar("_In")
_Out = TypeVar("_Out")

#: Windows that may wait for the writer; their memory is bounded by the buffers.
_WAITING = 64
#: Bytes of shards after which freed memory is given back to the system.
_TRIM_BYTES = 64 << 20


class Lane:
    """Workers, each taking one window of a shard from its bytes to what is written of it. A context manager.

    A worker is one thread, on a CPU with one core: nothing that it computes depends on how many there are. On a GPU each
    has a stream of its own, so that copies of one go on beside the arithmetic of another.

    Args:
        device: where the arithmetic runs.
        workers: how many.
        buffer_bytes: host memory for what is between the reader and the writer.
        timing: told where the time goes.
    """

    def __init__(self, device: torch.device, workers: int, buffer_bytes: int, timing: Timing | None = None) -> None:
        self.device = device
        self.workers = workers
        self.timing = timing
        self.buffers = Buffers(buffer_bytes, pinned=device.type == "cuda")
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="surgery-work", initializer=self._start_worker)
        self._streams = threading.local()
        self._passed = 0

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        return self

    def stop(self) -> None:
        """Give up what has not been begun, and wake who waits for it."""
        self.buffers.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # the libraries below have one setting for all threads

    def _start_worker(self) -> None:
        torch.set_num_threads(1)
        keep_scratch()
        if self.timing is not None:
            self.timing.watch("worker")
        if self.device.type == "cuda":
            self._streams.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams.own):
            yield
            self._streams.own.synchronize()  # the results go to other threads

    def submit(self, compute: Callable[[_In], _Out], item: _In) -> Future[_Out]:
        """``compute(item)`` by the next worker that is free."""

        def run() -> _Out:
            with exact_arithmetic(), self._on_device():
                return compute(item)

        return self._pool.submit(copy_context().run, run)

    def flow(
        self,
        pieces: Iterable[Piece],
        window_bytes: int,
        compute: Callable[[Sequence[Piece]], _Out],
        finish: Callable[[Sequence[Piece], _Out], object],
        on_read: Callable[[], object],
    ) -> None:
        """``finish(window, compute(window))`` for each window of a shard.

        Args:
            pieces: of the shard, in this lane's buffers.
            window_bytes: how long a window is at least, but for the last one.
            compute: done by the workers, several at a time.
            finish: called in one thread, in the order of the shard. Then the memory of the window is lent to others.
            on_read: called when all of the shard has been read.
        """
        with WriteBehind(_WAITING, failed=self.buffers.stop) as behind:
            for window in windows(pieces, window_bytes):
                behind.submit(self._finish, window, self.submit(compute, window), finish)
            on_read()

    def _finish(self, window: list[Piece], result: Future[_Out], finish: Callable[[Sequence[Piece], _Out], object]) -> None:
        if self.timing is not None:
            self.timing.watch("writer")
        finish(window, result.result())
        for piece in window:
            self._passed += len(piece)
            self.buffers.give(piece.buffer)
        if self._passed >= _TRIM_BYTES:
            self._passed = 0
            return_free_memory()
