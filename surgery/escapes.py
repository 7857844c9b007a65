"""Escaping untrusted text: for printing it in one line, and for using it as one word of a shell command.

Names of tensors and files, values in configs and answers of servers may hold anything. A terminal takes some characters as
commands, others reverse the order of the text around them, and a line end lets a name look like a line of our own.
"""

from __future__ import annotations

import glob
import os
import shlex


def escaped(text: str) -> str:
    """A text in one line of visible characters.

    Letters of all scripts with their marks, symbols and emoji stay. Characters that are not printable (``str.isprintable``)
    are escaped as in a Python string: control characters (C0, DEL, C1), ends of lines and paragraphs, changes of writing
    direction, zero-width characters, spaces other than the usual one, surrogates, private and unassigned characters. Text
    that has been escaped already stays unchanged.
    """
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def has_surrogates(text: str) -> bool:
    """Whether a text has surrogates, as Python reads a file name that is not valid UTF-8; it cannot be encoded in UTF-8."""
    return any(0xD800 <= ord(char) < 0xE000 for char in text)


def quoted(text: object) -> str:
    """A text as one word of a shell command, in quotes where it needs them.

    Any POSIX shell understands it, unless it has characters that are not printable: then it is ``$'...'`` with their bytes in
    octal, for bash, zsh and ksh, so that it can be copied from a terminal.
    """
    word = str(text)
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_in_dollar_quotes, word)) + "'"


def quoted_glob(name: str) -> str:
    """The glob that matches only this name, as one word of a shell command; always in quotes."""
    word = quoted(glob.escape(name))
    return word if word.endswith("'") else f"'{word}'"


def _in_dollar_quotes(char: str) -> str:
    """A character as it is written inside ``$'...'``."""
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable():
        return char
    try:
        data = os.fsencode(char)  # also gives the original bytes of a file name that is not UTF-8
    except UnicodeEncodeError:
        data = char.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in data)  # octal has three digits at most, so a digit may follow
