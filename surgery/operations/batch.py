"""Matrices in, results out: those of one shape, dtype and rank are worked on together."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows
from surgery.errors import WeightError
from surgery.linalg.energy import energy_svd
from surgery.linalg.lossless import Factors, split
from surgery.linalg.svd import Certificate, TruncatedSVD, truncated_svd, truncated_svds
from surgery.planning.plan import Layout
from surgery.planning.targets import Target


@dataclass(frozen=True, slots=True)
class Settings:
    """How matrices are factorized, see ``surgery.factorize``. ``device`` is a name that torch knows."""

    layout: Layout
    correction: bool
    seed: int
    tolerance: float
    device: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a target, (m, n), on the CPU.

    Attributes:
        target: whose.
        index: which of its matrices.
        weight: in the dtype of the checkpoint; float32 where that is quantized.
    """

    target: Target
    index: int
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one matrix; all on the CPU.

    Attributes:
        target, index: of the matrix.
        factors: float32.
        norm: the Frobenius norm of the matrix.
        certificate: of the SVD.
        residual: (m, n); None in the overlay layout.
        correction: encoded; None in the overlay layout, or if it is not wanted.
        inexact: share of the entries that residual and factors alone do not give back.
    """

    target: Target
    index: int
    factors: Factors
    norm: float
    certificate: Certificate
    residual: torch.Tensor | None
    correction: torch.Tensor | None
    inexact: float


def factorize_matrices(matrices: Sequence[Matrix], settings: Settings) -> list[Result]:
    """The results of matrices, in no order.

    Raises:
        WeightError: a matrix holds NaN or infinity; names the tensor.
    """
    groups: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        target = matrix.target
        alone = (target.key, matrix.index) if target.energy is not None else None  # its rank is not known yet
        groups.setdefault((matrix.weight.shape, matrix.weight.dtype, target.rank, alone), []).append(matrix)
    device = torch.device(settings.device)
    return [
        result
        for group in groups.values()
        for result in as_memory_allows(lambda part, where: _factorize_group(part, where, settings), group, device)
    ]


def _factorize_group(group: Sequence[Matrix], device: torch.device, settings: Settings) -> list[Result]:
    first = group[0]
    if len(group) == 1:
        weights = first.weight.to(device)[None]
        found = [truncate(first.target, weights[0], settings)]
    else:
        weights = torch.stack([matrix.weight.to(device) for matrix in group])
        try:
            found = truncated_svds(weights, first.target.rank, tolerance=settings.tolerance, seed=settings.seed)
        except WeightError:  # some matrix of it; one by one the message can name it
            found = [truncate(matrix.target, weight, settings) for matrix, weight in zip(group, weights, strict=True)]
    return [_finish(matrix, svd, on_device, settings) for matrix, svd, on_device in zip(group, found, weights, strict=True)]


def truncate(target: Target, weight: torch.Tensor, settings: Settings) -> TruncatedSVD:
    """The SVD of one matrix (m, n) of a target, by rank or by energy; errors name the tensor."""
    try:
        if target.energy is not None:
            return energy_svd(weight, target.energy, max_rank=target.rank, tolerance=settings.tolerance, seed=settings.seed)
        return truncated_svd(weight, target.rank, tolerance=settings.tolerance, seed=settings.seed)
    except WeightError as error:
        raise WeightError(
            f"{target.shard}: {target.key!r} cannot be factorized: {error.what}",
            hint=f"repair the model, or leave it out: --exclude '{glob.escape(target.tensor)}'",
        ) from error


def _finish(matrix: Matrix, svd: TruncatedSVD, on_device: torch.Tensor, settings: Settings) -> Result:
    factors = Factors(svd.U.cpu().contiguous(), svd.s.cpu(), svd.V.cpu().contiguous())
    known = (matrix.target, matrix.index, factors, svd.norm.item(), svd.certificate)
    if settings.layout == "overlay":
        return Result(*known, residual=None, correction=None, inexact=0.0)
    # The lossless arithmetic is float64, which an Apple GPU does not have.
    exact = matrix.weight if on_device.device.type == "mps" else on_device
    apart = split(exact, factors.to(exact.device), correct=settings.correction)
    return Result(*known, apart.residual.cpu(), apart.correction, apart.inexact)
