"""Files on the hub: size, hashes and place, from the hub's listing or its cache."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

#: The form of a commit's id and of the hashes of files, in hex.
COMMIT = re.compile("[0-9a-f]{40}")
SHA1 = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """What the hub says of a file of a repository at one commit.

    Attributes:
        size: in bytes.
        sha256: of its contents, for a large file; None for a small one, of which the hub does not tell it.
        git_sha1: git's hash of its contents; for a large file that of its git-lfs pointer.
        is_cached: whether the hub's cache had it when the files were listed.
        by_xet: whether the hub keeps it in its store of chunks (Xet), from which the client fetches in its own way.
    """

    size: int
    sha256: str | None
    git_sha1: str
    is_cached: bool
    by_xet: bool

    @property
    def hash(self) -> str:
        """The hash of its contents: sha256 (64 digits), or git's (40 digits). The cache names its blobs by it."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the hub: its place, and what the hub says of it.

    Attributes:
        repo_id, commit: of the repository.
        path: of the file in the repository.
        hub_file: its size and hashes.
    """

    repo_id: str
    commit: str
    path: str
    hub_file: HubFile


def content_hash(hub_file: HubFile) -> hashlib._Hash:
    """A fresh digest that gives ``HubFile.hash`` once it has been updated with the contents of the file."""
    if hub_file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % hub_file.size, usedforsecurity=False)
