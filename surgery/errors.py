"""The exception hierarchy. Every failure that a user can cause or meet is one of these.

SurgeryError
 +-- OptionError        (ValueError)    an option or argument is not valid, in general or for this model
 +-- SourceError        (OSError)       the model cannot be found, reached or used
 +-- ReadError          (OSError)       the system does not let surgery read a file, or the file has disappeared
 +-- FormatError        (ValueError)    a file breaks its own format
 +-- WeightError        (ValueError)    a weight cannot be factorized (NaN, infinity)
 +-- ScalesError        (ValueError)    scales do not fit the factors
 +-- OutputError        (OSError)       the output folder, or its disk, cannot be used
 +-- ResourceError      (RuntimeError)  the system gives no more memory or threads, or a GPU fails
 +-- ClusterError       (RuntimeError)  a Ray cluster cannot be reached, has no room, or is lost
 +-- MissingExtra       (ImportError)   an optional package is needed
 +-- InstallationError  (ImportError)   another project has a package of the same name

SurgeryWarning          (UserWarning)   something works, but is probably not what the user meant

If an error of the system is the cause, it is the ``__cause__`` of the ``SurgeryError``. Only mistakes in the call
itself, such as an unknown keyword, raise Python's own TypeError.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from surgery.escapes import escaped

#: What to do if there is too little memory.
MEMORY_HINT = "end other programs, allow less with --max-memory, or raise the limit (ulimit -v)"
#: What the options are called by which a result is replaced or written elsewhere, on the command line and in Python.
OVERWRITE, OTHER_OUT = "--overwrite (in Python: overwrite=True)", "-o (out) chooses another"
#: errno of an error with a file or folder -> what to do.
_ADVICE = {
    errno.EACCES: "see who may use it, and the folders above it: ls -l",
    errno.EPERM: "see who may use it, and the folders above it: ls -l",
    errno.EMFILE: "raise the limit of open files, ulimit -n, then run the same command again",
    errno.ENFILE: "end other programs, which have too many files open, then run the same command again",
    errno.ENOMEM: MEMORY_HINT,
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EIO: "see what the system says of this disk (dmesg), then run the same command again",
    errno.ESTALE: "see whether the network folder is there, mount it again, then run the same command again",
}
#: Texts by which errors for too little memory are recognized: of torch, of C++, of libraries that cannot be loaded.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory", "failed to map segment")
_GPU_FULL = ("CUDA out of memory", "MPS backend out of memory")
_GPU_FAILS = ("CUDA error", "CUBLAS_STATUS_", "CUSOLVER_STATUS_", "cudaError", "HIP error")
_NO_THREADS = ("can't start new thread", "Resource temporarily unavailable")


class SurgeryError(Exception):
    """Base of all errors that surgery raises on purpose.

    Args:
        what: what went wrong, in one sentence without a full stop. It names the file and the tensor.
        got: what was found.
        expected: what would have been right.
        hint: what to do next.

    Each argument is also an attribute, which is None if the argument was not given. In the text of the error, each of
    them is one line. Untrusted names in these lines are escaped: the text can be printed anywhere, and no name can look
    like a line of the message. Errors can be pickled and sent to other processes. If ``got`` is an exception, the error
    keeps its text, as one line.
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
    """An option or argument is not valid, alone or together with the others."""


class SourceError(SurgeryError, OSError):
    """The model cannot be found, reached or used."""


class ReadError(SurgeryError, OSError):
    """A file cannot be read: missing permissions, a folder in its place, a failing disk, or the file has just disappeared."""


class FormatError(SurgeryError, ValueError):
    """A file breaks its own format: it is truncated, inconsistent, or not of this format at all."""


class WeightError(SurgeryError, ValueError):
    """A weight holds a value that cannot be factorized (NaN or infinity)."""


class ScalesError(SurgeryError, ValueError):
    """Scales do not fit the factors that they are applied to."""


class OutputError(SurgeryError, OSError):
    """The output folder, or the disk that it is on, cannot be used."""


class ResourceError(SurgeryError, RuntimeError):
    """The system gives no more memory or threads, or a GPU fails."""


class ClusterError(SurgeryError, RuntimeError):
    """A Ray cluster cannot be reached, has no CPU or GPU to work on, or has lost a task for good."""


class MissingExtra(SurgeryError, ImportError):
    """An optional package is needed for this call."""


class InstallationError(SurgeryError, ImportError):
    """This project's package ``surgery`` and another project's package ``surgery`` are installed in the same folder."""


class SurgeryWarning(UserWarning):
    """A note of an operation that was called without ``progress``.

    The note is about something that works but is probably not meant, or that surgery has decided by itself.
    """


def few(names: Iterable[object], *, most: int = 4, between: str = ", ") -> str:
    """A list of names for a message: the first ``most``, and if there are more, how many in all."""
    texts = [str(name) for name in names]
    return between.join(texts[:most]) + (f" ... ({len(texts)} in all)" if len(texts) > most else "")


@contextmanager
def naming_system_errors() -> Iterator[None]:
    """Translates errors around a public function: errors of the system that no inner function has translated become ours.

    An error with a file becomes a ``ReadError``, one about memory, threads or a GPU a ``ResourceError``. Errors of connections
    and pipes pass unchanged.
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
    """What to do about an error of the system with a file or folder, as a hint."""
    return _ADVICE.get(error.errno or 0, "see what is there (ls -l), then run the same command again")


def _lacking(error: BaseException) -> ResourceError | None:
    """The ``ResourceError`` for an error that means too little memory, too few threads or a GPU that fails; None for others."""
    texts = [str(cause) for cause in (error, error.__cause__) if cause is not None]
    if any(sign in text for sign in _GPU_FULL for text in texts):
        hint = "end what else uses it (nvidia-smi), or do without: --device cpu; then run the same command again"
        return ResourceError("the GPU has not enough free memory", got=texts[0].partition("\n")[0][:300], hint=hint)
    if any(sign in text for sign in _GPU_FAILS for text in texts):
        hint = "see what the system says of it (nvidia-smi, dmesg), or do without: --device cpu"
        return ResourceError("the GPU has failed", got=texts[0].partition("\n")[0][:300], hint=hint)
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY for text in texts):
        got = next((text for text in texts if text), type(error).__name__).partition("\n")[0]
        return ResourceError("there is not enough memory", got=got[:300], hint=MEMORY_HINT)
    if any(sign in text for sign in _NO_THREADS for text in texts):
        hint = "end other programs, or raise the limit of processes (ulimit -u), then run the same command again"
        return ResourceError("the system starts no more threads", got=texts[0][:300], hint=hint)
    return None
