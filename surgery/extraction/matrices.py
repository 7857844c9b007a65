"""Matrices before and after: their difference, its nearly best low-rank approximation, and what a merge would make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.device import as_memory_allows
from surgery.errors import WeightError
from surgery.escapes import quoted_glob
from surgery.extraction.extents import Extent
from surgery.extraction.records import ExtractedMatrix, balanced
from surgery.format.safetensors import TORCH_DTYPES
from surgery.linalg.low_rank import LowRank, low_rank, low_rank_above_floor, low_rank_of_energy, low_ranks
from surgery.lossless.blocks import DEVICE_BLOCKS, row_slices, rows_at_a_time
from surgery.lossless.factors import Addition, Factors
from surgery.lossless.rounding import all_finite
from surgery.lossless.update import Written, rescale
from surgery.memory import scratch
from surgery.planning.targets import Target
from surgery.quantized.codec import Codec, Parts
from surgery.timing import timed


@dataclass(frozen=True, slots=True)
class Extracting:
    """How differences are approximated.

    Attributes:
        extent: how many directions are kept.
        dtype: of the adapter, as safetensors names it.
        tolerance, seed: see ``surgery.linalg.low_rank``.
    """

    extent: Extent
    dtype: str
    tolerance: float
    seed: int


@dataclass(frozen=True, slots=True)
class StoredAs:
    """How one quantized matrix is stored.

    Attributes:
        codec: what its numbers and parts mean.
        parts: what belongs to its numbers.
    """

    codec: Codec
    parts: Parts


@dataclass(frozen=True, slots=True)
class ChangedMatrix:
    """One matrix of a target, before and after; on the CPU.

    Attributes:
        target, index: which matrix of which target.
        before: (m, n), in the dtype of the base; float32 where that is quantized.
        after: (m, n), likewise of the tuned model.
        stored: how that of the base is stored; None where it is not quantized.
    """

    target: Target
    index: int
    before: torch.Tensor
    after: torch.Tensor
    stored: StoredAs | None = None


@dataclass(frozen=True, slots=True)
class ApproximatedMatrix:
    """The low-rank approximation of the difference of one matrix; on the CPU.

    Attributes:
        target, index: which matrix of which target.
        factors: of the difference, float32; of rank 0 where there is none.
        found: what is told of it.
    """

    target: Target
    index: int
    factors: Factors
    found: ExtractedMatrix


def extract_matrices(
    changed: Sequence[ChangedMatrix], extracting: Extracting, device: torch.device
) -> list[ApproximatedMatrix]:
    """Approximate the differences of matrices, those of one shape and rank together.

    Args:
        changed: matrices of any targets.
        extracting: how.
        device: where the arithmetic runs, one with float64; the CPU where its memory does not suffice.

    Returns:
        A result for each matrix, in no particular order.

    Raises:
        WeightError: a difference overflows; names the tensor.
    """
    groups: dict[object, list[ChangedMatrix]] = {}
    for one in changed:
        # Where the rank is not known before, each is solved by itself.
        alone = None if extracting.extent.is_fixed or extracting.extent.budget is not None else (one.target.key, one.index)
        groups.setdefault((one.before.shape, _wider(one), one.target.rank, alone), []).append(one)
    return [
        result
        for group in groups.values()
        for result in as_memory_allows(lambda part, where: _extract_group(part, extracting, where), group, device)
    ]


def _wider(one: ChangedMatrix) -> torch.dtype:
    """The dtype of the difference: float32 at least, in which that of 16-bit numbers is exact, or nearly so."""
    return torch.promote_types(torch.promote_types(one.before.dtype, one.after.dtype), torch.float32)


def _extract_group(group: Sequence[ChangedMatrix], extracting: Extracting, device: torch.device) -> list[ApproximatedMatrix]:
    with timed("copy"):
        before = [one.before.to(device, non_blocking=True) for one in group]
        after = [one.after.to(device, non_blocking=True) for one in group]
    with timed("difference"):
        differences = scratch("differences", (len(group), *before[0].shape), _wider(group[0]), device)
        for difference, old, new in zip(differences, before, after, strict=True):
            for rows in _blocks(difference):
                difference[rows].copy_(new[rows]).sub_(old[rows])
    with timed("svd"):
        found = _approximations(group, differences, extracting)
    del differences
    results = []
    for one, old, new, low in zip(group, before, after, found, strict=True):
        some = low.s > 0
        factors = Factors(low.U[:, some].float(), low.s[some].float(), low.V[:, some].float())
        merged = None
        if extracting.extent.budget is None:
            with timed("merge"):
                merged = _distance(_merged(old, factors, one.stored, extracting.dtype), new, _wider(one))
        results.append(
            ApproximatedMatrix(
                one.target,
                one.index,
                Factors(*(part.cpu().contiguous() for part in (factors.U, factors.s, factors.V))),
                ExtractedMatrix(
                    before=_norm(old),
                    after=_norm(new),
                    change=low.norm,
                    values=factors.s.tolist(),
                    error=low.error,
                    rule=low.rule,
                    excess=low.excess if math.isfinite(low.excess) else None,
                    above_floor=low.above_floor,
                    merged=merged,
                ),
            )
        )
    return results


def _approximations(group: Sequence[ChangedMatrix], differences: torch.Tensor, extracting: Extracting) -> list[LowRank]:
    if len(group) > 1 and all_finite(differences):
        return low_ranks(differences, group[0].target.rank, tolerance=extracting.tolerance, seed=extracting.seed)
    return [_approximation(one.target, difference, extracting) for one, difference in zip(group, differences, strict=True)]


def _approximation(target: Target, difference: torch.Tensor, extracting: Extracting) -> LowRank:
    extent, tolerance, seed = extracting.extent, extracting.tolerance, extracting.seed
    try:
        if extent.energy is not None:
            return low_rank_of_energy(difference, extent.energy, max_rank=target.rank, tolerance=tolerance, seed=seed)
        if extent.rank == "auto":
            return low_rank_above_floor(difference, max_rank=target.rank, tolerance=tolerance, seed=seed)
        return low_rank(difference, target.rank, tolerance=tolerance, seed=seed)
    except WeightError as error:
        raise WeightError(
            f"{target.shard}: the change of {target.key!r} cannot be approximated: {error.what}",
            got=error.got,
            hint=f"repair the models, or leave it out: --exclude {quoted_glob(target.tensor)}",
        ) from error


def _merged(before: torch.Tensor, factors: Factors, stored: StoredAs | None, dtype: str) -> torch.Tensor:
    """The matrix with the adapter merged into it, as ``merge`` writes it, in the dtype of ``before``."""
    if not factors.s.numel():
        return before
    addition = Addition(*(half.to(TORCH_DTYPES[dtype]).float() for half in balanced(factors)))
    if stored is None:
        return rescale(before, None, None, addition, Written(rounding=None))[0]
    m, n = before.shape
    whole = torch.addmm(before, addition.left, addition.right.T)
    parts: Parts = {role: part.to(before.device) for role, part in stored.parts.items()}
    parts = stored.codec.parts_that_hold(stored.codec.extremes(whole, parts), parts)
    grid = stored.codec.grid(parts, (m, n))
    return rescale(before, None, None, addition, Written(rounding="directions", grid=grid))[0]


def _blocks(matrix: torch.Tensor) -> list[slice]:
    """The rows of a matrix that are widened at a time: what stays in cache costs a tenth of what takes fresh memory."""
    m, n = matrix.shape
    return row_slices(m, rows_at_a_time(n) * (1 if matrix.device.type == "cpu" else DEVICE_BLOCKS))


def _norm(matrix: torch.Tensor) -> float:
    return math.hypot(*(_norm_of_block(matrix[rows]) for rows in _blocks(matrix)))


def _distance(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> float:
    """The Frobenius norm of the difference of two matrices, which is formed in ``dtype``."""
    return math.hypot(*(_norm_of_block(a[rows].to(dtype) - b[rows].to(dtype)) for rows in _blocks(a)))


def _norm_of_block(block: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64))
