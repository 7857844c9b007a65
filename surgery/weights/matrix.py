"""How an original matrix comes back from what is stored of it. The one place that knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows
from surgery.errors import FormatError
from surgery.format.factors import DAMAGED_HINT, FactorsReader
from surgery.format.manifest_records import TargetRecord
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.lossless import Addition, Factors, approximate, join, recover, rescale
from surgery.timing import timed


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix (m, n) of a target as a factorized checkpoint has it, on the CPU.

    Attributes:
        target: whose.
        stored: the original weight, or the residual; float32 where the weight is FP8, else in its dtype.
        is_residual: whether it is the residual.
        factors: of the original; None where nothing depends on them.
        correction: what makes the original of residual and factors bit for bit, encoded; None where nothing does.
    """

    target: TargetRecord
    stored: torch.Tensor
    is_residual: bool
    factors: Factors | None
    correction: torch.Tensor | None

    def original(self, where: torch.device) -> torch.Tensor:
        """The original weight, on a device with float64; of a residual without a correction what it has kept of that.

        Raises:
            FormatError: the correction is damaged in a way that shows.
        """
        if not self.is_residual:
            return self.stored.to(where)
        return self._with(self.stored.to(where), where, None, None, in_place=False)

    def recovered(self, where: torch.device) -> tuple[torch.Tensor, float]:
        """The original weight of a residual, and the share of its entries that residual and factors alone do not give back.

        Raises:
            CorruptCorrection: the correction is damaged in a way that shows.
        """
        assert self.factors is not None
        assert self.correction is not None
        return recover(self.stored.to(where), self.factors.to(where), self.correction)

    def updated(self, device: torch.device, scales: torch.Tensor | None, addition: Addition | None) -> torch.Tensor:
        """The original weight with an update, rounded once.

        Args:
            device: where the arithmetic runs, if it has the memory; it must have float64.
            scales: multipliers ``g`` of the kept directions, float32 (k,); None for all ones.
            addition: what else is added.

        Returns:
            (m, n), on the CPU, in the dtype of what is stored and perhaps in its memory: that is not to be used any more.

        Raises:
            FormatError: the correction is damaged in a way that shows.
        """

        def compute(there: torch.Tensor, where: torch.device) -> torch.Tensor:
            # On a GPU the weight here stays as it was until the result comes over, should the memory not suffice.
            return self._with(there, where, scales, addition, in_place=True)

        return computed_on(device, self.stored, compute)

    def _with(
        self,
        there: torch.Tensor,
        where: torch.device,
        scales: torch.Tensor | None,
        addition: Addition | None,
        *,
        in_place: bool,
    ) -> torch.Tensor:
        """The weight, of which ``there`` is what is stored, with an update."""
        factors, out = None if self.factors is None else self.factors.to(where), there if in_place else None
        added = None if addition is None else addition.to(where)
        if not self.is_residual:
            return rescale(there, factors, scales, added, out=out)
        assert factors is not None
        if self.correction is None:
            return approximate(there, factors, scales, added, out=out)
        with _naming_the_target(self.target):
            return join(there, factors, self.correction, scales, added, out=out)


def stored_residual(
    reader: FactorsReader, target: TargetRecord, index: int, stored: torch.Tensor, *, lossless: bool
) -> StoredMatrix:
    """A residual with its factors and, if the checkpoint is lossless, its correction.

    Args:
        reader: of the factors of its weight file.
        target, index: which target, and which of its matrices.
        stored: the residual (m, n).
        lossless: whether there are corrections.
    """
    correction = reader.correction(target, index) if lossless else None
    return StoredMatrix(target, stored, True, reader.factors(target, index), correction)


def computed_on(
    device: torch.device, weight: torch.Tensor, compute: Callable[[torch.Tensor, torch.device], torch.Tensor]
) -> torch.Tensor:
    """``compute(weight, where)`` for a weight on the CPU, on a device if that has the memory; the result is on the CPU."""

    def on(some: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
        with timed("copy"):
            there = some[0].to(where, non_blocking=True)
        with timed("fold"):
            result = compute(there, where)
        with timed("copy"):
            return [result.cpu()]

    return as_memory_allows(on, [weight], device)[0]


@contextmanager
def _naming_the_target(target: TargetRecord) -> Iterator[None]:
    try:
        yield
    except CorruptCorrection as error:
        what = f"{target.shard}: the correction of {target.key!r} is damaged ({error})"
        raise FormatError(what, hint=DAMAGED_HINT) from error
