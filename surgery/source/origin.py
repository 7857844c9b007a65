"""Where the weight files of a source are, for another process or machine to take them from."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from surgery.errors import SourceError
from surgery.format.files import reading


class Origin(Protocol):
    """Can be sent to wherever the work is done."""

    def file(self, name: str) -> AbstractContextManager[Path]:
        """A weight file, there for as long as the context lasts."""

    def sha256(self, name: str) -> str | None:
        """What somebody else than the file itself says that its hash is."""


@dataclass(frozen=True, slots=True)
class FolderOrigin:
    """A folder that every machine sees under the same path.

    Attributes:
        root: the folder.
        stamps: of its files those that must be what they were: size and time of change in nanoseconds, which are the same
            on every machine.
    """

    root: Path
    stamps: Mapping[str, Sequence[int]]

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
        with reading(self.root / name):
            found = (self.root / name).stat()
        if name in self.stamps and [found.st_size, found.st_mtime_ns] != list(self.stamps[name]):
            raise SourceError(
                f"{self.root / name} on {socket.gethostname()} is not what it was when the run was planned",
                got="another size or time of change",
                hint="run the same command again when nothing writes to that folder any more",
            )

    def sha256(self, name: str) -> str | None:
        return None


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """A repository on the hub at one commit, or the subfolder of it that ``prefix`` (ending in a slash) names.

    Files go through the hub's cache of the machine; with ``passing`` those that it does not have are dropped after use.
    """

    repo_id: str
    commit: str
    prefix: str
    passing: bool

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        from surgery.source.hub import fetch, is_cached

        if not self.passing or is_cached(self.repo_id, self.commit, self.prefix + name):
            yield fetch(self.repo_id, self.commit, self.prefix + name)
            return
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            yield fetch(self.repo_id, self.commit, self.prefix + name, Path(folder))

    def sha256(self, name: str) -> str | None:
        from surgery.source.hub import sha256_of

        return sha256_of(self.repo_id, self.commit, self.prefix + name)
