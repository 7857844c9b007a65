"""What the hub says of a file, whoever asks for it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

#: What the hub calls a commit, and the hashes of files.
COMMIT = re.compile("[0-9a-f]{40}")
SHA1 = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit.

    Attributes:
        size: in bytes.
        sha256: that the hub has given for a large file; None for a small one.
        git_sha1: what git calls a small file by its contents; of a large one, its pointer's.
        is_cached: whether the hub's cache had it when the files were listed.
        by_xet: whether the hub has it in its store of chunks, from which the client fetches in its own way.
    """

    size: int
    sha256: str | None
    git_sha1: str
    is_cached: bool
    by_xet: bool

    @property
    def hash(self) -> str:
        """Of its contents: sha256 (64 digits), or as git hashes files (40 digits). The cache calls its blobs so."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Where a file is on the hub, and what the hub says of it.

    Attributes:
        repo_id, commit: of the repository.
        path: its path in there.
        of: what the hub says of it.
    """

    repo_id: str
    commit: str
    path: str
    of: HubFile


def content_hash(of: HubFile) -> hashlib._Hash:
    """To be given the contents of a file, for what ``HubFile.hash`` must be."""
    if of.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % of.size, usedforsecurity=False)
