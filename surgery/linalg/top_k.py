"""Whether singular triplets are the leading ones: what is known of values that were not found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["proven", "likely", "unknown"]


@dataclass(frozen=True, slots=True)
class TopK:
    """What is known of the singular values of a matrix besides the k that were found.

    Attributes:
        verdict: ``proven``, ``likely`` or ``unknown``.
        margin: no singular value that was not found is above ``s_k + margin * s_1``; infinite where unknown.
        chance: the probability, at most, that this is wrong: 0 where proven, 1 where unknown.
    """

    verdict: Verdict
    margin: float
    chance: float


UNKNOWN = TopK("unknown", math.inf, 1.0)
