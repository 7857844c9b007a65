"""How an original matrix is recovered from what a factorized checkpoint stores of it: the one module that knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows
from surgery.errors import FormatError
from surgery.format.factors import RECORDED_DAMAGED_HINT, FactorsReader
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.correction import CorruptCorrection
from surgery.lossless.factors import Addition, Factors
from surgery.lossless.grids import Grid
from surgery.lossless.join import join, recover
from surgery.lossless.kept import NOTHING_ASKED, Kept
from surgery.lossless.update import NEAREST, Rounding, Written, approximate, rescale
from surgery.timing import timed


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix (m, n) of a target as a factorized checkpoint stores it, on the CPU.

    Attributes:
        target: the target that it is a matrix of.
        stored: the original weight or its residual, in the dtype of the weight; float32 where that is FP8.
        is_residual: whether ``stored`` is the residual.
        factors: of the original; None where they are not needed.
        correction: encoded, what makes residual and factors give the original back bit for bit; None for a weight, and in a
            checkpoint that is not lossless.
    """

    target: TargetRecord
    stored: torch.Tensor
    is_residual: bool
    factors: Factors | None
    correction: torch.Tensor | None

    def original(self, where: torch.device) -> torch.Tensor:
        """The original weight (m, n).

        Without a correction it is ``round(R + U diag(s) V^T)``, which differs in the last bits of some weights.

        Args:
            where: the device of the arithmetic and of the result; it must have float64.

        Raises:
            FormatError: the correction is damaged in a way that shows.
        """
        if not self.is_residual:
            return self.stored.to(where)
        return self._with(self.stored.to(where), where, None, None, NEAREST)[0]

    def recovered(self, where: torch.device) -> tuple[torch.Tensor, float]:
        """The original weight (m, n) of a residual with a correction, and the share of its entries that needed the correction.

        Args:
            where: the device of the arithmetic and of the result; it must have float64.

        Raises:
            CorruptCorrection: the correction is damaged in a way that shows.
        """
        assert self.factors is not None
        assert self.correction is not None
        return recover(self.stored.to(where), self.factors.to(where), self.correction)

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the original weight; that of a residual and its factors, which are orthogonal."""
        square = float(torch.linalg.vector_norm(self.stored, dtype=torch.float32)) ** 2
        if self.is_residual and self.factors is not None:
            square += float(self.factors.s.double().square().sum())
        return square

    def updated(
        self,
        device: torch.device,
        scales: torch.Tensor | None,
        addition: Addition | None,
        rounding: Rounding | None = "nearest",
        grid: Grid | None = None,
    ) -> tuple[torch.Tensor, Kept]:
        """The original weight with an update, rounded once, and what was kept of the update.

        Args:
            device: where the arithmetic runs, if it has the memory; it must have float64.
            scales: multipliers ``g`` of the kept directions, float32 (k,), or a core (k, k); None where they are untouched.
            addition: a low-rank matrix (m, n) that is added besides; None for nothing.
            rounding, grid: see ``Written``.

        Returns:
            (m, n), on the CPU, in the dtype of ``stored``. It may take the memory of ``stored``, which must not be used after.

        Raises:
            FormatError: the correction is damaged in a way that shows.
        """
        kept = NOTHING_ASKED

        def compute(there: torch.Tensor, where: torch.device) -> torch.Tensor:
            # On a GPU this changes a copy: if its memory does not suffice, the weight is still there for another try.
            nonlocal kept
            result, kept = self._with(there, where, scales, addition, Written(there, rounding, grid))
            return result

        return computed_on(device, self.stored, compute), kept

    def _with(
        self,
        there: torch.Tensor,
        where: torch.device,
        scales: torch.Tensor | None,
        addition: Addition | None,
        written: Written,
    ) -> tuple[torch.Tensor, Kept]:
        """The original weight with an update, computed from ``there``, a copy of ``stored`` on the device ``where``."""
        factors = None if self.factors is None else self.factors.to(where)
        added = None if addition is None else addition.to(where)
        if not self.is_residual:
            return rescale(there, factors, scales, added, written)
        assert factors is not None
        if self.correction is None:
            return approximate(there, factors, scales, added, written)
        with _correction_errors(self.target):
            return join(there, factors, self.correction, scales, added, written)


def stored_residual(
    reader: FactorsReader, target: TargetRecord, index: int, stored: torch.Tensor, *, lossless: bool
) -> StoredMatrix:
    """Read what belongs to a residual: its factors and, if the checkpoint is lossless, its correction.

    Args:
        reader: of the factors file that belongs to the weight file of the residual.
        target, index: which target, and which of its matrices.
        stored: the residual (m, n).
        lossless: whether the checkpoint has corrections.
    """
    correction = reader.correction(target, index) if lossless else None
    return StoredMatrix(target, stored, True, reader.factors(target, index), correction)


def added(
    device: torch.device, weight: torch.Tensor, addition: Addition, rounding: Rounding | None, grid: Grid | None
) -> tuple[torch.Tensor, Kept]:
    """A weight (m, n) without factors, with a change, and what was kept of it; as ``StoredMatrix.updated``."""
    kept = NOTHING_ASKED

    def compute(there: torch.Tensor, where: torch.device) -> torch.Tensor:
        nonlocal kept
        result, kept = rescale(there, None, None, addition.to(where), Written(there, rounding, grid))
        return result

    return computed_on(device, weight, compute), kept


def computed_on(
    device: torch.device, weight: torch.Tensor, compute: Callable[[torch.Tensor, torch.device], torch.Tensor]
) -> torch.Tensor:
    """Copy a weight (m, n) from the CPU to a device, call ``compute(weight, where)``, and bring the result back to the CPU.

    Where the memory of the device does not suffice, ``where`` is the CPU.
    """

    def on(some: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        with timed("copy"):
            there = some[0].to(where, non_blocking=True)
        with timed("fold"):
            result = compute(there, where)
        with timed("copy"):
            return [result.cpu()]

    return as_memory_allows(on, [weight], device)[0]


@contextmanager
def _correction_errors(target: TargetRecord) -> Iterator[None]:
    """Turns a ``CorruptCorrection`` into a FormatError that names the target."""
    try:
        yield
    except CorruptCorrection as error:
        what = f"{target.shard}: the correction of {target.key!r} is damaged ({error})"
        raise FormatError(what, hint=RECORDED_DAMAGED_HINT) from error
