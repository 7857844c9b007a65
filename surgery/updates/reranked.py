"""The best approximation of low rank of an update ``scaling B A``, from its halves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.errors import OptionError
from surgery.lossless.rounding import all_finite, is_vanished, round_once

_EPSILON = torch.finfo(torch.float64).eps
#: Units of rounding by which a sum of squares may miss its share.
_ROUNDING = 8


@dataclass(frozen=True, slots=True)
class WantedRank:
    """How many directions are kept of an update.

    Attributes:
        most: the most of them; None for as many as it has.
        energy: share of the squared norm that the fewest are to hold; None for as many as ``most`` allows.
    """

    most: int | None
    energy: float | None

    def of(self, squares: torch.Tensor, own: int) -> int:
        """The rank of an update, at least 1.

        Args:
            squares: of its singular values, float64 (p,), descending; sums over the matrices of a stack.
            own: the rank that it has.
        """
        rank = own
        if self.energy is not None:
            wanted = self.energy * (1 - _ROUNDING * _EPSILON) * squares.sum()
            rank = min(own, int((squares.cumsum(0) < wanted).sum()) + 1)
        return max(1, rank if self.most is None else min(rank, self.most))


@dataclass(frozen=True, slots=True)
class Reranked:
    """An update as ``B A`` of another rank k, with a scaling of 1.

    Attributes:
        A: (E, k, n) of E matrices, rounded once.
        B: (E, m, k), rounded once.
        own: the rank that the update had, numerically: the largest of its matrices; 0 for an update of zeros.
        norm, kept, error: squared Frobenius norms, of the update, of its kept directions, and of what the new one differs by.
    """

    A: torch.Tensor
    B: torch.Tensor
    own: int
    norm: float
    kept: float
    error: float


def reranked(
    A: torch.Tensor, B: torch.Tensor, scaling: float, wanted: WantedRank, dtypes: Sequence[torch.dtype], name: str
) -> Reranked:
    """Approximate ``scaling B A`` as well as can be in the Frobenius norm with fewer directions (Eckart and Young, 1936).

    The halves are orthogonalized, and the SVD is that of the small matrix between them; all in float64. Both new halves have
    the roots of the singular values.

    Args:
        A: (E, r, n) of a stack of E matrices, or of one, any float dtype, on the CPU, finite.
        B: (E, m, r), likewise.
        scaling: of the product.
        wanted: the rank; one for all matrices of a stack.
        dtypes: of the new A and B.
        name: of the module, for messages.

    Raises:
        OptionError: a new half is beyond the range of its dtype, above or below.
    """
    left, inner_left = torch.linalg.qr(B.double())
    right, inner_right = torch.linalg.qr(A.double().mT)
    U, s, Vh = torch.linalg.svd(scaling * inner_left @ inner_right.mT, full_matrices=False)
    # What rounding alone may have left where the product has no further direction.
    size = abs(scaling) * inner_left.flatten(1).norm(dim=1) * inner_right.flatten(1).norm(dim=1)
    real = s > (max(A.shape[2], B.shape[1]) * _EPSILON * size)[:, None]
    s = torch.where(real, s, 0.0)
    squares, own = s.square().sum(0), int(real.sum(1).max())
    k = wanted.of(squares, own)
    roots = s[:, None, :].sqrt()
    left, right = (left @ U) * roots, (right @ Vh.mT) * roots
    exact = [right[..., :k].mT.contiguous(), left[..., :k].contiguous()]
    halves = [round_once(half, dtype) for half, dtype in zip(exact, dtypes, strict=True)]
    for half, wide, dtype in zip(halves, exact, dtypes, strict=True):
        if half.numel() and (not all_finite(half) or is_vanished(wide, half)):
            raise OptionError(f"the update of {name!r} is beyond the range of {dtype}", hint="--dtype float32")
    new_A, new_B = halves
    # New minus old is (B' - B) A' + B (A' - A) - the directions that are left out: each small, so that nothing cancels.
    lefts = torch.cat([new_B.double() - left[..., :k], left], dim=2)
    differences = [new_A.double().mT, new_A.double().mT - right[..., :k], -right[..., k:]]
    error = ((lefts.mT @ lefts) * _gram(torch.cat(differences, dim=2))).sum().item()
    return Reranked(new_A, new_B, own, squares.sum().item(), squares[:k].sum().item(), max(0.0, error))


def _gram(columns: torch.Tensor) -> torch.Tensor:
    return columns.mT @ columns
