"""Text for the terminal: what it can show, how wide that is, how it is made to fit, and the guard that all output passes.

All that is written while a command runs goes through ``guarded``, which lets only characters and line ends through, so that no
text of others moves the cursor. It cannot know where a line should end: a text that must be one line is escaped by ``shown``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO, cast

import click

from surgery.errors import SurgeryError
from surgery.escapes import escaped

#: Stands for a space at which a line must not be broken. Neither paths nor arguments of a command can hold it.
_GLUE = "\0"


def shown(text: str, *, err: bool = False) -> str:
    """The text as one line, with all characters escaped that cannot be seen or that the encoding of the stream lacks.

    Args:
        text: any text.
        err: whether it goes to stderr.
    """
    return _encodable(escaped(text), _stream(err))


def _encodable(text: str, stream: TextIO | None) -> str:
    encoding = _encoding(stream)
    if text.isascii() or _has(encoding, text):
        return text
    return "".join(one if _has(encoding, one) else ascii(one)[1:-1] for one in text)


def can_show(text: str, *, err: bool) -> bool:
    """Whether stdout, or stderr, has all of these characters."""
    return _has(_encoding(_stream(err)), text)


def cells(text: str) -> int:
    """How many columns of a terminal a text without control characters takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(one: str) -> int:
    # Vowels and final consonants of Hangul share the cells of the consonant before them. File names of macOS have them.
    if unicodedata.category(one) in ("Mn", "Me", "Cf") or "\u1160" <= one <= "\u11ff" or "\ud7b0" <= one <= "\ud7ff":
        return 0
    return 2 if unicodedata.east_asian_width(one) in "WF" else 1


def terminal_width(*, err: bool = False) -> int | None:
    """Columns of the terminal that stdout or stderr is connected to, unless ``COLUMNS`` says another number. None: no limit."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    stream = _stream(err)
    try:
        return None if stream is None else os.get_terminal_size(stream.fileno()).columns or None
    except (AttributeError, OSError, ValueError):
        return None


def shorten(name: str, width: int, *, err: bool = False) -> str:
    """A name shortened to so many cells, so that it can still be told from others.

    Of the name of a tensor the last part and the numbers of layer and expert are kept longest, then its beginning:
    ``model.layers.31…gate_proj``. A text with spaces is cut in the middle.
    """
    if cells(name) <= width:
        return name
    gap = "…" if can_show("…", err=err) else "..."
    # Nearly all names end with ".weight", so that it says little.
    stem = re.sub(r"\.weight(?=\[|$)", "", name)
    if stem != name and cells(stem + gap) <= width:
        return stem + gap
    parts = [stem] if " " in stem else re.findall(r"[^./]*[./]|[^./]+$", stem)
    if len(parts) > 1 and re.match("weight|bias", parts[-1]):
        parts[-2:] = [parts[-2] + parts[-1]]  # the last part says little by itself
    last = len(parts) - 1
    numbers = [i for i, part in enumerate(parts[:-1]) if re.fullmatch(r"(\d+|\*)[./]", part)]
    first = numbers[0] if numbers else 0
    kept = {last}
    for i in (*numbers, *reversed(range(first)), *reversed(range(last))):
        beside = i in numbers or not kept.isdisjoint((i - 1, i + 1))
        if i not in kept and beside and cells(_joined(parts, kept | {i}, gap)) <= width:
            kept.add(i)
    short = _joined(parts, kept, gap)
    return short if cells(short) <= width else _cut(parts[last], width, gap)


def _joined(parts: list[str], kept: set[int], gap: str) -> str:
    """The kept parts of a name, each with the separator after it, and a gap for every run of other parts."""
    text = ""
    for i, part in enumerate(parts):
        if i in kept:
            text += part
        elif not text.endswith(gap):
            text = text.rstrip("./") + gap
    return text


def _cut(text: str, width: int, gap: str) -> str:
    """A text cut in the middle to so many cells."""
    room = width - cells(gap)
    if room < 2:
        return _beginning(text, max(width, 0))
    end = _beginning(text[::-1], room // 2)[::-1]
    return _beginning(text, room - cells(end)) + gap + end


def _beginning(text: str, width: int) -> str:
    taken = 0
    for i, one in enumerate(text):
        taken += _cells(one)
        if taken > width:
            return text[:i]
    return text


def whole(text: object) -> str:
    """A path or a command for a text, marked so that no line is broken in it, as users copy it."""
    return str(text).replace(" ", _GLUE)


def wrapped(text: str, width: int | None, *, indent: str = "  ") -> list[str]:
    """Break a line at spaces into lines of at most so many cells; those after the first are indented.

    A longer word gets a line of its own, which the terminal breaks. So it is whole again when it is copied.
    """
    first, *rest = text.lstrip(" ").split(" ")
    lines = [" " * (len(text) - len(text.lstrip(" "))) + first]
    for word in rest:
        grown = f"{lines[-1]} {word}"
        if width is not None and cells(grown) > width:
            lines.append(indent + word)
        else:
            lines[-1] = grown
    return [line.replace(_GLUE, " ") for line in lines]


def size(n_bytes: float) -> str:
    """A size for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.95:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """A rough time for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def fitted(*lines: str, indent: str = "  ", err: bool = False) -> str:
    """Break each of the lines at words to the width of the terminal that stdout or stderr is connected to."""
    width = terminal_width(err=err)
    safe = (_GLUE.join(shown(part, err=err) for part in line.split(_GLUE)) for line in lines)
    return "\n".join(part for line in safe for part in wrapped(line, width, indent=indent))


def _to_stderr(text: str) -> None:
    """Write to stderr, and ignore errors: a command goes on also if stderr is closed or nobody reads it."""
    with suppress(OSError, ValueError):
        click.echo(text, err=True, nl=False)


def redraw(line: str, *, over: int = 0) -> None:
    """Write the current line of stderr again from its beginning. Nothing else moves the terminal's cursor.

    Args:
        line: the new text.
        over: how many cells of the old text have to be erased after it.
    """
    with suppress(OSError, ValueError):
        click.echo("\r" + shown(line, err=True) + " " * over, file=_bare(sys.stderr), nl=False)


def say(message: str, *, quiet: bool = False) -> None:
    """Print a line for the user on stderr, broken at words to the width of the terminal."""
    if not quiet:
        _to_stderr(fitted(message, err=True) + "\n")


def tell(message: str, *, quiet: bool = False) -> None:
    """Print a note as one line on stderr. It may hold paths and commands to be copied, so only the terminal breaks it."""
    if not quiet:
        _to_stderr(shown(message, err=True) + "\n")


def tell_error(error: Exception) -> None:
    """Print the error that ends a command on stderr. A SurgeryError has several lines, in which all names are escaped."""
    lines = str(error).split("\n") if isinstance(error, SurgeryError) else [str(error)]
    _to_stderr("".join(shown(line, err=True) + "\n" for line in ["Error: " + lines[0], *lines[1:]]))


class _Guarded:
    """A standard stream through which only characters, tabs and line ends pass, whoever writes."""

    def __init__(self, stream: TextIO) -> None:
        self.bare = stream

    def write(self, text: str) -> int:
        safe = "\n".join("\t".join(map(escaped, line.split("\t"))) for line in text.split("\n"))
        self.bare.write(_encodable(safe, self.bare))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)


class _OneLine(logging.LogRecord):
    """A log record of a library whose message is escaped to one line: it may quote configs and answers of servers."""

    def getMessage(self) -> str:  # noqa: N802  # as logging calls it
        return escaped(super().getMessage())


def _bare(stream: TextIO | None) -> TextIO | None:
    return stream.bare if isinstance(stream, _Guarded) else stream


@contextmanager
def guarded() -> Iterator[None]:
    """Let only characters, tabs and line ends reach the terminal while a command runs, whoever writes them.

    That holds for click, Python's warnings, libraries and their logs too; and for the traceback of an unforeseen error, also
    after the context is left.
    """
    before = out, err = sys.stdout, sys.stderr
    factory = logging.getLogRecordFactory()
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show_unforeseen
    sys.stdout, sys.stderr = (None if one is None else cast(TextIO, _Guarded(one)) for one in before)
    ours = sys.stdout, sys.stderr
    logging.setLogRecordFactory(_OneLine)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        if (sys.stdout, sys.stderr) == ours:  # click replaces them if the reader of its output is gone
            sys.stdout, sys.stderr = out, err


def _show_unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print Python's own traceback, with the message of each exception escaped to one line."""
    parts = [part.strip("\n") for part in traceback.format_exception(kind, error, trace)]
    with guarded():
        _to_stderr("".join((part if part.startswith("  File ") else escaped(part)) + "\n" for part in parts))


def _stream(err: bool) -> TextIO | None:
    return sys.stderr if err else sys.stdout


def _encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _has(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
