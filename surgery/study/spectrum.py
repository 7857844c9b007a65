"""What the singular values and vectors of a matrix look like, alone and against those of a changed one.

Principal angles: Björck, Golub, "Numerical methods for computing angles between linear subspaces" (Math. Comp. 27, 1973).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from surgery.linalg.svd import TruncatedSVD, truncated_svd
from surgery.memory import scratch
from surgery.precision import full_precision
from surgery.solvers.operator import Operator
from surgery.study.claims import Claims, claims_of
from surgery.study.directions import Became, DifferenceImages, became, identified, known_values, matched, storage_noise
from surgery.study.effective_rank import effective_rank

#: Ranks for which the share of the energy is told.
ENERGY_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Leading values of an update that are told, and the tolerance of their SVD. Its vectors are not used, and the error of a value
#: is of second order in its residual. With the rounding of the stored numbers below them, more values would take twice as long.
_UPDATE_VALUES = 32
_UPDATE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The spectrum of one matrix A (m, n). Lists have k entries, those of the leading values.

    Attributes:
        norm: Frobenius.
        singular_values: descending.
        residual, gap: of the certificate, see ``surgery.linalg.svd``.
        identified: whether the matrix determines the direction: its angle to the true one is bounded by 0.1.
        converged, method: of the SVD.
        stable_rank: ``||A||_F^2 / s_1^2``.
        effective_rank: the exponential of the entropy of ``s_i^2 / ||A||_F^2``, of all values.
        effective_rank_error: its standard error; 0 where it was computed from all values.
        energy: rank -> share of ``||A||_F^2``.
        condition: ``s_1 / s_k``; None where s_k is 0.
        tail_exponent: a in ``s_i ~ i^-a``, fitted to the last three quarters of the k values; None with fewer than 8, or
            zeros among them.
    """

    norm: float
    singular_values: list[float]
    residual: list[float]
    gap: list[float]
    identified: list[bool]
    converged: bool
    method: str
    stable_rank: float
    effective_rank: float
    effective_rank_error: float
    energy: dict[str, float]
    condition: float | None
    tail_exponent: float | None


@dataclass(frozen=True, slots=True)
class UpdateFigures:
    """Figures of the difference D of two matrices, against the top subspaces of dimension r of the first.

    Attributes:
        norm, relative: Frobenius, and over that of the first matrix; None where that is 0.
        in_left, in_right, in_both: shares of ``||D||^2`` in the span of its top left vectors, right vectors, both.
        rescaling: share that scales of its top r directions explain, ``sum (u_i^T D v_i)^2 / ||D||^2``.
        stable_rank, effective_rank, effective_rank_error, singular_values: of D, the leading 32 of these.
        converged: whether the SVD of D is.
    """

    norm: float
    relative: float | None
    in_left: float
    in_right: float
    in_both: float
    rescaling: float
    stable_rank: float
    effective_rank: float
    effective_rank_error: float
    singular_values: list[float]
    converged: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of a matrix and the one that it became. Entries without a meaning are None.

    Attributes:
        amplification: the i-th new over the i-th old singular value; None where the old one is no more than rounding.
        rest_amplification: of the Frobenius norms of what comes after them.
        directions: what became of each.
        left_top, right_top: cosines of the principal angles of the top-r subspaces, descending.
        left_next, right_next: of those of directions r + 1 to 2 r.
        explained: ``(u_i^T D v_i)^2`` of the difference D, for the first r directions: what a scale takes of it.
        claims: figures for claims of others about fine-tuning.
        update: None where nothing has changed.
    """

    amplification: list[float | None]
    rest_amplification: float | None
    directions: Became
    left_top: list[float]
    right_top: list[float]
    left_next: list[float]
    right_next: list[float]
    explained: list[float]
    claims: Claims
    update: UpdateFigures | None

    def figures(self) -> dict[str, Any]:
        """All of it by name, as ``spectra.json`` has it: what became of the directions stands among the rest."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if name == "directions" else {name: value}
        return flat


def spectrum(A: torch.Tensor, top: int, *, beyond: int = 0, tolerance: float, seed: int) -> tuple[Spectrum, TruncatedSVD]:
    """Compute the spectrum of a matrix, and its ``top + beyond`` leading triplets, or all if there are fewer.

    Args:
        A: (m, n), any real floating dtype, any device.
        top: how many values are told.
        beyond: how many more are computed.
        tolerance, seed: see ``truncated_svd``.

    Raises:
        WeightError: A holds NaN or infinity.
    """
    svd = truncated_svd(A, min(top + beyond, *A.shape), tolerance=tolerance, seed=seed)
    values = svd.s.double().cpu()[:top]
    energy = svd.norm.item() ** 2
    shares = (values.square().cumsum(0) / energy).clamp(max=1.0).tolist() if energy else []
    rank, error = effective_rank(A, svd, seed)
    k, certificate, known = len(values), svd.certificate, known_values(svd)
    return (
        Spectrum(
            norm=svd.norm.item(),
            singular_values=values.tolist(),
            residual=certificate.residual[:k].tolist(),
            gap=certificate.gap[:k].tolist(),
            identified=identified(svd)[:k].tolist(),
            converged=bool(certificate.converged),
            method=str(certificate.method),
            stable_rank=energy / values[0].item() ** 2 if energy else 0.0,
            effective_rank=rank,
            effective_rank_error=error,
            energy={str(rank): shares[rank - 1] for rank in ENERGY_RANKS if rank <= len(shares)},
            condition=(values[0] / values[-1]).item() if known[k - 1] else None,
            tail_exponent=_tail_exponent(values) if known[k - 1] else None,
        ),
        svd,
    )


@dataclass(frozen=True, slots=True)
class DecomposedMatrix:
    """A matrix with its leading triplets and the precision that it was stored in.

    Attributes:
        matrix: (m, n).
        svd: of it.
        spacing: of the numbers next to 1 in the dtype that it is stored in.
    """

    matrix: torch.Tensor
    svd: TruncatedSVD
    spacing: float


def compare(old: DecomposedMatrix, new: DecomposedMatrix, k: int, r: int, *, seed: int) -> Comparison:
    """Compare a matrix with the one that it became.

    Args:
        old, new: of one shape, on one device, with SVDs of as many triplets.
        k: how many directions are told; more are looked at for those that change places.
        r: dimension of the subspaces that are compared.
        seed: of the SVD of the difference.
    """
    before, after = old.svd, new.svd
    k = min(k, before.s.numel())
    r = min(r, k)
    ratios = (after.s.double() / before.s.double()).cpu().tolist()[:k]
    pairs = [(before.U[:, :k], after.U[:, :k]), (before.V[:, :k], after.V[:, :k])]
    tops = [_principal_cosines(a[:, :r], b[:, :r]) for a, b in pairs]
    nexts = [_principal_cosines(a[:, r : 2 * r], b[:, r : 2 * r]) for a, b in pairs]
    difference = difference_of(old.matrix, new.matrix)
    images = _images(difference, before)
    both = before.U[:, :r].double().T @ images.left[:, :r].double()
    inside = images.left[:, :r], images.right[:, :r], both
    rests = [svd.norm.item() ** 2 - svd.s[:k].double().square().sum().item() for svd in (before, after)]
    # Below the rounding of the norm nothing comes after.
    some_rest = rests[0] > 1e-6 * before.norm.item() ** 2
    found = matched(before, after, images, storage_noise(before, after, (old.spacing, new.spacing)))
    update = _update(difference, before, inside, seed)
    return Comparison(
        amplification=[ratio if some else None for ratio, some in zip(ratios, known_values(before)[:k].tolist(), strict=True)],
        rest_amplification=math.sqrt(max(rests[1], 0.0) / rests[0]) if some_rest and k < min(old.matrix.shape) else None,
        directions=became(found, k, r),
        left_top=tops[0],
        right_top=tops[1],
        left_next=nexts[0],
        right_next=nexts[1],
        explained=both.diagonal().square().tolist(),
        claims=claims_of(found, 0.0 if update is None else update.norm, k, r, seed),
        update=update,
    )


def difference_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new - old``, in a temporary tensor that this thread has until it calls this again.

    In float32 at least: the difference of numbers that are close is exact there, or nearly so.
    """
    dtype = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    return scratch("difference", old.shape, dtype, old.device).copy_(new).sub_(old)


def _images(difference: torch.Tensor, svd: TruncatedSVD) -> DifferenceImages:
    """What a difference makes of all vectors of an SVD."""
    operator = Operator(difference[None])
    left, right = (vectors.T.to(difference).contiguous()[None] for vectors in (svd.U, svd.V))
    with torch.no_grad(), full_precision(difference.device):
        of_right, of_left = (operator.to_short, operator.to_long) if operator.wide else (operator.to_long, operator.to_short)
        return DifferenceImages(of_right(right)[0].T, of_left(left)[0].T)


def _update(
    difference: torch.Tensor, before: TruncatedSVD, inside: tuple[torch.Tensor, torch.Tensor, torch.Tensor], seed: int
) -> UpdateFigures | None:
    svd = truncated_svd(difference, min(_UPDATE_VALUES, *difference.shape), tolerance=_UPDATE_TOLERANCE, seed=seed)
    energy = svd.norm.item() ** 2
    if energy == 0:
        return None
    to_left, to_right, both = inside
    rank, error = effective_rank(difference, svd, seed)
    norm = before.norm.item()
    return UpdateFigures(
        norm=svd.norm.item(),
        relative=svd.norm.item() / norm if norm else None,
        in_left=_share(to_right.double().square().sum().item() / energy),
        in_right=_share(to_left.double().square().sum().item() / energy),
        in_both=_share(both.square().sum().item() / energy),
        rescaling=_share(both.diagonal().square().sum().item() / energy),
        stable_rank=energy / svd.s[0].item() ** 2,
        effective_rank=rank,
        effective_rank_error=error,
        singular_values=svd.s.double().tolist(),
        converged=bool(svd.certificate.converged),
    )


def _share(value: float) -> float:
    """A share, at most 1: rounding may take it beyond."""
    return min(value, 1.0)


def _principal_cosines(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """The cosines of the principal angles between two spans of orthonormal columns, descending."""
    if a.shape[1] == 0:
        return []
    values: list[float] = torch.linalg.svdvals((a.double().T @ b.double()).cpu()).clamp(max=1.0).tolist()
    return values


def _tail_exponent(values: torch.Tensor) -> float | None:
    k = len(values)
    if k < 8:
        return None
    indices = torch.arange(k // 4, k, dtype=torch.float64)
    x, y = (indices + 1).log(), values[k // 4 :].log()
    x = x - x.mean()
    return -((x * (y - y.mean())).sum() / x.square().sum()).item()
