"""The lock of an output folder, and the removal of its traces: of the lock, and of a run that has done nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from surgery.errors import OutputError
from surgery.files.access import write_errors
from surgery.names import FILES_FILE, JOURNAL_DIR, LOCK_FILE, PARTS_DIR, RESULT_DIR, RUN_FILE, SURGERY_DIR
from surgery.run.contents import files_in
from surgery.run.journal import Journal, clear_away
from surgery.run.output_paths import check_apart, check_leads_somewhere

#: How often to try for a lock whose file other runs remove meanwhile.
_ATTEMPTS = 1000


@contextmanager
def locked(out: Path, inputs: Iterable[Path]) -> Iterator[None]:
    """Lock an output folder, created if missing, against other runs. When a process dies, the system releases its lock.

    Args:
        out: the folder.
        inputs: folders and files that are read; ``out`` may neither be one, nor lie in one, nor hold one.

    Raises:
        OutputError: another run holds it, it is one of the inputs or no folder, or it cannot be written to.
    """
    with write_errors(out):
        check_apart(out, inputs)
        check_leads_somewhere(out)
        lock, made = _taken(out)
    try:
        yield
    finally:
        try:
            unfinished = Journal.is_there(out) or (out / FILES_FILE).is_file()
            over = not unfinished or _nothing_done(out)
            if over:
                _clear(out)
        finally:
            with suppress(OSError):  # of a system that cannot unlock: it does when the process ends
                lock.release()
        # A folder goes only if it is empty: another run may have come into it already.
        for path in (out / JOURNAL_DIR, *([out] if made else [])) if over else ():
            with suppress(OSError):
                path.rmdir()


def _taken(out: Path) -> tuple[BaseFileLock, bool]:
    """Acquire the lock of an output folder. Returns it, and whether the folder was created for it.

    Another run that ends may remove the file of its lock, and the folders around it, at any moment. Then they are created
    again: a lock counts only while its file is in its place.
    """
    made, path = False, out / LOCK_FILE
    for left in reversed(range(_ATTEMPTS)):
        try:
            if not stat.S_ISDIR(out.stat().st_mode):
                raise OutputError(f"{out} is no folder", hint="choose another folder with -o")
        except FileNotFoundError:
            made = True
        try:
            (out / JOURNAL_DIR).mkdir(parents=True, exist_ok=True)
            for ours in (out / JOURNAL_DIR, path):
                if ours.is_symlink():
                    raise OutputError(f"{ours} is a link", hint="remove it, or choose another folder with -o")
            if (lock := _lock_in_place(path)) is not None:
                return lock, made
        except Timeout:
            raise OutputError(
                f"another run is writing to {out}", hint="wait until it is finished, or choose another folder with -o"
            ) from None
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
    raise OutputError(f"{out} cannot be locked: its lock file is removed again and again", hint="choose another folder with -o")


def _lock_in_place(path: Path) -> BaseFileLock | None:
    """Acquire the lock in a file. None if another run has removed or replaced the file meanwhile.

    Raises:
        Timeout: another run holds it.
        FileNotFoundError: the file or its folder has been removed.
    """
    lock = FileLock(path, timeout=0)
    # Kept open until the end, as the system may give the inode number of a closed and removed file to a new one.
    before = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        lock.acquire()
        try:
            if os.path.samestat(os.fstat(before), path.lstat()):
                return lock
        except FileNotFoundError:
            pass
        lock.release()
        return None
    finally:
        os.close(before)


def _clear(out: Path) -> None:
    """Remove the traces of a run that is over or has done nothing. The file of its lock comes last, and is held until then."""
    with write_errors(out):
        for path in set((out / JOURNAL_DIR).iterdir()) - {out / LOCK_FILE}:
            with suppress(OSError):
                clear_away(path)
        if (out / SURGERY_DIR).is_dir() and not files_in(out):
            with suppress(OSError):  # there are folders in it, or it is a link
                (out / SURGERY_DIR).rmdir()
        with suppress(OSError):  # Windows does not remove open files
            (out / LOCK_FILE).unlink()


def _nothing_done(out: Path) -> bool:
    """Whether a run that was begun has finished no shard and left no file."""
    journal = {f"{JOURNAL_DIR}/{path.name}" for path in (out / JOURNAL_DIR).iterdir()}
    place = out / RESULT_DIR if RESULT_DIR in journal else out
    if PARTS_DIR in journal and any((out / PARTS_DIR).iterdir()):
        return False
    return not files_in(place) and journal <= {LOCK_FILE, RUN_FILE, FILES_FILE, RESULT_DIR, PARTS_DIR}
