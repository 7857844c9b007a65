"""Failed checks of a checkpoint, collected by ``verify`` instead of raised, and the checkpoint that is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import ReadError, SurgeryError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, file_sha256
from surgery.files.watch import Watch
from surgery.format.manifest import Manifest
from surgery.weights.protocol import Weights

#: The checks that a damaged or missing file fails, which ``verify --repair`` may make again.
FILE_CHECKS = IS_THERE, SIZE, SHA256 = "the file is there", "size", "sha256"


@dataclass(frozen=True, slots=True)
class Failure:
    """A check that failed.

    Attributes:
        where: the file or the target.
        check: what was checked.
        got: what was found; empty if there is nothing to report.
        expected: what should have been found; empty if there is nothing to report.
    """

    where: str
    check: str
    got: str
    expected: str


@dataclass(slots=True)
class Failures:
    """The checks that have failed so far.

    Attributes:
        found: in the order they were made.
    """

    found: list[Failure] = field(default_factory=list)

    def fail(self, where: str, error: SurgeryError) -> None:
        """Add an error that was raised by a check, once; an error of the system with its hint."""
        got, expected = ("" if part is None else str(part) for part in (error.got, error.expected))
        check = f"{error.what}; {error.hint}" if isinstance(error, ReadError) and error.hint else error.what
        failure = Failure(where, check, got, expected)
        if failure not in self.found:  # a file that one check cannot read is often met by the next
            self.found.append(failure)

    def expect(self, holds: bool, where: str, check: str, got: object = "", expected: object = "") -> bool:
        if not holds:
            self.found.append(Failure(where, check, str(got), str(expected)))
        return holds


def check_recorded_file(folder: Path, record: FileRecord, watch: Watch, failures: Failures, *, hashed: bool = True) -> bool:
    """Check a file of the checkpoint: that it is there, its size and, if ``hashed``, its sha256.

    Args:
        folder: of the checkpoint.
        record: of the file.
        watch: told of the file, so that a later change is noticed.
        failures: failed checks are added to it.
        hashed: False for a file that is hashed elsewhere, while it is read for other checks.

    Returns:
        Whether the file can be read and has its size.
    """
    path = folder / record.file
    if not failures.expect(path.is_file(), record.file, IS_THERE, "nothing"):
        return False
    try:
        size = watch.see(path, record.file).size
        if not failures.expect(size == record.size, record.file, SIZE, size, record.size):
            return False
        if hashed:
            with read_errors(path, record.file):
                found = file_sha256(path)
            return failures.expect(found == record.sha256, record.file, SHA256, found, record.sha256)
    except SurgeryError as error:
        failures.fail(record.file, error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class CheckedCheckpoint:
    """A factorized checkpoint that is checked: any of its files may be damaged, and its weights may be missing.

    Attributes:
        folder, manifest: of the checkpoint.
        weights: the weight files that its factors belong to; None if they are not to be checked, or are those of a base that
            was not given.
    """

    folder: Path
    manifest: Manifest
    weights: Weights | None
