"""Records of files by size and sha256, and checks that a file still is the one that was recorded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import FormatError
from surgery.files.access import read_errors
from surgery.files.paths import check_relative_path

RESTORE_HINT = "restore it from the source model"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a checkpoint.

    Attributes:
        file: its path, relative to the checkpoint.
        size: its size in bytes.
        sha256: the SHA-256 of its bytes.
    """

    file: str
    size: int
    sha256: str


def file_sha256(path: Path) -> str:
    """The sha256 of a file's contents, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(folder: Path, record: FileRecord, hint: str) -> None:
    """Refuse a file that is missing or not the one that was recorded.

    Raises:
        ReadError: it cannot be read.
        FormatError: it is missing, or has another size or hash.
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
        FormatError: it is missing, or has another size.
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
    """The error for a file that differs from its record; ``found`` is its hash or size in words."""
    return FormatError(
        f"{path} is not the file that the manifest describes",
        got=f"sha256 {found}",
        expected=f"sha256 {expected.sha256}",
        hint=hint,
    )
