"""Proving that no singular value above a limit is missing from triplets of a matrix, with all rounding accounted for.

For any factors of rank k, ``sigma_{k+1}(A) <= |A - U diag(s) V^T|`` (Weyl), and no value of A but those that the triplets
stand for is larger than that norm, up to the residuals. The norm of ``B = A - U diag(s) V^T`` is below tau if ``tau^2 I - B
B^T`` is positive definite, and it is if a Cholesky factorization runs to its end, as far as rounding allows to say so:
Rump, "Verification of positive definiteness" (BIT 46, 2006). Here n is the shorter and l the longer side, ``u = 2^-53`` and
``g(j) = j u / (1 - j u)`` (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1):

1. What is computed of B differs from it by at most ``d = g(k + 3) (|A|_F + N)`` in norm, N the sum of all ``s_i |u_i|
   |v_i|``; and ``|A|_F`` is at most ``|B|_F + N``.
2. What is computed of ``G = B B^T`` is off by at most ``g(l) |B| |B|^T`` in each entry, so by ``g(l) |B|_F^2`` in norm, and
   ``|B|_F^2 <= tr G / (1 - g(l))``.
3. ``M = delta I - G`` rounds only the diagonal, by ``u delta`` at most, as it is positive.
4. If Cholesky finds a factor L of M, ``L L^T`` differs from M by at most ``g(n + 1) |L| |L|^T``, in norm by ``g(n + 1)
   |L|_F^2 <= g(n + 1) / (1 - g(n + 1)) tr M``, so that no eigenvalue of M is further below 0 (Rump, Theorem 2.3); and ``tr
   M <= n delta``.

So ``|B| <= d + sqrt(e)`` with ``e = delta (1 + u + n g(n + 1) / (1 - g(n + 1))) + g(l) tr G / (1 - g(l))``. All that is
2e-9 tau for n = 4096. The bounds hold for sums in any order, with fused operations or without, and in blocks; LAPACK's
factorization on a CPU is of that kind. That of a GPU's library may be another, by inverses of blocks: there ``M - L L^T``
is multiplied out, and takes the place of the bound in 4. Numbers that vanish are far below: s_1 is brought near 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from surgery.linalg.top_k import NOTHING_ELSE, UNKNOWN, TopK, known, norm_with_rest
from surgery.solvers.operator import wide_device, widened

#: How far the first limit is above s_k, relatively.
_ABOVE = 1e-3
#: What the rounding of a proof may hide, over s_1: more than d, see the head of this module, for thousands of values.
_OF_PROOF = 1e-9
#: Rows or columns of B that are made at a time, and rows of a Gram matrix that are computed at a time, up to the diagonal.
_AT_A_TIME = 512
_PANEL = 256
_UNIT = 2.0**-53
#: Binary exponents of s_1 from which on its squares are scaled.
_FAR = 256
#: For the rounding of the bounds themselves.
_SAFE = 1 + 2.0**-40


def prove_top_k(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, residual: torch.Tensor) -> TopK:
    """Prove that no singular value above s_k is missing, with as small a margin as that goes.

    A first limit is ``1.001 s_k`` and what the residuals add in the second order: where directions are not quite those of A, B
    has the rest. A second one adds them in the first order, for values so close that s_k is too low by as much. A third is
    above the rounding of the proof itself, for values that vanish beside s_1.

    Args:
        A: (m, n), any floating dtype, finite.
        U, V: (m, k), (n, k), any floating dtype, on the device of A.
        s: float64 (k,) on the CPU, descending, s_1 above 0.
        residual: float64 (k,) on the CPU, those of the triplets over s_1.

    Returns:
        ``proven``, or ``unknown`` where no limit holds or the margin says nothing.
    """
    if len(s) == min(A.shape):
        return NOTHING_ELSE
    rest = torch.linalg.vector_norm(residual).item() * s[0].item()
    above = s[-1].item() * (1 + _ABOVE)
    limits = [norm_with_rest(above, rest), above + 2 * rest, above + 2 * rest + _OF_PROOF * s[0].item()]
    limit = first_limit(A, U, s, V, limits)
    return UNKNOWN if limit is None else known(s, limit, 0.0)


def first_limit(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor, limits: list[float]) -> float | None:
    """The first of some limits that the spectral norm of ``A - U diag(s) V^T`` is proven not to exceed; None if there is none.

    Args:
        A, U, s, V: see ``prove_top_k``.
        limits: positive.
    """
    (short, long), k = sorted(A.shape), len(s)
    exponent = math.frexp(s[0].item())[1]
    scale = 2.0**-exponent if abs(exponent) > _FAR else 1.0
    s = s * scale
    G = _gram_without(A, widened(U) * s.to(wide_device(U)), widened(V), scale)
    diagonal = G.diagonal().clone()
    trace = diagonal.sum().item()
    of_gram = _g(long) / (1 - _g(long)) * trace
    lengths = [torch.linalg.vector_norm(widened(X), dim=0).cpu() for X in (U, V)]
    of_B = _g(k + 3) / (1 - _g(k + 3)) * (math.sqrt(trace) + 2 * (lengths[0] * s * lengths[1]).sum().item())
    of_cholesky = short * _g(short + 1) / (1 - _g(short + 1))
    G.neg_()
    for limit in limits:
        # What may be known only afterwards is tried with twice that of the bound.
        delta = ((limit * scale - of_B * _SAFE) ** 2 - of_gram * _SAFE) / (1 + _UNIT + 2 * of_cholesky) / _SAFE
        if not (math.isfinite(trace) and delta > 0 and limit * scale > of_B):
            continue
        G.diagonal().copy_(delta - diagonal)
        factor, info = torch.linalg.cholesky_ex(G)
        if info.item() == 0 and (G.device.type == "cpu" or _missed_by(G, factor) <= 2 * of_cholesky * delta):
            return limit
        del factor  # its memory, before the next one is made
    return None


def proof_bytes(m: int, n: int) -> int:
    """Upper estimate of the memory that ``prove_top_k`` takes on a CPU besides the matrix, and float64 copies of U and V."""
    short = min(m, n)
    return 8 * (2 * short**2 + _PANEL * short + 2 * _AT_A_TIME * short)


def _g(j: int) -> float:
    return j * _UNIT / (1 - j * _UNIT)


def _gram_without(A: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """float64 ``B B^T`` or ``B^T B`` of the shorter side of ``B = scale A - left right^T``; of its upper half only some."""
    wide = A.shape[0] < A.shape[1]
    short, long = sorted(A.shape)
    G = torch.zeros(short, short, dtype=torch.float64, device=left.device)
    for B in _parts(A, left, right, scale, wide, long):
        for start in range(0, short, _PANEL):
            stop = min(start + _PANEL, short)
            G[start:stop, :stop].addmm_(B[start:stop], B[:stop].T)
    return G


def _parts(
    A: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, wide: bool, long: int
) -> Iterator[torch.Tensor]:
    """``scale A - left right^T`` in float64, some of its longer side at a time, seen as (short, some)."""
    for start in range(0, long, _AT_A_TIME):
        some = slice(start, start + _AT_A_TIME)
        part = widened(A[:, some] if wide else A[some])
        part = part * scale if scale != 1 else part
        over = (left, right[some]) if wide else (left[some], right)
        B = torch.addmm(part, over[0], over[1].T, alpha=-1)
        yield B if wide else B.T


def _missed_by(M: torch.Tensor, factor: torch.Tensor) -> float:
    """A bound of ``|M - L L^T|``, for the lower halves of M and L."""
    seen = torch.linalg.vector_norm(torch.addmm(M, factor, factor.T, alpha=-1).tril()).item()
    unseen = _g(len(M) + 1) * torch.linalg.vector_norm(factor).item() ** 2  # the rounding of this product
    return float(2 * (seen + unseen) * _SAFE)
