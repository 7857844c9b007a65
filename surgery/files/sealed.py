"""Sealed JSON: our own files that end in the sha256 of everything before it, so that any change to them is noticed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from surgery.errors import FormatError
from surgery.files.json_files import MAX_OWN_JSON_BYTES, json_bytes, json_object, read_bytes

_KEY = "sha256"
_HEAD, _TAIL = f',\n "{_KEY}": "'.encode(), b'"\n}\n'
_SEAL = re.compile(re.escape(_HEAD) + b"([0-9a-f]{64})" + re.escape(_TAIL))
_SEAL_BYTES = len(_HEAD) + 64 + len(_TAIL)


def sealed(value: Any) -> bytes:
    """The bytes of a sealed file: a JSON object whose last entry, ``sha256``, is the hash of all bytes before that entry.

    Args:
        value: a dict or a dataclass with at least one entry and none called ``sha256``.
    """
    text = json_bytes(value)
    before = memoryview(text)[: -len("\n}")]
    return b"".join((before, _HEAD, hashlib.sha256(before).hexdigest().encode(), _TAIL))


def read_sealed(path: Path, hint: str) -> dict[str, Any]:
    """Read a sealed file; returns the object without its hash.

    Args:
        path: of the file, which may hold anything.
        hint: what to do if it has changed since it was written.

    Raises:
        ReadError: it cannot be read, or is no ordinary file.
        FormatError: it is too large, has changed since it was written, or has no hash of its own.
    """
    return unsealed(read_bytes(path, str(path), most=MAX_OWN_JSON_BYTES), str(path), hint)


def unsealed(data: bytes, name: str, hint: str) -> dict[str, Any]:
    """The object in the bytes of a sealed file, without its hash.

    Args:
        data: the bytes of the file.
        name: of the file, for messages.
        hint: what to do if it has changed since it was written.

    Raises:
        FormatError: it has changed since, or has no hash of its own.
    """
    seal = _SEAL.fullmatch(data, max(0, len(data) - _SEAL_BYTES))
    if seal is None:
        try:
            is_plain = _KEY not in json_object(data, name)
        except FormatError as error:
            raise FormatError(f"{name}: damaged", got=error.what, hint=hint) from None
        if is_plain:
            raise FormatError(
                f"{name}: carries no hash of its own",
                got="what an unreleased version of surgery wrote, or what something else has edited",
                expected=f"a last entry {_KEY!r}, the sha256 of all before it",
                hint=hint,
            )
    found = hashlib.sha256(memoryview(data)[:-_SEAL_BYTES]).hexdigest()
    if seal is None or seal[1].decode() != found:
        raise FormatError(
            f"{name}: has changed since it was written",
            got=f"sha256 {found}" if seal else "another end",
            expected=f"sha256 {seal[1].decode()}, by its own last entry" if seal else "its own sha256 as the last entry",
            hint=hint,
        )
    value = json_object(data, name)
    del value[_KEY]
    return value
