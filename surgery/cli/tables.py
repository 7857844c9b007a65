"""Tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest

from surgery.cli.text import cells, shorten, shown, terminal_width, wrapped

_BETWEEN = "  "
#: The indent of all lines of a row but the first.
_INDENT = "  "
#: The least width of a column of names, and of one of prose, before a row is broken into several lines.
_LEAST_NAME, _LEAST_PROSE = 16, 20


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    flush_right: Collection[int] = (),
    names: Collection[int] = (),
    prose: Collection[int] = (),
) -> str:
    """A table with columns padded with spaces, within the width of the terminal; as wide as needed if stdout is no terminal.

    If it does not fit, names are shortened in the middle and prose is wrapped. If that would leave too little of them, or make
    two names alike, a row takes several lines, of which all but the first are indented.

    Args:
        flush_right: the columns of numbers.
        names: those that can be shortened.
        prose: those that can be wrapped.
    """
    cleaned = [[shown(cell) for cell in row] for row in rows]
    natural = [max(cells(row[i]) for row in [headings, *cleaned]) for i in range(len(headings))]
    least = [
        min(width, _LEAST_NAME) if i in names else min(width, _longest_word(headings, cleaned, i)) if i in prose else width
        for i, width in enumerate(natural)
    ]
    room = terminal_width()
    groups = [list(range(len(headings)))]
    widths = _shrunk(natural, least, room)
    if room is not None and (_total(widths) > room or not _told_apart(cleaned, names, widths)):
        groups = _packed(natural, least, room)
        widths = [width for group in groups for width in _widths_of(group, natural, least, room, first=group is groups[0])]

    def lines(row: Sequence[str]) -> list[str]:
        texts = []
        for number, group in enumerate(groups):
            parts = [
                wrapped(row[i], widths[i], indent="") if i in prose else [shorten(row[i], widths[i]) if i in names else row[i]]
                for i in group
            ]
            for some in zip_longest(*parts, fillvalue=""):
                padded = [_padded(text, widths[i], right=i in flush_right) for i, text in zip(group, some, strict=True)]
                texts.append(((_INDENT if number else "") + _BETWEEN.join(padded)).rstrip())
        return texts

    rule = [_BETWEEN.join("-" * widths[i] for i in groups[0])]
    if len(groups) > 1:
        longest = max(_total([widths[i] for i in group]) + len(_INDENT) * (group is not groups[0]) for group in groups)
        rule = ["-" * min(longest, room or longest)]
    return "\n".join([*lines(headings), *rule, *(line for row in cleaned for line in lines(row))])


def _longest_word(headings: Sequence[str], rows: Sequence[Sequence[str]], i: int) -> int:
    return max(_LEAST_PROSE, *(cells(word) for row in [headings, *rows] for word in row[i].split(" ")))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_BETWEEN) * (len(widths) - 1)


def _shrunk(natural: Sequence[int], least: Sequence[int], room: int | None) -> list[int]:
    """Widths of columns that fit the room if that is possible: the widest of those that can shrink is made smaller first."""
    widths = list(natural)
    while room is not None and _total(widths) > room:
        giving = [i for i, width in enumerate(widths) if width > least[i]]
        if not giving:
            break
        widths[max(giving, key=lambda i: widths[i])] -= 1
    return widths


def _told_apart(rows: Sequence[Sequence[str]], names: Collection[int], widths: Sequence[int]) -> bool:
    """Whether names that differ still differ when they are shortened to these widths."""
    for i in names:
        full = {row[i] for row in rows}
        if len({shorten(name, widths[i]) for name in full}) < len(full):
            return False
    return True


def _packed(natural: Sequence[int], least: Sequence[int], room: int) -> list[list[int]]:
    """Which columns are in each line of a row: the last takes as many as it can, so that the others have room for names."""
    wanted = [width if width == natural[i] else min(natural[i], max(width, 2 * room // 3)) for i, width in enumerate(least)]
    groups: list[list[int]] = [[]]
    for i in reversed(range(len(natural))):
        if groups[0] and _total([wanted[j] for j in (i, *groups[0])]) > room - len(_INDENT):
            groups.insert(0, [])
        groups[0].insert(0, i)
    if len(groups) > 1 and _total([wanted[i] for i in (*groups[0], *groups[1])]) <= room:  # the first line has no indent
        groups[:2] = [groups[0] + groups[1]]
    return groups


def _widths_of(group: Sequence[int], natural: Sequence[int], least: Sequence[int], room: int, *, first: bool) -> list[int]:
    return _shrunk([natural[i] for i in group], [least[i] for i in group], room - (0 if first else len(_INDENT)))


def _padded(text: str, width: int, *, right: bool) -> str:
    spaces = " " * (width - cells(text))
    return spaces + text if right else text + spaces
