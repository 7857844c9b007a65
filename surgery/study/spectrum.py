"""What the singular values and vectors of a matrix look like, alone and against those of a changed one.

Effective rank: Roy, Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), here of the
squared values, so that it is the exponential of the entropy of the energy. Stochastic Lanczos quadrature: Ubaru, Chen,
Saad, "Fast estimation of tr(f(A))" (SIAM J. Matrix Anal. 38, 2017). Principal angles: Björck, Golub, "Numerical methods
for computing angles between linear subspaces" (Math. Comp. 27, 1973).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from surgery.linalg.random import generator_of
from surgery.linalg.svd import TruncatedSVD, truncated_svd
from surgery.lossless.rounding import times_power_of_two
from surgery.precision import full_precision
from surgery.study.claims import Claims, claims_of
from surgery.study.directions import Became, DifferenceImages, became, identified, known_values, matched, storage_noise

#: Ranks for which the share of the energy is told.
ENERGY_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Up to this many values, of a matrix of so many entries, all of them are computed for the effective rank.
_EXACT_SIZE = 1024
_EXACT_ENTRIES = 1 << 22
_PROBES = 16
_STEPS = 40
#: Leading values of an update that are told.
_UPDATE_VALUES = 64


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
        stable_rank, effective_rank, effective_rank_error, singular_values: of D, the leading 64 of these.
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
    rank, error = _effective_rank(A, svd, seed)
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
    # In float32 at least: the difference of numbers that are close is exact there, or nearly so.
    difference = _wide(new.matrix) - _wide(old.matrix)
    with full_precision(difference.device):
        images = DifferenceImages(difference @ before.V.to(difference), difference.T @ before.U.to(difference))
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


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _update(
    difference: torch.Tensor, before: TruncatedSVD, inside: tuple[torch.Tensor, torch.Tensor, torch.Tensor], seed: int
) -> UpdateFigures | None:
    svd = truncated_svd(difference, min(_UPDATE_VALUES, *difference.shape), seed=seed)
    energy = svd.norm.item() ** 2
    if energy == 0:
        return None
    to_left, to_right, both = inside
    rank, error = _effective_rank(difference, svd, seed)
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


def _effective_rank(A: torch.Tensor, svd: TruncatedSVD, seed: int) -> tuple[float, float]:
    """The effective rank, and its standard error."""
    energy = svd.norm.item() ** 2
    if energy == 0:
        return 0.0, 0.0
    squares = svd.s.double().cpu().square()
    if len(squares) < min(A.shape) <= _EXACT_SIZE and A.numel() <= _EXACT_ENTRIES:
        # Of float32 weights the squares of all values are float64 numbers, to its rounding of their sum: no SVD is needed.
        matrix = A.double().cpu()
        gram = matrix @ matrix.T if A.shape[0] < A.shape[1] else matrix.T @ matrix
        squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    leading = _entropy(squares / energy).sum().item()
    if len(squares) == min(A.shape):
        return math.exp(leading), 0.0
    tail, error = _tail_entropy(A, svd, energy, seed)
    return math.exp(leading + tail), math.exp(leading + tail) * error


def _entropy(shares: torch.Tensor) -> torch.Tensor:
    entropy: torch.Tensor = -torch.special.xlogy(shares, shares)
    return entropy


def _tail_entropy(A: torch.Tensor, svd: TruncatedSVD, energy: float, seed: int) -> tuple[float, float]:
    """The entropy of all values but the leading ones, and its standard error.

    Stochastic Lanczos quadrature for the trace of ``-x log x`` of ``x = A^T A / energy`` on the complement of the leading
    vectors of the short side. Three things are known and not estimated: the leading values, the trace of x, so that only
    that of ``-x log(x / mean)`` is left, and the dimension, to which each probe is scaled.
    """
    wide = A.shape[0] < A.shape[1]
    matrix = A.to(torch.float32) if A.dtype != torch.float64 else A
    # Squares of the entries must neither overflow nor vanish. A power of two changes no bit.
    exponent = math.frexp(svd.norm.item())[1]
    matrix, scaled = times_power_of_two(matrix, -exponent), math.ldexp(energy, -2 * exponent)
    known = (svd.U if wide else svd.V).to(matrix)
    short = min(A.shape)
    generator = generator_of(seed)
    start = torch.randint(0, 2, (short, _PROBES), generator=generator).to(matrix) * 2 - 1

    def apart(block: torch.Tensor) -> torch.Tensor:
        outside: torch.Tensor = block - known @ (known.T @ block)
        return outside

    def product(block: torch.Tensor) -> torch.Tensor:
        image = matrix @ (matrix.T @ block) if wide else matrix.T @ (matrix @ block)
        return apart(image / scaled)

    with torch.no_grad(), full_precision(A.device):
        block = apart(start)
        lengths = block.double().norm(dim=0)
        alphas, betas = _lanczos(product, block / lengths.to(block), min(_STEPS, short - known.shape[1]))
    dimension = short - known.shape[1]
    share = max(0.0, 1 - svd.s.double().square().sum().item() / energy)
    mean = max(share / dimension, 1e-300)
    estimates = []
    for probe in range(_PROBES):
        T = torch.diag(alphas[:, probe]) + torch.diag(betas[:-1, probe], 1) + torch.diag(betas[:-1, probe], -1)
        nodes, vectors = torch.linalg.eigh(T)
        nodes = nodes.clamp(min=0)
        estimates.append(dimension * (vectors[0].square() * -torch.special.xlogy(nodes, nodes / mean)).sum().item())
    found = torch.tensor(estimates, dtype=torch.float64)
    return found.mean().item() - share * math.log(mean), found.std().item() / math.sqrt(_PROBES)


def _lanczos(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients (steps, b), float64 on the CPU, of the tridiagonal matrices for unit columns (n, b), each on its own."""
    basis: list[torch.Tensor] = [start]
    alphas, betas = [], []
    for _ in range(steps):
        image = product(basis[-1])
        alphas.append((image * basis[-1]).double().sum(dim=0))
        # Twice against all before: the numbers must be those of exact arithmetic, not ghosts of converged ones.
        for _ in range(2):
            for vector in basis:
                image = image - vector * (image * vector).sum(dim=0)
        lengths = image.double().norm(dim=0)
        # An exhausted space gives noise, which a coupling of 0 keeps out.
        alive = lengths > 1e-7 * alphas[0].abs().clamp(min=1e-30)
        betas.append(torch.where(alive, lengths, 0.0))
        basis.append(torch.where(alive, image / lengths.clamp(min=1e-30).to(image), 0.0).to(image))
    return torch.stack(alphas).cpu(), torch.stack(betas).cpu()
