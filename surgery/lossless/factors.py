"""The kept part of a matrix, and low-rank matrices that are added to one."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Factors:
    """The kept part of one matrix, ``U diag(s) V^T``; for a stack of B matrices each tensor has a leading dimension B.

    Attributes:
        U: float32 (m, k), orthonormal columns.
        s: float32 (k,), descending, not negative.
        V: float32 (n, k), orthonormal columns.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor

    def to(self, device: torch.device | str) -> Factors:
        """The factors on another device.

        Args:
            device: such as ``cpu`` or ``cuda``.
        """
        return Factors(self.U.to(device), self.s.to(device), self.V.to(device))


@dataclass(frozen=True, slots=True)
class Addition:
    """A low-rank matrix ``left right^T`` to add to a weight along with its scaled directions, such as a LoRA update.

    Attributes:
        left: float32 or float64 (m, r).
        right: float32 (n, r).
    """

    left: torch.Tensor
    right: torch.Tensor

    def to(self, device: torch.device | str) -> Addition:
        return Addition(self.left.to(device), self.right.to(device))


def both(first: Addition, second: Addition) -> Addition:
    """The sum of two additions, as one."""
    return Addition(
        torch.cat([first.left.double(), second.left.double()], dim=1), torch.cat([first.right, second.right], dim=1)
    )
