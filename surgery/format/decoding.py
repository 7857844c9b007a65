"""Decoding JSON from untrusted files into dataclasses, with each field checked against its annotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from surgery.errors import FormatError, few
from surgery.files.json_files import is_later

_T = TypeVar("_T")
#: Called with a JSON value and its place in the file, gives the value of the annotated type; raises FormatError.
_Decoder = Callable[[Any, str], Any]

#: Annotation of a scalar field -> the types that JSON may have for it.
_SCALARS: dict[type, type | tuple[type, ...]] = {str: str, int: int, bool: bool, float: (int, float)}


def decode(kind: type[_T], value: Any, where: str) -> _T:
    """Decode a JSON object into a dataclass.

    Args:
        kind: a dataclass. Its annotations are scalars, other dataclasses, ``list[X]`` and ``tuple[X, ...]`` of one of these
            (both are lists in JSON), and ``X | None``.
        value: from JSON. Its lists of records are emptied as they are decoded, so that memory is not needed twice.
        where: the place in the file, for messages.

    Raises:
        FormatError: a field is unknown or of another type, or is missing and has neither a ``default_factory``
            nor the mark that earlier versions did not have it.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object", got=type(value).__name__)
    decoders, needed = _fields_of(kind)  # type: ignore[arg-type]  # classes are hashable
    if odd := sorted(value.keys() - decoders.keys() | needed - value.keys()):
        raise FormatError(f"{where}: missing or unknown entries", got=few(map(repr, odd)))
    return kind(**{name: decoders[name](value[name], f"{where}: {name}") for name in value})


@cache
def _fields_of(kind: type) -> tuple[dict[str, _Decoder], frozenset[str]]:
    """A decoder for each field of a dataclass, and the names of the fields that must be given."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    needed = frozenset(part.name for part in fields if part.default_factory is dataclasses.MISSING and not is_later(part))
    return {part.name: _decoder_of(hints[part.name]) for part in fields}, needed


def _decoder_of(annotation: Any) -> _Decoder:
    """The decoder for an annotation. Raises TypeError if it is none of those that ``decode`` knows."""
    if annotation in _SCALARS:
        return partial(_decode_scalar, annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return partial(decode, annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is list:
        return partial(_decode_list, _decoder_of(arguments[0]), arguments[0] not in _SCALARS)
    if origin is tuple and arguments[1:] == (...,):
        as_list = _decoder_of(list[arguments[0]])  # type: ignore[valid-type]  # known at run time only
        return lambda value, where: tuple(as_list(value, where))
    if origin is UnionType and arguments[1:] == (NoneType,):
        present = _decoder_of(arguments[0])
        return lambda value, where: None if value is None else present(value, where)
    raise TypeError(f"no JSON is known for {annotation}")


def _decode_list(decode_item: _Decoder, of_records: bool, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{where}: expected a list", got=type(value).__name__)
    items = []
    for i, item in enumerate(value):
        items.append(decode_item(item, f"{where}[{i}]"))
        if of_records:
            value[i] = None  # frees the parsed JSON of a long list as its records are made
    return items


def _decode_scalar(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, _SCALARS[kind]) or (isinstance(value, bool) and kind is not bool):
        raise FormatError(f"{where}: expected {kind.__name__}", got=repr(value)[:80])
    if kind is float and isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            raise FormatError(f"{where}: a number out of all range") from None
    return value
