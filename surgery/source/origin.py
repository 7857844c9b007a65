"""Where the weight files of a source are, for another process or machine to take them from."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from surgery.errors import SourceError
from surgery.files.access import read_errors


class Origin(Protocol):
    """Can be sent to wherever the work is done.

    Attributes:
        pinned: see ``Watch``.
    """

    @property
    def pinned(self) -> bool: ...

    def file(self, name: str) -> AbstractContextManager[Path]:
        """A weight file, there for as long as the context lasts."""

    def sha256(self, name: str) -> str | None:
        """What somebody else than the file itself says that its hash is."""

    def again(self, name: str) -> str | None:
        """The command that fetches it once more, if it comes from the hub."""


class DamagedCopy(SourceError):
    """A copy of a file of the hub that has other contents than the hub says."""


def damaged_copy(name: str, again: str | None, got: object = "other contents", expected: object = None) -> DamagedCopy:
    """The error for it; ``again`` is the command that fetches it once more."""
    return DamagedCopy(
        f"{name} is not the file that the hub has",
        got=got,
        expected=expected,
        hint=f"its copy here is damaged: {again}; then run the same command again",
    )


@dataclass(frozen=True, slots=True)
class FolderOrigin:
    """A folder that every machine sees under the same path.

    Attributes:
        root: the folder.
        stamps: of its files those that must be what they were: size and time of change in nanoseconds, which are the same
            on every machine.
        hashes: the sha256 of those that are from the hub's cache.
        commands: that fetch these once more.
    """

    root: Path
    stamps: Mapping[str, Sequence[int]]
    hashes: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)

    @property
    def pinned(self) -> bool:
        return False

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        self._check(name)
        yield self.root / name
        self._check(name)

    def _check(self, name: str) -> None:
        if not (self.root / name).is_file():
            raise SourceError(
                f"{self.root / name} is not there on {socket.gethostname()}",
                hint="a local model must be in a folder that every machine sees under the same path; one on the hub need not",
            )
        with read_errors(self.root / name):
            found = (self.root / name).stat()
        if name in self.stamps and [found.st_size, found.st_mtime_ns] != list(self.stamps[name]):
            raise SourceError(
                f"{self.root / name} on {socket.gethostname()} is not what it was when the run was planned",
                got="another size or time of change",
                hint="run the same command again when nothing writes to that folder any more",
            )

    def sha256(self, name: str) -> str | None:
        return self.hashes.get(name)

    def again(self, name: str) -> str | None:
        return self.commands.get(name)
