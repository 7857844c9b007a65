"""The exception hierarchy. Every failure a user can cause or meet is one of these.

SurgeryError
 +-- OptionError        (ValueError)    an option or argument that makes no sense, here or at all
 +-- SourceError        (OSError)       the model cannot be found, reached or used
 +-- ReadError          (OSError)       a file is there, or was, and the system does not let it be read
 +-- FormatError        (ValueError)    a file breaks its own format
 +-- WeightError        (ValueError)    a weight that cannot be factorized (NaN, infinity)
 +-- ScalesError        (ValueError)    scales that do not fit the factors
 +-- OutputError        (OSError)       the output folder or the disk under it
 +-- ResourceError      (RuntimeError)  the system gives no more memory or threads
 +-- ClusterError       (RuntimeError)  a Ray cluster that cannot be reached, has no room, or has been lost
 +-- MissingExtra       (ImportError)   an optional package is needed for this
 +-- InstallationError  (ImportError)   another project has the same package

SurgeryWarning          (UserWarning)   something that works but is probably not meant

Where the system has said what is wrong, its error is the ``__cause__``. What is no error of ours is Python's about the call
itself: a TypeError for an unknown keyword.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from surgery.escapes import escaped

#: What to do where memory is short.
MEMORY_HINT = "end other programs, allow less with --max-memory, or raise the limit (ulimit -v)"
#: What to do about what the system says of a file or a folder; of anything else, look and try again.
_ADVICE = {
    errno.EACCES: "see who may use it, and the folders above it: ls -l",
    errno.EPERM: "see who may use it, and the folders above it: ls -l",
    errno.EMFILE: "raise the limit of open files, ulimit -n, then run the same command again",
    errno.ENFILE: "end other programs, which have too many files open, then run the same command again",
    errno.ENOMEM: MEMORY_HINT,
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EIO: "see what the system says of this disk (dmesg), then run the same command again",
    errno.ESTALE: "see whether the network folder is there, mount it anew, then run the same command again",
}
#: Signs, in their texts, of errors that come of too little memory: of torch, of C++, of libraries that cannot be loaded.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory", "failed to map segment")
_NO_THREADS = ("can't start new thread", "Resource temporarily unavailable")


class SurgeryError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what went wrong, naming the file and the tensor, as one sentence without a full stop.
        got: what was found.
        expected: what would have been right.
        hint: what to do next.

    Each is an attribute as it was given, None where there is nothing to tell. As text each is one line, with what it holds of
    strangers' names ``escaped``: it may be printed anywhere, and no name can look like another line of it. An error goes from
    one process to another and stays what it is: another error that was found is kept as its text, without its line ends.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.expected, self.hint = what, expected, hint
        self.got = " ".join(str(got).split()) if isinstance(got, BaseException) else got

    def __str__(self) -> str:
        parts = {"got:      ": self.got, "expected: ": self.expected, "try:      ": self.hint}
        rest = [f"  {label}{escaped(str(part))}" for label, part in parts.items() if part is not None]
        return "\n".join([escaped(self.what), *rest])


class OptionError(SurgeryError, ValueError):
    """An option or argument that makes no sense, alone or with the others."""


class SourceError(SurgeryError, OSError):
    """The model cannot be found, reached or used."""


class ReadError(SurgeryError, OSError):
    """A file that cannot be read: permissions, a folder in its place, a failing disk, or it has just gone."""


class FormatError(SurgeryError, ValueError):
    """A file breaks its own format: truncated, garbage, or inconsistent."""


class WeightError(SurgeryError, ValueError):
    """A weight holds a value that cannot be factorized (NaN or infinity)."""


class ScalesError(SurgeryError, ValueError):
    """Scales that do not fit the factors they are applied to."""


class OutputError(SurgeryError, OSError):
    """The output folder or the disk under it cannot be used."""


class ResourceError(SurgeryError, RuntimeError):
    """The system gives no more memory, or no more threads."""


class ClusterError(SurgeryError, RuntimeError):
    """A Ray cluster cannot be reached, has nothing to work on, or has lost a task for good."""


class MissingExtra(SurgeryError, ImportError):
    """An optional package is needed for what was asked."""


class InstallationError(SurgeryError, ImportError):
    """The package ``surgery`` of this project and that of another one lie in the same folder."""


class SurgeryWarning(UserWarning):
    """A note that nobody else hears: what works but is probably not meant, or what an operation has done by itself."""


def few(names: Iterable[object], *, most: int = 4, between: str = ", ") -> str:
    """The first of some names, for a message, and how many there are where these are not all."""
    texts = [str(name) for name in names]
    return between.join(texts[:most]) + (f" ... ({len(texts)} in all)" if len(texts) > most else "")


@contextmanager
def naming_system_errors() -> Iterator[None]:
    """At the edge to callers: what the system says, and nothing nearer to it has explained, becomes an error of ours.

    Of a file it is a ``ReadError``, of memory or threads a ``ResourceError``. A connection or a pipe that is closed is not
    of ours.
    """
    try:
        yield
    except SurgeryError:
        raise
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise ReadError(f"{error.filename}: the system refuses it ({error.strerror})", hint=advice(error)) from error
        if (lacking := _lacking(error)) is not None:
            raise lacking from error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise ReadError(f"the system refuses what is asked of it ({error.strerror})", hint=advice(error)) from error
        raise


def advice(error: OSError) -> str:
    """What to do about what the system says of a file or a folder that is there."""
    return _ADVICE.get(error.errno or 0, "see what is there (ls -l), then run the same command again")


def _lacking(error: BaseException) -> ResourceError | None:
    """What an error is that comes of too little memory or too few threads; None of any other."""
    texts = [str(cause) for cause in (error, error.__cause__) if cause is not None]
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY for text in texts):
        got = next((text for text in texts if text), type(error).__name__).partition("\n")[0]
        return ResourceError("there is not enough memory", got=got[:300], hint=MEMORY_HINT)
    if any(sign in text for sign in _NO_THREADS for text in texts):
        hint = "end other programs, or raise the limit of processes (ulimit -u), then run the same command again"
        return ResourceError("the system starts no more threads", got=texts[0][:300], hint=hint)
    return None
