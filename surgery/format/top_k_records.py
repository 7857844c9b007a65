"""What the manifest says of whether a larger singular value was missed, matrix by matrix, and all of it in a few numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

from surgery.linalg.top_k import TopK

#: Verdicts, the best one first.
_VERDICTS = ("proven", "likely", "unknown")
_UPWARDS = Context(prec=3, rounding=ROUND_CEILING)


@dataclass(frozen=True, slots=True)
class TopKRecord:
    """Whether the kept values of a matrix are its largest (``surgery.linalg.top_k.TopK``).

    Attributes:
        verdict: ``proven``, ``likely`` or ``unknown``.
        margin: no singular value that was not found is above ``s_k + margin * s_1``; three significant digits, rounded up.
            None where it is unknown.
        chance: that this is wrong: 0 where it is proven, 1 where it is unknown.
    """

    verdict: str
    margin: float | None
    chance: float

    @classmethod
    def of(cls, found: TopK) -> TopKRecord:
        if found.verdict == "unknown":
            return NOT_ON_RECORD
        return cls(found.verdict, _rounded_up(found.margin), found.chance)

    @property
    def makes_sense(self) -> bool:
        """Whether verdict, margin and chance go together."""
        match self.verdict:
            case "proven":
                good = self.chance == 0
            case "likely":
                good = 0 < self.chance < 1
            case "unknown":
                return self.margin is None and self.chance == 1
            case _:
                return False
        return good and self.margin is not None and 0 <= self.margin < math.inf

    def __str__(self) -> str:
        return self.verdict if self.margin is None else f"{self.verdict} {self.margin:.2e}"

    @property
    def rank(self) -> tuple[int, float]:
        """By how much it says: what says less comes later."""
        return _VERDICTS.index(self.verdict), math.inf if self.margin is None else self.margin


#: Of a matrix of which nothing is known, as in what earlier versions wrote.
NOT_ON_RECORD = TopKRecord("unknown", None, 1.0)


@dataclass(frozen=True, slots=True)
class TopKSummary:
    """For how many matrices it is known that the kept singular values are the largest.

    Attributes:
        proven: number of matrices for which it is proven.
        likely: number of matrices for which it holds, except with the small probability that the manifest records.
        unknown: number of matrices for which nothing is known, including those that an earlier version of surgery has
            factorized.
        margin: the largest margin of the matrices that are proven or likely: no singular value above
            ``s_k + margin * s_1`` was missed. None if there are no such matrices.
        margin_in: the key of the target with this margin; None if there is none.
    """

    proven: int
    likely: int
    unknown: int
    margin: float | None
    margin_in: str | None

    @classmethod
    def of(cls, found: Iterable[tuple[str, TopKRecord]]) -> TopKSummary:
        """The summary of what is known of matrices, each with the key of its target."""
        counts, margin, where = Counter[str](), None, None
        for key, record in found:
            counts[record.verdict] += 1
            if record.margin is not None and (margin is None or record.margin > margin):
                margin, where = record.margin, key
        return cls(counts["proven"], counts["likely"], counts["unknown"], margin, where)


def _rounded_up(value: float) -> float:
    """With three significant digits, and no smaller: it is an upper bound."""
    return float(_UPWARDS.create_decimal(repr(value)))
