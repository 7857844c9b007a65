"""Factorize the matrices of a window, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows
from surgery.errors import WeightError
from surgery.escapes import quoted_glob
from surgery.format.options import Options
from surgery.linalg.energy import energy_svd
from surgery.linalg.svd import Certificate, TruncatedSVD, truncated_svd, truncated_svds
from surgery.lossless.factors import Factors
from surgery.lossless.parts import Parts
from surgery.lossless.split import split
from surgery.planning.plan import Layout
from surgery.planning.targets import Target
from surgery.shards.batches import batches
from surgery.timing import timed


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a target, (m, n), on the CPU or on a GPU.

    Attributes:
        target: the target that it is a matrix of.
        index: which of its matrices.
        weight: (m, n), in the dtype of the checkpoint; float32 where that is quantized.
    """

    target: Target
    index: int
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """The factorization of one matrix (m, n); all on the CPU.

    Attributes:
        target, index: which matrix of which target.
        factors: float32.
        norm: the Frobenius norm of the matrix.
        certificate: of the SVD.
        correction: encoded; None in the overlay layout, or if none was asked for.
        inexact: share of the entries that residual and factors alone do not give back; 0 in the overlay layout.
    """

    target: Target
    index: int
    factors: Factors
    norm: float
    certificate: Certificate
    correction: torch.Tensor | None
    inexact: float


def factorize_matrices(
    matrices: Sequence[Matrix], layout: Layout, options: Options, device: torch.device, window_bytes: int
) -> list[Result]:
    """Factorize matrices. In the residual layout each residual overwrites its weight, wherever that is.

    Args:
        matrices: of any targets.
        layout: of the result.
        options: only correction, seed and tolerance matter here; ranks and energies are those of the targets.
        device: where the SVD and the split run; the CPU where its memory does not suffice.
        window_bytes: of the window that the matrices are of, by which the batches of a GPU are bounded.

    Returns:
        A result for each matrix, in no particular order.

    Raises:
        WeightError: a matrix holds NaN or infinity, or has a residual beyond the range of its dtype; names the tensor.
    """
    results = []
    for batch in batches(matrices, window_bytes if device.type == "cuda" else None):
        solved = as_memory_allows(lambda part, where: _solved(part, options, where), batch, device)
        for matrix, svd in zip(batch, solved, strict=True):
            parts = None
            if layout == "residual":
                # The lossless arithmetic is float64, which an Apple GPU does not have.
                exact_on = torch.device("cpu") if device.type == "mps" else device
                parts = as_memory_allows(lambda one, where: [_split(*one[0], options, where)], [(matrix, svd)], exact_on)[0]
            results.append(
                Result(
                    matrix.target,
                    matrix.index,
                    _factors(svd).to("cpu"),
                    svd.norm.item(),
                    svd.certificate,
                    None if parts is None else parts.correction,
                    0.0 if parts is None else parts.inexact,
                )
            )
    return results


def _factors(svd: TruncatedSVD) -> Factors:
    return Factors(svd.U.contiguous(), svd.s, svd.V.contiguous())


def _solved(batch: Sequence[Matrix], options: Options, where: torch.device) -> list[TruncatedSVD]:
    with timed("copy"):
        weights = [matrix.weight.to(where) for matrix in batch]
    with timed("svd"):
        return _svds(batch, weights, options)


def _split(matrix: Matrix, svd: TruncatedSVD, options: Options, where: torch.device) -> Parts:
    """Split one matrix (m, n); the residual overwrites it, when all else has been done. Errors name the tensor."""
    target, weight = matrix.target, matrix.weight
    with timed("copy"):
        there = weight.to(where)
    with timed("residual"):
        # A weight that lies on a GPU is kept until then: if the memory does not suffice, it is split elsewhere.
        out = None if there is weight and where.type == "cuda" else there
        try:
            parts = split(there, _factors(svd).to(where), correct=options.correction, out=out)
        except WeightError as error:
            raise WeightError(
                f"{target.shard}: {target.key!r} cannot be factorized: {error.what}",
                got=error.got,
                expected=error.expected,
                hint=f"--layout overlay, which has no residuals; or leave it out: --exclude {quoted_glob(target.tensor)}",
            ) from error
    with timed("copy"):
        if parts.residual is not weight:
            weight.copy_(parts.residual)
    return parts


def _svds(group: Sequence[Matrix], weights: Sequence[torch.Tensor], options: Options) -> list[TruncatedSVD]:
    if len(group) > 1:
        try:
            batch = torch.stack(list(weights))
            return truncated_svds(batch, group[0].target.rank, tolerance=options.tolerance, seed=options.seed)
        except WeightError:  # some matrix of the batch; solved one by one, the error can name it
            pass
    return [truncate(matrix.target, weight, options) for matrix, weight in zip(group, weights, strict=True)]


def truncate(target: Target, weight: torch.Tensor, options: Options) -> TruncatedSVD:
    """The truncated SVD of one matrix (m, n) of a target, by its rank or its energy. Errors name the tensor."""
    try:
        if target.energy is not None:
            return energy_svd(weight, target.energy, max_rank=target.rank, tolerance=options.tolerance, seed=options.seed)
        return truncated_svd(weight, target.rank, tolerance=options.tolerance, seed=options.seed)
    except WeightError as error:
        raise WeightError(
            f"{target.shard}: {target.key!r} cannot be factorized: {error.what}",
            hint=f"repair the model, or leave it out: --exclude {quoted_glob(target.tensor)}",
        ) from error
