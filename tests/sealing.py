"""Manifests that somebody has edited and sealed anew, by what docs/format.md says and nothing of ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "surgery/manifest.json"


def seal(text: str | bytes) -> bytes:
    """A JSON object, or what has become of one, with the hash of all but its last brace as the last entry."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    before = data.rstrip().removesuffix(b"}").rstrip()
    return before + b',\n "sha256": "%s"\n}\n' % hashlib.sha256(before).hexdigest().encode()


def open_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, without its hash."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    return manifest


def put_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it, sealed."""
    (folder / MANIFEST).write_bytes(seal(json.dumps(manifest, indent=1)))


@contextmanager
def edited_manifest(folder: Path) -> Iterator[dict[str, Any]]:
    """The manifest in a folder, to be changed by the block."""
    manifest = open_manifest(folder)
    yield manifest
    put_manifest(folder, manifest)
