"""Where the hub's client keeps files, by the names of folders alone."""

from __future__ import annotations

import re
from pathlib import Path


def cached_repo(folder: Path) -> str | None:
    """The model that the hub's client keeps in a folder, by the folder's name; None for other folders."""
    match = re.fullmatch("models--(.+)", folder.name)
    return None if match is None else match[1].replace("--", "/")


def hub_cache(path: Path) -> Path | None:
    """The folder in which the hub's client keeps a file for a model, or shares it between several; None for other files."""
    return next(
        (
            folder.parent
            for folder in path.parents
            if folder.name in ("blobs", "snapshots")
            and (cached_repo(folder.parent) is not None or (folder / ".huggingface-shared-blobs").exists())
        ),
        None,
    )
