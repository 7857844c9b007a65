"""What does not hold of a checkpoint, in the place of figures or of files that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import ReadError, SurgeryError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, file_sha256
from surgery.files.watch import Watch
from surgery.format.manifest import Manifest
from surgery.weights.protocol import Weights


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that does not hold.

    Attributes:
        where: the file, or the target.
        check: what was checked.
        got, expected: what was found, and what belongs there; empty where there is nothing to tell.
    """

    where: str
    check: str
    got: str
    expected: str


@dataclass(slots=True)
class Failures:
    """What has been found not to hold, in order."""

    found: list[Failure] = field(default_factory=list)

    def fail(self, where: str, error: SurgeryError) -> None:
        """An error in the place of a figure; of what the system refuses, with what to do."""
        got, expected = ("" if part is None else str(part) for part in (error.got, error.expected))
        check = f"{error.what}; {error.hint}" if isinstance(error, ReadError) and error.hint else error.what
        self.found.append(Failure(where, check, got, expected))

    def expect(self, holds: bool, where: str, check: str, got: object = "", expected: object = "") -> bool:
        if not holds:
            self.found.append(Failure(where, check, str(got), str(expected)))
        return holds


def check_recorded_file(folder: Path, record: FileRecord, watch: Watch, failures: Failures, *, hashed: bool = True) -> bool:
    """A file of the checkpoint: that it is there, its size, and its hash unless others take that while they read it."""
    path = folder / record.file
    if not failures.expect(path.is_file(), record.file, "the file is there", "nothing"):
        return False
    try:
        size = watch.see(path, record.file).size
        if not failures.expect(size == record.size, record.file, "size", size, record.size):
            return False
        if hashed:
            with read_errors(path, record.file):
                found = file_sha256(path)
            return failures.expect(found == record.sha256, record.file, "sha256", found, record.sha256)
    except SurgeryError as error:
        failures.fail(record.file, error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is checked: as a ``Factorized`` has it, but that its weights may be out of reach, and that any file may be damaged.

    Attributes:
        folder, manifest: of the checkpoint.
        weights: those that it has the factors of; None where they are not to be had.
    """

    folder: Path
    manifest: Manifest
    weights: Weights | None
