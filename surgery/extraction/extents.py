"""How many directions of each difference an adapter keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from surgery.errors import OptionError
from surgery.format.options import Options
from surgery.solvers.limits import check_energy

#: A number, or ``auto`` for the directions that stand above the noise.
Rank = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Extent:
    """How many directions are kept: one of a rank, a share of the energy, those above the noise, or a budget for all.

    Attributes:
        rank: of each matrix, or ``auto``: as many as stand above the noise that the difference ends in. With all of these
            None it is that of the recipe's rules, or 16.
        energy: as few as hold this share of each difference's squared Frobenius norm.
        budget: numbers of the whole adapter, shared out such that they hold the most of all differences.
        max_rank: the most directions of a matrix, where the number is not given; 256 if None.

    Raises:
        OptionError: they contradict each other, or a number makes no sense.
    """

    rank: Rank | None = None
    energy: float | None = None
    budget: int | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self._ways().items() if value is not None}
        if len(given) > 1:
            raise OptionError(
                "the size of an adapter is given in more than one way",
                got=", ".join(f"{name} {value}" for name, value in given.items()),
                expected="one of rank, energy and budget",
            )
        if isinstance(self.rank, str) and self.rank != "auto":
            raise OptionError("the rank is no number", got=repr(self.rank), expected="a number, or auto")
        for name, number in (("rank", self.rank), ("budget", self.budget), ("max_rank", self.max_rank)):
            if isinstance(number, int) and number < 1:
                raise OptionError(f"{name} must be at least 1", got=number)
        if self.energy is not None:
            check_energy(self.energy, 1)
        if self.max_rank is not None and self.is_fixed:
            raise OptionError(
                "a largest rank goes with an energy, a budget, or the rank auto", got=f"max_rank {self.max_rank} without one"
            )

    def _ways(self) -> dict[str, Rank | float | None]:
        return {"rank": self.rank, "energy": self.energy, "budget": self.budget}

    @property
    def is_fixed(self) -> bool:
        """Whether the ranks are known before the differences are."""
        return self.energy is None and self.budget is None and self.rank != "auto"

    def options(self, chosen: Options) -> Options:
        """The options for a plan whose targets have the largest rank that may be kept. Fused weights stay whole."""
        if self.is_fixed:
            return replace(chosen, rank=self.rank if isinstance(self.rank, int) else None, split=False)
        return replace(chosen, rank=None, energy=1.0, max_rank=self.max_rank, split=False)
