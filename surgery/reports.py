"""Reports: what an operation returns, and its command prints as JSON with ``--json``.

The fields of a report are the entries of its JSON, and its docstring explains them: docs/json.md is generated from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

_NAME = "name in JSON"
#: Metadata of a dataclass field that is not in the JSON.
NOT_IN_JSON: Mapping[str, str | None] = {_NAME: None}


class Report:
    """Base class of all reports. A report is a frozen dataclass.

    Attributes:
        schema_version: version of the JSON: it changes when an entry is removed or gets another meaning, and not when
            an entry is added.
    """

    __slots__ = ()
    schema_version: ClassVar[int] = 1

    def as_json(self) -> dict[str, Any]:
        """The report as dict, list, str, int, float, bool and None. ``schema_version`` comes first.

        A path becomes a string. A number that is not finite becomes None, because JSON has no such numbers.
        """
        return {"schema_version": self.schema_version, **_entries(self)}


def in_json(name: str) -> Mapping[str, str | None]:
    """Metadata of a dataclass field that has another name in the JSON."""
    return {_NAME: name}


def json_fields(kind: Any) -> dict[str, Field[Any]]:
    """Name in JSON -> field, for the fields of a dataclass that are in the JSON."""
    named = ((field.metadata.get(_NAME, field.name), field) for field in fields(kind))
    return {name: field for name, field in named if name is not None}


def rounded_to(value: float, digits: int) -> float:
    """With so many significant digits, as the manifest and reports have numbers."""
    return float(f"{value:.{digits}g}")


def _entries(record: Any) -> dict[str, Any]:
    return {name: _plain(getattr(record, field.name)) for name, field in json_fields(record).items()}


def _plain(value: Any) -> Any:
    """A value of a field as JSON has it. Raises TypeError if JSON has nothing for it."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return _entries(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} is no part of a report")
