"""Orthonormal bases of the spaces that given rows span, in float64."""

from __future__ import annotations

import torch

from surgery.device import downloaded

#: The least length of a row outside the span of those before it, over its own, at which Cholesky QR does at all, and at which
#: once is enough.
_INDEPENDENT, _FAR = 1e-6, 1e-2


def orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormalise rows: by Cholesky QR, twice if they are far from orthogonal; by Householder QR if nearly dependent.

    Args:
        rows: float64 (..., k, n), k <= n, of any lengths.

    Returns:
        (..., k, n), orthonormal to rounding. Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2
        algorithm" (ETNA 44, 2015).
    """
    if rows.device.type != "cpu":
        return orthonormal_together(rows)[0]
    for _ in range(2):
        # Rows of unit length, so that the diagonal of the factor tells how independent they are.
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        factor, info = torch.linalg.cholesky_ex(rows @ rows.mT)
        least = factor.diagonal(0, -2, -1).min().item()
        if info.any() or not least > _INDEPENDENT:
            return _by_householder(rows)
        eye = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
        rows = torch.linalg.solve_triangular(factor, eye, upper=False) @ rows
        if least > _FAR:
            break
    return rows


def orthonormal_together(*stacks: torch.Tensor) -> list[torch.Tensor]:
    """``orthonormal_rows`` of each of several. It waits for a device once, or twice if any are far from it."""
    if stacks[0].device.type == "cpu":
        return [orthonormal_rows(rows) for rows in stacks]
    found, left = list(stacks), list(range(len(stacks)))
    for _ in range(2):
        grams = [found[i] @ found[i].mT for i in left]
        factors = [torch.linalg.cholesky_ex(gram) for gram in grams]
        of_rows = [gram.diagonal(0, -2, -1) for gram in grams]
        outside = [factor.diagonal(0, -2, -1) for factor, _ in factors]
        told = downloaded(*of_rows, *outside, *(info for _, info in factors))
        again, count = [], len(left)
        for i, (factor, _), squares, lengths, info in zip(
            left, factors, told[:count], told[count : 2 * count], told[2 * count :], strict=True
        ):
            least = (lengths / squares.sqrt()).min().item()  # as of rows of unit length
            if info.any() or not least > _INDEPENDENT:
                found[i] = _by_householder(found[i] / found[i].norm(dim=-1, keepdim=True).clamp(min=1e-300))
                continue
            found[i] = torch.linalg.solve_triangular(factor, found[i], upper=False)
            if not least > _FAR:
                again.append(i)
        if not (left := again):
            break
    return found


def _by_householder(rows: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = torch.linalg.qr(rows.mT)[0].mT.contiguous()
    return turned
