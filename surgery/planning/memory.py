"""How many workers a run has, the size of its windows, and how much memory that takes; upper estimates for each verb."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from surgery.engine.resources import Memory, Resources
from surgery.errors import OptionError
from surgery.files.disk import STREAM_MEMORY
from surgery.files.file_writer import CHUNK_BYTES
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

#: Bytes of a window, so that small matrices of one shape are solved together. Constants, and not what happens to be free: the
#: bits of a result may depend on which matrices share a batch.
CPU_WINDOW_BYTES = 8 << 20
GPU_WINDOW_BYTES = 512 << 20
#: Windows that are worked on at a time on a GPU: enough to copy, compute and encode at once.
_GPU_WORKERS = 4
#: The interpreter with torch loaded (220 MB), the libraries' own buffers, and what the allocator keeps of freed blocks.
_BASE_MEMORY = 400 << 20
#: Temporary tensors of the block-wise arithmetic, per worker.
_BLOCK_MEMORY = 32 << 20
#: Files that are written at a time for each device: two of the shard that is begun, and two of the one being finished.
_OPEN_FILES = 4
#: Upper estimate of the correction, bytes per weight (measured: 0.06-0.15).
CORRECTION_BYTES = 0.25
#: Bytes of headers and records for each tensor of a model, each target, each matrix of a target and each kept direction of it:
#: as objects, as parsed JSON, and as the text that is written. docs/performance.md has the measurements.
_TENSOR_MEMORY = 1024
_TARGET_MEMORY = 4096
_MATRIX_MEMORY = 3072
_DIRECTION_MEMORY = 288
#: Bytes for each target of a shard until the shard is finished: its hashes, and its record on the way to the journal.
_UNFINISHED_MEMORY = 8192
#: Bytes for each matrix of a window, besides its numbers: factors, correction and certificate are tensors of their own.
_RESULT_MEMORY = 12288
#: GPU memory of the context with its libraries, and of temporary tensors of the certificate and of the lossless arithmetic.
_GPU_BASE_MEMORY = 3 << 30


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that one target needs while it is worked on, in bytes.

    Attributes:
        key, shape: of the target and of its tensor, for messages.
        file: the weight file that it is in.
        held: bytes of it that are read at a time.
        working: further memory of a worker: of the host or, on a GPU, of the GPU.
        matrix: bytes of one matrix.
        count, stored: how many matrices it has, and the bytes of one of them in the file.
        together: how many matrices the workers of a CPU solve in one batch.
    """

    key: str
    shape: Sequence[int]
    file: str
    held: int
    working: int
    matrix: int
    count: int
    stored: int
    together: int = 1


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


def _held(shape: Sequence[int], dtype: str, at_a_time: int | None) -> int:
    """Bytes of a tensor that are read at a time: some matrices of a stack, else all of it, also for a slice."""
    held = math.prod(shape) * WEIGHT_BITS[dtype] // 8
    return held if at_a_time is None else held // shape[0] * min(shape[0], at_a_time)


def _copies(held: int, dtype: str, quantized: bool, sliced: bool) -> int:
    """Bytes of copies before the arithmetic: of quantized weights in float32, and of slices, twice, as they are cut out and
    made contiguous."""
    return (4 * held * 8 // WEIGHT_BITS[dtype] if quantized else 0) + (2 * held if sliced else 0)


def share_out(needs: Sequence[Need], resources: Resources, *, kept: int = 0) -> Memory:
    """As many workers as there are cores and memory for, with the size of windows and buffers.

    Args:
        needs: of all targets of the run.
        resources: what the run may use.
        kept: host memory that it needs besides, in bytes.

    Raises:
        OptionError: a strict limit is too small for one matrix at a time.
    """
    window = _window(needs, resources)
    most = max(1, resources.cores // resources.lanes)
    if resources.device == "cuda":
        most = min(most, _GPU_WORKERS)
    elif resources.device == "mps":
        most = 1
    choices = [_memory(needs, resources, workers, window, kept) for workers in range(most, 0, -1)]
    fits = [memory for memory in choices if _keeps_to(memory, resources)]
    least = choices[-1].peak_bytes
    if resources.strict and resources.memory is not None and least > resources.memory:
        largest = max(needs, key=lambda need: need.held + need.working)
        raise OptionError(
            "the memory allowed is too small for one matrix at a time",
            got=f"{resources.memory / 1e9:.2f} GB",
            expected=f"at least {math.ceil(least / 1e7) / 100:.2f} GB, for {largest.key} {list(largest.shape)}",
            hint="allow more with --max-memory",
        )
    return fits[0] if fits else choices[-1]


def _keeps_to(memory: Memory, resources: Resources) -> bool:
    return (resources.memory is None or memory.peak_bytes <= resources.memory) and (
        resources.device_memory is None or memory.device_bytes <= resources.device_memory
    )


def _window(needs: Sequence[Need], resources: Resources) -> int:
    if resources.device != "cuda":
        return CPU_WINDOW_BYTES
    window = GPU_WINDOW_BYTES
    if resources.device_memory is not None:
        while window > CPU_WINDOW_BYTES and _device_bytes(needs, 1, window) > resources.device_memory:
            window //= 2
    return window


def _memory(needs: Sequence[Need], resources: Resources, workers: int, window: int, kept: int) -> Memory:
    held = max([CHUNK_BYTES, *(need.held for need in needs)])
    unit = window + held  # a window ends with the piece that makes it reach its size
    # One for each worker, one being written, and the piece being read.
    buffers = (workers + 1) * unit + held
    work = max([0, *(need.working * (1 if resources.device == "cuda" else need.together) for need in needs)])
    # Results that wait to be written besides the window itself: corrections, where a weight has two bytes or more. What small
    # matrices take whatever their size is counted below.
    left = int(unit * CORRECTION_BYTES / 2) + _BLOCK_MEMORY
    files: dict[str, list[Need]] = {}
    for need in needs:
        files.setdefault(need.file, []).append(need)
    results = (workers + 1) * max((_most_in(unit, some) for some in files.values()), default=0) * _RESULT_MEMORY
    results += max(map(len, files.values()), default=0) * _UNFINISHED_MEMORY
    # With a GPU one working set on the host as well, for a matrix that does not fit into the memory of the GPU.
    host = workers * left + (work if resources.device == "cuda" else workers * work)
    peak = _BASE_MEMORY + resources.lanes * (buffers + host + results + _OPEN_FILES * STREAM_MEMORY) + kept
    return Memory(workers, window, buffers, peak, _device_bytes(needs, workers, window) if resources.device == "cuda" else 0)


def _device_bytes(needs: Sequence[Need], workers: int, window: int) -> int:
    # The matrices, once more as a batch, and what the arithmetic needs.
    one = max(max(1, window // need.matrix) * (2 * need.matrix + need.working) for need in needs)
    return _GPU_BASE_MEMORY + workers * one


def _most_in(window: int, needs: Sequence[Need]) -> int:
    """The most matrices of one file that a window of so many bytes can hold: its smallest ones."""
    most = 0
    for need in sorted(needs, key=lambda need: need.stored):
        taken = min(need.count, window // need.stored)
        if taken == 0:
            break
        most += taken
        window -= taken * need.stored
    return most


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
