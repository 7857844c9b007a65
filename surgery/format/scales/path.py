"""Which scales file is meant by a path."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.errors import FormatError, ReadError, ScalesError, few
from surgery.format.safetensors import ShardReader
from surgery.format.scales.no_scales import no_scales_in
from surgery.names import CHECKPOINT_FILE, SCALES_FILE, SCALES_METADATA_KEY
from surgery.progress import note


def scales_file(path: Path) -> Path:
    """The file that is meant by a path: itself, or the one scales file that is in a folder.

    Raises:
        ScalesError: there is none in the folder, or there are several.

    Warns:
        SurgeryWarning: it is a folder; which file of it is taken.
    """
    if not path.is_dir():
        return path
    found = [file for file in (path / CHECKPOINT_FILE, path / SCALES_FILE) if file.is_file() or file.is_symlink()]
    found = found or [file for file in sorted(path.glob("*.safetensors")) if _says_what_it_is(file)]
    found = found or sorted(filter(_is_shown, path.glob(f"*/{CHECKPOINT_FILE}")), key=_numbers_in)
    if len(found) == 1:
        note(f"{path} is a folder: its {found[0].relative_to(path)} is taken")
        return found[0]
    if found:
        raise ScalesError(
            f"{path} is a folder with several scales files",
            got=few(file.relative_to(path) for file in reversed(found)),
            expected="a scales file",
            hint=f"give the one that is meant, such as {found[-1]}",
        )
    raise no_scales_in(path)


def _is_shown(file: Path) -> bool:
    """Whether a file is in no hidden folder, as editors keep copies in."""
    return not file.parent.name.startswith(".")


def _says_what_it_is(file: Path) -> bool:
    """Whether a file is one of scales by its metadata."""
    if file.name.startswith(".") or not file.is_file():
        return False
    try:
        with ShardReader(file) as reader:
            return SCALES_METADATA_KEY in reader.header.metadata
    except (FormatError, ReadError):
        return False


def _numbers_in(file: Path) -> list[int]:
    """Checkpoints in the order of their steps."""
    return [int(number) for number in re.findall(r"\d+", file.parent.name)]
