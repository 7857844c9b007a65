"""What a square matrix does to directions: by how much it stretches them, and by which angles it turns them."""

from __future__ import annotations

import torch


def stretches_and_angles(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The singular values of square matrices, and the angles by which their polar factors turn.

    With the SVD ``C = A diag(sigma) B^T`` the polar factor is ``Q = A B^T``, the orthogonal matrix nearest to C (Higham,
    "Computing the polar decomposition - with applications", 1986). Its eigenvalues are ``exp(+-i theta)``, one pair for each
    plane that it turns by theta, and real ones: -1 where it mirrors a direction, an angle of 180 degrees. Where C is singular Q
    is not unique: of all of them the one is taken that turns least what C maps to 0.

    Args:
        matrices: float64 (B, k, k), finite, on the CPU.

    Returns:
        Singular values, float64 (B, k), descending; and angles in degrees, float64 (B, ceil(k / 2)), descending, from 0 to 180.
    """
    left, values, right = torch.linalg.svd(matrices)
    turn = left @ right
    k = matrices.shape[-1]
    rank = (values > k * torch.finfo(values.dtype).eps * values[:, :1]).sum(dim=1)
    for i in torch.nonzero(rank < k).flatten().tolist():
        lost_left, lost_right = left[i, :, rank[i] :], right[i, rank[i] :]
        # Of all orthogonal O that of the largest trace of lost_left O lost_right.
        one, _, other = torch.linalg.svd(lost_left.T @ lost_right.T)
        turn[i] += lost_left @ (one @ other - torch.eye(len(lost_right), dtype=turn.dtype)) @ lost_right
    # Its symmetric and its skew half commute, with eigenvalues cos(theta) and +-i sin(theta): an eigenvector of the former is
    # stretched by sin(theta) by the latter. That is faster than the eigenvalues of the whole, and as exact for small angles.
    cosines, vectors = torch.linalg.eigh((turn + turn.mT) / 2)
    sines = torch.linalg.vector_norm((turn - turn.mT) / 2 @ vectors, dim=1)
    angles = torch.atan2(sines, cosines).rad2deg()
    return values, angles.sort(dim=1, descending=True).values[:, ::2]  # both of a pair have one angle
