"""Files of the hub on their way here: tried again, gone on with where they broke off, and held to the hub's hashes."""

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

#: How often a file is fetched whose contents are not what the hub says, or which somebody removes meanwhile.
_WHOLE_ATTEMPTS = 3


def first_bytes(remote: RemoteFile, count: int, patience: Patience) -> bytes:
    """At most ``count`` bytes from the start of a file. Raises what ``Patience.failed`` does."""
    end = min(count, remote.of.size)
    data = bytearray()
    while len(data) < end:
        try:
            for part in repository.byte_range(remote, len(data), end):
                data += part
                patience.succeeded()
        except Exception as error:
            patience.failed(error)
    return bytes(data)


def into_cache(remote: RemoteFile, patience: Patience) -> Path:
    """A file of a repository, fetched into the hub's cache, where it has the contents that the hub says.

    Raises:
        SourceError: other contents come.
        OSError, and what ``Patience.failed`` raises.
    """
    of = remote.of
    if repository.has_xet() and of.by_xet:
        return _by_xet(remote, None, patience)
    for attempt in range(_WHOLE_ATTEMPTS):
        blob = client_cache.blob_path(remote.repo_id, of)
        try:
            # Of another commit the same file may be here: whatever is there by that name is looked at before it is used.
            if not blob.exists() or not is_sound(blob, of):
                with _own_partial(blob, client_cache.lock_path(remote.repo_id, of)) as partial:
                    _fetch(remote, partial, blob, patience)
            return client_cache.link_into_cache(remote.repo_id, remote.commit, remote.path, blob)
        except FileNotFoundError:  # somebody removes the cache
            if attempt + 1 == _WHOLE_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def into_folder(remote: RemoteFile, folder: Path, patience: Patience) -> Path:
    """The same in a folder of one's own, which nobody else writes to.

    A file that is there already is taken for what it is called.
    """
    target, of = folder / remote.path, remote.of
    if target.is_file() and target.stat().st_size == of.size:
        return target
    if repository.has_xet() and of.by_xet:
        return _by_xet(remote, folder, patience)
    target.parent.mkdir(parents=True, exist_ok=True)
    _fetch(remote, _partial_in_folder(target), target, patience)
    return target


def bytes_in_cache(repo_id: str, of: HubFile) -> int:
    """How much of the contents of a file the hub's cache has: from another commit, or an earlier start of the download."""
    blob = client_cache.blob_path(repo_id, of)
    return max(_held(blob, of), _held(_partial(blob), of))


def bytes_in_folder(folder: Path, file: str, of: HubFile) -> int:
    """The same of a folder of one's own."""
    return max(_held(folder / file, of), _held(_partial_in_folder(folder / file), of))


def _held(path: Path, of: HubFile) -> int:
    try:
        size = path.stat().st_size
    except OSError:
        return 0
    return size if size <= of.size else 0


def is_sound(path: Path, of: HubFile) -> bool:
    """Whether a file has the contents that the hub says.

    Raises:
        OSError: it cannot be read.
    """
    digest = content_hash(of)
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest() == of.hash


def _by_xet(remote: RemoteFile, folder: Path | None, patience: Patience) -> Path:
    """From the store of chunks, whose own client tries each of them again and does not go on where a file broke off."""
    for _ in range(_WHOLE_ATTEMPTS):
        path = patience.run(lambda: repository.download_by_xet(remote, folder))
        if is_sound(path, remote.of):
            return path
        path.resolve().unlink(missing_ok=True)
    raise _others_come(remote)


def _fetch(remote: RemoteFile, partial: Path, target: Path, patience: Patience) -> None:
    """Fetch what is not yet in ``partial``; it becomes ``target`` once its contents are right."""
    for _ in range(_WHOLE_ATTEMPTS):
        partial.parent.mkdir(parents=True, exist_ok=True)
        if _filled(remote, partial, patience) == remote.of.hash:
            partial.replace(target)
            return
        partial.unlink()  # what broke off may have been of something else, or the way here damages what it carries
    raise _others_come(remote)


def _filled(remote: RemoteFile, partial: Path, patience: Patience) -> str:
    """The hash of ``partial`` once all of a file is in it."""
    of = remote.of
    digest, here = content_hash(of), 0
    progress, told = listening(), -1
    with open(partial, "a+b") as out:
        out.seek(0)
        while data := out.read(CHUNK_BYTES):
            digest.update(data)
            here += len(data)
        while here < of.size:
            try:
                for part in repository.byte_range(remote, here, of.size):
                    out.write(part)
                    digest.update(part)
                    here += len(part)
                    patience.go_on()
                    patience.succeeded()
                    if told != (told := 100 * here // of.size):
                        progress.item(f"fetching {told}% of {remote.path}")
            except Exception as error:
                patience.failed(error)
    return digest.hexdigest()


def _others_come(remote: RemoteFile) -> SourceError:
    of = remote.of
    return SourceError(
        f"{remote.repo_id}/{remote.path}: what comes is not the file that the hub has",
        got="other contents, each time",
        expected=f"{'sha256' if of.sha256 else 'git hash'} {of.hash}, {of.size} bytes",
        hint="something on the way here changes files: try another network, or HF_ENDPOINT; then run the same command again",
    )


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.surgery.incomplete")


def _partial_in_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.incomplete")


@contextmanager
def _own_partial(blob: Path, lock_path: Path) -> Iterator[Path]:
    """Where a blob may be put together: the same file at each start, unless another process is at it, or locks do not work."""
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
