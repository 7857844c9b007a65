"""What the rounding has kept of an update."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """What has arrived of an update D in a rounded weight: W is the weight before, T = W + D, W_out what is written.

    P (m, r) and Q (n, r) are orthonormal bases of the columns and rows of D, or of its low-rank part. Sums over matrices are
    meaningful: each counts by the size of its update.

    Attributes:
        asked: ``<D, D>``, the squared norm of the update.
        arrived: ``<W_out - W, D>``.
        missed: ``|P^T (W_out - T) Q|^2``; None where it has not been measured, as after rounding to nearest.
        within: ``|P^T D Q|^2``: ``asked`` for a low-rank update.
    """

    asked: float
    arrived: float
    missed: float | None
    within: float

    @property
    def share(self) -> float:
        """How much of the update has arrived: 1 for all of it, also where there is none."""
        return self.arrived / self.asked if self.asked else 1.0

    @property
    def error(self) -> float | None:
        """The error in the directions of the update, relative to it; None where it has not been measured."""
        if self.missed is None:
            return None
        return math.sqrt(self.missed / self.within) if self.within else 0.0

    def __add__(self, other: Kept) -> Kept:
        missed = None if self.missed is None or other.missed is None else self.missed + other.missed
        return Kept(self.asked + other.asked, self.arrived + other.arrived, missed, self.within + other.within)


#: Of no update at all.
NOTHING_ASKED = Kept(0.0, 0.0, 0.0, 0.0)
