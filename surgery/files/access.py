"""Files that the system does not let be read or written, or that are none: errors that name them and say what to do."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import OutputError, ReadError, SurgeryError, advice
from surgery.files.hub_cache import hub_cache

#: What to do where something cannot be written, and can be soon.
_TO_GO_ON = {
    errno.ENOSPC: "free some space, then run the same command again: it goes on where it stopped",
    errno.EDQUOT: "free some of your quota, then run the same command again: it goes on where it stopped",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or see what this disk allows, then run the same command again",
}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that names the file."""
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint=_TO_GO_ON.get(error.errno or 0) or f"{advice(error)}; or choose another folder with -o",
        ) from error


@contextmanager
def read_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Turns an OSError of reading into a ReadError that names the file."""
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        hint = advice(error)
        if isinstance(error, FileNotFoundError) and hub_cache(path) is not None:
            hint = "the hub's cache has lost it; run the same command again: it is fetched once more"
        raise ReadError(f"{name or path}: cannot be read ({error.strerror or error})", hint=hint) from error


def check_regular(path: Path, name: str) -> None:
    """Refuse what is no ordinary file: a pipe or a device may have no end.

    Raises:
        ReadError: it is something else.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode):
        raise ReadError(f"{name}: is no ordinary file", got="a folder" if stat.S_ISDIR(mode) else "a pipe or a device")


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of what is none: renamed over ``/dev/null``, it would take it away.

    Raises:
        OutputError: something else is there.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise OutputError(f"{path} is {what}", expected="a file to write", hint="choose another file with -o")


def all_below(folder: Path) -> Iterator[Path]:
    """Everything in a folder and in the folders in it; links are not followed.

    ``Path.rglob`` passes over folders that may not be looked into, as if nothing were there.

    Raises:
        ReadError: one of the folders cannot be looked into.
    """
    if not folder.is_dir():
        return

    def refused(error: OSError) -> None:
        with read_errors(Path(error.filename)):
            raise error

    for top, folders, files in os.walk(folder, onerror=refused):
        for name in (*folders, *files):
            yield Path(top, name)
