"""JSON files: read with limits on size and depth and without ambiguity, and written without a second copy in memory."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.errors import FormatError
from surgery.files.access import check_regular, read_errors

#: The largest config or index that is read, and the largest JSON of our own: a manifest of 45,000 matrices takes some 80 MB.
MAX_JSON_BYTES = 1 << 26
MAX_OWN_JSON_BYTES = 1 << 29
#: Levels of nesting: far more than any config has, and few enough that Python can also compare and print what is read.
_MOST_LEVELS = 100
#: Metadata of a field of a dataclass that is not written while it has its default, and may be missing where it is read. Such a
#: field is newer than the format: what an earlier version wrote is read, and written again as it was.
NOT_IN_EARLIER: Mapping[str, bool] = {"not in earlier versions": True}
_TOO_DEEP = f"nested deeper than {_MOST_LEVELS} levels"
#: How many tokens of the encoder (a number, a bracket ...) are joined at a time.
_TOKENS = 1 << 14


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON in UTF-8; dataclasses become objects. Only one copy of the text is in memory at any time."""
    encoder = json.JSONEncoder(indent=1, ensure_ascii=False, default=_fields)
    encoded, tokens = bytearray(), encoder.iterencode(value)
    while joined := "".join(islice(tokens, _TOKENS)):
        encoded += joined.encode()
    return bytes(encoded)


def _fields(record: Any) -> dict[str, Any]:
    values = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
    return {field.name: value for field, value in values if not (is_later(field) and value == field.default)}


def is_later(field: dataclasses.Field[Any]) -> bool:
    """Whether a field is marked with ``NOT_IN_EARLIER``."""
    return field.metadata.keys() >= NOT_IN_EARLIER.keys()


def read_json_object(path: Path, name: str, *, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file that may hold anything.

    Args:
        path: of the file.
        name: for messages.
        most: bytes that the file may have.

    Raises:
        ReadError: it cannot be read, or is no ordinary file.
        FormatError: it is too large, not JSON, or no object.
    """
    return json_object(read_bytes(path, name, most=most), name)


def read_bytes(path: Path, name: str, *, most: int) -> bytes:
    """Read all bytes of a file that may be of any kind and size.

    Raises:
        ReadError: it cannot be read, or is no ordinary file.
        FormatError: it is larger than ``most`` bytes.
    """
    with read_errors(path, name):
        check_size(path, name, most)
        return path.read_bytes()


def check_size(path: Path, name: str, most: int = MAX_JSON_BYTES) -> None:
    """Refuse a file that is too large to be read as a whole.

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
    """Decode JSON text, refusing what is ambiguous: of a repeated name in an object, readers take different values.

    ``NaN`` and ``Infinity`` are numbers, since transformers writes them into configs.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or an object has the same name twice.
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
