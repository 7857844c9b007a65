"""What the rounding of updated weights kept of each update, and of all of them together."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from surgery.lossless.kept import Kept
from surgery.lossless.update import Rounding

#: Below this share of its update a target is told of.
_ENOUGH = 0.9


@dataclass(frozen=True, slots=True)
class KeptUpdate:
    """What the rounding kept of one update.

    Attributes:
        name: key of the target, or name of the tensor without targets, that was updated.
        kept: what was kept of it.
        weight: the squared Frobenius norm of what it was added to; None where that was not asked for.
    """

    name: str
    kept: Kept
    weight: float | None = None

    @property
    def size(self) -> float | None:
        """Of the update, relative to the weight, in Frobenius norms; None where the weight's is not known, or zero."""
        return math.sqrt(self.kept.asked / self.weight) if self.weight else None

    def __add__(self, other: KeptUpdate) -> KeptUpdate:
        weight = None if self.weight is None or other.weight is None else self.weight + other.weight
        return KeptUpdate(self.name, self.kept + other.kept, weight)


@dataclass(frozen=True, slots=True)
class KeptSummary:
    """What rounding kept of all updates together, and of that which lost most.

    Attributes:
        share: of all, each by the size of its update, or None if nothing was updated.
        least: the smallest share of any.
        least_in: the name of that one.
        error: of all that were rounded in their directions: what is wrong there, relative to the update; None if none was.
        lost: the names of those of which less than 90 % was kept.
        updates: how many there are.
    """

    share: float | None
    least: float | None
    least_in: str | None
    error: float | None
    lost: Sequence[str]
    updates: int

    @classmethod
    def of(cls, updates: Iterable[KeptUpdate]) -> Self:
        """Summarize what was kept of updates; of those that name one target, such as one of tied tensors, together."""
        kept: dict[str, Kept] = {}
        for one in updates:
            if one.kept.asked > 0:
                kept[one.name] = kept[one.name] + one.kept if one.name in kept else one.kept
        if not kept:
            return cls(None, None, None, None, (), 0)
        worst = min(kept, key=lambda name: (kept[name].share, name))
        total = functools.reduce(operator.add, kept.values())
        measured = [one for one in kept.values() if one.missed is not None]
        error = functools.reduce(operator.add, measured).error if measured else None
        lost = [name for name, one in kept.items() if one.share < _ENOUGH]
        return cls(total.share, kept[worst].share, worst, error, lost, len(kept))

    def note(self, rounding: Rounding | None, *, is_quantized: bool) -> str | None:
        """What the user should know of it; None if enough was kept everywhere.

        Args:
            rounding: as it was asked for.
            is_quantized: whether any weight was quantized.
        """
        if not self.lost or self.least is None:
            return None
        ways = ["--rounding directions keeps it"] if rounding == "nearest" else []
        ways += ["--dequantize writes bfloat16"] if is_quantized else []
        return (
            f"rounding has kept less than {_ENOUGH:.0%} of the update of {len(self.lost)} of {self.updates} weights "
            f"(least: {self.least:.0%}, {self.least_in})" + (f"; {', '.join(ways)}" if ways else "")
        )
