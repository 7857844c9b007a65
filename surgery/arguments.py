"""Checking the arguments of public functions: each is held against its annotation, and ``~`` in paths is expanded."""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import types
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

from surgery.errors import OptionError

_PATH = "a path (str or Path)"
_SIMPLE = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a str",
    Path: _PATH,
    type(None): "None",
}


class _Unfit(Exception):
    """A value is not of the type that its annotation names."""


def as_path(path: str | os.PathLike[str], what: str = "the path") -> Path:
    """A Path, with ``~`` or ``~name`` at its beginning expanded to the home folder. Variables are not expanded.

    Args:
        path: any str or Path.
        what: what messages call it.

    Raises:
        OptionError: it is neither, is empty, cannot be a path on this system, or names a user that does not exist.
    """
    try:
        return Path(_expanded(path, what))
    except _Unfit:
        raise OptionError(f"{what} is no path", got=_shown(path), expected=_PATH) from None


def checked(
    function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Check the arguments of a call against the annotations of the function, and convert them to plain types.

    Numbers of other libraries, subclasses of str and other kinds of paths become Python's own. Ordered collections become
    tuples: lists, iterators (which are used up), views of dicts, arrays of one dimension. An argument that may be a str or a
    Path has its ``~`` expanded, and otherwise stays a str if it was one, since it may be a repo id. A ``torch.device``
    becomes its name. The function itself checks whether numbers and names make sense.

    Args:
        function: that is called.
        arguments, options: its positional and keyword arguments.

    Returns:
        The converted positional and keyword arguments.

    Raises:
        OptionError: an argument is of a type that its annotation does not name.
        TypeError: there is no parameter of that name.
    """
    signature, kinds = _kinds(function)
    try:
        bound = signature.bind(*arguments, **options)
    except TypeError:
        if unknown := sorted(options.keys() - signature.parameters.keys()):  # unpacked keywords would swallow it
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}") from None
        return arguments, options  # the call is wrong in another way: making it raises Python's own error
    for name, kind in kinds.items():
        if name in bound.arguments:
            bound.arguments[name] = _fitting(bound.arguments[name], kind, name, function.__name__)
    return bound.args, bound.kwargs


def check_fields(record: object) -> None:
    """Check and convert each field of a frozen dataclass, from its ``__post_init__``, as ``checked`` does for arguments.

    Raises:
        OptionError: a field is of a type that its annotation does not name.
    """
    made: Callable[..., Any] = type(record)
    for name, kind in _field_kinds(made).items():
        object.__setattr__(record, name, _fitting(getattr(record, name), kind, name, made.__name__))


@functools.cache
def _field_kinds(record: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(record)


def spelled_out(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function with ``Unpack`` keywords, with each of these as a parameter; None for other functions.

    Such a function has the parameters ``options: Record | None = None`` and ``**keywords: Unpack[Keywords]``. ``Record`` is a
    dataclass, and ``Keywords`` a TypedDict of some of its fields, which has the types of the keywords. Their defaults and
    their order are those of the dataclass. In the signature they come after ``options``.
    """
    parameters = inspect.signature(function).parameters.values()
    is_unpacked = any(one.kind is one.VAR_KEYWORD and str(one.annotation).startswith("Unpack[") for one in parameters)
    return _kinds(function)[0] if is_unpacked else None


@functools.cache
def _kinds(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """The signature of a function with its ``Unpack`` keywords spelled out, and the type of each of its parameters."""
    hints = get_type_hints(function)
    hints.pop("return", None)
    signature = inspect.signature(function)
    *parameters, last = signature.parameters.values() or (None,)
    if last is None or last.kind is not last.VAR_KEYWORD or get_origin(hints.get(last.name)) is not Unpack:
        return signature, hints
    (keywords,) = get_args(hints.pop(last.name))
    (record,) = [kind for kind in _alternatives(hints["options"]) if is_dataclass(kind)]
    annotations = {name: kind.__forward_arg__ for name, kind in keywords.__annotations__.items()}
    unpacked = [
        last.replace(name=one.name, kind=last.KEYWORD_ONLY, default=one.default, annotation=annotations[one.name])
        for one in fields(record)
        if one.name in annotations
    ]
    after = 1 + next(i for i, one in enumerate(parameters) if one.name == "options")
    every = [*parameters[:after], *unpacked, *parameters[after:]]
    return signature.replace(parameters=every), hints | get_type_hints(keywords)


def _fitting(value: Any, kind: Any, name: str, function: str) -> Any:
    """The value of a parameter, converted to its type. Raises OptionError if it does not fit."""
    if isinstance(value, str) and (known := _names(kind)) and value not in known:
        raise OptionError(f"unknown {name}", got=_shown(value), expected=" or ".join(known))
    has_items = any(_items(one) is not None for one in _alternatives(kind))
    try:
        return _taken(_in_order(value) if has_items else value, kind, name)
    except (_Unfit, OverflowError):
        raise OptionError(
            f"{function}() cannot take this as {name}",
            got=_shown(value),
            expected=" or ".join(dict.fromkeys(_described(one) for one in _alternatives(kind))),
            hint=_hint(value, kind, name),
        ) from None


def _hint(value: Any, kind: Any, name: str) -> str | None:
    """A hint on how to convert a value to this type, such as a list around a single path; None if there is none."""
    for one in _alternatives(kind):
        if isinstance(value, str) and (items := _items(one)) is not None and not {str, Path}.isdisjoint(_alternatives(items)):
            return f"{name}=[{value[:80]!r}]"
        if getattr(one, "__name__", "") == "Tensor" and (hasattr(value, "__array__") or isinstance(value, list | tuple)):
            return f"{name}=torch.as_tensor(...) of it"
        if _items(one) is not None and isinstance(value, Set):
            return f"{name}=sorted(...) of it, as a set has no order"
        if one in (bool, int, float) and callable(getattr(value, "item", None)) and not isinstance(value, Real):
            return "its .item(), where it is a single value"
        if _is_mapping(one):
            if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
                return f"{name}={{key: torch.as_tensor(value), ...}}"
            if type(value).__module__.startswith("surgery.") and hasattr(value, "values"):
                return "its .values" + ("()" if callable(value.values) else "")
        if getattr(one, "_is_protocol", False):
            if isinstance(value, type):
                return f"an object of {value.__name__}, and not the class"
            methods = [method for method in vars(one) if not method.startswith("_")]
            lacks = [method for method in methods if not callable(getattr(value, method, None))]
            return f"an object with all of its methods: this one has no {', no '.join(lacks)}"
    return None


def _in_order(value: Any) -> Any:
    """An ordered collection as a tuple; any other value unchanged."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return value
    if isinstance(value, Sequence | Iterator | KeysView | ValuesView):
        return tuple(value)
    if hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1:
        return tuple(value.tolist())
    return value


def _taken(value: Any, kind: Any, name: str) -> Any:
    """The value converted to the first alternative of this type that it fits. Raises ``_Unfit`` if it fits none."""
    for one in _alternatives(kind):
        try:
            return _as_one(value, one, name)
        except _Unfit:
            continue
    raise _Unfit


def _as_one(value: Any, kind: Any, name: str) -> Any:
    """The value converted to a type that is no union. Raises ``_Unfit`` if it does not fit."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        named = [one for one in inner if value is one or (isinstance(value, type(one)) and value == one)]
        _only_if(bool(named))
        return named[0]
    if _is_mapping(kind):
        _only_if(isinstance(value, Mapping))
        return {_taken(key, inner[0], name): _taken(one, inner[1], name) for key, one in value.items()}
    if (items := _items(kind)) is not None:
        return tuple(_taken(one, items, name) for one in _only_if(isinstance(value, tuple), value))
    if kind is bool or kind is type(None):
        return _only_if(isinstance(value, kind), value)
    if kind is int:
        return int(_only_if(isinstance(value, Integral) and not isinstance(value, bool), value))
    if kind is float:
        return float(_only_if(isinstance(value, Real) and not isinstance(value, bool), value))
    if kind is str:
        return _plain(_only_if(isinstance(value, str), value))
    if kind is Path:
        return _expanded(value, name)
    if getattr(kind, "__module__", "") == "torch" and kind.__name__ == "device":
        return str(_only_if(isinstance(value, kind), value))
    return _only_if(isinstance(value, kind) and not isinstance(value, type), value)


def _only_if(fits: bool, value: Any = None) -> Any:
    """Return the value if it fits, else raise ``_Unfit``."""
    if not fits:
        raise _Unfit
    return value


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _plain(text: str) -> str:
    """A plain str from one of a subclass, such as a member of an enumeration, of which it is the value."""
    return str.__str__(text)


def _expanded(given: Any, what: str) -> str | Path:
    """A path with its ``~`` expanded. The result is a str only if a str was given and there was no ``~``."""
    _only_if(isinstance(given, str | os.PathLike))
    text = os.fspath(given)
    text = _plain(_only_if(isinstance(text, str), text))
    path: str | Path = text if isinstance(given, str) else given if isinstance(given, Path) else Path(text)
    if not text:
        raise OptionError(f"{what} is an empty path", expected=_PATH, hint=". is the current folder")
    try:
        impossible = b"\0" in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        impossible = True
    if impossible:
        raise OptionError(f"{what}: no file can have this path", got=ascii(text)[:200])
    if text.startswith("~"):
        try:
            path = Path(text).expanduser()
        except RuntimeError:
            name = Path(text).parts[0]
            raise OptionError(
                f"{what} begins with the home folder of a user that is not known here",
                got=repr(text)[:200],
                hint=f"./{name} is a folder of that name",
            ) from None
    return path


def _items(kind: Any) -> Any:
    """The type of the items of a sequence type; None for other types."""
    origin = get_origin(kind)
    return get_args(kind)[0] if isinstance(origin, type) and issubclass(origin, Sequence) else None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone. Where Path is one, str is left out, since Path accepts it too."""
    several = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(one for one in several if one is not str or Path not in several)


def _names(kind: Any) -> list[str]:
    """The names that a ``Literal`` type allows; empty for other types."""
    literals = [one for one in _alternatives(kind) if get_origin(one) is Literal]
    return [str(name) for one in literals for name in get_args(one)]


def _described(kind: Any) -> str:
    """A type in words, for a message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if _is_mapping(kind):
        return f"a mapping of names to {_many(inner[1])}"
    if (items := _items(kind)) is not None:
        return f"a list of {_many(items)}"
    return _SIMPLE.get(kind) or f"a {kind.__module__.partition('.')[0]} {kind.__name__}"


def _many(kind: Any) -> str:
    """Several values of a type in words, for a message."""
    words = {str: "str", float: "numbers", int: "whole numbers"}
    return "paths" if Path in _alternatives(kind) else words.get(kind) or _described(kind).removeprefix("a ") + "s"


def _shown(value: Any) -> str:
    """A value and its type in one short line, for a message."""
    if value is None or isinstance(value, bool | str):
        return repr(value)[:100]
    return f"{type(value).__name__} {' '.join(reprlib.repr(value).split())[:100]}"
