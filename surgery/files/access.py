"""File access: the system's errors as ours, which name the file and say what to do, and checks for ordinary files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import OutputError, ReadError, SurgeryError, advice
from surgery.files.hub_cache import hub_cache

#: errno of a failed write -> what to do, where the same command can succeed afterwards.
_RETRY_HINTS = {
    errno.ENOSPC: "free some space, then run the same command again: it continues where it stopped",
    errno.EDQUOT: "free some of your quota, then run the same command again: it continues where it stopped",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or see what this disk allows, then run the same command again",
}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Translates errors: an OSError raised inside becomes an OutputError that names ``path``."""
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint=_RETRY_HINTS.get(error.errno or 0) or f"{advice(error)}; or choose another folder with -o",
        ) from error


@contextmanager
def read_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Translates errors: an OSError raised inside becomes a ReadError that names the file.

    Args:
        path: of the file.
        name: what messages call it; its path if None.
    """
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        hint = advice(error)
        if isinstance(error, FileNotFoundError) and hub_cache(path) is not None:
            hint = "it is no longer in the hub's cache; run the same command again to fetch it"
        raise ReadError(f"{name or path}: cannot be read ({error.strerror or error})", hint=hint) from error


def check_regular(path: Path, name: str) -> None:
    """Refuse to read anything but an ordinary file: a pipe or a device may have no end.

    Args:
        path: of the file; links are followed.
        name: for messages.

    Raises:
        ReadError: it is a folder, a pipe or a device.
        OSError: it is not there, or may not be looked at.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode):
        raise ReadError(f"{name}: is no ordinary file", got="a folder" if stat.S_ISDIR(mode) else "a pipe or a device")


def check_replaceable(path: Path) -> None:
    """Refuse to replace anything but an ordinary file: a file renamed over ``/dev/null`` would remove the device.

    Raises:
        OutputError: ``path`` is a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise OutputError(f"{path} is {what}", expected="a file to write", hint="choose another file with -o")


def all_below(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder, at any depth; links are not followed. Nothing if there is no such folder.

    ``Path.rglob`` silently skips folders that may not be listed; this raises instead.

    Raises:
        ReadError: one of the folders cannot be listed.
    """
    if not folder.is_dir():
        return

    def refused(error: OSError) -> None:
        with read_errors(Path(error.filename)):
            raise error

    for top, folders, files in os.walk(folder, onerror=refused):
        for name in (*folders, *files):
            yield Path(top, name)
