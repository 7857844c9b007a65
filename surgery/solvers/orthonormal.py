"""Orthonormal bases of the spaces that given rows span, in float64."""

from __future__ import annotations

import torch


def orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormalise rows: by Cholesky QR, twice if they are far from orthogonal; by Householder QR if nearly dependent.

    Args:
        rows: float64 (..., k, n), k <= n, of any lengths.

    Returns:
        (..., k, n), orthonormal to rounding. Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2
        algorithm" (ETNA 44, 2015).
    """
    for _ in range(2):
        # Rows of unit length, so that the diagonal of the factor tells how independent they are.
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        factor, info = torch.linalg.cholesky_ex(rows @ rows.mT)
        least = factor.diagonal(0, -2, -1).min().item()
        if info.any() or not least > 1e-6:
            turned: torch.Tensor = torch.linalg.qr(rows.mT)[0].mT.contiguous()
            return turned
        eye = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
        rows = torch.linalg.solve_triangular(factor, eye, upper=False) @ rows
        if least > 1e-2:
            break
    return rows
