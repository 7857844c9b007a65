"""The schema of ``spectra.json`` (docs/study.md), and the check of its contents before they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from surgery.errors import FormatError
from surgery.report.verdicts import CLAIMS, TOGETHER

SCHEMA_VERSION = 3

#: Larger than any ratio of squared norms of float32 weights.
_LARGEST = 1e100
_MOST = 2**53
#: Rounding to six digits may take a cosine or a share a little beyond 1.
_ONE = 1 + 1e-5

#: A check ``(value, where)`` that raises a FormatError, with ``where`` in its message, unless the value is of some kind.
_Kind = Callable[[Any, str], None]


def _wrong(where: str, value: object, expected: str) -> FormatError:
    return FormatError(f"spectra: {where} is not what it must be", got=ascii(value)[:80], expected=expected)


def _number(least: float, most: float, expected: str) -> _Kind:
    def check(value: Any, where: str) -> None:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or not least <= value <= most:
            raise _wrong(where, value, expected)

    return check


def _whole(least: int) -> _Kind:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
            raise _wrong(where, value, f"an integer, at least {least}")

    return check


def _of_type(kind: type, expected: str) -> _Kind:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, kind):
            raise _wrong(where, value, expected)

    return check


def _one_of(texts: Collection[str]) -> _Kind:
    def check(value: Any, where: str) -> None:
        if value not in texts:
            raise _wrong(where, value, f"one of {', '.join(texts)}")

    return check


def _maybe(kind: _Kind) -> _Kind:
    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def _list(kind: _Kind, *, least: int = 0) -> _Kind:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list | tuple) or len(value) < least:
            raise _wrong(where, value, f"a list of at least {least}")
        for i, item in enumerate(value):
            kind(item, f"{where}[{i}]")

    return check


def _object(fields: Mapping[str, _Kind], *, may_lack: tuple[str, ...] = ()) -> _Kind:
    """A check for an object with these entries, and perhaps others."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "an object")
        for name, kind in fields.items():
            if name in value:
                kind(value[name], f"{where}.{name}".lstrip("."))
            elif name not in may_lack:
                raise FormatError(f"spectra: {where or 'they'} {'has' if where else 'have'} no {name!r}")

    return check


_real = _number(-_LARGEST, _LARGEST, "a number")
_size = _number(0, _LARGEST, "a number that is not negative")
_share = _number(0, _ONE, "a number from 0 to 1")
_text, _flag = _of_type(str, "a text"), _of_type(bool, "true or false")
_count = _whole(0)

_OPTIONS = {
    "top": _whole(1),
    "subspace": _whole(1),
    "seed": _of_type(int, "an integer"),
    "tolerance": _size,
    "recipe": _maybe(_text),
    "include": _list(_text),
    "exclude": _list(_text),
}
_MODEL = _object({"name": _text, "repo_id": _maybe(_text), "commit": _maybe(_text)})
_SPECTRUM: dict[str, _Kind] = {
    "norm": _size,
    "singular_values": _list(_size, least=1),
    "residual": _list(_size, least=1),
    "gap": _list(_size, least=1),
    "identified": _list(_flag, least=1),
    "converged": _flag,
    "method": _text,
    "stable_rank": _size,
    "effective_rank": _size,
    "effective_rank_error": _size,
    "energy": lambda value, where: _shares(value, where),
    "condition": _maybe(_size),
    "tail_exponent": _maybe(_real),
}
_NAMES: dict[str, _Kind] = {
    "tensor": _text,
    "slice": _maybe(_text),
    "matrix": _maybe(_count),
    "key": _text,
    "group": _text,
    "layer": _maybe(_count),
    "view": _text,
    "dtype": _text,
    "shape": lambda value, where: _shape(value, where),
}
_UPDATE: dict[str, _Kind] = {
    "norm": _size,
    "relative": _maybe(_size),
    "in_left": _share,
    "in_right": _share,
    "in_both": _share,
    "rescaling": _share,
    "stable_rank": _size,
    "effective_rank": _size,
    "effective_rank_error": _size,
    "singular_values": _list(_size, least=1),
    "converged": _flag,
}
_SCALING = {"factor": _size, "of_values": _share, "of_update": _share}
_TURNING = {
    **dict.fromkeys(("left", "right", "independent"), _size),
    **dict.fromkeys(("alike", "random"), _number(-_ONE, _ONE, "a number from -1 to 1")),
}
_COMPARISON: dict[str, _Kind] = {
    "tuned": _object(_SPECTRUM),
    "amplification": _list(_maybe(_size)),
    "rest_amplification": _maybe(_size),
    "place": _list(_maybe(_whole(1))),
    "left_cosine": _list(_maybe(_share)),
    "right_cosine": _list(_maybe(_share)),
    "in_place": _list(_maybe(_real)),
    "order_changes": _count,
    "gone": _list(_whole(1)),
    "new": _list(_whole(1)),
    "new_certain": _list(_whole(1)),
    "left_top": _list(_share),
    "right_top": _list(_share),
    "left_next": _list(_share),
    "right_next": _list(_share),
    "explained": _list(_size),
    "claims": _object({"rounding": _maybe(_share), "scaling": _maybe(_object(_SCALING)), "turning": _maybe(_object(_TURNING))}),
}
#: Lists with one entry for each singular value that is told, and lists with at most as many.
_BY_DIRECTION = ("residual", "gap", "identified")
_BY_PAIR = ("amplification", "place", "left_cosine", "right_cosine", "in_place")
_PARTS = ("in_left", "in_right", "in_either", "in_both")
_SHARES = (*(f"median_update_{part}" for part in _PARTS), "median_rescaling")
_CHANCES = (*(f"chance_{part}" for part in _PARTS), "chance_rescaling")
#: Findings that are there together.
_TOGETHER = {
    "in_place_grew_share": ("median_in_place",),
    "median_scaling": ("median_scaling_at_random", "median_scaling_of_values", "median_scaling_of_update"),
    "median_turned_alike": ("median_turned_alike_at_random",),
}
#: The findings about all matrices together. Each is a value or None; those about a change may be missing for a model alone.
_FINDINGS: dict[str, _Kind] = {
    "targets": _count,
    "median_stable_rank": _maybe(_size),
    "median_effective_rank_share": _maybe(_size),
    "unconverged": _count,
    "unidentified_share": _share,
}
_CHANGES: dict[str, _Kind] = {
    **dict.fromkeys(("top_change", "rest_change", "median_matched_amplification"), _maybe(_size)),
    **dict.fromkeys(("median_scaling", "median_scaling_at_random"), _maybe(_size)),
    "top_amplified_share": _maybe(_share),
    **dict.fromkeys(("median_scaling_of_values", "median_scaling_of_update"), _maybe(_share)),
    **dict.fromkeys(("median_left_cosine", "median_right_cosine"), _maybe(_share)),
    **dict.fromkeys(("median_next_left_cosine", "median_next_right_cosine"), _maybe(_share)),
    **dict.fromkeys(("median_turned_alike", "median_turned_alike_at_random"), _maybe(_real)),
    "median_in_place": _maybe(_real),
    "in_place_grew_share": _maybe(_share),
    "order_changes": _count,
    "moved_share": _maybe(_share),
    "gone": _count,
    "new": _count,
    "new_certain": _count,
    **dict.fromkeys(_SHARES, _maybe(_share)),
    **dict.fromkeys(_CHANCES, _maybe(_size)),
    "claims": _list(
        _object(
            {
                "claim": _one_of([name for name, _, _ in CLAIMS]),
                "arxiv": _text,
                "verdict": _one_of(TOGETHER),
                **dict.fromkeys(("yes", "partly", "no", "unknown"), _count),
            }
        )
    ),
    "most_amplified": _maybe(_list(_object({"key": _text, "index": _whole(1), "amplification": _size}))),
}


def _shares(value: Any, where: str) -> None:
    _of_type(Mapping, "an object")(value, where)
    for rank, share in value.items():
        if not isinstance(rank, str) or not rank.isascii() or not rank.isdecimal() or len(rank) > 9:
            raise _wrong(where, rank, "ranks")
        _share(share, f"{where}.{rank}")


def _shape(value: Any, where: str) -> None:
    _list(_whole(1))(value, where)
    if len(value) != 2:
        raise _wrong(where, value, "rows and columns")


def _check_lengths(target: Mapping[str, Any], where: str, *, compared: bool) -> None:
    k = len(target["singular_values"])
    if k > min(target["shape"]):
        raise _wrong(f"{where}.singular_values".lstrip("."), f"{k} values", f"at most {min(target['shape'])}, by its shape")
    lists = {name: target[name] for name in _BY_DIRECTION}
    if compared:
        lists |= {f"tuned.{name}": target["tuned"][name] for name in ("singular_values", *_BY_DIRECTION)}
    for name, values in lists.items():
        if len(values) != k:
            raise _wrong(f"{where}.{name}".lstrip("."), f"{len(values)} values", f"{k}, as many as singular values")
    for name in _BY_PAIR if compared else ():
        if len(target[name]) > k:
            raise _wrong(f"{where}.{name}".lstrip("."), f"{len(target[name])} values", f"at most {k}")


def check_target(target: Any, where: str = "", *, compared: bool, whole: bool = True) -> None:
    """Refuse a value that is not the figures of one matrix.

    Args:
        target: one of ``targets``, as it comes from JSON.
        where: its place, for messages.
        compared: whether two models were compared.
        whole: whether entries must be there that neither page nor table shows.

    Raises:
        FormatError: names the entry.
    """
    _object(_NAMES | _SPECTRUM, may_lack=() if whole else ("view",))(target, where)
    if compared:
        update = _maybe(_object(_UPDATE, may_lack=() if whole else ("converged",)))
        _object({**_COMPARISON, "update": update}, may_lack=() if whole else ("explained",))(target, where)
        if target["update"] is not None:
            _share(target["claims"]["rounding"], f"{where}.claims.rounding".lstrip("."))
    _check_lengths(target, where, compared=compared)


def check_spectra(spectra: Any) -> None:
    """Refuse a value that is not the contents of a ``spectra.json``, as far as a page or a table shows it.

    Raises:
        FormatError: it is of another schema version, or an entry is missing or of another kind, which the message names.
    """
    if not isinstance(spectra, Mapping) or spectra.get("schema_version") != SCHEMA_VERSION:
        raise FormatError(
            "these spectra are of another version",
            got=ascii(spectra.get("schema_version") if isinstance(spectra, Mapping) else spectra)[:80],
            expected=f"schema_version {SCHEMA_VERSION}",
        )
    texts = dict.fromkeys(("tool", "torch", "device"), _text)
    _object({**texts, "base": _MODEL, "tuned": _maybe(_MODEL), "options": _object(_OPTIONS)})(spectra, "")
    compared = spectra["tuned"] is not None
    _object({"targets": _list(_of_type(Mapping, "an object"), least=1)})(spectra, "")
    _object({"findings": _object(_FINDINGS | (_CHANGES if compared else {}))})(spectra, "")
    keys = set()
    for i, target in enumerate(spectra["targets"]):
        check_target(target, f"targets[{i}]", compared=compared, whole=False)
        if target["key"] in keys:
            raise _wrong(f"targets[{i}].key", target["key"], "a matrix that is told of once")
        keys.add(target["key"])
    if compared:
        _check_findings(spectra)


def _check_findings(spectra: Mapping[str, Any]) -> None:
    """Refuse findings in which a value is missing that others, or an update, say must be there."""
    found = spectra["findings"]
    for name, others in _TOGETHER.items():
        for other in others if found[name] is not None else ():
            _real(found[other], f"findings.{other}")
    for name, part in (("median_scaling", "scaling"), ("median_turned_alike", "turning")):
        if found[name] is not None and all(target["claims"][part] is None for target in spectra["targets"]):
            raise _wrong(f"findings.{name}", found[name], "none, as no matrix has one")
    if any(target["update"] is not None for target in spectra["targets"]):
        for name in (*_SHARES, *_CHANCES):
            _size(found[name], f"findings.{name}")
            if name in _CHANCES and not found[name]:
                raise _wrong(f"findings.{name}", 0, "more than 0")
