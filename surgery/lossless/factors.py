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
        factor: float64 (m, 1) or (1, n), by which the weight is multiplied: the result is ``factor * W + left right^T``, as
            DoRA has it (arXiv 2402.09353, eq. 5); None for 1.
    """

    left: torch.Tensor
    right: torch.Tensor
    factor: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Addition:
        factor = None if self.factor is None else self.factor.to(device)
        return Addition(self.left.to(device), self.right.to(device), factor)


def both(first: Addition, second: Addition) -> Addition:
    """The sum of two changes of one weight, as one. Two factors must be of one shape."""
    factors = [change.factor for change in (first, second) if change.factor is not None]
    return Addition(
        torch.cat([first.left.double(), second.left.double()], dim=1),
        torch.cat([first.right, second.right], dim=1),
        # W (f1 - 1) + W (f2 - 1) is added to W.
        torch.stack(factors).sum(dim=0).sub_(len(factors) - 1) if factors else None,
    )


def scaled(factors: Factors, values: torch.Tensor) -> Addition:
    """``U diag(values) V^T`` for values float64 (k,)."""
    return Addition(factors.U.double() * values, factors.V)


def change_of_s(factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """``s (g - 1)`` in float64, on the device of the factors, for scales ``g`` (k,)."""
    return factors.s.double() * (scales.to(factors.s.device).double() - 1.0)
