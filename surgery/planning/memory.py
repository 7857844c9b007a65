"""The memory that each verb needs for a target, and for all that it knows of a model; upper estimates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from surgery.engine.sharing import CPU_WINDOW_BYTES, Need
from surgery.format.header import TensorEntry
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import TORCH_DTYPES
from surgery.linalg.low_rank import low_rank_bytes
from surgery.linalg.measured import measuring_bytes
from surgery.linalg.proof import proof_bytes
from surgery.linalg.svd import solved_together
from surgery.names import FACTORIZABLE_DTYPES, WEIGHT_BITS
from surgery.planning.targets import Target
from surgery.solvers.triplets import workspace_bytes

#: Bytes of headers and records for each tensor of a model, each target, each matrix of a target and each kept direction of it:
#: as objects, as parsed JSON, and as the text that is written. docs/performance.md has the measurements.
_TENSOR_MEMORY = 1024
_TARGET_MEMORY = 4096
_MATRIX_MEMORY = 3072
_DIRECTION_MEMORY = 288


def need_to_factorize(target: Target, *, prove: bool = False) -> Need:
    """What SVD and split of a target need, and with ``prove`` its proof."""
    count, m, n = target.matrices
    # The dtype in which the weight reaches the SVD: its own, or float32 where it is quantized.
    dtype = torch.float32 if target.quantized is not None else TORCH_DTYPES[target.dtype]
    held = _held(target.shape, target.dtype, target.at_a_time)
    copies = _copies(held, target.dtype, target.quantized is not None, target.view.slice is not None)
    working = copies + workspace_bytes(m, n, target.rank, dtype) + (proof_bytes(m, n) if prove else 0)
    together = min(solved_together(min(m, n), target.rank), CPU_WINDOW_BYTES // (m * n * dtype.itemsize) + 1)
    stored = m * n * WEIGHT_BITS[target.dtype] // 8
    return Need(target.key, target.shape, target.shard, held, working, m * n * dtype.itemsize, count, stored, together)


def need_to_fold(target: TargetRecord) -> Need:
    """What recovery and update of a target need."""
    count, m, n = target.matrices
    quantized = target.dtype not in FACTORIZABLE_DTYPES
    held = _held(target.shape, target.dtype, target.at_a_time)
    # The factors as stored, as integers in float64, and as the update; then the correction.
    working = _copies(held, target.dtype, quantized, target.slice is not None) + 32 * target.rank * (m + n) + held // 8
    matrix = m * n * (4 if quantized else TORCH_DTYPES[target.dtype].itemsize)
    stored = m * n * WEIGHT_BITS[target.dtype] // 8
    return Need(target.key, target.shape, target.shard, held, working, matrix, count, stored)


def need_to_merge(entry: TensorEntry, file: str, at_a_time: int | None, rank: int) -> Need:
    """What the update of a tensor needs.

    Args:
        entry: of the tensor in the header of its weight file.
        file: that weight file.
        at_a_time: how many matrices of a stack are worked on at a time; None for the whole tensor.
        rank: of what is added to each matrix.
    """
    stack = at_a_time is not None
    held = _held(entry.shape, entry.dtype, at_a_time)
    rows = entry.shape[1 if stack else 0] if len(entry.shape) > 1 else 1
    matrix = math.prod(entry.shape[1:] if stack else entry.shape)
    # The numbers in float32 where they are stored in another dtype than they are written in; the update, in float64 as well.
    working = 2 * _copies(held, entry.dtype, True, False) + 32 * rank * (rows + matrix // max(rows, 1))
    stored = max(1, matrix * WEIGHT_BITS[entry.dtype] // 8)  # a tensor may be empty
    return Need(entry.name, entry.shape, file, held, working, 4 * matrix, entry.shape[0] if stack else 1, stored)


def need_to_extract(target: Target) -> Need:
    """What the change of a target needs: both weights, their difference, its approximation, and then the merged weight."""
    _, m, n = target.matrices
    need = need_to_factorize(target)
    quantized = target.quantized is not None
    copies = _copies(need.held, target.dtype, quantized, False)
    tuned = 4 * need.held * 8 // WEIGHT_BITS[target.dtype]  # float32 at most, put together from parts of its own size
    solving = low_rank_bytes(m, n, target.rank, torch.float32)
    merging = 16 * m * n + 32 * target.rank * (m + n)
    # Twice the difference: one that is very small is scaled.
    return replace(need, working=copies + 2 * tuned + 8 * m * n + max(solving, merging))


def need_to_compare(entry: TensorEntry, file: str) -> Need:
    """What a tensor needs that is read whole to be compared with another, and kept."""
    held = _held(entry.shape, entry.dtype, None)
    return Need(
        entry.name, entry.shape, file, held, 4 * held * 8 // WEIGHT_BITS[entry.dtype] * 3, max(held, 1), 1, max(held, 1)
    )


def need_to_measure(target: Target, triplets: int, *, compared: bool) -> Need:
    """What the spectra of a target need; with ``compared`` also those of the tuned weight and of the difference."""
    need = need_to_factorize(replace(target, rank=min(triplets, *target.matrices[1:])))
    _, m, n = target.matrices
    # All singular values of a small matrix, or the products with probes for a large one.
    working = need.working + 24 * m * n
    if compared:
        # The tuned weight, in float32 at most, with its slices; the difference; the directions of both, and their products.
        tuned = 4 * need.held * 8 // WEIGHT_BITS[target.dtype]
        working += 3 * tuned + 4 * m * n + 32 * min(triplets, m, n) * (m + n)
    return replace(need, working=working, together=1)


def need_to_verify(target: TargetRecord, *, prove: bool = False) -> Need:
    """What recovery and measurement of a target need, and with ``prove`` its proof."""
    _, m, n = target.matrices
    need = need_to_fold(target)
    return replace(need, working=need.working + measuring_bytes(m, n, target.rank, prove=prove))


def need_to_project(target: TargetRecord) -> Need:
    """What the recovery of a target and its comparison with a tuned weight need."""
    need = need_to_fold(target)
    tuned = 4 * need.held * 8 // WEIGHT_BITS[target.dtype]  # float32 at most, put together from parts of its own size
    return replace(need, working=need.working + 2 * tuned)


def _held(shape: Sequence[int], dtype: str, at_a_time: int | None) -> int:
    """Bytes of a tensor that are read at a time: some matrices of a stack, else all of it, also for a slice."""
    held = math.prod(shape) * WEIGHT_BITS[dtype] // 8
    return held if at_a_time is None else held // shape[0] * min(shape[0], at_a_time)


def _copies(held: int, dtype: str, quantized: bool, sliced: bool) -> int:
    """Bytes of copies before the arithmetic: of quantized weights in float32, and of slices, twice, as they are cut out and
    made contiguous."""
    return (4 * held * 8 // WEIGHT_BITS[dtype] if quantized else 0) + (2 * held if sliced else 0)


def collected_bytes(targets: Sequence[Target], tensors: int) -> int:
    """Bytes that factorizing keeps besides weights: factors of stacks that are not finished, and the records of all targets.

    Args:
        targets: all of the run.
        tensors: how many tensors the model has.
    """
    factors: dict[str, int] = {}
    for target in targets:
        if target.matrices[0] > 1:
            # The factors of all slices, and those of one slice once more while they are put together.
            factors[target.tensor] = factors.get(target.tensor, target.factor_bytes) + target.factor_bytes
    return max(factors.values(), default=0) + known_bytes(targets, tensors)


def known_bytes(targets: Iterable[Target | TargetRecord], tensors: int) -> int:
    """Bytes of headers and records of so many tensors, and of the targets among them, besides weights and factors."""
    return tensors * _TENSOR_MEMORY + sum(
        _TARGET_MEMORY + target.matrices[0] * (_MATRIX_MEMORY + _DIRECTION_MEMORY * target.rank) for target in targets
    )
