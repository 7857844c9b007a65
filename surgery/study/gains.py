"""What ``recommend`` measures of a matrix: what each further direction adds to what counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.linalg.preparation import in_working_precision
from surgery.linalg.svd import truncated_svd
from surgery.names import Train
from surgery.precision import full_precision
from surgery.solvers.operator import Operator
from surgery.study.spectrum import difference_of

#: Shorter sides for which all values of the Gram matrix take less time on a CPU than a truncated SVD, if that is for more than
#: one in so many of them (7168x2048, one core: 1.0 s, and 2.2 s for 256 triplets). Below either is quick; beyond it is not.
_GRAM_SIZES = range(513, 2049)
_GRAM_PART = 16
#: Frobenius norms for which no square of a float32 entry that matters overflows or vanishes.
_PLAIN_NORMS = 2.0**-12, 2.0**24
#: Eigenvalues of a Gram matrix below so many units of the rounding of its entries, over the largest, are taken for rounding.
_ROUNDING = 8


@dataclass(frozen=True, slots=True)
class GainsMeasure:
    """Measures the gains of one matrix, which is a ``Measure``.

    They are ``s_i^2``. With the tuned matrix they are what direction i adds to what those before it explain of the change D:
    with scales ``(u_i^T D v_i)^2``; with a core the squares of all ``u_i^T D v_j`` and ``u_j^T D v_i`` with j up to i, so that
    those of the first k have the sum ``||U_k^T D V_k||^2``.

    Attributes:
        max_rank: the most directions.
        train: what explains the change.
        tolerance, seed: of the truncated SVD.
    """

    max_rank: int
    train: Train
    tolerance: float
    seed: int

    @property
    def triplets(self) -> int:
        """See ``Measure``."""
        return self.max_rank

    def __call__(self, old: torch.Tensor, new: torch.Tensor | None, spacings: tuple[float, float]) -> dict[str, Any]:
        """See ``Measure``.

        Returns:
            ``gains``, one for each direction; ``total``, all that could be gained, never less than these, each of which is
            rounded; ``norm``, ``tuned_norm`` and ``update_norm`` of old, new and their difference, the latter two None
            without new; ``residual`` and ``converged`` of the certificate.
        """
        k = min(self.max_rank, *old.shape)
        norm = torch.linalg.vector_norm(old, dtype=torch.float64).item()
        if new is None and (squares := _leading_squares(old, k, norm)) is not None:
            return _figures(squares, (norm, None, None), torch.zeros(k), True)
        svd = truncated_svd(old, k, tolerance=self.tolerance, seed=self.seed)
        told = svd.certificate.residual, bool(svd.certificate.converged)
        if new is None:
            return _figures(svd.s.double().square(), (norm, None, None), *told)
        D = difference_of(old, new)
        operator, right = Operator(D[None]), svd.V.T.to(D).contiguous()[None]
        with torch.no_grad(), full_precision(D.device):
            images = (operator.to_short(right) if operator.wide else operator.to_long(right))[0]
        explained = _explained(images.double(), svd.U.T.double(), self.train)
        change, tuned = (torch.linalg.vector_norm(matrix, dtype=torch.float64).item() for matrix in (D, new))
        return _figures(explained, (norm, tuned, change), *told)


def _explained(images: torch.Tensor, left: torch.Tensor, train: Train) -> torch.Tensor:
    """float64 (k,): gains of directions by ``D v_j`` (k, m) and ``u_i`` (k, m), float64."""
    if train == "scales":
        return (images * left).sum(dim=1).square()
    squares = torch.mm(left, images.T).square()
    return squares.tril().sum(dim=1) + squares.triu(1).sum(dim=0)


def _figures(
    gains: torch.Tensor, norms: tuple[float, float | None, float | None], residual: torch.Tensor, converged: bool
) -> dict[str, Any]:
    """The figures of ``GainsMeasure``; ``norms`` are those of the matrix, the tuned one and their difference."""
    norm, tuned, change = norms
    counted = norm if change is None else change
    return {
        "gains": gains.tolist(),
        "total": max(counted**2, gains.sum().item()),
        "norm": norm,
        "tuned_norm": tuned,
        "update_norm": change,
        "residual": residual.tolist(),
        "converged": converged,
    }


def _leading_squares(A: torch.Tensor, k: int, norm: float) -> torch.Tensor | None:
    """float64 (k,): the largest squared singular values, descending, by the Gram matrix; None where an SVD is better.

    Their errors are no more than the rounding of the Gram matrix: some 1e-7 of the largest. What is no more than that is 0.
    """
    short = min(A.shape)
    plain = _PLAIN_NORMS[0] <= norm <= _PLAIN_NORMS[1]
    if A.device.type != "cpu" or short not in _GRAM_SIZES or k <= short // _GRAM_PART or not plain:
        return None
    with torch.no_grad(), full_precision(A.device):
        gram = Operator(in_working_precision(A[None]), A.shape[1]).gram()[0]
        squares = torch.linalg.eigvalsh(gram.double()).flip(0)[:k]
    return torch.where(squares > _ROUNDING * torch.finfo(gram.dtype).eps * squares[0], squares, 0.0)
