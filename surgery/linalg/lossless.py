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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from surgery.linalg.correction import CorrectionReader, assemble, encode_block
from surgery.linalg.rounding import from_ordinals, ordinals, round_once
from surgery.linalg.threads import one_thread_each
from surgery.memory import bytes_of

#: Entries that are worked on at a time: few enough for their float64 temporaries to stay in cache, enough for the threads
#: not to wait for the interpreter (2^15 to 2^21 measured; half of this costs a tenth, an eighth of it twice the time).
BLOCK_ENTRIES = 1 << 18
#: Blocks that a GPU works on at a time: fewer, larger steps are better there.
DEVICE_BLOCKS = 128

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

    def rows(self, rows: slice) -> torch.Tensor:
        """float64, the rows asked for, (r, n)."""
        return (self._left[rows] @ self._right).mul_(self._unit)


def _to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """``x`` as float64 integers of at most ``bits`` bits, and the exponent e such that x = integers 2^(e - bits)."""
    largest = x.abs().max().item() if x.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return torch.ldexp(x.double(), torch.tensor(bits - exponent, device=x.device)).round_(), exponent


def split(weight: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual of a weight, and the correction that makes it lossless.

    Args:
        weight: (m, n), bfloat16, float16 or float32, finite, on a device with float64.
        factors: on the same device.

    Returns:
        The residual ``round(W - U diag(s) V^T)``, same shape, dtype and device as ``weight``, and the encoded
        correction, uint8 (bytes,) on the CPU, a multiple of 8 bytes. ``join`` undoes it.
    """
    m, n = weight.shape
    prediction = _Prediction(factors)
    residual = torch.empty_like(weight)
    step = max(1, BLOCK_ENTRIES // n)

    def work(rows: slice) -> list[bytes]:
        block = weight[rows]
        low_rank = prediction.rows(rows)
        residual[rows] = round_once(block.double().sub_(low_rank), weight.dtype)
        units = (ordinals(block) - ordinals(_predict(residual[rows], low_rank))).cpu().numpy()
        return [encode_block(units[part].ravel()) for part in _slices(len(units), step)]

    encoded = [data for blocks in _for_each(work, m, step, weight.device) for data in blocks]
    return residual, torch.frombuffer(assemble(encoded, step), dtype=torch.uint8)


def join(
    residual: torch.Tensor, factors: Factors, correction: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight that ``split`` took apart, with its directions scaled.

    ``round(W + U diag(s (g - 1)) V^T)`` with W recovered exactly, in float64, rounded once.

    Args:
        residual: (m, n), the weight's dtype, on a device with float64.
        factors: on the same device.
        correction: as returned by ``split``, on the CPU.
        scales: ``g``, float32 (k,), on the CPU; None for all ones, which gives W itself.

    Returns:
        (m, n), dtype and device of ``residual``.

    Raises:
        CorruptCorrection: the correction is damaged in a way that shows.
    """
    m, n = residual.shape
    prediction = _Prediction(factors)
    reader = CorrectionReader(bytes_of(correction), m, n, residual.element_size())
    update = None if scales is None else _Update(factors, scales)
    weight = torch.empty_like(residual)
    step = reader.rows_per_block

    def work(rows: slice) -> None:
        block = residual[rows]
        parts = [torch.from_numpy(reader.block(first)) for first in range(rows.start, rows.stop, step)]
        difference = torch.cat(parts).reshape(block.shape).to(block.device)
        units = ordinals(_predict(block, prediction.rows(rows))).add_(difference)
        exact = from_ordinals(units, weight.dtype)
        weight[rows] = exact if update is None else round_once(update.add_to(exact.double(), rows), weight.dtype)

    _for_each(work, m, step, residual.device)
    return weight


def rescale(weight: torch.Tensor, factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """``round(W + U diag(s (g - 1)) V^T)`` from the weight itself: the fold of an overlay.

    Args and result as for ``join``.
    """
    update = _Update(factors, scales)
    result = torch.empty_like(weight)

    def work(rows: slice) -> None:
        result[rows] = round_once(update.add_to(weight[rows].double(), rows), weight.dtype)

    m, n = weight.shape
    _for_each(work, m, max(1, BLOCK_ENTRIES // n), weight.device)
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


def _slices(m: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def _for_each(work: Callable[[slice], _T], m: int, step: int, device: torch.device) -> list[_T]:
    """Run ``work`` on m rows, ``step`` at a time on a CPU and a larger multiple of it elsewhere.

    On a CPU with one single-threaded worker per core, so that temporaries stay in its cache.
    """
    if device.type != "cpu":
        return [work(rows) for rows in _slices(m, step * DEVICE_BLOCKS)]
    blocks = _slices(m, step)
    workers = min(len(blocks), torch.get_num_threads())
    if workers < 2:
        return [work(rows) for rows in blocks]
    with one_thread_each(workers) as pool:
        return list(pool.map(work, blocks))
