"""Background threads: one that makes the next item ahead of its use, one that runs calls behind the caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_T = TypeVar("_T")


class Stopped(Exception):
    """Raised in waits that end because something else has failed; the user is told that other error."""


class ReadAhead(Generic[_T]):
    """Iterates over ``items``, and makes the next one in a thread while the current one is used.

    Besides the item handed out, exactly one is ready or being made. A context manager: leaving it stops the thread after
    the item that is being made. Errors of the iterator are raised in the place of its item.
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
        # After an error the item that is being made, perhaps a long download, is not needed: the thread is left behind.
        self._thread.join(timeout=None if error is None else 1.0)

    def stop(self) -> None:
        """Make no more items. The thread ends after the one that is being made; waits for it get ``Stopped``."""
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
    """Runs calls one after the other in one thread; a bounded number of them may be queued.

    A context manager. Leaving it normally waits for all calls; the first error is raised at the next call of
    ``submit`` or when leaving.

    Args:
        depth: how many calls may be queued.
        on_failure: called in the thread when a call has failed, to end waits for what that call would have done.
    """

    def __init__(self, depth: int = 1, on_failure: Callable[[], object] | None = None) -> None:
        self._calls: queue.Queue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._dropping = False
        self._on_failure = on_failure
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="surgery-write", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._dropping = self._dropping or error is not None  # calls that are still queued are not made
        self._calls.put(None)
        self._thread.join()
        if self._error is not None and (error is None or isinstance(error, Stopped)):
            raise self._error

    def submit(self, call: Callable[..., object], *args: Any) -> None:
        """Queue ``call(*args)``; waits while the queue is full. Raises the error of an earlier call."""
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
                    if self._on_failure is not None:
                        self._on_failure()
