"""JSON of ours that carries its own hash, so that whatever has changed in its file since is noticed."""

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
    """A JSON object, or a dataclass as one, with an entry at least, as it is in its file: the last entry is the sha256 of all
    bytes before that.

    Args:
        value: without an entry ``sha256``.
    """
    text = json_bytes(value)
    before = memoryview(text)[: -len("\n}")]
    return b"".join((before, _HEAD, hashlib.sha256(before).hexdigest().encode(), _TAIL))


def read_sealed(path: Path, hint: str) -> dict[str, Any]:
    """What was ``sealed``, from a file that may be anything.

    Args:
        path: of the file.
        hint: what to do where it is not as it was written.

    Raises:
        ReadError: the system does not let it be read.
        FormatError: it is too large, or as of ``unsealed``.
    """
    return unsealed(read_bytes(path, str(path), most=MAX_OWN_JSON_BYTES), str(path), hint)


def unsealed(data: bytes, name: str, hint: str) -> dict[str, Any]:
    """What was ``sealed``, without its hash.

    Args:
        data: the bytes of its file.
        name: of that, for messages.
        hint: see ``read_sealed``.

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
