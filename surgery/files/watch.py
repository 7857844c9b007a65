"""Noticing that a file has changed between two reads: stamps of files, and a watch that remembers them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from surgery.errors import FormatError
from surgery.files.access import check_regular, read_errors


@dataclass(frozen=True, slots=True)
class Stamp:
    """Identity, size and times of a file: at least one of them changes when it is written to or replaced.

    Attributes:
        device, inode: which file it is.
        size: in bytes.
        mtime_ns, ctime_ns: when its contents changed, and when anything about it did; the latter cannot be set back.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: IO[bytes]) -> Self:
        """The stamp of an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def at(cls, path: Path, name: str) -> Self:
        """The stamp of the file that is at ``path`` now.

        Raises:
            ReadError: it is gone, is no ordinary file or cannot be opened.
        """
        with read_errors(path, name):
            check_regular(path, name)
            with open(path, "rb", buffering=0) as file:
                return cls.of(file)

    def check(self, now: Stamp, name: str) -> None:
        """Refuse a file that has changed: this stamp is the earlier one, ``now`` the later.

        Raises:
            FormatError: they differ; says in what.
        """
        if now == self:
            return
        if (now.device, now.inode) != (self.device, self.inode):
            got = "another file in its place"
        elif now.size != self.size:
            got = f"{now.size} bytes, {self.size} before"
        elif now.mtime_ns != self.mtime_ns:
            got = "another time of change"
        else:
            got = "the same size and time of change, but another ctime: it has been touched since"
        raise FormatError(
            f"{name} has changed while it was in use",
            got=got,
            expected="a file that does not change from the plan to the end",
            hint="run the same command again when nothing writes to that folder any more",
        )


class Watch:
    """Remembers the stamps of files that must not change while they are in use. Safe for any number of threads.

    Attributes:
        pinned: whether the contents of the files are pinned by hashes, which each use checks. Then a file may be removed and
            fetched again, as happens in the hub's cache, and ``check`` does not look at them.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._seen: dict[Path, tuple[str, Stamp]] = {}
        self._lock = threading.Lock()

    def see(self, path: Path, name: str, stamp: Stamp | None = None) -> Stamp:
        """Remember the stamp of a file that is seen for the first time; else refuse the file if it has changed since.

        Args:
            path: of the file.
            name: for messages.
            stamp: of the file, if it is open already; None: that of the file at ``path``.

        Returns:
            The stamp of the file now.

        Raises:
            FormatError: it has changed.
            ReadError: it is gone or cannot be opened.
        """
        stamp = stamp or Stamp.at(path, name)
        with self._lock:
            _, before = self._seen.setdefault(path, (name, stamp))
        before.check(stamp, name)
        return stamp

    def seen(self, path: Path) -> Stamp | None:
        """The stamp of a file when it was first seen; None if it has not been."""
        with self._lock:
            return self._seen[path][1] if path in self._seen else None

    def forget(self, path: Path) -> None:
        """Forget a file that is about to be deleted or replaced on purpose."""
        with self._lock:
            self._seen.pop(path, None)

    def check(self) -> None:
        """Look at all files once more, unless they are pinned.

        Raises:
            FormatError: one has changed.
            ReadError: one is gone.
        """
        with self._lock:
            seen = [] if self.pinned else list(self._seen.items())
        for path, (name, before) in seen:
            before.check(Stamp.at(path, name), name)
