"""The hub's cache on this machine: where the client keeps files, and under which names."""

from __future__ import annotations

import os
import uuid
from pathlib import Path, PurePosixPath

from surgery.hub.hub_client import constants, try_to_load_from_cache
from surgery.hub.hub_file import COMMIT, SHA1, SHA256, HubFile


def cache_folder() -> Path:
    """The folder of the hub's cache (``HF_HUB_CACHE``)."""
    return Path(constants.HF_HUB_CACHE)


def cached_file(repo_id: str, commit: str, file: str) -> Path | None:
    """The path of a file of a commit in the cache; None if it is not there, or is a link to nothing."""
    found = try_to_load_from_cache(repo_id, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


def cached_hash(pointer: Path) -> str | None:
    """The hash (``HubFile.hash``) of a file in a snapshot, by the name of the blob it links to; None if it is no such link."""
    try:
        blob = pointer.readlink()  # one link only: a blob may itself link into a shared store, under another kind of name
    except OSError:
        return None
    is_hash = SHA1.fullmatch(blob.name) or SHA256.fullmatch(blob.name)
    return blob.name if is_hash and blob.parent.name == "blobs" else None


def blob_path(repo_id: str, hub_file: HubFile) -> Path:
    """Where the cache keeps the contents of a file, which all commits that have them share."""
    return _repository(repo_id) / "blobs" / hub_file.hash


def lock_path(repo_id: str, hub_file: HubFile) -> Path:
    """The lock file that keeps two processes from fetching the same contents at the same time."""
    return cache_folder() / ".locks" / _repository(repo_id).name / f"{hub_file.hash}.surgery.lock"


def link_into_cache(repo_id: str, commit: str, file: str, blob: Path) -> Path:
    """Put a file into the snapshot of a commit, as the client does: as a link to its blob, or the blob itself without links.

    Returns:
        The path of the file in the snapshot.

    Raises:
        OSError: the cache cannot be written.
    """
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
    """The commit that a revision stood for when the hub was last asked, from the cache; None if it is not recorded."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    kept = ref_path(repo_id, revision)
    try:
        commit = "" if kept is None else kept.read_bytes().decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def cached_snapshot(repo_id: str, commit: str) -> Path | None:
    """The folder with those files of a commit that are in the cache, all or some; None if there is no such folder."""
    folder = _repository(repo_id) / "snapshots" / commit
    return folder if folder.is_dir() else None


def cached_hub_file(pointer: Path) -> HubFile | None:
    """What the cache itself says of a file in a snapshot, by the name of its blob; None if that says nothing."""
    known = cached_hash(pointer)
    if known is None or not pointer.exists():
        return None
    return HubFile(pointer.stat().st_size, known if len(known) == 64 else None, known, is_cached=True, by_xet=False)


def cached_files(repo_id: str, commit: str) -> dict[str, HubFile]:
    """The files of a commit that are in the cache, by name; without those that no hash is known of."""
    folder = cached_snapshot(repo_id, commit) if commit else None
    paths = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    known = {path.relative_to(folder).as_posix(): cached_hub_file(path) for path in paths if folder is not None}
    return {name: file for name, file in known.items() if file is not None}


def _repository(repo_id: str) -> Path:
    return cache_folder() / "--".join(["models", *repo_id.split("/")])


def ref_path(repo_id: str, revision: str | None) -> Path | None:
    """The file in the cache that records the commit of a revision; None for what cannot be the name of a revision."""
    name = PurePosixPath(revision or constants.DEFAULT_REVISION)
    if name.is_absolute() or ".." in name.parts or "\0" in str(name):
        return None
    return _repository(repo_id) / "refs" / name
