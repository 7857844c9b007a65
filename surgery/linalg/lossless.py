"""Splitting a weight into residual, factors and correction, and putting it together again bit for bit.

A residual in the weight's own dtype cannot give the weight back: where the residual lies in a higher binade than
the weight, none of its values rounds to it (8-18 % of entries differ). So the difference between the weight and
its prediction from residual and factors is kept as well, counted in units in the last place: zero for some nine
entries in ten, and almost always one byte otherwise.

The prediction must come out the same on every device, thread count and library. Floating-point products do not,
so the factors are first rounded to integers short enough that every partial sum of their product is an integer
of at most 53 bits: float64 then computes it exactly, in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from surgery.linalg.correction import CorrectionReader, assemble, encode_block
from surgery.linalg.rounding import from_ordinals, ordinals, round_once
from surgery.memory import bytes_of

#: Entries that are worked on at a time: float64 temporaries of this size stay in a core's cache.
BLOCK_ENTRIES = 1 << 17
#: On a GPU fewer, larger steps are better.
DEVICE_BLOCK_ENTRIES = 1 << 24

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Factors:
    """The kept part of one matrix: ``U diag(s) V^T``.

    Attributes:
        U: float32 (m, k), orthonormal columns.
        s: float32 (k,), descending, not negative.
        V: float32 (n, k), orthonormal columns.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor

    def to(self, device: torch.device | str) -> Factors:
        return Factors(self.U.to(device), self.s.to(device), self.V.to(device))


class _Prediction:
    """Rows of ``U diag(s) V^T`` in fixed-point arithmetic, the same bits everywhere.

    With k columns the integers have ``b = (53 - log2 k) / 2`` bits (24 at k = 16), so the result is off by at
    most about ``k 2^-b max|U s| max|V|``: as good as float32 factors can be.
    """

    def __init__(self, factors: Factors) -> None:
        k = factors.s.numel()
        bits = (53 - math.ceil(math.log2(max(k, 1)))) // 2
        self._left, left_exponent = _to_integers(factors.U * factors.s, bits)
        right, right_exponent = _to_integers(factors.V, bits)
        self._right = right.T.contiguous()
        self._unit = 2.0 ** (left_exponent + right_exponent - 2 * bits)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """float64 (stop - start, n)."""
        return (self._left[start:stop] @ self._right).mul_(self._unit)


def _to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """``x`` as float64 integers of at most ``bits`` bits, and the exponent e such that x = integers 2^(e - bits)."""
    largest = x.abs().max().item() if x.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return torch.ldexp(x.double(), torch.tensor(bits - exponent, device=x.device)).round_(), exponent


def split(weight: torch.Tensor, factors: Factors, *, correct: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Residual of a weight, and the correction that makes it lossless.

    Args:
        weight: (m, n), bfloat16, float16 or float32, finite, on a device with float64.
        factors: on the same device.
        correct: whether to compute the correction.

    Returns:
        The residual ``round(W - U diag(s) V^T)``, same shape, dtype and device as ``weight``, and the encoded
        correction, uint8 (bytes,) on the CPU, a multiple of 8 bytes; None without ``correct``. ``join`` undoes it.
    """
    prediction = _Prediction(factors)
    residual = torch.empty_like(weight)

    def work(rows: slice) -> bytes:
        block = weight[rows]
        low_rank = prediction.rows(rows.start, rows.stop)
        residual[rows] = round_once(block.double().sub_(low_rank), weight.dtype)
        if not correct:
            return b""
        units = ordinals(block) - ordinals(_predict(residual[rows], low_rank))
        return encode_block(units.flatten().cpu().numpy())

    blocks = _row_blocks(weight)
    encoded = _for_each_block(work, blocks, weight.device)
    if not correct:
        return residual, None
    rows_per_block = blocks[0].stop if blocks else 0
    return residual, torch.frombuffer(assemble(encoded, rows_per_block), dtype=torch.uint8)


def join(
    residual: torch.Tensor, factors: Factors, correction: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight that ``split`` took apart, with its directions scaled.

    ``round(W + U diag(s (g - 1)) V^T)`` with W recovered exactly, in float64, rounded once. Without ``correction``
    W is only ``residual + U diag(s) V^T``, rounded together with the update.

    Args:
        residual: (m, n), the weight's dtype, on a device with float64.
        factors: on the same device.
        correction: as returned by ``split``, on the CPU, or None.
        scales: ``g``, float32 (k,), on the CPU; None for all ones, which gives W itself.

    Returns:
        (m, n), dtype and device of ``residual``.

    Raises:
        CorruptCorrection: the correction is damaged.
    """
    prediction = _Prediction(factors)
    m, n = residual.shape
    decoder = None if correction is None else CorrectionReader(bytes_of(correction), m, n, residual.element_size())
    update = None if scales is None else _Update(factors, scales)
    weight = torch.empty_like(residual)

    def work(rows: slice) -> None:
        block = residual[rows]
        low_rank = prediction.rows(rows.start, rows.stop)
        if decoder is None:
            total = block.double().add_(low_rank)
            weight[rows] = round_once(total if update is None else update.add_to(total, rows), weight.dtype)
            return
        difference = torch.from_numpy(decoder.block(rows.start)).reshape(block.shape).to(block.device)
        units = ordinals(_predict(block, low_rank)).add_(difference)
        exact = from_ordinals(units, weight.dtype)
        weight[rows] = exact if update is None else round_once(update.add_to(exact.double(), rows), weight.dtype)

    blocks = _blocks_of(m, decoder.rows_per_block) if decoder else _row_blocks(residual)
    _for_each_block(work, blocks, residual.device)
    return weight


def rescale(weight: torch.Tensor, factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """``round(W + U diag(s (g - 1)) V^T)`` from the weight itself: the fold of an overlay.

    Args and result as for ``join``; gives the same bits.
    """
    update = _Update(factors, scales)
    result = torch.empty_like(weight)

    def work(rows: slice) -> None:
        result[rows] = round_once(update.add_to(weight[rows].double(), rows), weight.dtype)

    _for_each_block(work, _row_blocks(weight), weight.device)
    return result


class _Update:
    """``U diag(s (g - 1)) V^T`` in float64, a few rows at a time."""

    def __init__(self, factors: Factors, scales: torch.Tensor) -> None:
        change = factors.s.double() * (scales.to(factors.s.device).double() - 1.0)
        self._left = factors.U.double() * change
        self._right = factors.V.double().T.contiguous()

    def add_to(self, block: torch.Tensor, rows: slice) -> torch.Tensor:
        return block.addmm_(self._left[rows], self._right)


def _predict(residual: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
    """The weight as residual and factors have it. Any rounding will do, as long as it is the same everywhere."""
    return low_rank.add_(residual).to(torch.float32).to(residual.dtype)


def _row_blocks(matrix: torch.Tensor) -> list[slice]:
    m, n = matrix.shape
    entries = BLOCK_ENTRIES if matrix.device.type == "cpu" else DEVICE_BLOCK_ENTRIES
    return _blocks_of(m, max(1, entries // max(n, 1)))


def _blocks_of(m: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def _for_each_block(work: Callable[[slice], _T], blocks: list[slice], device: torch.device) -> list[_T]:
    """Run ``work`` on each block; on a CPU with one single-threaded worker per core, so that temporaries stay in cache."""
    workers = min(len(blocks), torch.get_num_threads())
    if device.type != "cpu" or workers < 2:
        return [work(block) for block in blocks]
    with _one_thread_each(workers) as pool:
        return list(pool.map(work, blocks))


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
