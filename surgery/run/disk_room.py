"""Disk room: a run whose files will not fit is refused before it begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from surgery.errors import OutputError
from surgery.names import STREAM_DIR, TUNED_STREAM_DIR

ROOM_HINT = "free some space, or choose a folder on another disk"
_DOWNLOAD_HINT = "--stream, where the command has it, to hold a few of its files at a time, or HF_HOME on another disk"


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Disk room that a run needs in a folder.

    Attributes:
        folder: where the files will be.
        size: their bytes.
        what: what they are, for messages, such as ``the result``.
        freed: bytes of files that are there now and will be gone by then.
        hint: what to do if there is not enough.
    """

    folder: Path
    size: int
    what: str
    freed: int = 0
    hint: str = ROOM_HINT


def download_needs(*sources: Fetching) -> list[DiskNeed]:
    """The disk room for the files that are still to be fetched of models from the hub."""
    rooms = [room for source in sources for room in source.room_to_fetch().items() if room[1]]
    return [
        DiskNeed(folder, size, "weight files that pass through")
        if folder.match(STREAM_DIR) or folder.match(TUNED_STREAM_DIR)
        else DiskNeed(folder, size, "the download", hint=_DOWNLOAD_HINT)
        for folder, size in rooms
    ]


class Fetching(Protocol):
    """A model whose files may still have to be fetched."""

    def room_to_fetch(self) -> dict[Path, int]: ...


def check_room(*needs: DiskNeed) -> None:
    """Refuse a run if a disk has less room than all needs on it take together.

    Raises:
        OutputError: tells how much there is, and how much is needed.
    """
    disks: dict[int, list[DiskNeed]] = {}
    for need in needs:
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for together in disks.values():
        free = shutil.disk_usage(_existing(together[0].folder)).free
        needed = sum(need.size - need.freed for need in together)
        if free < needed:
            folders = dict.fromkeys(str(need.folder) for need in together)
            each = [f"{need.size / 1e9:.3f} GB for {need.what}" for need in together]
            raise OutputError(
                f"the disk under {' and '.join(folders)} is too small",
                got=f"{(free + sum(need.freed for need in together)) / 1e9:.3f} GB free",
                expected=f"about {sum(need.size for need in together) / 1e9:.3f} GB"
                + (f": {', '.join(each)}" if each[1:] else ""),
                hint="; or ".join(dict.fromkeys(need.hint for need in together)),
            )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
