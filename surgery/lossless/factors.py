"""The kept part of a matrix, and low-rank matrices that are added to one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.lossless.integers import portable_product


@dataclass(frozen=True, slots=True)
class Factors:
    """The kept part of one matrix, ``U diag(s) V^T``. For a stack of B matrices, each tensor has a leading dimension B.

    Attributes:
        U: float32 (m, k), with orthonormal columns.
        s: float32 (k,), in descending order, not negative.
        V: float32 (n, k), with orthonormal columns.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor

    def to(self, device: torch.device | str) -> Factors:
        """The factors on another device.

        Args:
            device: a device, such as ``cpu`` or ``cuda``.
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


def between(factors: Factors, inner: torch.Tensor) -> Addition:
    """``U diag(inner) V^T`` for ``inner`` float64 (k,), and ``U inner V^T`` for (k, k): the same bits everywhere."""
    left = factors.U.double() * inner if inner.ndim == 1 else portable_product(factors.U, inner)
    return Addition(left, factors.V)


def inner_change(factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """What scales add between U and V^T, float64, on the device of the factors.

    Args:
        factors: of one matrix.
        scales: multipliers g (k,), which give ``s (g - 1)`` (k,); or a core C (k, k), which gives
            ``diag(sqrt s) (C - I) diag(sqrt s)`` (k, k). Source: Balazy et al., LoRA-XS (arXiv 2405.17604), whose R this is.
    """
    s, scales = factors.s.double(), scales.to(factors.s.device).double()
    if scales.ndim == 1:
        return s * (scales - 1.0)
    # The root of the product: on the diagonal it is s itself, so that diag(g) is the same as g.
    return torch.outer(s, s).sqrt_() * (scales - torch.eye(len(s), dtype=s.dtype, device=s.device))
