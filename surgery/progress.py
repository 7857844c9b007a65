"""How long-running operations say where they are, without knowing who listens."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from surgery.errors import SurgeryWarning


class Progress(Protocol):
    """What an operation reports. The command line turns it into a bar, or lines of a log; the default ignores it.

    One phase is over before the next one begins. ``item``, ``advance`` and ``note`` are called by several threads in
    ``factorize`` and ``fold``, one at a time.
    """

    def start(self, label: str, total_bytes: int) -> None:
        """A phase begins that will process ``total_bytes`` bytes; 0 if nobody can say how long it takes."""

    def item(self, name: str) -> None:
        """The tensor or file now being worked on."""

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more bytes are done."""

    def note(self, message: str) -> None:
        """Something the user should know that is no error. Said once."""

    def finish(self) -> None:
        """The phase is over, well or not."""


@contextmanager
def phase(progress: Progress, label: str, total_bytes: int = 0) -> Iterator[None]:
    """A phase for as long as the block takes; see ``Progress.start``."""
    progress.start(label, total_bytes)
    try:
        yield
    finally:
        progress.finish()


class Silent:
    """Reports nothing, but keeps the notes for whoever asks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, label: str, total_bytes: int) -> None: ...

    def item(self, name: str) -> None: ...

    def advance(self, n_bytes: int) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)

    def finish(self) -> None: ...


def note_or_warn(progress: Progress | None, message: str) -> None:
    """A note to whoever listens, and a ``SurgeryWarning`` where nobody does."""
    if progress is not None:
        progress.note(message)
    else:
        warnings.warn(message, SurgeryWarning, stacklevel=4)


class Shared:
    """Another one, for several threads at a time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._one = threading.Lock()

    def start(self, label: str, total_bytes: int) -> None:
        with self._one:
            self._progress.start(label, total_bytes)

    def item(self, name: str) -> None:
        with self._one:
            self._progress.item(name)

    def advance(self, n_bytes: int) -> None:
        with self._one:
            self._progress.advance(n_bytes)

    def note(self, message: str) -> None:
        with self._one:
            self._progress.note(message)

    def finish(self) -> None:
        with self._one:
            self._progress.finish()
