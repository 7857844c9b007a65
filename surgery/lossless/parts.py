"""What a split makes of a weight besides its factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from surgery.errors import WeightError
from surgery.lossless.blocks import HOST_THREADS
from surgery.lossless.correction import CorrectionBlock, assemble


@dataclass(frozen=True, slots=True)
class Parts:
    """What ``split`` makes of a weight besides its factors.

    Attributes:
        residual: ``round(W - U diag(s) V^T)``, shape, dtype and device of the weight.
        correction: encoded, uint8 (bytes,) on the CPU, a multiple of 8 bytes; None if ``split`` was told to make none.
        inexact: share of the entries that residual and factors alone do not give back exactly.
    """

    residual: torch.Tensor
    correction: torch.Tensor | None
    inexact: float


@dataclass(frozen=True, slots=True)
class UnencodedParts:
    """``Parts`` whose correction is still to be encoded, which takes the host longer than all else does a GPU.

    Attributes:
        residual, inexact: as in ``Parts``.
        blocks: of the correction, in the order of the rows, in memory of the host; None if none was to be made.
        rows_per_block: how many rows each of them has but the last.
    """

    residual: torch.Tensor
    blocks: list[CorrectionBlock] | None
    rows_per_block: int
    inexact: float

    def correction(self) -> torch.Tensor | None:
        """The correction of ``Parts``, encoded by this thread, whichever that is."""
        return self._assembled(map(CorrectionBlock.encoded, self.blocks or ()))

    def encoded(self) -> Parts:
        """With the correction, encoded by all cores. Not for ``HOST_THREADS`` themselves, which would wait for each other."""
        return Parts(self.residual, self._assembled(HOST_THREADS.map(CorrectionBlock.encoded, self.blocks or ())), self.inexact)

    def _assembled(self, blocks: Iterable[bytes]) -> torch.Tensor | None:
        return None if self.blocks is None else assemble(list(blocks), self.rows_per_block)


class ResidualError(WeightError):
    """A residual that is beyond the range of its dtype.

    Attributes:
        index: of the matrix in its batch.
    """

    index = 0


def residual_error(largest: float, dtype: torch.dtype, index: int = 0) -> ResidualError:
    """The error for a residual of which ``largest`` is the largest number before it was rounded to ``dtype``."""
    error = ResidualError(
        f"its residual is beyond the range of {str(dtype).removeprefix('torch.')}",
        got=f"up to {largest:.6g}",
        expected=f"at most {torch.finfo(dtype).max:.6g}",
    )
    error.index = index
    return error
