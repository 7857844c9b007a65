"""Factorize the matrices of a window: those of one shape, dtype and rank together, in a batch."""

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
from surgery.timing import timed


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a target, (m, n), on the CPU; where it is quantized, perhaps on the device that has computed its numbers.

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
        residual: (m, n), in the memory of the weight, which it has overwritten; None in the overlay layout, where the weight
            is unchanged.
        factors: float32.
        norm: the Frobenius norm of the matrix.
        certificate: of the SVD.
        correction: encoded; None in the overlay layout, or if none was asked for.
        inexact: share of the entries that residual and factors alone do not give back.
    """

    target: Target
    index: int
    residual: torch.Tensor | None
    factors: Factors
    norm: float
    certificate: Certificate
    correction: torch.Tensor | None
    inexact: float


def factorize_matrices(matrices: Sequence[Matrix], layout: Layout, options: Options, device: torch.device) -> list[Result]:
    """Factorize matrices. In the residual layout each residual overwrites its weight.

    Args:
        matrices: of any targets.
        layout: of the result.
        options: only correction, seed and tolerance matter here; ranks and energies are those of the targets.
        device: where the SVD and the split run; the CPU where its memory does not suffice.

    Returns:
        A result for each matrix, in no particular order.

    Raises:
        WeightError: a matrix holds NaN or infinity, or has a residual beyond the range of its dtype; names the tensor.
    """
    groups: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        target = matrix.target
        # With an energy the rank is not known before the SVD, so that such a matrix is solved alone.
        alone = (target.key, matrix.index) if target.energy is not None else None
        groups.setdefault((matrix.weight.shape, matrix.weight.dtype, target.rank, alone), []).append(matrix)
    return [
        result
        for group in groups.values()
        for result in as_memory_allows(lambda part, where: _factorize_group(part, layout, options, where), group, device)
    ]


def _factorize_group(group: Sequence[Matrix], layout: Layout, options: Options, device: torch.device) -> list[Result]:
    with timed("copy"):
        weights = [matrix.weight.to(device, non_blocking=True) for matrix in group]
    with timed("svd"):
        found = _svds(group, weights, options)
    with timed("copy"):
        factors = [Factors(svd.U.cpu().contiguous(), svd.s.cpu(), svd.V.cpu().contiguous()) for svd in found]
    if layout == "overlay":
        parts: list[Parts | None] = [None] * len(group)
    else:
        with timed("residual"):
            parts = []
            for matrix, weight, kept in zip(group, weights, factors, strict=True):
                # The lossless arithmetic is float64, which an Apple GPU does not have.
                exact = matrix.weight if device.type == "mps" else weight
                parts.append(_split(matrix.target, exact, kept.to(exact.device), options))
        # Weights on the CPU are overwritten last: if the memory of a GPU does not suffice, the group is done again from them.
        with timed("copy"):
            for matrix, part in zip(group, parts, strict=True):
                if part is not None and part.residual.device.type == "cuda":
                    matrix.weight.copy_(part.residual, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
    return [
        Result(
            matrix.target,
            matrix.index,
            None if part is None else matrix.weight,
            kept,
            svd.norm.item(),
            svd.certificate,
            None if part is None else part.correction,
            0.0 if part is None else part.inexact,
        )
        for matrix, kept, svd, part in zip(group, factors, found, parts, strict=True)
    ]


def _split(target: Target, weight: torch.Tensor, factors: Factors, options: Options) -> Parts:
    """Split one matrix (m, n) of a target; the residual overwrites ``weight``. Errors name the tensor."""
    try:
        return split(weight, factors, correct=options.correction, out=weight)
    except WeightError as error:
        raise WeightError(
            f"{target.shard}: {target.key!r} cannot be factorized: {error.what}",
            got=error.got,
            expected=error.expected,
            hint=f"--layout overlay, which has no residuals; or leave it out: --exclude {quoted_glob(target.tensor)}",
        ) from error


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
