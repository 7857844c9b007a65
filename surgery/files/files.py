"""Files that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

from surgery.errors import FormatError, OutputError, ReadError, SurgeryError, advice
from surgery.escapes import has_surrogates
from surgery.files.disk import DiskStream
from surgery.files.hub_cache import hub_cache
from surgery.names import RESERVED_SUFFIX
from surgery.timing import timed

#: Bytes moved at a time where no tensor has to be whole.
CHUNK_BYTES = 8 << 20
RESTORE_HINT = "restore it from the source model"
#: Of a config or an index, and of what surgery writes: the manifest of a model of 45,000 matrices takes some 80 MB.
MAX_JSON_BYTES = 1 << 26
MAX_OWN_JSON_BYTES = 1 << 29
#: Of JSON: far more than any config has, and far less than what Python's recursion bears, to compare and print it too.
_MOST_LEVELS = 100
_TOO_DEEP = f"nested deeper than {_MOST_LEVELS} levels"
#: Of JSON in the making, as the encoder gives them: a number, a bracket ...
_PIECES = 1 << 14
#: What to do where something cannot be written, and can be soon.
_TO_GO_ON = {
    errno.ENOSPC: "free some space, then run the same command again: it goes on where it stopped",
    errno.EDQUOT: "free some of your quota, then run the same command again: it goes on where it stopped",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or see what this disk allows, then run the same command again",
}

#: Bytes of a name that leave room for what is added to it while its file is written, and of a path below a folder.
_LONGEST_NAME = 255 - len(RESERVED_SUFFIX)
_LONGEST_PATH = 1000
#: What Windows takes for devices, in any folder and with any suffix.
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789\u00b9\u00b2\u00b3"
}
_JOINER = "\u200d"
_PLAIN = "a relative path without .. and without : and \\, which have a meaning on Windows"


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
        with read_errors(path, name):
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

    Attributes:
        pinned: whether hashes pin what the files hold, and each use holds them to it. Then one may be removed when it has been
            opened, as from the hub's cache, and come again.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
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

    def seen(self, path: Path) -> Stamp | None:
        """What a file was when it was seen, if it was."""
        with self._one:
            return self._seen[path][1] if path in self._seen else None

    def forget(self, path: Path) -> None:
        """A file is dropped by whoever put it there."""
        with self._one:
            self._seen.pop(path, None)

    def check(self) -> None:
        """All once more, unless they are pinned.

        Raises:
            FormatError: one has changed.
            ReadError: one is gone.
        """
        with self._one:
            seen = [] if self.pinned else list(self._seen.items())
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
        self._in_place = False
        self.size = 0

    def __enter__(self) -> Self:
        try:
            with write_errors(self.path):
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
            with suppress(OSError):  # the disk has said before what is wrong with it, or it is of no account any more
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
        """``write``, for those who compute the hash by themselves."""
        with timed("write"), write_errors(self.path):
            self.stream.write(view)
        self.size += len(view)

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in order."""
        return self._sha256.hexdigest()

    def commit(self, name: str) -> FileRecord:
        """Put the file in place, synced; the record carries ``name``."""
        with timed("write"), write_errors(self.path):
            self.stream.finish()
            os.fsync(self.file.fileno())
            self.file.close()
            self.partial.replace(self.path)
            self._in_place = True
            try:
                sync_directory(self.path.parent)
            except OSError:  # what is not known to stay is not left to be taken for a result
                with suppress(OSError):
                    self.path.unlink()
                raise
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


def check_file(folder: Path, record: FileRecord, hint: str) -> None:
    """Refuse a file that is missing or not the one that was recorded.

    Raises:
        ReadError: it cannot be read.
        FormatError: it is missing, or with both hashes.
    """
    path = check_size_of(folder, record, hint)
    with read_errors(path):
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
    with read_errors(path):
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
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that names the file."""
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error})",
            hint=_TO_GO_ON.get(error.errno or 0) or f"{advice(error)}; or choose another folder with -o",
        ) from error


def read_json_object(path: Path, name: str, *, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that may be anything.

    Raises:
        ReadError: the system does not let it be read.
        FormatError: too large, not JSON, or no object.
    """
    return json_object(read_bytes(path, name, most=most), name)


def read_bytes(path: Path, name: str, *, most: int) -> bytes:
    """A small file that may be anything, whole.

    Raises:
        ReadError: the system does not let it be read, or it is no ordinary file.
        FormatError: it is larger than ``most`` bytes.
    """
    with read_errors(path, name):
        check_size(path, name, most)
        return path.read_bytes()


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from the bytes of a file.

    Raises:
        FormatError: not JSON, or no object.
    """
    try:
        parsed = decode_json(data.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{name}: no JSON object", got=type(parsed).__name__)
    return parsed


def decode_json(text: str) -> Any:
    """What JSON says, where it says it once: of a name that is there twice every reader takes another value.

    ``NaN`` and ``Infinity`` are numbers, as transformers writes them into configs.

    Raises:
        ValueError: it is no JSON, is nested deeply, or has an object with a name twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level, depth = [parsed], 0
    while level := [
        inner
        for value in level
        if isinstance(value, (dict, list))
        for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > _MOST_LEVELS:
            raise ValueError(_TOO_DEEP)
    return parsed


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r} appears twice")
    return result


@contextmanager
def read_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Turns an OSError of reading into a ReadError that names the file."""
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        hint = advice(error)
        if isinstance(error, FileNotFoundError) and hub_cache(path) is not None:
            hint = "the hub's cache has lost it; run the same command again: it is fetched once more"
        raise ReadError(f"{name or path}: cannot be read ({error.strerror or error})", hint=hint) from error


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


def all_below(folder: Path) -> Iterator[Path]:
    """Everything in a folder and in the folders in it; links are not followed.

    ``Path.rglob`` passes over folders that may not be looked into, as if nothing were there.

    Raises:
        ReadError: one of the folders cannot be looked into.
    """
    if not folder.is_dir():
        return

    def refused(error: OSError) -> None:
        with read_errors(Path(error.filename)):
            raise error

    for top, folders, files in os.walk(folder, onerror=refused):
        for name in (*folders, *files):
            yield Path(top, name)


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
    """``name`` if it is a path that means the same file on every system, and that stays inside the folder it is relative to.

    Letters of all scripts, symbols and emoji are fine. The same rule holds for what a hub or a folder lists, what an index
    names, and what a manifest records.

    Raises:
        FormatError: says which part of the rule it breaks.
    """
    path = PurePosixPath(name)
    if has_surrogates(name):
        raise FormatError(f"{where}: a file name that is no Unicode text", got=ascii(name)[:200])
    if not path.parts or path.is_absolute() or ".." in path.parts or any(sign in name for sign in "\\\0:"):
        raise FormatError(f"{where}: a path that leaves its folder", got=repr(name)[:200], expected=_PLAIN)
    if path.as_posix() != name:
        raise FormatError(f"{where}: a path with parts that say nothing", got=repr(name)[:200], expected=repr(path.as_posix()))
    for part in path.parts:
        if _hidden(part):
            raise FormatError(f"{where}: a file name with characters that are not seen", got=ascii(part)[:200])
        if part[-1] in " ." or part.split(".")[0].rstrip().upper() in _DEVICES:
            raise FormatError(f"{where}: a file name that Windows takes for another", got=repr(part)[:200])
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise FormatError(f"{where}: a file name that is too long", got=ascii(part)[:80], expected=f"{_LONGEST_NAME} bytes")
    if len(os.fsencode(name)) > _LONGEST_PATH:
        raise FormatError(f"{where}: a path that is too long", got=ascii(name)[:80], expected=f"{_LONGEST_PATH} bytes")
    return name


def is_plain_path(name: str) -> bool:
    """Whether ``check_relative_path`` takes it."""
    try:
        check_relative_path(name, "")
    except FormatError:
        return False
    return True


def _hidden(part: str) -> bool:
    """Whether a name has control characters, line ends, changes of direction, or characters without a width in it.

    One of these is part of emoji: what joins two.
    """
    if all(_is_emoji_joined(before, after) for before, after in pairwise(part.split(_JOINER))):
        part = part.replace(_JOINER, "")
    return any(unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp") for one in part)


def _is_emoji_joined(before: str, after: str) -> bool:
    """Whether a symbol, maybe with its skin or its variant, stands before a joiner, and a symbol after it."""
    last, first = (unicodedata.category(one) if one else "" for one in (before[-1:], after[:1]))
    return last in ("So", "Sk", "Mn") and first == "So"


def file_key(path: str) -> str:
    """What two paths have in common that are one on a disk that does not tell case or normal forms apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
