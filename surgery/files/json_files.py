"""JSON in files: read within bounds and without a doubt of what it says, and written without a second copy of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.errors import FormatError
from surgery.files.access import check_regular, read_errors

#: Of a config or an index, and of what surgery writes: the manifest of a model of 45,000 matrices takes some 80 MB.
MAX_JSON_BYTES = 1 << 26
MAX_OWN_JSON_BYTES = 1 << 29
#: Of JSON: far more than any config has, and far less than what Python's recursion bears, to compare and print it too.
_MOST_LEVELS = 100
_TOO_DEEP = f"nested deeper than {_MOST_LEVELS} levels"
#: Of JSON in the making, as the encoder gives them: a number, a bracket ...
_PIECES = 1 << 14


def json_bytes(value: Any) -> bytes:
    """Indented JSON of dataclasses and what JSON has, UTF-8. Of a large value no second copy is made but this one."""
    encoder = json.JSONEncoder(indent=1, ensure_ascii=False, default=_fields)
    text, pieces = bytearray(), encoder.iterencode(value)
    while some := "".join(islice(pieces, _PIECES)):
        text += some.encode()
    return bytes(text)


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def read_json_object(path: Path, name: str, *, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that may be anything.

    Raises:
        ReadError: the system does not let it be read.
        FormatError: too large, not JSON, or no object.
    """
    return json_object(read_bytes(path, name, most=most), name)


def read_bytes(path: Path, name: str, *, most: int) -> bytes:
    """A small file that may be anything, whole.

    Raises:
        ReadError: the system does not let it be read, or it is no ordinary file.
        FormatError: it is larger than ``most`` bytes.
    """
    with read_errors(path, name):
        check_size(path, name, most)
        return path.read_bytes()


def check_size(path: Path, name: str, most: int = MAX_JSON_BYTES) -> None:
    """Refuse a file that would take unbounded memory or time.

    Raises:
        ReadError: it is no ordinary file.
        FormatError: it is larger than ``most`` bytes.
    """
    check_regular(path, name)
    size = path.stat().st_size
    if size > most:
        raise FormatError(f"{name}: too large to be read", got=f"{size} bytes", expected=f"at most {most}")


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from the bytes of a file.

    Raises:
        FormatError: not JSON, or no object.
    """
    try:
        parsed = decode_json(data.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{name}: no JSON object", got=type(parsed).__name__)
    return parsed


def decode_json(text: str) -> Any:
    """What JSON says, where it says it once: of a name that is there twice every reader takes another value.

    ``NaN`` and ``Infinity`` are numbers, as transformers writes them into configs.

    Raises:
        ValueError: it is no JSON, is nested deeply, or has an object with a name twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level, depth = [parsed], 0
    while level := [
        inner
        for value in level
        if isinstance(value, (dict, list))
        for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > _MOST_LEVELS:
            raise ValueError(_TOO_DEEP)
    return parsed


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r} appears twice")
    return result
