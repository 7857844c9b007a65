"""Progress and notes of long-running operations, which they tell without knowing who listens.

Public functions are decorated with ``heard``: their notes go to the argument ``progress``; without one, each note is a
``SurgeryWarning`` at the caller's line. Inner functions call ``listening()`` for the progress, or ``note(...)``, and need no
argument for it.
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
    """Receives the progress and the notes of an operation.

    Pass one as ``progress=``. Any object with these methods works. The command line shows the progress as a bar, or as
    lines of a log. Without a ``Progress``, notes become warnings, and everything else is ignored.

    Phases do not overlap: one ends before the next begins. Several threads call the methods, but only one at a time.
    """

    def start(self, label: str, total_bytes: int) -> None:
        """A phase begins.

        Args:
            label: what the operation does in this phase, such as ``factorizing``.
            total_bytes: how many bytes the phase will process; 0 if this is not known.
        """

    def item(self, name: str) -> None:
        """The operation begins to work on another tensor or file.

        Args:
            name: its name.
        """

    def advance(self, n_bytes: int) -> None:
        """More bytes are done.

        Args:
            n_bytes: how many bytes, since the last call.
        """

    def note(self, message: str) -> None:
        """A message that the user should know about and that is not an error. The same message comes only once.

        Args:
            message: one sentence on one line. Untrusted names in it are escaped.
        """

    def finish(self) -> None:
        """The phase has ended, with success or with an error."""


@contextmanager
def phase(progress: Progress, label: str, total_bytes: int = 0) -> Iterator[None]:
    """Marks the block as a phase of the operation; arguments as for ``Progress.start``."""
    progress.start(label, total_bytes)
    try:
        yield
    finally:
        progress.finish()


class Silent:
    """A ``Progress`` that shows nothing and collects the notes.

    Attributes:
        notes: the messages so far, in order.
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
    """The listener of a call without ``progress``: makes each note a ``SurgeryWarning`` at the line of that call.

    A note from another thread is kept until the end of the operation. So is one that the caller's warning filters turn into
    an error, since a note must never stop the operation.
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
        """Warn of the notes that were kept."""
        while self.notes:
            self._warn(self.notes.pop(0))

    def _warn(self, message: str) -> None:
        where, known = self._caller, self._caller.f_globals
        warnings.warn_explicit(
            message,
            SurgeryWarning,
            where.f_code.co_filename,
            where.f_lineno,
            module=known.get("__name__") or "<string>",  # code of exec and eval has no name, and needs one to be warned
            registry=known.setdefault("__warningregistry__", {}),
        )


class Shared:
    """Lets several threads tell one ``Progress``: its methods are called one at a time, and no note comes twice.

    A public function that the listener calls in one of its methods is not part of the operation that it listens to.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
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


#: The listener of the current operation. Threads that work for it are started with a copy of its context.
_listener: ContextVar[Shared | None] = ContextVar("surgery_listener", default=None)


def listening() -> Progress:
    """The ``Progress`` of the current operation, which several threads may call; a silent one outside of any operation."""
    return _listener.get() or Silent()


def note(message: str) -> None:
    """Tell a note of the current operation; outside of any, it is a ``SurgeryWarning`` at the line that called our caller."""
    listener = _listener.get()
    if listener is not None:
        listener.note(message)
    else:
        warnings.warn(escaped(message), SurgeryWarning, stacklevel=3)


def heard(function: Callable[_Arguments, _Out]) -> Callable[_Arguments, _Out]:
    """Decorator for public functions: sets who hears their progress and notes, and those of all functions that they call.

    That is the keyword argument ``progress`` if it is given. Otherwise it is the listener of the operation that this call is
    a part of; and if it is part of none, each note is a ``SurgeryWarning`` at the caller's line.
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
                with suppress(SurgeryWarning):  # filters may make it an error, which must not hide the one being raised
                    warner.tell_the_rest()
            raise
        finally:
            _listener.reset(before)
        warner.tell_the_rest()
        return result

    return wrapped
