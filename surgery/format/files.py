"""Files that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

from surgery.errors import FormatError, OutputError, ReadError, SurgeryError
from surgery.format.disk import DiskStream
from surgery.timing import timed

#: Bytes moved at a time where no tensor has to be whole.
CHUNK_BYTES = 8 << 20
RESTORE_HINT = "restore it from the source model"
#: Of a config or an index, and of what surgery writes: the manifest of a model of 45,000 matrices takes some 80 MB.
MAX_JSON_BYTES = 1 << 26
MAX_OWN_JSON_BYTES = 1 << 29
#: Of JSON in the making, as the encoder gives them: a number, a bracket ...
_PIECES = 1 << 14


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a checkpoint.

    Attributes:
        file: its path, relative to the checkpoint.
        size: in bytes.
        sha256: of its bytes.
    """

    file: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written to or another one takes its place, whatever becomes of its other times.

    Attributes:
        device, inode: which file it is.
        size: in bytes.
        mtime_ns, ctime_ns: when its contents changed, and when anything about it did; the latter cannot be set back.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: IO[bytes]) -> Self:
        """Of an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def at(cls, path: Path, name: str) -> Self:
        """Of the file that is to be found there now.

        Raises:
            ReadError: it is gone, is no ordinary file or cannot be opened.
        """
        with reading(path, name):
            check_regular(path, name)
            with open(path, "rb", buffering=0) as file:
                return cls.of(file)

    def check(self, now: Stamp, name: str) -> None:
        """Refuse what has changed since.

        Raises:
            FormatError: says what is different.
        """
        if now == self:
            return
        if (now.device, now.inode) != (self.device, self.inode):
            got = "another file in its place"
        elif now.size != self.size:
            got = f"{now.size} bytes, {self.size} before"
        elif now.mtime_ns != self.mtime_ns:
            got = "another time of change"
        else:
            got = "the same size and time of change, but it has been touched since: its ctime is another"
        raise FormatError(
            f"{name} has changed while it was in use",
            got=got,
            expected="a file that stays as it is from the plan to the end",
            hint="run the same command again when nothing writes to that folder any more",
        )


class Watch:
    """Files that are read more than once, or together with others, and must be the same all the time.

    For any number of threads.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, Stamp]] = {}
        self._one = threading.Lock()

    def see(self, path: Path, name: str, stamp: Stamp | None = None) -> Stamp:
        """Remember what a file is, or make sure that it still is what it was when it was seen first.

        Args:
            path: where it is.
            name: for messages.
            stamp: of the file as it has been opened; else of what is found there.

        Raises:
            FormatError: it has changed.
            ReadError: it is gone or cannot be opened.
        """
        stamp = stamp or Stamp.at(path, name)
        with self._one:
            _, before = self._seen.setdefault(path, (name, stamp))
        before.check(stamp, name)
        return stamp

    def forget(self, path: Path) -> None:
        """A file is dropped by whoever put it there."""
        with self._one:
            self._seen.pop(path, None)

    def check(self) -> None:
        """All once more.

        Raises:
            FormatError: one has changed.
            ReadError: one is gone.
        """
        with self._one:
            seen = list(self._seen.items())
        for path, (name, before) in seen:
            before.check(Stamp.at(path, name), name)


class FileWriter:
    """A file that appears under its name only when ``commit`` is called, and then whole and on the disk.

    Writes go to ``<name>.partial`` beside it, or to ``partial``, on the same disk, if others may be writing the same file
    at the same time. Entering the context makes that file, leaving it without ``commit`` removes it, so a failure cannot be
    mistaken for a result.

    Args:
        path: of the file.
        partial: see above.
        read_soon: see ``DiskStream``.
    """

    def __init__(self, path: Path, partial: Path | None = None, *, read_soon: bool = False) -> None:
        self.path = path
        self.partial = partial or path.with_name(path.name + ".partial")
        self._read_soon = read_soon
        self._sha256 = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        try:
            with reporting(self.path):
                self._open()
            return self
        except BaseException:  # Ctrl-C too: what is made here is nobody else's to remove yet
            with suppress(OSError):
                self.partial.unlink()
            raise

    def _open(self) -> None:
        check_replaceable(self.path)
        for folder in {self.path.parent, self.partial.parent}:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_directory(folder.parent)
        # What a killed run has left, or a link that somebody put there: never written through.
        self.partial.unlink(missing_ok=True)
        self.file: IO[bytes] = open(self.partial, "xb", buffering=0)
        self.stream = DiskStream(self.file, read_soon=self._read_soon)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stream.stop()
        finally:
            self.file.close()
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
        """``write``, for those who compute the hash by themselves."""
        with timed("write"), reporting(self.path):
            self.stream.write(view)
        self.size += len(view)

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in order."""
        return self._sha256.hexdigest()

    def commit(self, name: str) -> FileRecord:
        """Put the file in place, synced; the record carries ``name``."""
        with timed("write"), reporting(self.path):
            self.stream.finish()
            os.fsync(self.file.fileno())
            self.file.close()
            self.partial.replace(self.path)
            sync_directory(self.path.parent)
        return FileRecord(name, self.size, self.sha256)


class HashSink:
    """Takes what a ``FileWriter`` would write, and only tells what it was."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._sha256.update(data)

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in order."""
        return self._sha256.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole and synced, or not at all."""
    with FileWriter(path) as writer:
        writer.write(data)
        writer.commit(path.name)


def json_bytes(value: Any) -> bytes:
    """Indented JSON of dataclasses and what JSON has, UTF-8. Of a large value no second copy is made but this one."""
    encoder = json.JSONEncoder(indent=1, ensure_ascii=False, default=_fields)
    text, pieces = bytearray(), encoder.iterencode(value)
    while some := "".join(islice(pieces, _PIECES)):
        text += some.encode()
    return bytes(text)


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def file_sha256(path: Path) -> str:
    """The sha256 of a file's contents, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(
    source: Path, target: Path, name: str, expected: FileRecord | None = None, watch: Watch | None = None
) -> FileRecord:
    """Copy a file as bytes; the record carries ``name``.

    Raises:
        OutputError: the target cannot be written.
        ReadError: the source cannot be read.
        FormatError: it is not the ``expected`` file, or not the one that ``watch`` has seen. Nothing is put in place then.
    """
    with reading(source):
        check_regular(source, str(source))
        file = open(source, "rb")
    with file, FileWriter(target) as writer:
        if expected is not None and os.fstat(file.fileno()).st_size != expected.size:
            raise not_as_described(source, "another size", expected, RESTORE_HINT)
        while True:
            with reading(source):
                data = file.read(CHUNK_BYTES)
            if not data:
                break
            writer.write(data)
        if watch is not None:
            watch.see(source, str(source))
        if expected is not None and writer.sha256 != expected.sha256:
            raise not_as_described(source, writer.sha256, expected, RESTORE_HINT)
        return writer.commit(name)


def check_file(folder: Path, record: FileRecord, hint: str) -> None:
    """Refuse a file that is missing or not the one that was recorded.

    Raises:
        ReadError: it cannot be read.
        FormatError: it is missing, or with both hashes.
    """
    path = check_size_of(folder, record, hint)
    with reading(path):
        found = file_sha256(path)
    if found != record.sha256:
        raise not_as_described(path, found, record, hint)


def check_size_of(folder: Path, record: FileRecord, hint: str) -> Path:
    """Refuse a file that is missing or has another size than was recorded; returns where it is.

    Raises:
        ReadError: the system does not let it be looked at.
        FormatError: it is missing, or with its size.
    """
    path = folder / check_relative_path(record.file, str(folder))
    with reading(path):
        if not path.exists():
            raise FormatError(f"{path} is not there", expected="a file that the manifest describes", hint=hint)
        size = path.stat().st_size
    if size != record.size:
        raise not_as_described(path, f"of {size} bytes", record, hint)
    return path


def not_as_described(path: Path, found: str, expected: FileRecord, hint: str) -> FormatError:
    """The error for a file that has another sha256 than its manifest says."""
    return FormatError(
        f"{path} is not the file that the manifest describes",
        got=f"sha256 {found}",
        expected=f"sha256 {expected.sha256}",
        hint=hint,
    )


def sync_directory(path: Path) -> None:
    """Make renames within ``path`` survive a power loss, where the platform can."""
    if os.name == "nt":  # Windows cannot open a directory for syncing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that names the file."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint="free some space, then run the same command again: it goes on where it stopped"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
            else "choose another folder with -o",
        ) from error


def read_json_object(path: Path, name: str, *, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that may be anything.

    Raises:
        ReadError: the system does not let it be read.
        FormatError: too large, not JSON, or no object.
    """
    with reading(path, name):
        check_size(path, name, most)
        data = path.read_bytes()
    try:
        parsed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{name}: no JSON object", got=type(parsed).__name__)
    return parsed


@contextmanager
def reading(path: Path, name: str | None = None) -> Iterator[None]:
    """Turns an OSError of reading into a ReadError that names the file."""
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        raise ReadError(
            f"{name or path}: cannot be read ({error.strerror or error})",
            hint="see who may read it, and the folders above it: ls -l" if isinstance(error, PermissionError) else None,
        ) from error


def check_regular(path: Path, name: str) -> None:
    """Refuse what is no ordinary file: a pipe or a device may have no end.

    Raises:
        ReadError: it is something else.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode):
        raise ReadError(f"{name}: is no ordinary file", got="a folder" if stat.S_ISDIR(mode) else "a pipe or a device")


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of what is none: renamed over ``/dev/null``, it would take it away.

    Raises:
        OutputError: something else is there.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise OutputError(f"{path} is {what}", expected="a file to write", hint="choose another file with -o")


def check_size(path: Path, name: str, most: int = MAX_JSON_BYTES) -> None:
    """Refuse a file that would take unbounded memory or time.

    Raises:
        ReadError: it is no ordinary file.
        FormatError: it is larger than ``most`` bytes.
    """
    check_regular(path, name)
    size = path.stat().st_size
    if size > most:
        raise FormatError(f"{name}: too large to be read", got=f"{size} bytes", expected=f"at most {most}")


def check_relative_path(name: str, where: str) -> str:
    """``name`` if it stays inside the folder it is relative to.

    Raises:
        FormatError: absolute, with ``..``, empty, or with characters no path of ours has.
    """
    path = PurePosixPath(name)
    if not name.isprintable() and any(0xD800 <= ord(character) < 0xE000 for character in name):
        raise FormatError(f"{where}: a file name that is no Unicode text", got=ascii(name)[:200])
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in path.parts[0]:
        raise FormatError(f"{where}: a path that leaves its folder", got=repr(name)[:200], expected="a plain relative path")
    return name
