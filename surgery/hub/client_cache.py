"""The hub's cache of files: where the client keeps what, and what it is called there."""

from __future__ import annotations

import os
import uuid
from pathlib import Path, PurePosixPath

from surgery.hub.hub_client import constants, try_to_load_from_cache
from surgery.hub.hub_file import COMMIT, SHA1, SHA256, HubFile


def cache_folder() -> Path:
    """The hub's cache."""
    return Path(constants.HF_HUB_CACHE)


def cached_file(repo_id: str, commit: str, file: str) -> Path | None:
    """Where the cache has a file of a commit, as a link or as it is; None if it does not, or only a link to nothing."""
    found = try_to_load_from_cache(repo_id, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


def cached_hash(pointer: Path) -> str | None:
    """What the cache says that the hash of a file in a snapshot is, see ``HubFile.hash``; None where it does not say."""
    try:
        blob = pointer.readlink()  # of this link alone: blobs may be links into a store with names of another kind
    except OSError:
        return None
    is_hash = SHA1.fullmatch(blob.name) or SHA256.fullmatch(blob.name)
    return blob.name if is_hash and blob.parent.name == "blobs" else None


def blob_path(repo_id: str, of: HubFile) -> Path:
    """Where the cache keeps the contents of a file, whatever commits it is in."""
    return _repository(repo_id) / "blobs" / of.hash


def lock_path(repo_id: str, of: HubFile) -> Path:
    """A file by which processes keep each other from fetching the same."""
    return cache_folder() / ".locks" / _repository(repo_id).name / f"{of.hash}.surgery.lock"


def link_into_cache(repo_id: str, commit: str, file: str, blob: Path) -> Path:
    """Put a file that the cache has the contents of into the snapshot of a commit, as the client does."""
    pointer = _repository(repo_id) / "snapshots" / commit / file
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
        blob.replace(pointer)
        return pointer
    fresh = pointer.with_name(f".{pointer.name}.{uuid.uuid4().hex[:8]}.surgery")
    try:
        fresh.symlink_to(os.path.relpath(blob, pointer.parent))
    except (NotImplementedError, OSError):  # a system or a disk without links
        blob.replace(pointer)
    else:
        fresh.replace(pointer)
    return pointer


def cached_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit that the cache knows a revision by; None if it knows none."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    kept = ref_path(repo_id, revision)
    try:
        commit = "" if kept is None else kept.read_bytes().decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def cached_snapshot(repo_id: str, commit: str) -> Path | None:
    """The folder with the files of a commit that the cache has, all or some; None if it has none."""
    folder = _repository(repo_id) / "snapshots" / commit
    return folder if folder.is_dir() else None


def _repository(repo_id: str) -> Path:
    return cache_folder() / "--".join(["models", *repo_id.split("/")])


def ref_path(repo_id: str, revision: str | None) -> Path | None:
    """The file of the cache that says what commit a revision is; None for what is no name of one."""
    name = PurePosixPath(revision or constants.DEFAULT_REVISION)
    if name.is_absolute() or ".." in name.parts or "\0" in str(name):
        return None
    return _repository(repo_id) / "refs" / name
