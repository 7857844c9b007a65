"""The leading eigenvectors of a dense symmetric positive semidefinite matrix by Chebyshev-filtered subspace iteration.

For Gram matrices of small matrices: a full eigendecomposition finds all of them, at many times the cost. Source: Zhou,
Saad, Tiago, Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration" (J. Comput.
Phys. 219, 2006).
"""

from __future__ import annotations

import math

import torch

from surgery.linalg.orthonormal import orthonormal_rows

_MAX_ROUNDS = 20
#: A filter may magnify the first direction over the last one by this much, or the last ones drown in rounding.
_MAX_CONTRAST = 1e10


def leading_eigenvectors(G: torch.Tensor, k: int, *, tolerance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues and their vectors.

    Args:
        G: float64 (n, n), symmetric, positive semidefinite.
        k: ``1 <= k <= n``.
        tolerance: with sigma the square root of an eigenvalue, ``|G v - sigma^2 v|`` is brought below ``tolerance
            sigma_1 sigma`` and below ``100 tolerance sigma^2``, as far as the rounding of G allows.
        seed: of the random start block, drawn on the CPU.

    Returns:
        float64 (k, n) orthonormal rows, and float64 (k + 1,) values, descending; the last one is an estimate of the
        next, or zero for k = n.
    """
    n = len(G)
    width = k + max(8, k // 2)
    if width <= n // 4:
        found = _iterate(G, k, width, tolerance, seed)
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(G)
    return vectors.T[-k:].flip(0), torch.cat([values.flip(0), values.new_zeros(1)])[: k + 1]


def _iterate(G: torch.Tensor, k: int, width: int, tolerance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(width, len(G), generator=generator, dtype=torch.float32).to(G)
    block = orthonormal_rows(block @ G @ G)
    for _ in range(_MAX_ROUNDS):
        images = block @ G
        values, turn = torch.linalg.eigh(images @ block.T)
        values, turn = values.flip(0), turn.T.flip(0)
        block, images = turn @ block, turn @ images
        sigma = values[:k].clamp(min=0).sqrt()
        allowed = torch.minimum(tolerance * sigma[0] * sigma, 100 * tolerance * values[:k]).clamp(min=1e-14 * values[0].item())
        worst = ((images[:k] - block[:k] * values[:k, None]).norm(dim=1) / allowed).max().item()
        if worst <= 1:
            return block[:k], values[: k + 1]
        edge = values[-1].item()
        if not edge > 1e-12 * values[0].item():
            return None
        # Degrees enough for the k-th direction, if not too many for the first.
        needed = math.log(100 * worst) / max(math.acosh(max(2 * values[k - 1].item() / edge - 1, 1.0)), 1e-2)
        affordable = math.log(_MAX_CONTRAST) / math.acosh(max(2 * values[0].item() / edge - 1, 1.0) + 1e-9)
        degree = math.floor(min(needed + 1, affordable, 16))
        if degree < 2:
            return None
        block = orthonormal_rows(_filtered(G, block, images, edge, degree))
    return None


def _filtered(G: torch.Tensor, block: torch.Tensor, images: torch.Tensor, edge: float, degree: int) -> torch.Tensor:
    """The Chebyshev polynomial that stays below one on [0, edge] applied to ``block``; ``images = block G``."""
    half = edge / 2
    before, now = block, (images - half * block) / half
    for _ in range(degree - 1):
        before, now = now, torch.addmm(torch.add(before, now, alpha=2), now, G, beta=-1, alpha=2 / half)
    return now
