"""Which relative paths a checkpoint may have: those that mean the same file on every system."""

from __future__ import annotations

import os
import unicodedata
from itertools import pairwise
from pathlib import PurePosixPath

from surgery.errors import FormatError
from surgery.escapes import has_surrogates
from surgery.names import RESERVED_SUFFIX

#: Bytes of a name that leave room for what is added to it while its file is written, and of a path below a folder.
_LONGEST_NAME = 255 - len(RESERVED_SUFFIX)
_LONGEST_PATH = 1000
#: What Windows takes for devices, in any folder and with any suffix.
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789\u00b9\u00b2\u00b3"
}
_JOINER = "\u200d"
_PLAIN = "a relative path without .. and without : and \\, which have a meaning on Windows"


def check_relative_path(name: str, where: str) -> str:
    """``name`` if it is a path that means the same file on every system, and that stays inside the folder it is relative to.

    Letters of all scripts, symbols and emoji are fine. The same rule holds for what a hub or a folder lists, what an index
    names, and what a manifest records.

    Raises:
        FormatError: says which part of the rule it breaks.
    """
    path = PurePosixPath(name)
    if has_surrogates(name):
        raise FormatError(f"{where}: a file name that is no Unicode text", got=ascii(name)[:200])
    if not path.parts or path.is_absolute() or ".." in path.parts or any(sign in name for sign in "\\\0:"):
        raise FormatError(f"{where}: a path that leaves its folder", got=repr(name)[:200], expected=_PLAIN)
    if path.as_posix() != name:
        raise FormatError(f"{where}: a path with parts that say nothing", got=repr(name)[:200], expected=repr(path.as_posix()))
    for part in path.parts:
        if _hidden(part):
            raise FormatError(f"{where}: a file name with characters that are not seen", got=ascii(part)[:200])
        if part[-1] in " ." or part.split(".")[0].rstrip().upper() in _DEVICES:
            raise FormatError(f"{where}: a file name that Windows takes for another", got=repr(part)[:200])
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise FormatError(f"{where}: a file name that is too long", got=ascii(part)[:80], expected=f"{_LONGEST_NAME} bytes")
    if len(os.fsencode(name)) > _LONGEST_PATH:
        raise FormatError(f"{where}: a path that is too long", got=ascii(name)[:80], expected=f"{_LONGEST_PATH} bytes")
    return name


def is_plain_path(name: str) -> bool:
    """Whether ``check_relative_path`` takes it."""
    try:
        check_relative_path(name, "")
    except FormatError:
        return False
    return True


def _hidden(part: str) -> bool:
    """Whether a name has control characters, line ends, changes of direction, or characters without a width in it.

    One of these is part of emoji: what joins two.
    """
    if all(_is_emoji_joined(before, after) for before, after in pairwise(part.split(_JOINER))):
        part = part.replace(_JOINER, "")
    return any(unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp") for one in part)


def _is_emoji_joined(before: str, after: str) -> bool:
    """Whether a symbol, maybe with its skin or its variant, stands before a joiner, and a symbol after it."""
    last, first = (unicodedata.category(one) if one else "" for one in (before[-1:], after[:1]))
    return last in ("So", "Sk", "Mn") and first == "So"


def file_key(path: str) -> str:
    """What two paths have in common that are one on a disk that does not tell case or normal forms apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
