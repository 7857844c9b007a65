"""Truncated SVD by energy: as few singular triplets as hold a given share of a matrix's squared Frobenius norm."""

from __future__ import annotations

import dataclasses
import math

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.linalg.svd import TruncatedSVD, proven_svd, truncated_svd
from surgery.linalg.top_k import TopK
from surgery.lossless.rounding import check_dense
from surgery.solvers.limits import DEFAULT_TOLERANCE, check_energy
from surgery.solvers.operator import widened

#: How many values a search for a rank begins with.
FIRST_RANK = 16
#: Units of the working precision by which rounding may keep a sum of squares below its share.
_ROUNDING = 8


@on_its_own_terms
def energy_svd(
    A: torch.Tensor, energy: float, *, max_rank: int, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0, prove: bool = False
) -> TruncatedSVD:
    """The fewest leading singular triplets whose squared values make up ``energy`` of the squared Frobenius norm.

    Computes truncated SVDs of growing rank, and never a full SVD. Each rank is at least twice the last one. It is also
    at least the rank that the values found so far show to be needed.

    Args:
        A: (m, n), any real floating dtype, any device.
        energy: the share to reach, above 0 and at most 1.
        max_rank: the most triplets to return, even if they do not reach the share; at least 1. A number above min(m, n)
            counts as min(m, n).
        tolerance, seed, prove: see ``truncated_svd``.

    Returns:
        k <= max_rank triplets. To see whether they reach the share, compare ``s.square().sum()`` with ``norm ** 2``. A
        matrix of zeros gives one triplet.

    Raises:
        OptionError, WeightError: as for ``truncated_svd``; or ``energy`` or ``max_rank`` is out of its range.
    """
    check_energy(energy, max_rank)
    check_dense(A, "A")
    if A.ndim != 2:
        raise OptionError("A is not one matrix", got=f"shape {tuple(A.shape)}")
    limit = min(max_rank, *A.shape)
    k = min(FIRST_RANK, limit)
    while True:
        svd = truncated_svd(A, k, tolerance=tolerance, seed=seed)
        if not svd.norm.item():
            return _cut(svd, 1)
        rank, found = _least_rank(svd, energy, limit)
        if found and prove:
            svd = proven_svd(A, svd, tolerance=tolerance, seed=seed)
            rank, found = _least_rank(svd, energy, limit)  # of other values, if some had been missed
        if found:
            return _cut(svd, rank)
        k = rank


def _least_rank(svd: TruncatedSVD, energy: float, limit: int) -> tuple[int, bool]:
    shares = (svd.s.cpu().double() / svd.norm).square()
    return least_rank(shares, energy, limit, svd.s.dtype)


def least_rank(shares: torch.Tensor, energy: float, limit: int, dtype: torch.dtype) -> tuple[int, bool]:
    """How many leading values make up a share of the squared norm.

    Args:
        shares: float64 (k,) on the CPU, descending, those of the values so far.
        energy: the share.
        limit: the most values that there may be.
        dtype: of the values.

    Returns:
        The least number that is enough, or k if no more can be had, and True; else how many to compute next, and False.
    """
    k = len(shares)
    wanted = energy * (1 - _ROUNDING * torch.finfo(dtype).eps)
    enough = (shares.cumsum(0) >= wanted).nonzero().flatten()
    if len(enough) or k == limit or shares[-1] == 0:  # after a zero only zeros come
        return int(enough[0]) + 1 if len(enough) else k, True
    # Further values are no larger than the last, which gives a lower bound on how many are missing.
    missing = (wanted - shares.sum().item()) / shares[-1].item()
    return min(limit, max(2 * k, k + math.ceil(1.2 * missing))), False


def _cut(svd: TruncatedSVD, k: int) -> TruncatedSVD:
    """The first k triplets. The gap of the last one is that to the next value, which has been computed too."""
    certificate, top_k = svd.certificate, svd.certificate.top_k
    if isinstance(top_k, TopK) and k < len(svd.s) and svd.s[0] > 0:
        top_k = dataclasses.replace(top_k, margin=_margin_of_first(svd, k, top_k.margin))
    return dataclasses.replace(
        svd,
        U=svd.U[:, :k].contiguous(),
        s=svd.s[:k].contiguous(),
        V=svd.V[:, :k].contiguous(),
        certificate=dataclasses.replace(
            certificate,
            residual=certificate.residual[:k],
            gap=certificate.gap[:k],
            angle_bound=certificate.angle_bound[:k],
            top_k=top_k,
        ),
    )


def _margin_of_first(svd: TruncatedSVD, k: int, margin: float) -> float:
    """The margin (``TopK``) of the first k triplets, fewer than there are, where that of all of them is ``margin``.

    A value that is left out may be larger than what was found of it, by the norm of all residuals (Kahan 1967; Parlett, "The
    Symmetric Eigenvalue Problem", theorem 11.5.1) and by what the vectors lack of being orthonormal.
    """
    s = svd.s.cpu().double() / svd.s[0].item()
    off = [
        torch.linalg.vector_norm(X.T @ X - torch.eye(len(s), dtype=X.dtype, device=X.device)).item()
        for X in (widened(svd.U), widened(svd.V))
    ]
    error = torch.linalg.vector_norm(svd.certificate.residual).item() + max(off)
    return max(0.0, float(max(s[k].item() + error, s[-1].item() + margin) - s[k - 1].item()))
