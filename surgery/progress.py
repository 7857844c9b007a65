"""How long-running operations say where they are, and what the user should know, without knowing who listens.

What users call is ``heard``: its notes go to its ``progress``; without one each is a ``SurgeryWarning`` at the line that called
it. What it consists of asks for ``listening``, or tells a ``note``, and need not be handed anything.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FrameType
from typing import ParamSpec, Protocol, TypeVar, runtime_checkable

from surgery.errors import SurgeryWarning
from surgery.escapes import escaped

_Arguments = ParamSpec("_Arguments")
_Out = TypeVar("_Out")


@runtime_checkable
class Progress(Protocol):
    """What an operation reports. The command line turns it into a bar, or lines of a log; by default notes are warnings, and
    the rest is ignored.

    Any object with these methods will do. One phase is over before the next one begins. They are called from several threads,
    one call at a time.
    """

    def start(self, label: str, total_bytes: int) -> None:
        """A phase begins.

        Args:
            label: what is done in it, such as ``factorizing``.
            total_bytes: how many bytes it will process; 0 if nobody can say how long it takes.
        """

    def item(self, name: str) -> None:
        """What is worked on changes.

        Args:
            name: of the tensor or file that is worked on from now on.
        """

    def advance(self, n_bytes: int) -> None:
        """Some bytes are done.

        Args:
            n_bytes: how many more.
        """

    def note(self, message: str) -> None:
        """Something the user should know that is no error.

        Args:
            message: one sentence in one line, with what it holds of strangers' names ``escaped``. Said once.
        """

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
    """Reports nothing, but keeps the notes for whoever asks.

    Attributes:
        notes: what has been said, in order.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, label: str, total_bytes: int) -> None: ...

    def item(self, name: str) -> None: ...

    def advance(self, n_bytes: int) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)

    def finish(self) -> None: ...


class _Warner(Silent):
    """The listener of a call that was given none: a note becomes a ``SurgeryWarning`` at the line of that call.

    A note from another thread waits for the end of the operation. So does one that the caller's filters make an error: a note
    never stops the work.
    """

    def __init__(self, caller: FrameType) -> None:
        super().__init__()
        self._caller = caller
        self._thread = threading.get_ident()

    def note(self, message: str) -> None:
        if threading.get_ident() != self._thread:
            self.notes.append(message)
            return
        try:
            self._warn(message)
        except SurgeryWarning:
            self.notes.append(message)

    def tell_the_rest(self) -> None:
        while self.notes:
            self._warn(self.notes.pop(0))

    def _warn(self, message: str) -> None:
        where, known = self._caller, self._caller.f_globals
        warnings.warn_explicit(
            message,
            SurgeryWarning,
            where.f_code.co_filename,
            where.f_lineno,
            module=known.get("__name__") or "<string>",  # of exec and eval; without one nothing would be said
            registry=known.setdefault("__warningregistry__", {}),
        )


class Shared:
    """A listener that several threads may tell at a time: it hears one call after the other, and no note twice.

    What it does when it hears something is its own: an operation that it calls is no part of the one that it hears.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told: set[str] = set()
        self._one = threading.Lock()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._one:
            before = _listener.set(None)
            try:
                yield
            finally:
                _listener.reset(before)

    def start(self, label: str, total_bytes: int) -> None:
        with self._turn():
            self._progress.start(label, total_bytes)

    def item(self, name: str) -> None:
        with self._turn():
            self._progress.item(name)

    def advance(self, n_bytes: int) -> None:
        with self._turn():
            self._progress.advance(n_bytes)

    def note(self, message: str) -> None:
        message = escaped(message)
        with self._turn():
            if message not in self._told:
                self._told.add(message)
                self._progress.note(message)

    def finish(self) -> None:
        with self._turn():
            self._progress.finish()


#: Who hears the operation that goes on. Threads that work for it are begun with a copy of its context.
_listener: ContextVar[Shared | None] = ContextVar("surgery_listener", default=None)


def listening() -> Progress:
    """Who hears the operation that goes on; safe to call from several threads."""
    return _listener.get() or Silent()


def note(message: str) -> None:
    """A note of the operation that goes on; where none does, a ``SurgeryWarning`` at the line that called our caller."""
    listener = _listener.get()
    if listener is not None:
        listener.note(message)
    else:
        warnings.warn(escaped(message), SurgeryWarning, stacklevel=3)


def heard(function: Callable[_Arguments, _Out]) -> Callable[_Arguments, _Out]:
    """For what users call: who hears its progress and its notes, and those of all that it calls.

    That is the keyword argument ``progress``, if there is one and it is given, alone. Without it, who hears the operation that
    this one is a part of; and if it is a part of none, nobody: then each note is a ``SurgeryWarning`` at the caller's line.
    """

    @functools.wraps(function)
    def wrapped(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Out:
        given: Progress | None = options.get("progress")  # type: ignore[assignment]
        if given is None and _listener.get() is not None:
            return function(*arguments, **options)
        warner = _Warner(sys._getframe(1))
        before = _listener.set(Shared(warner if given is None else given))
        try:
            result = function(*arguments, **options)
        except BaseException:
            while warner.notes:
                with suppress(SurgeryWarning):  # where that is an error: the one on its way is what counts
                    warner.tell_the_rest()
            raise
        finally:
            _listener.reset(before)
        warner.tell_the_rest()
        return result

    return wrapped
