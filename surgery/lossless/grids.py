"""The numbers that a format can hold, to which weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from surgery.memory import scratch


class Grid(Protocol):
    """The numbers that the entries of one matrix (m, n) may take."""

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """The numbers of the grid nearest to those of some rows.

        Each entry by itself, in operations that IEEE 754 prescribes, so that the result is the same on every device.

        Args:
            x: float32 (r, n); it may be overwritten.
            rows: which rows of the matrix these are, a slice or int64 (r,) on the CPU.

        Returns:
            float32 (r, n), perhaps ``x`` itself.
        """


@dataclass(frozen=True, slots=True)
class DtypeGrid:
    """The numbers of a floating-point dtype of torch.

    Attributes:
        dtype: torch.bfloat16 or torch.float16.
    """

    dtype: torch.dtype

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        return x.copy_(scratch("grid", x.shape, self.dtype, x.device).copy_(x))
