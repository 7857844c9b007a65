"""A pool of open files: a model may have thousands of files, and a process may only have a few hundred open at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

#: How many files that nobody uses stay open, for whoever needs them next.
_KEPT_OPEN = 6


class Reader(Protocol):
    """An open file, such as a ``ShardReader``."""

    def check_unchanged(self) -> None:
        """Refuse a file that has changed since it was opened. Raises FormatError."""

    def close(self) -> None:
        """Close the file; nothing is read from it any more."""


_Reader = TypeVar("_Reader", bound=Reader)


class Pool(Generic[_Reader]):
    """Readers by file name, opened when they are first needed. The ones unused for longest are closed.

    When a file is closed, it is checked that it has not changed since it was opened. A context manager; safe for any number
    of threads.

    Args:
        make: opens the file of that name; called by one thread at a time.
    """

    def __init__(self, make: Callable[[str], _Reader]) -> None:
        self._make = make
        self._open: dict[str, _Reader] = {}  # in the order of their last use
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                for reader in self._open.values():
                    reader.check_unchanged()
        finally:
            for reader in self._open.values():
                reader.close()
            self._open.clear()

    @contextmanager
    def of(self, name: str) -> Iterator[_Reader]:
        """The reader of a file, which stays open for as long as the context lasts.

        Raises:
            What ``make`` raises; FormatError: an unused file is closed here, and has changed.
        """
        with self._lock:
            reader = self._open.pop(name, None) or self._make(name)
            self._open[name] = reader
            self._users[name] += 1
        try:
            yield reader
        finally:
            with self._lock:
                self._users[name] -= 1
        with self._lock:
            idle = [name for name in self._open if not self._users[name]]
            for name in idle[:-_KEPT_OPEN]:
                self._close(name)

    def forget(self, name: str) -> None:
        """Close a file that is open and not in use, so that it may be deleted.

        Raises:
            FormatError: it has changed since it was opened.
        """
        with self._lock:
            if name in self._open and not self._users[name]:
                self._close(name)

    def _close(self, name: str) -> None:
        reader = self._open.pop(name)
        try:
            reader.check_unchanged()
        finally:
            reader.close()
