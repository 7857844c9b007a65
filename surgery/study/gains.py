"""What ``recommend`` measures of a matrix: what each further direction adds to what counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.linalg.operator import Operator
from surgery.linalg.svd import truncated_svd
from surgery.precision import full_precision
from surgery.study.spectrum import difference_of


@dataclass(frozen=True, slots=True)
class GainsMeasure:
    """Measures the gains of one matrix, which is a ``Measure``: ``s_i^2``, or with the tuned matrix ``(u_i^T D v_i)^2``.

    Attributes:
        max_rank: the most directions.
        tolerance, seed: of the truncated SVD.
    """

    max_rank: int
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
        svd = truncated_svd(old, min(self.max_rank, *old.shape), tolerance=self.tolerance, seed=self.seed)
        norm = svd.norm.item()
        if new is None:
            gains, change, tuned = svd.s.double().square(), None, None
        else:
            D = difference_of(old, new)
            operator, right = Operator(D[None]), svd.V.T.to(D).contiguous()[None]
            with torch.no_grad(), full_precision(D.device):
                images = (operator.to_short(right) if operator.wide else operator.to_long(right))[0]
            gains = (images.double() * svd.U.T.double()).sum(dim=1).square()
            change, tuned = (torch.linalg.vector_norm(matrix, dtype=torch.float64).item() for matrix in (D, new))
        return {
            "gains": gains.tolist(),
            "total": max((norm if change is None else change) ** 2, gains.sum().item()),
            "norm": norm,
            "tuned_norm": tuned,
            "update_norm": change,
            "residual": svd.certificate.residual.tolist(),
            "converged": bool(svd.certificate.converged),
        }
