"""Threads that read ahead and write behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_T = TypeVar("_T")


class Stopped(Exception):
    """Work is given up because something else has failed, which is what the user is told."""


class ReadAhead(Generic[_T]):
    """Iterate over ``items`` with the next one being made in a thread while this one is used.

    Exactly one item is ready or in the making besides the one handed out. A context manager: leaving it stops the
    thread after the item in the making. Errors of the iterator are raised where its item would have come.
    """

    def __init__(self, items: Iterator[_T]) -> None:
        self._items = items
        self._room = threading.Semaphore(1)
        self._ready: queue.SimpleQueue[tuple[_T | None, BaseException | None, bool]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="surgery-read", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        # On an error nobody wants what is still being read, which may be a whole download: the thread is left behind.
        self._thread.join(timeout=None if error is None else 1.0)

    def stop(self) -> None:
        """No more items: the thread ends after the one in the making, and whoever waits for it gets ``Stopped``."""
        self._stopping = True
        self._room.release()
        self._ready.put((None, Stopped(), True))

    def _run(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stopping:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    self._ready.put((None, None, True))
                    return
                self._ready.put((item, None, False))
        except BaseException as error:  # handed to the thread that waits for the item
            self._ready.put((None, error, True))

    def __iter__(self) -> Iterator[_T]:
        while True:
            item, error, end = self._ready.get()
            self._room.release()
            if error is not None:
                raise error
            if end:
                return
            yield item  # type: ignore[misc]  # an item is there unless it is the end


class WriteBehind:
    """Runs calls in order in one thread, with a bounded number waiting behind the one that runs.

    A context manager. Leaving it normally waits for all calls; the first error is raised at the next call of
    ``submit`` or when leaving.

    Args:
        depth: how many calls may wait.
        failed: called when one has failed, in the thread: for those who wait for something that will not come now.
    """

    def __init__(self, depth: int = 1, failed: Callable[[], object] | None = None) -> None:
        self._calls: queue.Queue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._dropping = False
        self._failed = failed
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="surgery-write", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._dropping = self._dropping or error is not None  # the calls still waiting
        self._calls.put(None)
        self._thread.join()
        if self._error is not None and (error is None or isinstance(error, Stopped)):
            raise self._error

    def submit(self, call: Callable[..., object], *args: Any) -> None:
        """Run ``call(*args)`` after all calls before it."""
        if self._error is not None:
            raise self._error
        self._calls.put((call, args))

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            if not self._dropping:
                call, args = item
                try:
                    call(*args)
                except BaseException as error:  # raised in the thread that submits
                    self._error, self._dropping = error, True
                    if self._failed is not None:
                        self._failed()
