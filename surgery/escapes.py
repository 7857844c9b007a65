"""Texts of strangers, made such that they can do nothing but stand there: in one line, or as one word of a shell.

Names of tensors and files, values in configs and answers of servers may hold anything. A terminal takes some characters for
commands, others turn the order of what is around them, and a line end lets a name look like a line of our own.
"""

from __future__ import annotations

import glob
import os
import shlex


def escaped(text: str) -> str:
    """A text in one line, of characters that can be seen.

    Letters of all scripts with their marks, symbols and emoji stay. Escaped as in a Python string is what is not printable
    in its sense: control characters (C0, DEL, C1), ends of lines and paragraphs, changes of direction, characters without a
    width, spaces that are no space, surrogates, private and unassigned characters. What is escaped stays as it is.
    """
    return text if text.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def has_surrogates(text: str) -> bool:
    """Whether a text has halves of characters, as of a file name that is no text; UTF-8 has none."""
    return any(0xD800 <= ord(one) < 0xE000 for one in text)


def quoted(text: object) -> str:
    """One word of a POSIX shell; of bash, zsh and ksh (``$'...'``) where it holds what ``escaped`` would escape.

    There it is spelled out in bytes, so that what is pasted is what is meant.
    """
    word = str(text)
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_in_dollar_quotes, word)) + "'"


def quoted_glob(name: str) -> str:
    """The pattern that matches this name alone, as one word of a shell; in quotes even where it needs none, as patterns are."""
    word = quoted(glob.escape(name))
    return word if word.endswith("'") else f"'{word}'"


def _in_dollar_quotes(one: str) -> str:
    if one in "\\'":
        return f"\\{one}"
    if one.isprintable():
        return one
    try:
        data = os.fsencode(one)  # of a file name that is no text, too
    except UnicodeEncodeError:
        data = one.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in data)  # octal: always three digits, whatever comes next
