"""What the bases of Krylov spaces have in common, of one matrix or of a batch: how far they have come."""

from __future__ import annotations

from surgery.solvers.operator import Operator
from surgery.solvers.search import Search


class Basis:
    """How far a basis has come.

    Args:
        operator: of the matrices.
        limit: rows at which it is full.
        block: rows per step.

    Attributes:
        operator, limit, block: as given; the limit is the shorter side at most.
        size: rows that have been multiplied by C.
    """

    def __init__(self, operator: Operator, limit: int, block: int) -> None:
        self.operator = operator
        self.block = block
        self.limit = min(limit, operator.short)
        self.size = 0
        self._pending = 0  # orthonormal rows behind them, yet to be multiplied
        self._last = 0  # rows multiplied in the last step
        self._steps = 0  # before the first restart
        self._whole = True  # nothing has been let go of by a restart

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space, so that nothing is left to find."""
        return self._pending == 0

    @property
    def search(self) -> Search:
        """What it has gone through, if it began with random rows alone."""
        return Search(min(self.block, self.limit), self._steps)
