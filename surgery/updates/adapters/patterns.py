"""The ranks and alphas of an adapter, looked up by module as PEFT does: in bounded time, whatever patterns its config has."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import FormatError
from surgery.expressions import Expression, ExpressionError, Work

#: Of a module's name. None of a model comes near, and with it the work of a pattern is bounded.
_MOST_CHARACTERS = 1000
#: What looking up patterns may cost, some seconds at most: characters of plain ones and of regular expressions; characters of
#: names that the latter are held against; sets of plain ones that have the same length and dots, times modules.
_MOST_PLAIN = 2_000_000
_MOST_OF_EXPRESSIONS = 100_000
_MOST_READ = 20_000_000
_MOST_LOOKED_UP = 5_000_000
_NOT_PLAIN = re.compile(r"[\\^$*+?{}\[\]|()]")


class ByModule:
    """The ranks or alphas of an adapter, as PEFT looks them up: of the first pattern that fits, which is
    ``re.match(rf"(.*\\.)?({pattern})$", module)``.

    Nearly all patterns are names of modules or ends of them, where a dot stands for any character. They are found by the
    characters between the dots, for their number is that of the modules.

    Raises:
        FormatError: patterns that make no sense, or would take long.
    """

    def __init__(self, config: Mapping[str, Any], key: str, default: str, modules: Collection[str], folder: Path) -> None:
        self._key, self._default, self._folder = key, config.get(default), folder
        self._patterns: Mapping[str, Any] = config.get(key) or {}
        if not isinstance(self._patterns, dict):
            raise self._refusal(self._patterns, "regular expression -> number")
        if self._patterns and max(map(len, modules)) > _MOST_CHARACTERS:
            raise self._refusal(f"a module's name of {max(map(len, modules))} characters", f"at most {_MOST_CHARACTERS}")
        self._values = list(self._patterns.values())
        numbered = list(enumerate(self._patterns))
        others = {number: pattern for number, pattern in numbered if _NOT_PLAIN.search(pattern)}
        # No module has a longer name.
        plain = {n: pattern for n, pattern in numbered if n not in others and len(pattern) <= _MOST_CHARACTERS}
        #: By length, then by the parts between dots: where these are, and what is in them -> the number of the pattern.
        self._plain: dict[int, dict[tuple[tuple[int, int], ...], dict[str, int]]] = {}
        self._check_most(sum(map(len, plain.values())) <= _MOST_PLAIN, modules)
        for number, pattern in plain.items():
            parts = tuple(found.span() for found in re.finditer(r"[^.]+", pattern))
            self._plain.setdefault(len(pattern), {}).setdefault(parts, {}).setdefault(pattern.replace(".", ""), number)
        self._check_most(sum(map(len, self._plain.values())) * len(modules) <= _MOST_LOOKED_UP, modules)
        self._check_most(sum(map(len, others.values())) <= _MOST_OF_EXPRESSIONS, modules)
        self._check_most(len(others) * sum(map(len, modules)) <= _MOST_READ, modules)
        self._work = Work()
        self._expressions = {number: self._expression(pattern) for number, pattern in others.items()}

    def of(self, module: str) -> Any:
        """The entry for a module; its value is not checked."""
        number = min(self._plain_ones(module), default=len(self._values))
        for other, expression in self._expressions.items():
            if other > number:
                break
            try:
                if expression.fullmatch(module, self._work):
                    number = other
                    break
            except ExpressionError as error:
                raise self._refusal(f"{expression.text[:80]!r}: {error}", "a simpler one") from None
        if number < len(self._values):
            return self._values[number]
        return self._patterns.get(module, self._default)  # PEFT, too, goes on with the name itself

    def _plain_ones(self, module: str) -> Iterator[int]:
        for length, alike in self._plain.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                end = module[start:]
                for parts, numbers in alike.items():
                    number = numbers.get("".join([end[first:last] for first, last in parts]))
                    if number is not None:
                        yield number

    def _expression(self, pattern: str) -> Expression:
        try:
            Expression(pattern, self._work)  # by itself it must be one: the group around it would make one of "a)|(b"
            return Expression(rf"(.*\.)?({pattern})", self._work)
        except ExpressionError as error:
            raise self._refusal(
                f"{pattern[:80]!r}: {error}", "the end of a module's name, or a regular expression without look-around"
            ) from None

    def _check_most(self, is_less: bool, modules: Collection[str]) -> None:
        if not is_less:
            raise self._refusal(f"{len(self._patterns)} for {len(modules)} modules", "fewer, or names of modules alone")

    def _refusal(self, got: object, expected: str) -> FormatError:
        return FormatError(
            f"{self._folder}: its {self._key} cannot be looked up",
            got=got if isinstance(got, str) else reprlib.repr(got),
            expected=expected,
            hint="write the names of the modules there, or merge the adapter with PEFT: merge_and_unload()",
        )


def with_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], where: Path) -> dict[str, Any]:
    """The config of an adapter whose modules have got other ranks, each also its alpha, so that the scaling of all is 1.

    The default is the largest rank, which loaders that ignore patterns take. Patterns are the shortest ends of names that tell
    the modules of other ranks, as loaders may know modules under names that begin otherwise.

    Args:
        config: as it was; all other entries stay.
        ranks: by the names that PEFT looks them up with.
        where: the adapter's folder or file, for messages.
    """
    largest = max(ranks.values())
    by_end: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        for end in _ends(name):
            by_end.setdefault(end, set()).add(rank)
    pattern: dict[str, int] = {}
    for name, rank in ranks.items():
        if rank != largest:
            pattern[next((end for end in _ends(name) if len(by_end[end]) == 1), name)] = rank
    changed = {**config, "r": largest, "lora_alpha": largest, "rank_pattern": pattern}
    try:
        found = ByModule(changed, "rank_pattern", "r", ranks, where)
        is_right = all(found.of(name) == rank for name, rank in ranks.items())
    except FormatError:  # a name that is no expression
        is_right = False
    if not is_right:  # as where a dot stands for another character in another module's name
        pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    changed |= {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return changed | ({"use_rslora": False} if "use_rslora" in config else {})


def _ends(name: str) -> list[str]:
    """The ends of a module's name, from dots on, the shortest first."""
    words = name.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]
