"""Downloads from the hub: retried, resumed where they broke off, and checked against the hub's hashes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from surgery.errors import SourceError
from surgery.files.file_writer import CHUNK_BYTES
from surgery.hub import client_cache, repository
from surgery.hub.hub_file import HubFile, RemoteFile, content_hash
from surgery.hub.patience import Patience
from surgery.progress import listening

#: How often a file is fetched as a whole if its contents have another hash, or it is removed from the cache meanwhile.
_WHOLE_ATTEMPTS = 3


def first_bytes(remote: RemoteFile, count: int, patience: Patience) -> bytes:
    """The first ``count`` bytes of a file, or all if it is shorter. Raises what ``Patience.failed`` raises."""
    end = min(count, remote.hub_file.size)
    data = bytearray()
    while len(data) < end:
        try:
            for chunk in repository.byte_range(remote, len(data), end):
                data += chunk
                patience.succeeded()
        except Exception as error:
            patience.failed(error)
    return bytes(data)


def into_cache(remote: RemoteFile, patience: Patience) -> Path:
    """Fetch a file into the hub's cache, unless its contents are there; they are checked against the hub's hash.

    Returns:
        Its path in the snapshot of its commit.

    Raises:
        SourceError: contents with another hash come, each time.
        OSError: the disk fails.
        Exception: what ``Patience.failed`` raises.
    """
    hub_file = remote.hub_file
    if repository.has_xet() and hub_file.by_xet:
        return _by_xet(remote, None, patience)
    for attempt in range(_WHOLE_ATTEMPTS):
        blob = client_cache.blob_path(remote.repo_id, hub_file)
        try:
            # Another commit may have brought the same contents. They are hashed before they are used.
            if not blob.exists() or not is_sound(blob, hub_file):
                with _partial_under_lock(blob, client_cache.lock_path(remote.repo_id, hub_file)) as partial:
                    _fetch(remote, partial, blob, patience)
            return client_cache.link_into_cache(remote.repo_id, remote.commit, remote.path, blob)
        except FileNotFoundError:  # somebody removes the cache
            if attempt + 1 == _WHOLE_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def into_folder(remote: RemoteFile, folder: Path, patience: Patience) -> Path:
    """Fetch a file into a private folder, which no other process writes to. Returns its path; raises like ``into_cache``.

    A file that is already there and has the right size is taken without hashing it.
    """
    target, hub_file = folder / remote.path, remote.hub_file
    if target.is_file() and target.stat().st_size == hub_file.size:
        return target
    if repository.has_xet() and hub_file.by_xet:
        return _by_xet(remote, folder, patience)
    target.parent.mkdir(parents=True, exist_ok=True)
    _fetch(remote, _partial_in_folder(target), target, patience)
    return target


def bytes_in_cache(repo_id: str, hub_file: HubFile) -> int:
    """Bytes of a file's contents that the hub's cache has already: from another commit, or a download that broke off."""
    blob = client_cache.blob_path(repo_id, hub_file)
    return max(_bytes_there(blob, hub_file), _bytes_there(_partial(blob), hub_file))


def bytes_in_folder(folder: Path, file: str, hub_file: HubFile) -> int:
    """Bytes of a file's contents that a private folder (``into_folder``) has already."""
    return max(_bytes_there(folder / file, hub_file), _bytes_there(_partial_in_folder(folder / file), hub_file))


def _bytes_there(path: Path, hub_file: HubFile) -> int:
    try:
        size = path.stat().st_size
    except OSError:
        return 0
    return size if size <= hub_file.size else 0


def is_sound(path: Path, hub_file: HubFile) -> bool:
    """Whether the file at ``path`` has the hash that the hub gives.

    Raises:
        OSError: it cannot be read.
    """
    digest = content_hash(hub_file)
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest() == hub_file.hash


def _by_xet(remote: RemoteFile, folder: Path | None, patience: Patience) -> Path:
    """Fetch a file from the hub's store of chunks. Its client retries each chunk by itself, and resumes no file."""
    for _ in range(_WHOLE_ATTEMPTS):
        path = patience.run(lambda: repository.download_by_xet(remote, folder))
        if is_sound(path, remote.hub_file):
            return path
        path.resolve().unlink(missing_ok=True)
    raise _wrong_contents(remote)


def _fetch(remote: RemoteFile, partial: Path, target: Path, patience: Patience) -> None:
    """Fetch what is not yet in the file ``partial``, and rename it to ``target`` once it has the hub's hash."""
    for _ in range(_WHOLE_ATTEMPTS):
        partial.parent.mkdir(parents=True, exist_ok=True)
        if _fetch_rest(remote, partial, patience) == remote.hub_file.hash:
            partial.replace(target)
            return
        partial.unlink()  # the partial file may have been another file's, or something damages files on their way here
    raise _wrong_contents(remote)


def _fetch_rest(remote: RemoteFile, partial: Path, patience: Patience) -> str:
    """Append the rest of a file to ``partial``; returns the hash of all of it."""
    hub_file = remote.hub_file
    digest, here = content_hash(hub_file), 0
    progress, told = listening(), -1
    with open(partial, "a+b") as out:
        out.seek(0)
        while data := out.read(CHUNK_BYTES):
            digest.update(data)
            here += len(data)
        while here < hub_file.size:
            try:
                for chunk in repository.byte_range(remote, here, hub_file.size):
                    out.write(chunk)
                    digest.update(chunk)
                    here += len(chunk)
                    patience.check_wanted()
                    patience.succeeded()
                    if told != (told := 100 * here // hub_file.size):
                        progress.item(f"fetching {told}% of {remote.path}")
            except Exception as error:
                patience.failed(error)
    return digest.hexdigest()


def _wrong_contents(remote: RemoteFile) -> SourceError:
    hub_file = remote.hub_file
    return SourceError(
        f"{remote.repo_id}/{remote.path}: the download is not the file that the hub has",
        got="other contents, each time",
        expected=f"{'sha256' if hub_file.sha256 else 'git hash'} {hub_file.hash}, {hub_file.size} bytes",
        hint="something on the network changes files: try another network, or HF_ENDPOINT; then run the same command again",
    )


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.surgery.incomplete")


def _partial_in_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.incomplete")


@contextmanager
def _partial_under_lock(blob: Path, lock_path: Path) -> Iterator[Path]:
    """The partial file of a blob, under a lock: the same one at each start, so that a download is resumed.

    Where another process holds the lock, or locks do not work, it is a file of our own, which is removed in the end.
    """
    lock = FileLock(lock_path, timeout=0)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (NotImplementedError, OSError, Timeout):
        own = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
        try:
            yield own
        finally:
            own.unlink(missing_ok=True)
        return
    try:
        yield _partial(blob)
    finally:
        lock.release()
