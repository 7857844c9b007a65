"""Recognizing the hub's cache by the names of its folders, without the hub's client."""

from __future__ import annotations

import re
from pathlib import Path


def cached_repo(folder: Path) -> str | None:
    """The repo id of the model that the hub's cache keeps in a folder (``models--owner--name``); None for other folders."""
    match = re.fullmatch("models--(.+)", folder.name)
    return None if match is None else match[1].replace("--", "/")


def hub_cache(path: Path) -> Path | None:
    """The folder of the hub's cache that a file lies in: a model's, or one shared by several; None if it is not cached."""
    return next(
        (
            folder.parent
            for folder in path.parents
            if folder.name in ("blobs", "snapshots")
            and (cached_repo(folder.parent) is not None or (folder / ".huggingface-shared-blobs").exists())
        ),
        None,
    )
