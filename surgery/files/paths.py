"""Which relative paths are allowed in a checkpoint: those that mean the same file on every system."""

from __future__ import annotations

import os
import unicodedata
from itertools import pairwise
from pathlib import PurePosixPath

from surgery.errors import FormatError
from surgery.escapes import has_surrogates
from surgery.names import RESERVED_SUFFIX

#: Bytes of a file name, with room for the suffix that it has while the file is written, and of a whole relative path.
_LONGEST_NAME = 255 - len(RESERVED_SUFFIX)
_LONGEST_PATH = 1000
#: Names that Windows takes for devices, in any folder and with any suffix.
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789\u00b9\u00b2\u00b3"
}
#: The zero-width joiner: invisible, but also a part of emoji.
_JOINER = "\u200d"
_PLAIN = "a relative path without .. and without : and \\, which have a meaning on Windows"


def check_relative_path(name: str, where: str) -> str:
    """Refuse a relative path that is not portable or leaves its folder.

    Letters of all scripts, symbols and emoji are allowed. The same rule holds for what a hub or a folder lists, what an
    index names, and what a manifest records.

    Args:
        name: the path, with forward slashes.
        where: what lists or names it, for messages.

    Returns:
        ``name``.

    Raises:
        FormatError: says which part of the rule it breaks.
    """
    path = PurePosixPath(name)
    if has_surrogates(name):
        raise FormatError(f"{where}: a file name that is no Unicode text", got=ascii(name)[:200])
    if not path.parts or path.is_absolute() or ".." in path.parts or any(sign in name for sign in "\\\0:"):
        raise FormatError(f"{where}: a path that leaves its folder", got=repr(name)[:200], expected=_PLAIN)
    if path.as_posix() != name:
        raise FormatError(f"{where}: a path with empty parts or .", got=repr(name)[:200], expected=repr(path.as_posix()))
    for part in path.parts:
        if _hidden(part):
            raise FormatError(f"{where}: a file name with invisible characters", got=ascii(part)[:200])
        if part[-1] in " ." or part.split(".")[0].rstrip().upper() in _DEVICES:
            raise FormatError(f"{where}: a file name that means another file on Windows", got=repr(part)[:200])
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise FormatError(f"{where}: a file name that is too long", got=ascii(part)[:80], expected=f"{_LONGEST_NAME} bytes")
    if len(os.fsencode(name)) > _LONGEST_PATH:
        raise FormatError(f"{where}: a path that is too long", got=ascii(name)[:80], expected=f"{_LONGEST_PATH} bytes")
    return name


def is_plain_path(name: str) -> bool:
    """Whether ``check_relative_path`` accepts the path."""
    try:
        check_relative_path(name, "")
    except FormatError:
        return False
    return True


def _hidden(part: str) -> bool:
    """Whether a name has invisible characters: controls, line ends, changes of writing direction, or zero-width ones.

    A zero-width joiner between two emoji does not count.
    """
    if all(_is_emoji_joined(before, after) for before, after in pairwise(part.split(_JOINER))):
        part = part.replace(_JOINER, "")
    return any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in part)


def _is_emoji_joined(before: str, after: str) -> bool:
    """Whether a joiner stands between emoji: ``before`` ends in a symbol or its modifier, ``after`` begins with a symbol."""
    last, first = (unicodedata.category(character) if character else "" for character in (before[-1:], after[:1]))
    return last in ("So", "Sk", "Mn") and first == "So"


def file_key(path: str) -> str:
    """A key that is equal for paths which are the same file on a disk that ignores case and Unicode normal forms."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
