"""Untrusted regular expressions: matched in time linear in the text, or refused.

``re`` backtracks: it tries one way to match after another, and an expression can have more ways than can ever be tried. Here
all are followed at once: the expression becomes an automaton (Thompson, 1968), whose states are made when a text first
reaches them. Supported is what such an automaton can do: characters, ``.``, classes in brackets, ``\\d \\w \\s``, groups,
``|``, ``* + ? {m,n}``, ``^ $ \\b``, each with the meaning that ``re`` gives it.
"""

from __future__ import annotations

import re
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

#: The longest expression, and the longest program of an automaton: ``a{1000}`` becomes a thousand instructions.
MOST_CHARACTERS = 10_000
MOST_INSTRUCTIONS = 10_000
#: How many instructions may be made, or looked at while matching: about a second's work.
MOST_WORK = 200_000
_MOST_GROUPS = 40

_TOKEN = re.compile(
    r"(?P<set>\[\^?\]?(?:[^]\\[]|\\.)*\]|\\[dDwWsS])"
    r"|(?P<at>[\^$]|\\b)"
    r"|\\(?P<escaped>[^a-zA-Z0-9])"
    r"|(?P<open>\((?:\?:|(?!\?)))"
    r"|(?P<close>\))"
    r"|(?P<alternative>\|)"
    r"|(?P<repeat>[*+?]|\{(?:[0-9]{1,4}(?:,[0-9]{0,4})?|,[0-9]{1,4})\})\??"
    r"|(?P<any>\.)"
    r"|(?P<literal>[^\\\[({])",
    re.DOTALL,
)
#: In brackets: escapes that ``re`` reads as something else than the character, and syntax that it reserves for the future.
_ODD_IN_SET = re.compile(r"\\(?![dDwWsS])[a-zA-Z0-9]|--|&&|~~|\|\|")


class ExpressionError(ValueError):
    """An expression that is invalid, needs backtracking, or takes too much work."""


class _Character(NamedTuple):
    """An instruction: take one character. It is ``literal``, one of ``members``, or with neither any but a newline."""

    literal: str | None
    members: re.Pattern[str] | None

    def accepts(self, character: str) -> bool:
        if self.members is not None:
            return self.members.fullmatch(character) is not None
        return character == self.literal if self.literal is not None else character != "\n"


class _At(NamedTuple):
    """An instruction: go on only at a place in the text, ``^``, ``$`` or ``\\b``."""

    what: str


class _Goto(NamedTuple):
    """An instruction: go on at each of these instructions, as offsets from this one."""

    steps: tuple[int, ...]


_Program = list[_Character | _At | _Goto]


@dataclass(eq=False, slots=True)
class _State:
    """A state of the automaton: all places in the program where it may be after some text.

    Attributes:
        places: indices of the instructions that come next.
        after_word: whether the last character was one of a word; None at the beginning of the text.
        following: next character -> next state, as far as it has been made.
        accepts: whether the text may end here; None if that is not known yet.
    """

    places: frozenset[int]
    after_word: bool | None
    following: dict[str, _State] = field(default_factory=dict)
    accepts: bool | None = None


@dataclass(slots=True)
class Work:
    """A budget for compiling and matching, which several expressions may share.

    Attributes:
        left: instructions that may still be made or looked at.
    """

    left: int = MOST_WORK

    def spend(self, instructions: int) -> None:
        """Take so many instructions from the budget.

        Raises:
            ExpressionError: it is used up.
        """
        self.left -= instructions
        if self.left < 0:
            raise ExpressionError("it takes too long to match")


@dataclass(slots=True)
class Expression:
    """A compiled regular expression. Safe for any number of threads.

    Attributes:
        text: the expression.
        work: the budget for compiling it; None: ``MOST_WORK``.

    Raises:
        ExpressionError: says what is wrong with it.
    """

    text: str
    work: InitVar[Work | None] = None
    _program: _Program = field(init=False, repr=False, compare=False)
    _states: dict[tuple[frozenset[int], bool | None], _State] = field(init=False, repr=False, compare=False)
    _kept: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self, work: Work | None) -> None:
        if len(self.text) > MOST_CHARACTERS:
            raise ExpressionError(f"{len(self.text)} characters; at most {MOST_CHARACTERS} are taken")
        self._program = _Parser(self.text).parsed()
        (work or Work()).spend(len(self._program))
        self._states = {}

    def fullmatch(self, text: str, work: Work | None = None) -> bool:
        """Whether the expression matches the whole text, as ``re.fullmatch``.

        Args:
            text: any.
            work: the budget for it; None: ``MOST_WORK``.

        Raises:
            ExpressionError: the budget is used up.
        """
        work = work or Work()
        if self._kept > MOST_WORK:  # bounds the memory of states
            self._states, self._kept = {}, 0
        body = text[:-1] if text.endswith("\n") else text  # $ also matches before a newline at the end of the text
        state = self._state(frozenset([0]), None)
        for character in body:
            state = state.following.get(character) or self._follow(state, character, work)
            if not state.places:
                return False
        if body is not text:
            state = self._next(state, "\n", work, at_end=True)
        if state.accepts is None:
            state.accepts = len(self._program) in self._reached(state, None, work, at_end=True)
        return state.accepts

    def _state(self, places: frozenset[int], after_word: bool | None) -> _State:
        return self._states.setdefault((places, after_word), _State(places, after_word))

    def _follow(self, state: _State, character: str, work: Work) -> _State:
        following = state.following[character] = self._next(state, character, work, at_end=False)
        return following

    def _next(self, state: _State, character: str, work: Work, *, at_end: bool) -> _State:
        places = []
        for place in self._reached(state, character, work, at_end=at_end):
            instruction = self._program[place] if place < len(self._program) else None
            if isinstance(instruction, _Character) and instruction.accepts(character):
                places.append(place + 1)
        return self._state(frozenset(places), _is_of_word(character))

    def _reached(self, state: _State, character: str | None, work: Work, *, at_end: bool) -> set[int]:
        """The instructions that are reached from a state before ``character`` is taken (None: after the last one)."""
        is_there = {
            "^": state.after_word is None,
            "$": at_end,
            "\\b": bool(state.after_word) != (character is not None and _is_of_word(character)),
        }
        reached: set[int] = set()
        todo = list(state.places)
        while todo:
            place = todo.pop()
            if place in reached:
                continue
            reached.add(place)
            instruction = self._program[place] if place < len(self._program) else None
            if isinstance(instruction, _Goto):
                todo += [place + step for step in instruction.steps]
            elif isinstance(instruction, _At) and is_there[instruction.what]:
                todo.append(place + 1)
        self._kept += len(reached)
        work.spend(len(reached))
        return reached


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


class _Parser:
    """Compiles the text of an expression into a program, by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def parsed(self) -> _Program:
        program = self._alternatives()
        if self._at < len(self._text):
            raise ExpressionError("a ) without a (")
        return program

    def _alternatives(self) -> _Program:
        branches = [self._sequence()]
        while self._take("alternative"):
            branches.append(self._sequence())
        program = branches.pop()
        for branch in reversed(branches):
            program = [_Goto((1, len(branch) + 2)), *branch, _Goto((len(program) + 1,)), *program]
        return program

    def _sequence(self) -> _Program:
        program: _Program = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            program += self._item()
            if len(program) > MOST_INSTRUCTIONS:
                raise ExpressionError("it repeats too much")
        return program

    def _item(self) -> _Program:
        found = self._next_token()
        self._at = found.end()
        match found.lastgroup:
            case "at":
                return [_At(found[0])]  # a place cannot be repeated, as in re
            case "repeat":
                raise ExpressionError(f"nothing that {found[0]} could repeat")
            case "open":
                self._depth += 1
                if self._depth > _MOST_GROUPS:
                    raise ExpressionError(f"more than {_MOST_GROUPS} groups within each other")
                item = self._alternatives()
                if not self._take("close"):
                    raise ExpressionError("a ( without a )")
                self._depth -= 1
            case "set":
                item = [_Character(None, _members(found[0]))]
            case "any":
                item = [_Character(None, None)]
            case kind:
                item = [_Character(found[kind or 0], None)]
        repeat = self._take("repeat")
        return _repeated(item, repeat) if repeat else item

    def _take(self, kind: str) -> str | None:
        """Consume the next token if it is of this kind; returns its text, else None."""
        if self._at == len(self._text):
            return None
        found = self._next_token()
        if found.lastgroup != kind:
            return None
        self._at = found.end()
        return found[kind]

    def _next_token(self) -> re.Match[str]:
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            raise ExpressionError(f"{self._text[self._at : self._at + 3]!r} at its character {self._at + 1}")
        return found


def _repeated(item: _Program, repeat: str) -> _Program:
    low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(repeat) or _bounds(repeat)
    if (len(item) + 1) * max(low, high or 1) > MOST_INSTRUCTIONS:
        raise ExpressionError("it repeats too much")
    if high is not None:
        return item * low + [_Goto((1, len(item) + 1)), *item] * (high - low)
    if low == 0:
        return [_Goto((1, len(item) + 2)), *item, _Goto((-len(item) - 1,))]
    return item * low + [_Goto((-len(item), 1))]


def _bounds(repeat: str) -> tuple[int, int | None]:
    low, comma, high = repeat[1:-1].partition(",")
    bounds = int(low or 0), int(high) if high else None if comma else int(low)
    if bounds[1] is not None and bounds[1] < bounds[0]:
        raise ExpressionError(f"{repeat} is no range")
    return bounds


def _members(text: str) -> re.Pattern[str]:
    if odd := _ODD_IN_SET.search(text):
        raise ExpressionError(f"{odd[0]!r} within {text[:40]}")
    try:
        return re.compile(text)
    except re.error as error:
        raise ExpressionError(f"{text[:40]} is no set of characters ({error})") from None
