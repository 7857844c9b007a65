"""Numbers and names as texts for the readers of a report."""

from __future__ import annotations

import html
import math

from surgery.escapes import escaped

MINUS = "\u2212"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def html_text(name: object) -> str:
    """A text escaped for an HTML element or a quoted attribute, with characters that cannot be seen spelled out."""
    return html.escape(escaped(str(name)))


def number(value: float | None, *, signed: bool = False) -> str:
    """A number to three digits, fewer below one; with a power of ten only below 1e-4 and from 1e9 on."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        digits = "0"
    elif size < 1e-4 or size >= 1e9:
        mantissa, power = f"{size:.1e}".split("e")
        digits = f"{mantissa.removesuffix('.0')}\u00a0×\u00a010{str(int(power)).translate(_RAISED)}"
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
    # A share that is nearly 1 must not be shown as 100 %.
    if 0.9995 <= share < 1 and not signed:
        return "over 99.9\u00a0%"
    return number(100 * share, signed=signed) + "\u00a0%"


def cosine(value: float | None) -> str:
    """A cosine to four decimals, cut off and not rounded: one of nearly 1 must not be shown as 1."""
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
    """A rank; where it is infinite, that it is more than the ``kept`` ones that were computed."""
    return number(rank) if math.isfinite(rank) else f"more than {kept}"


def directions_text(rank: float, kept: int) -> str:
    """A number of directions, such as a rank."""
    return f"{rank_text(rank, kept)} direction{'s' if rank != 1 else ''}"
