"""Whether a file that is read more than once is still the same: stamps, and who keeps them."""

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
    """What changes when a file is written to or another one takes its place, whatever becomes of its other times.

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
        """Of an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def at(cls, path: Path, name: str) -> Self:
        """Of the file that is to be found there now.

        Raises:
            ReadError: it is gone, is no ordinary file or cannot be opened.
        """
        with read_errors(path, name):
            check_regular(path, name)
            with open(path, "rb", buffering=0) as file:
                return cls.of(file)

    def check(self, now: Stamp, name: str) -> None:
        """Refuse what has changed since.

        Raises:
            FormatError: says what is different.
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
            got = "the same size and time of change, but it has been touched since: its ctime is another"
        raise FormatError(
            f"{name} has changed while it was in use",
            got=got,
            expected="a file that stays as it is from the plan to the end",
            hint="run the same command again when nothing writes to that folder any more",
        )


class Watch:
    """Files that are read more than once, or together with others, and must be the same all the time.

    For any number of threads.

    Attributes:
        pinned: whether hashes pin what the files hold, and each use holds them to it. Then one may be removed when it has been
            opened, as from the hub's cache, and come again.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._seen: dict[Path, tuple[str, Stamp]] = {}
        self._one = threading.Lock()

    def see(self, path: Path, name: str, stamp: Stamp | None = None) -> Stamp:
        """Remember what a file is, or make sure that it still is what it was when it was seen first.

        Args:
            path: where it is.
            name: for messages.
            stamp: of the file as it has been opened; else of what is found there.

        Raises:
            FormatError: it has changed.
            ReadError: it is gone or cannot be opened.
        """
        stamp = stamp or Stamp.at(path, name)
        with self._one:
            _, before = self._seen.setdefault(path, (name, stamp))
        before.check(stamp, name)
        return stamp

    def seen(self, path: Path) -> Stamp | None:
        """What a file was when it was seen, if it was."""
        with self._one:
            return self._seen[path][1] if path in self._seen else None

    def forget(self, path: Path) -> None:
        """A file is dropped by whoever put it there."""
        with self._one:
            self._seen.pop(path, None)

    def check(self) -> None:
        """All once more, unless they are pinned.

        Raises:
            FormatError: one has changed.
            ReadError: one is gone.
        """
        with self._one:
            seen = [] if self.pinned else list(self._seen.items())
        for path, (name, before) in seen:
            before.check(Stamp.at(path, name), name)
