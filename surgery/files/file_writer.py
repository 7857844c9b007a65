"""Atomic writing: files that appear under their name whole and synced, or not at all."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from surgery.files.access import check_regular, check_replaceable, read_errors, write_errors
from surgery.files.disk import DiskStream
from surgery.files.file_records import RESTORE_HINT, FileRecord, not_as_described
from surgery.files.watch import Watch
from surgery.timing import timed

#: Bytes read or copied at a time where a tensor need not be in one piece.
CHUNK_BYTES = 8 << 20


class FileWriter:
    """A file that appears under its name only when ``commit`` is called, and then whole and synced to disk.

    Until then its bytes are in a partial file. Entering the context creates that, leaving it without ``commit`` removes it,
    so a failure cannot be mistaken for a result.

    Args:
        path: of the file.
        partial: the partial file, on the same disk; ``<name>.partial`` beside ``path`` if None. Give another one where
            several processes may write the same file at the same time.
        read_soon: whether the file is read right after it is written, see ``DiskStream``.
    """

    def __init__(self, path: Path, partial: Path | None = None, *, read_soon: bool = False) -> None:
        self.path = path
        self.partial = partial or path.with_name(path.name + ".partial")
        self._read_soon = read_soon
        self._sha256 = hashlib.sha256()
        self._in_place = False
        self.size = 0

    def __enter__(self) -> Self:
        try:
            with write_errors(self.path):
                self._open()
            return self
        except BaseException:  # Ctrl-C too: __exit__ is not called when __enter__ fails
            with suppress(OSError):
                self.partial.unlink()
            raise

    def _open(self) -> None:
        check_replaceable(self.path)
        for folder in {self.path.parent, self.partial.parent}:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_directory(folder.parent)
        # A killed run may have left one, or somebody may have put a link there, which must not be written through.
        self.partial.unlink(missing_ok=True)
        self.file: IO[bytes] = open(self.partial, "xb", buffering=0)
        self.stream = DiskStream(self.file, read_soon=self._read_soon)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stream.stop()
        finally:
            with suppress(OSError):  # a failing disk has been reported by a write already; else the file is discarded
                self.file.close()
            if not self._in_place:
                with suppress(OSError):
                    self.partial.unlink(missing_ok=True)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``.

        Raises:
            OutputError: the disk is full or fails.
        """
        view = memoryview(data)
        with timed("hash"):
            self._sha256.update(view)
        self.append(view)

    def append(self, view: memoryview) -> None:
        """``write`` without hashing: for subclasses that compute the sha256 themselves."""
        with timed("write"), write_errors(self.path):
            self.stream.write(view)
        self.size += len(view)

    @property
    def sha256(self) -> str:
        """Of all bytes given to ``write`` so far, in hex."""
        return self._sha256.hexdigest()

    def commit(self, name: str) -> FileRecord:
        """Sync the file and rename it to its final path. Returns its record, under ``name``.

        Raises:
            OutputError: the disk is full or fails; then no file is left under that path.
        """
        with timed("write"), write_errors(self.path):
            self.stream.finish()
            os.fsync(self.file.fileno())
            self.file.close()
            self.partial.replace(self.path)
            self._in_place = True
            try:
                sync_directory(self.path.parent)
            except OSError:  # the rename may not survive a power loss, so the file must not be taken for a result
                with suppress(OSError):
                    self.path.unlink()
                raise
        return FileRecord(name, self.size, self.sha256)


class HashSink:
    """Stands in for a ``FileWriter`` where only the sha256 of what would be written is wanted."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._sha256.update(data)

    @property
    def sha256(self) -> str:
        """Of all bytes given to ``write`` so far, in hex."""
        return self._sha256.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically: whole and synced, or not at all. Raises OutputError."""
    with FileWriter(path) as writer:
        writer.write(data)
        writer.commit(path.name)


def copy_file(
    source: Path, target: Path, name: str, expected: FileRecord | None = None, watch: Watch | None = None
) -> FileRecord:
    """Copy a file byte by byte, atomically.

    Args:
        source, target: paths.
        name: for the record that is returned.
        expected: what the copy must be, by size and sha256.
        watch: told of ``source``, which must not have changed since it was first seen.

    Raises:
        OutputError: the target cannot be written.
        ReadError: the source cannot be read.
        FormatError: the source is not the ``expected`` file, or has changed. There is no copy then.
    """
    with read_errors(source):
        check_regular(source, str(source))
        file = open(source, "rb")
    with file, FileWriter(target) as writer:
        if expected is not None and os.fstat(file.fileno()).st_size != expected.size:
            raise not_as_described(source, "another size", expected, RESTORE_HINT)
        while True:
            with read_errors(source):
                data = file.read(CHUNK_BYTES)
            if not data:
                break
            writer.write(data)
        if watch is not None:
            watch.see(source, str(source))
        if expected is not None and writer.sha256 != expected.sha256:
            raise not_as_described(source, writer.sha256, expected, RESTORE_HINT)
        return writer.commit(name)


def sync_directory(path: Path) -> None:
    """Make renames within ``path`` survive a power loss, where the platform can."""
    if os.name == "nt":  # Windows cannot open a directory for syncing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
