"""Files that are open while they are read, and a few longer: a model may have thousands, a process a few dozen."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

#: Of those that nobody uses.
_KEPT_OPEN = 6


class Reader(Protocol):
    """A file that is open."""

    def check_unchanged(self) -> None:
        """Raises where the file is not what it was when it was opened."""

    def close(self) -> None:
        """No more reading."""


_Reader = TypeVar("_Reader", bound=Reader)


class Pool(Generic[_Reader]):
    """Readers of files, by name: opened when they are wanted, and closed when nobody uses them and others were used since.

    A file that is closed must be what it was when it was opened. A context manager, for any number of threads.

    Args:
        make: opens the file of a name; called by one thread at a time.
    """

    def __init__(self, make: Callable[[str], _Reader]) -> None:
        self._make = make
        self._open: dict[str, _Reader] = {}  # the last that was used comes last
        self._users: Counter[str] = Counter()
        self._one = threading.Lock()

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
        """The reader of a name, open for as long as the context lasts.

        Raises:
            What opening it does; FormatError: another one is closed, and its file has changed.
        """
        with self._one:
            reader = self._open.pop(name, None) or self._make(name)
            self._open[name] = reader
            self._users[name] += 1
        try:
            yield reader
        finally:
            with self._one:
                self._users[name] -= 1
        with self._one:
            idle = [name for name in self._open if not self._users[name]]
            for name in idle[:-_KEPT_OPEN]:
                self._close(name)

    def forget(self, name: str) -> None:
        """Close a file that nobody uses, if it is open: it may be dropped.

        Raises:
            FormatError: it has changed.
        """
        with self._one:
            if name in self._open and not self._users[name]:
                self._close(name)

    def _close(self, name: str) -> None:
        reader = self._open.pop(name)
        try:
            reader.check_unchanged()
        finally:
            reader.close()
