"""Numbers and names as a reader gets them."""

from __future__ import annotations

import html
import math

MINUS = "\u2212"


def shown(name: object) -> str:
    """A text from a stranger's file; what is not printable (control characters, changes of direction) is spelled out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(name)
    )


def escaped(name: object) -> str:
    """``shown``, for the text of an element or a quoted attribute."""
    return html.escape(shown(name))


def number(value: float | None, *, signed: bool = False) -> str:
    """To three digits, fewer below one, and never with an exponent in between 1e-9 and 1e9."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        digits = "0"
    elif size < 1e-9 or size >= 1e9:
        digits = f"{size:.1e}"
    elif size < 1:
        places = 1 - math.floor(math.log10(size))
        digits = f"{size:.{places}f}".rstrip("0").rstrip(".")
    else:
        digits = f"{size:.3g}" if size < 99.95 else f"{size:,.0f}"
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    return sign + digits


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share as a percentage: 0.0123 is "1.23 %"."""
    if share is None or not math.isfinite(share):
        return "–"
    # What is nearly all must not be rounded to all of it.
    if 0.9995 <= share < 1 and not signed:
        return "over 99.9\u00a0%"
    return number(100 * share, signed=signed) + "\u00a0%"


def cosine(value: float | None) -> str:
    """To four places, cut off: what is nearly one must not become it."""
    return "–" if value is None else f"{math.floor(1e4 * value) / 1e4:.4f}"


def times(ratio: float) -> str:
    """A ratio, as in "2.5 times as much"."""
    return f"{number(ratio)} times"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """``n`` of something: "1 matrix", "2 matrices"."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def matrices(n: int) -> str:
    return count(n, "matrix", "matrices")


def rank_text(rank: float, kept: int) -> str:
    """A rank that may lie beyond those that were computed."""
    return number(rank) if math.isfinite(rank) else f"more than {kept}"
