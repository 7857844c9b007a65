"""The files in an output folder: which there are, whether they are as recorded, and the order they are put in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from surgery.errors import FormatError, ReadError
from surgery.files.access import all_below
from surgery.files.file_records import FileRecord, check_file
from surgery.names import ADAPTER_CONFIG, CONFIG_FILE, EXTRACTION_FILE, JOURNAL_DIR, MANIFEST_FILE, is_litter
from surgery.progress import listening, phase

#: The files that come last, in this order.
_LAST = (ADAPTER_CONFIG, EXTRACTION_FILE, CONFIG_FILE, MANIFEST_FILE)


def files_in(out: Path) -> set[str]:
    """Paths, relative to ``out``, of all files and links in it; not the journal's, nor those that file managers leave."""
    paths = (path for path in all_below(out) if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(out).as_posix() for path in paths}
    return {name for name in names if not name.startswith(f"{JOURNAL_DIR}/") and not is_litter(name)}


def is_as_recorded(out: Path, record: FileRecord) -> bool:
    """Whether a file is there with the size and the sha256 that were recorded."""
    try:
        check_file(out, record, "")
    except (FormatError, ReadError):
        return False
    return True


def not_as_recorded(out: Path, records: Iterable[FileRecord]) -> list[str]:
    """The files that are not there with the size and the sha256 that were recorded."""
    known, lost, progress = list(records), [], listening()
    with phase(progress, "hashing", sum(record.size for record in known)):
        for record in known:
            progress.item(record.file)
            if not is_as_recorded(out, record):
                lost.append(record.file)
            progress.advance(record.size)
    return lost


def loading_order(files: Iterable[str]) -> list[str]:
    """Files in the order they are put in place: last those without which no loader or reader takes a folder."""
    return sorted(files, key=loading_key)


def loading_key(name: str) -> tuple[int, str]:
    """The sort key of ``loading_order``."""
    return _LAST.index(name) + 1 if name in _LAST else 0, name


def total_size(folder: Path, names: set[str]) -> int:
    """Bytes of some files in a folder, in sum. A link counts with its own size, not with that of its target."""
    return sum((folder / name).lstat().st_size for name in names)
