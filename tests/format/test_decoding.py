"""Records from JSON: each annotation that a record may have takes what ``json`` writes of it, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from surgery.errors import FormatError
from surgery.format.decoding import decode


@dataclass(frozen=True, slots=True)
class Inner:
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Outer:
    flag: bool
    share: float
    globs: tuple[str, ...]
    numbers: list[int]
    inner: Inner
    maybe: Inner | None
    several: list[Inner]
    pairs: tuple[Inner, ...] | None
    given: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Impossible:
    value: dict[str, int]


_ONE = Outer(True, 0.5, ("a", "b"), [1, 2], Inner("x", 3), None, [Inner("y", 4), Inner("z", 5)], (Inner("w", 6),), [1.5])


def _json(record: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(record)))


@pytest.mark.parametrize("record", [_ONE, dataclasses.replace(_ONE, maybe=Inner("m", 7), pairs=None, globs=(), several=[])])
def test_what_is_written_comes_back(record: Outer) -> None:
    assert decode(Outer, _json(record), "here") == record


def test_a_whole_number_is_a_float_and_a_default_may_be_left_out() -> None:
    value = _json(_ONE) | {"share": 2}
    del value["given"]
    found = decode(Outer, value, "here")
    assert (found.share, type(found.share), found.given) == (2.0, float, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flag": 1}, "here: flag: expected bool"),
        ({"share": True}, "here: share: expected float"),
        ({"share": 10**400}, "here: share: a number out of all range"),
        ({"globs": "ab"}, "here: globs: expected a list"),
        ({"globs": ["a", 1]}, r"here: globs\[1\]: expected str"),
        ({"numbers": [1, 2.0]}, r"here: numbers\[1\]: expected int"),
        ({"numbers": [False]}, r"here: numbers\[0\]: expected int"),
        ({"inner": None}, "here: inner: expected an object"),
        ({"inner": {"name": "x"}}, "here: inner: missing or unknown entries"),
        ({"maybe": 0}, "here: maybe: expected an object"),
        ({"several": [{"name": "y", "size": "4"}]}, r"here: several\[0\]: size: expected int"),
        ({"pairs": [{"name": "y", "size": 4, "more": 1}]}, r"here: pairs\[0\]: missing or unknown entries"),
        ({"more": 1}, "here: missing or unknown entries"),
    ],
)
def test_anything_else_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode(Outer, _json(_ONE) | change, "here")


def test_an_annotation_that_no_json_is_known_for_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match=r"no JSON is known for dict\[str, int\]"):
        decode(Impossible, {"value": {}}, "here")
