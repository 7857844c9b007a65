"""Regular expressions in bounded time: the answers are those of ``re``, which has no bound."""

from __future__ import annotations

import random
import re
import time

import pytest

from surgery.expressions import MOST_CHARACTERS, Expression, ExpressionError, Work

_CHARACTERS = (
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a.]",
    r"\d",
    r"\w",
    "1",
    "_",
    "^",
    "$",
    r"\b",
    "\n",
    "[]a]",
    r"[\w.]",
    r"\-",
    "}",
)
_REPEATS = ("*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "{0}", "*?", "+?", "??", "{0,2}?")
_PIECES = (*_CHARACTERS, *_REPEATS, "(?:", "(", ")", "|", "|", "{", "]", "**", "\\")


def _random(chance: random.Random, depth: int) -> str:
    kind = chance.randrange(5) if depth else 0
    if kind < 2:
        text = chance.choice(_CHARACTERS)
    elif kind == 2:
        text = f"({_random(chance, depth - 1)})"
    elif kind == 3:
        text = f"(?:{_random(chance, depth - 1)}|{_random(chance, depth - 1)})"
    else:
        text = _random(chance, depth - 1) + _random(chance, depth - 1)
    return text + chance.choice(_REPEATS) if chance.randrange(3) == 0 else text


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_answers_of_re(seed: int) -> None:
    """What is taken has the meaning that it has there; what is no expression there is none here."""
    chance = random.Random(seed)
    taken = matched = 0
    for _ in range(3000 if seed == 0 else 50_000):
        text = "".join(chance.choices(_PIECES, k=chance.randrange(7))) if chance.randrange(3) == 0 else _random(chance, 3)
        try:
            expression = Expression(text)
        except ExpressionError:
            continue
        taken += 1
        reference = re.compile(text)
        for _ in range(10):
            name = "".join(chance.choices("aab.1_-\n c", k=chance.randrange(8)))
            expected = reference.fullmatch(name) is not None
            assert expression.fullmatch(name) == expected, (text, name)
            matched += expected
    assert taken > 1500
    assert matched > 1000


@pytest.mark.parametrize(
    "text",
    [
        *("(?=a)a", "(?!a)b", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?P<n>a)", "(?P=n)", "(?i)a", "(?i:a)", "(?>a)", "(?#x)"),
        *("a++", "a*+", "a**", "*a", "(*)", "|*", "^*", "(", ")", "a)", "[", "[]", "[z-a]", "[[a]", "[a--b]", "\\", r"\Aa"),
        *(r"\n", r"\x41", r"[\n]", r"[\b]", r"\B", r"\0", r"a\Z", "a{2,1}", "a{", "a{x}", "a{99999}", "(a{1000}){1000}"),
        *("a" * (MOST_CHARACTERS + 1), "(" * 9_000, "(" * 99 + ")" * 99, "a{99999999999999999999}", "(?(1)a|b)"),
    ],
)  # fmt: skip
def test_what_is_not_taken(text: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("([a-z._0-9]+)+X", "model.layers.0.self_attn.q_proj" * 3000),
        ("(a*)*b", "a" * 100_000),
        ("(a|aa)+$", "a" * 100_000 + "b"),
        (".*a.*a.*a.*a.*a.*a.*b", "a" * 100_000),
        (r"(.*\.)?((\w+\.?)*!)", "a." * 50_000),
    ],
)
def test_time_grows_with_the_text_alone(text: str, name: str) -> None:
    """``re`` needs years for these, or hours; a second is enough."""
    started = time.perf_counter()
    assert not Expression(text).fullmatch(name)
    assert time.perf_counter() - started < 10


def test_what_takes_too_much_work() -> None:
    chance = random.Random(0)
    name = "".join(chance.choices("abc", k=100_000))
    started = time.perf_counter()
    with pytest.raises(ExpressionError, match="too long to match"):
        Expression("(.*a.{40}b|.*b.{30}c)+x.*").fullmatch(name)
    assert time.perf_counter() - started < 10
    work = Work(100)
    expression = Expression("a{20}", work)
    with pytest.raises(ExpressionError, match="too long to match"):
        for _ in range(100):
            expression = Expression("a{20}", work)
    assert expression.fullmatch("a" * 20)
