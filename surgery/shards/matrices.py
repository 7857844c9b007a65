"""Factorize the matrices of a window, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows, downloaded
from surgery.engine.lane import Lane
from surgery.errors import WeightError
from surgery.escapes import quoted_glob
from surgery.format.options import Options
from surgery.linalg.energy import energy_svd
from surgery.linalg.svd import Certificate, TruncatedSVD, truncated_svd, truncated_svds
from surgery.lossless.factors import Factors
from surgery.lossless.parts import ResidualError
from surgery.lossless.split import split
from surgery.lossless.split_batch import split_batch
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
        correction: gives it, encoded, when that is done; None in the overlay layout, or if none was asked for.
        inexact: share of the entries that residual and factors alone do not give back; 0 in the overlay layout.
    """

    target: Target
    index: int
    factors: Factors
    norm: float
    certificate: Certificate
    correction: Callable[[], torch.Tensor | None]
    inexact: float


def factorize_matrices(
    matrices: Sequence[Matrix], layout: Layout, options: Options, lane: Lane, window_bytes: int
) -> list[Result]:
    """Factorize matrices. In the residual layout each residual overwrites its weight, wherever that is.

    Args:
        matrices: of any targets.
        layout: of the result.
        options: only correction, seed, tolerance and prove matter here; ranks and energies are those of the targets.
        lane: on whose device SVD and split run, or on the CPU where its memory does not suffice. With a GPU, corrections are
            encoded by the threads that it has for the host.
        window_bytes: of the window that the matrices are of, by which the batches of a GPU are bounded.

    Returns:
        A result for each matrix, in no particular order.

    Raises:
        WeightError: a matrix holds NaN or infinity, or has a residual beyond the range of its dtype; names the tensor.
    """
    results = []
    for batch in batches(matrices, window_bytes if lane.device.type == "cuda" else None):
        results += as_memory_allows(
            lambda part, where: _factorize_batch(part, layout, options, lane, where), batch, lane.device
        )
    return results


def _factorize_batch(
    batch: Sequence[Matrix], layout: Layout, options: Options, lane: Lane, where: torch.device
) -> list[Result]:
    with timed("copy"):
        weights = [matrix.weight.to(where) for matrix in batch]
        # On a GPU always a copy, which the split may overwrite: if its memory does not suffice, the batch is done again.
        together = torch.stack(weights) if len(batch) > 1 or where.type == "cuda" else weights[0][None]
    with timed("svd"):
        found = _svds(batch, together, options)
    here = _on_host(found)
    if layout == "overlay":
        parts: list[_Split] = [_Split(None, lambda: None, 0.0)] * len(batch)
    else:
        with timed("residual"):
            if where.type == "cuda":
                parts = _split_together(batch, together, found, options, lane)
            else:  # also for an Apple GPU: the lossless arithmetic is float64, which that does not have
                parts = [_split(matrix, factors, options) for matrix, factors in zip(batch, here, strict=True)]
        with timed("copy"):
            for matrix, part in zip(batch, parts, strict=True):
                if part.residual is not None and part.residual is not matrix.weight:
                    matrix.weight.copy_(part.residual)
    return [
        Result(matrix.target, matrix.index, factors, svd.norm.item(), svd.certificate, part.correction, part.inexact)
        for matrix, factors, svd, part in zip(batch, here, found, parts, strict=True)
    ]


def _on_host(found: Sequence[TruncatedSVD]) -> list[Factors]:
    """The factors of each matrix on the CPU: of all of them in one transfer."""
    parts = downloaded(*(part for svd in found for part in (svd.U, svd.s, svd.V)))
    return [Factors(*(part.contiguous() for part in parts[i : i + 3])) for i in range(0, len(parts), 3)]


@dataclass(frozen=True, slots=True)
class _Split:
    """A matrix that has been split: its residual, what gives its correction, and the share of inexact entries."""

    residual: torch.Tensor | None
    correction: Callable[[], torch.Tensor | None]
    inexact: float


def _split(matrix: Matrix, factors: Factors, options: Options) -> _Split:
    """Split one matrix (m, n) on the CPU; the residual overwrites it if it is there. Errors name the tensor."""
    weight = matrix.weight.to("cpu")
    try:
        parts = split(weight, factors, correct=options.correction, out=weight)
    except WeightError as error:
        raise _cannot_be_split(matrix.target, error) from error
    return _Split(parts.residual, lambda: parts.correction, parts.inexact)


def _split_together(
    batch: Sequence[Matrix], together: torch.Tensor, found: Sequence[TruncatedSVD], options: Options, lane: Lane
) -> list[_Split]:
    """Split matrices (B, m, n) on a GPU, which their residuals overwrite. Errors name the tensor."""
    U, s, V = (torch.stack([getattr(svd, part) for svd in found]) for part in "UsV")
    try:
        parts = split_batch(together, Factors(U, s, V), correct=options.correction, out=together)
    except ResidualError as error:
        raise _cannot_be_split(batch[error.index].target, error) from error
    results = []
    for one in parts:
        # Without the residual, so that the memory of the batch is not kept until its corrections are encoded.
        blocks = dataclasses.replace(one, residual=one.residual.new_empty(0))
        results.append(_Split(one.residual, lane.on_host(blocks.correction).result, one.inexact))
    return results


def _cannot_be_split(target: Target, error: WeightError) -> WeightError:
    return WeightError(
        f"{target.shard}: {target.key!r} cannot be factorized: {error.what}",
        got=error.got,
        expected=error.expected,
        hint=f"--layout overlay, which has no residuals; or leave it out: --exclude {quoted_glob(target.tensor)}",
    )


def _svds(batch: Sequence[Matrix], together: torch.Tensor, options: Options) -> list[TruncatedSVD]:
    """The truncated SVDs of matrices (B, m, n) on the device where they are."""
    if len(batch) > 1:
        try:
            rank, tolerance = batch[0].target.rank, options.tolerance
            return truncated_svds(together, rank, tolerance=tolerance, seed=options.seed, prove=options.prove)
        except WeightError:  # some matrix of the batch; solved one by one, the error can name it
            pass
    return [truncate(matrix.target, weight, options) for matrix, weight in zip(batch, together, strict=True)]


def truncate(target: Target, weight: torch.Tensor, options: Options) -> TruncatedSVD:
    """The truncated SVD of one matrix (m, n) of a target, by its rank or its energy. Errors name the tensor."""
    tolerance, seed, prove = options.tolerance, options.seed, options.prove
    try:
        if target.energy is not None:
            return energy_svd(weight, target.energy, max_rank=target.rank, tolerance=tolerance, seed=seed, prove=prove)
        return truncated_svd(weight, target.rank, tolerance=tolerance, seed=seed, prove=prove)
    except WeightError as error:
        raise WeightError(
            f"{target.shard}: {target.key!r} cannot be factorized: {error.what}",
            hint=f"repair the model, or leave it out: --exclude {quoted_glob(target.tensor)}",
        ) from error
