"""Origins: where other processes and machines take the weight files of a model from."""

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
    """Where weight files are; it can be pickled and sent to the process that does a job.

    Attributes:
        pinned: whether hashes pin the contents of the files, as for ``Watch``.
    """

    @property
    def pinned(self) -> bool: ...

    def file(self, name: str) -> AbstractContextManager[Path]:
        """The local path of a weight file, which exists for as long as the context lasts."""

    def sha256(self, name: str) -> str | None:
        """The sha256 of a weight file by the hub; None for a file that is not from the hub."""

    def again(self, name: str) -> str | None:
        """The shell command that fetches a weight file again, if it comes from the hub."""


class DamagedCopy(SourceError):
    """The local copy of a file of the hub has other contents than the hub says."""


def damaged_copy(name: str, again: str | None, got: object = "other contents", expected: object = None) -> DamagedCopy:
    """A ``DamagedCopy`` error for the file ``name``; ``again`` is the command that fetches it once more."""
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
        stamps: file -> [size in bytes, time of change in nanoseconds], for files that must not have changed since the run was
            planned; these are the same on every machine.
        hashes: file -> sha256, for files of the hub's cache.
        commands: file -> shell command that fetches it again, for the same files.
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
