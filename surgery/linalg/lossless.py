"""Splitting a weight into residual, factors and correction, and putting it together again bit for bit.

A residual in the weight's own dtype cannot give the weight back: where the residual lies in a higher binade than
the weight, none of its values rounds to it (8-18 % of entries differ). So the difference between the weight and
its prediction from residual and factors is kept as well, counted in units in the last place: zero for some nine
entries in ten, and almost always one byte otherwise.

The prediction must come out the same on every device, thread count and library. Floating-point products do not,
so the factors are first rounded to integers short enough that every partial sum of their product is an integer
of at most 53 bits: float64 then computes it exactly, in whatever order. Everything after the product is done in
the working precision, float32 for two-byte weights and float64 for float32 ones, one correctly rounded operation
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from surgery.arithmetic import exact_arithmetic
from surgery.errors import WeightError
from surgery.linalg.correction import CorrectionReader, assemble, differences, encode_block
from surgery.linalg.precision import full_precision
from surgery.linalg.rounding import all_finite, bits_of, flipped, round_once, times_power_of_two
from surgery.memory import bytes_of, scratch
from surgery.timing import timed
from surgery.torch_threads import one_thread, one_thread_each

#: Entries that are worked on at a time: few enough for their temporaries to stay in cache, enough for the threads not to
#: wait for the interpreter (2^15 to 2^22 measured: below 2^18 and above 2^20 it takes up to twice as long).
BLOCK_ENTRIES = 1 << 19
#: Blocks that a GPU works on at a time: fewer, larger steps are better there.
DEVICE_BLOCKS = 64

#: Beyond this rank the bound on float32 sums leaves too many entries in doubt (3 % here).
_MOST_IN_FLOAT32 = {torch.bfloat16: 64, torch.float16: 16, torch.float32: 0}
#: How many entries in doubt are computed in float64 at a time.
_DOUBTFUL_AT_ONCE = 1 << 15

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Factors:
    """The kept part of one matrix, ``U diag(s) V^T``; for a stack of B matrices each tensor has a leading dimension B.

    Attributes:
        U: float32 (m, k), orthonormal columns.
        s: float32 (k,), descending, not negative.
        V: float32 (n, k), orthonormal columns.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor

    def to(self, device: torch.device | str) -> Factors:
        """The factors on another device.

        Args:
            device: such as ``cpu`` or ``cuda``.
        """
        return Factors(self.U.to(device), self.s.to(device), self.V.to(device))


@dataclass(frozen=True, slots=True)
class Addition:
    """A low-rank matrix ``left right^T`` to add to a weight along with its scaled directions, such as a LoRA update.

    Attributes:
        left: float32 or float64 (m, r).
        right: float32 (n, r).
    """

    left: torch.Tensor
    right: torch.Tensor

    def to(self, device: torch.device | str) -> Addition:
        return Addition(self.left.to(device), self.right.to(device))


@dataclass(frozen=True, slots=True)
class Parts:
    """What ``split`` makes of a weight besides its factors.

    Attributes:
        residual: ``round(W - U diag(s) V^T)``, shape, dtype and device of the weight.
        correction: encoded, uint8 (bytes,) on the CPU, a multiple of 8 bytes; None if ``split`` was told to make none.
        inexact: share of the entries that residual and factors alone do not give back exactly.
    """

    residual: torch.Tensor
    correction: torch.Tensor | None
    inexact: float


@exact_arithmetic()
def split(weight: torch.Tensor, factors: Factors, *, correct: bool = True, out: torch.Tensor | None = None) -> Parts:
    """Take a weight apart so that ``join`` puts it together again bit for bit.

    Args:
        weight: (m, n), bfloat16, float16 or float32, finite, on a device with float64.
        factors: on the same device.
        correct: whether to encode what residual and factors alone do not give back.
        out: where the residual goes, like the weight; may be the weight itself.

    Raises:
        WeightError: the residual is beyond the range of the dtype. The contents of ``out`` are invalid then.
    """
    m, n = weight.shape
    residual = torch.empty_like(weight) if out is None else out
    step = _step(n)
    with one_thread():
        prediction = _Prediction(factors, weight.dtype)

    def worker(most: int) -> Callable[[slice], list[tuple[bytes, int]]]:
        predict = prediction.worker(most)
        wide = scratch("split sums", (most, n), working_dtype(weight.dtype), weight.device)
        left, predicted = (scratch(f"split {part}", (most, n), weight.dtype, weight.device) for part in ("residual", "guess"))

        def work(rows: slice) -> list[tuple[bytes, int]]:
            block, count = weight[rows], rows.stop - rows.start
            low_rank, sums = predict(rows), wide[:count]
            rounded = left[:count].copy_(sums.copy_(block).sub_(low_rank))
            if not all_finite(rounded):
                raise WeightError(
                    f"its residual is beyond the range of {str(weight.dtype).removeprefix('torch.')}",
                    got=f"up to {sums.abs().max().item():.6g}",
                    expected=f"at most {torch.finfo(weight.dtype).max:.6g}",
                )
            guess = predicted[:count].copy_(sums.copy_(rounded).add_(low_rank))
            if correct:
                with timed("correction"):
                    encoded = _encoded(bits_of(block), bits_of(guess), step)
            else:
                encoded = [(b"", len(_differing(bits_of(block), bits_of(guess))))]
            residual[rows] = rounded  # last: it may be the weight itself
            return encoded

        return work

    blocks = [block for some in _for_each(worker, m, step, weight.device) for block in some]
    inexact = sum(count for _, count in blocks) / weight.numel()
    if not correct:
        return Parts(residual, None, inexact)
    return Parts(residual, torch.frombuffer(assemble([data for data, _ in blocks], step), dtype=torch.uint8), inexact)


def _encoded(exact: torch.Tensor, guess: torch.Tensor, step: int) -> list[tuple[bytes, int]]:
    """For each ``step`` rows of (r, n): the encoded differences of ``guess`` from ``exact``, and how many there are."""
    if exact.device.type == "cpu":
        found = [differences(exact[rows].numpy().ravel(), guess[rows].numpy().ravel()) for rows in _slices(len(exact), step)]
    else:
        found = _differences_by_device(exact, guess, step)
    return [(encode_block(differs, values), len(values)) for differs, values in found]


def _differences_by_device(
    exact: torch.Tensor, guess: torch.Tensor, step: int
) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]]:
    """``differences`` of each block, computed on the device of the tensors; only the results are copied to the host."""
    differ = exact != guess
    units = (flipped(exact[differ]) - flipped(guess[differ])).cpu().numpy()
    mask = differ.cpu().numpy()
    found, first = [], 0
    for rows in _slices(len(exact), step):
        block = mask[rows].ravel()
        last = first + int(np.count_nonzero(block))
        found.append((block, units[first:last]))
        first = last
    return found


@exact_arithmetic()
def join(
    residual: torch.Tensor,
    factors: Factors,
    correction: torch.Tensor,
    scales: torch.Tensor | None = None,
    addition: Addition | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight that ``split`` took apart, with its directions scaled.

    ``round(W + U diag(s (g - 1)) V^T)`` with W recovered exactly, rounded once.

    Args:
        residual: (m, n), the weight's dtype, on a device with float64.
        factors: on the same device.
        correction: as returned by ``split``, on the CPU.
        scales: ``g``, float32 (k,), on the CPU; None for all ones, which gives W itself.
        addition: added before the rounding, on the device of the residual.
        out: where the result goes, like the residual; may be the residual itself.

    Returns:
        (m, n), dtype and device of ``residual``.

    Raises:
        CorruptCorrection: the correction cannot be decoded. Not every damage is noticed: check the hash of its file.
    """
    return _joined(residual, factors, correction, scales, addition, out)[0]


@exact_arithmetic()
def recover(
    residual: torch.Tensor, factors: Factors, correction: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The weight that ``split`` took apart, and the share of entries that residual and factors alone do not give exactly.

    Arguments and errors are those of ``join``.
    """
    weight, moved = _joined(residual, factors, correction, None, None, out)
    return weight, moved / weight.numel()


def _joined(
    residual: torch.Tensor,
    factors: Factors,
    correction: torch.Tensor,
    scales: torch.Tensor | None,
    addition: Addition | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """The result of ``join``, and how many entries the correction has changed."""
    m, n = residual.shape
    reader = CorrectionReader(bytes_of(correction), m, n, residual.element_size())
    step = reader.rows_per_block
    with one_thread():
        prediction = _Prediction(factors, residual.dtype)
        update = _update(factors, scales, addition, residual.dtype)
    weight = torch.empty_like(residual) if out is None else out

    def worker(most: int) -> Callable[[slice], int]:
        predict = prediction.worker(most)
        wide = scratch("join sums", (most, n), working_dtype(residual.dtype), residual.device)
        apply = None if update is None else update.worker(most)

        def work(rows: slice) -> int:
            sums = wide[: rows.stop - rows.start].copy_(residual[rows]).add_(predict(rows))
            block, moved = weight[rows].copy_(sums), 0
            for first in range(rows.start, rows.stop, step):
                positions, units = reader.block(first)
                _correct(bits_of(weight[first : first + step]).view(-1), positions, units)
                moved += int(np.count_nonzero(units))
            if apply is not None:
                apply(block, rows)
            return moved

        return work

    with full_precision(residual.device):
        return weight, sum(_for_each(worker, m, step, residual.device))


def _correct(bits: torch.Tensor, positions: npt.NDArray[np.int64], units: npt.NDArray[Any]) -> None:
    """Change the floats with these bits, (entries,), in place: those at ``positions`` by ``units`` in the last place."""
    if bits.device.type == "cpu":
        array = bits.numpy()  # more than twice as fast as torch here
        array[positions] = flipped(flipped(array[positions]) + units)
        return
    where, by = (torch.from_numpy(part).to(bits.device) for part in (positions, units))
    bits[where] = flipped(flipped(bits[where]) + by)


@exact_arithmetic()
def rescale(
    weight: torch.Tensor,
    factors: Factors | None,
    scales: torch.Tensor | None,
    addition: Addition | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``round(W + U diag(s (g - 1)) V^T)`` from the weight itself: the fold of an overlay.

    Arguments and result are those of ``join``; ``factors`` may be None if there is an addition.
    """
    with one_thread():
        update = _update(factors, scales, addition, weight.dtype)
    return _updated(weight, update, out)


@exact_arithmetic()
def approximate(
    residual: torch.Tensor,
    factors: Factors,
    scales: torch.Tensor | None = None,
    addition: Addition | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``round(R + U diag(s g) V^T)``: the fold of a residual without a correction.

    Arguments and result are those of ``join``. With scales of 1 it gives the weight up to the rounding of the residual.
    """
    with one_thread():
        s = factors.s.double()
        kept = _scaled(factors, s if scales is None else s * scales.to(s))
        update = _Update(kept if addition is None else both(kept, addition), residual.dtype)
    return _updated(residual, update, out)


def _update(
    factors: Factors | None, scales: torch.Tensor | None, addition: Addition | None, dtype: torch.dtype
) -> _Update | None:
    """The update of a weight by scales and an addition; None if there is neither."""
    if factors is None or scales is None:
        return None if addition is None else _Update(addition, dtype)
    change = _scaled(factors, _change(factors, scales))
    return _Update(change if addition is None else both(change, addition), dtype)


def _scaled(factors: Factors, values: torch.Tensor) -> Addition:
    """``U diag(values) V^T`` for values float64 (k,)."""
    return Addition(factors.U.double() * values, factors.V)


def both(first: Addition, second: Addition) -> Addition:
    """The sum of two additions, as one."""
    return Addition(
        torch.cat([first.left.double(), second.left.double()], dim=1), torch.cat([first.right, second.right], dim=1)
    )


def _updated(weight: torch.Tensor, update: _Update | None, out: torch.Tensor | None) -> torch.Tensor:
    if update is None:
        return weight
    m, n = weight.shape
    result = torch.empty_like(weight) if out is None else out

    def worker(most: int) -> Callable[[slice], None]:
        apply = update.worker(most)
        return lambda rows: apply(result[rows] if result is weight else result[rows].copy_(weight[rows]), rows)

    with full_precision(weight.device):
        _for_each(worker, m, _step(n), weight.device)
    return result


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic after the exact product, for a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float32 else torch.float32


class _Prediction:
    """``U diag(s) V^T`` in fixed-point arithmetic, rounded to the working precision: the same bits everywhere.

    With k columns the integers have ``b = (53 - log2 k) / 2`` bits (24 at k = 16), so the product is off by at
    most about ``k 2^-b max|U s| max|V|``: as good as float32 factors can be.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        k = factors.s.numel()
        bits = (53 - math.ceil(math.log2(max(k, 1)))) // 2
        self._left, left_exponent = _to_integers(factors.U * factors.s, bits)
        right, right_exponent = _to_integers(factors.V, bits)
        self._left = times_power_of_two(self._left, left_exponent + right_exponent - 2 * bits)
        self._right = right.T.contiguous()
        self._dtype = working_dtype(dtype)

    def worker(self, most: int) -> Callable[[slice], torch.Tensor]:
        """A function that predicts rows: (r, n), r <= ``most``, in the working dtype, valid until it is called again."""
        shape, device = (most, self._right.shape[1]), self._left.device
        product = scratch("exact product", shape, torch.float64, device)
        rounded = scratch("rounded product", shape, self._dtype, device)

        def predict(rows: slice) -> torch.Tensor:
            count = rows.stop - rows.start
            exact = torch.mm(self._left[rows], self._right, out=product[:count])
            return exact if self._dtype == torch.float64 else rounded[:count].copy_(exact)

        return predict


def _to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """``x`` as float64 integers of at most ``bits`` bits, and the exponent e such that x = integers 2^(e - bits)."""
    largest = x.abs().max().item() if x.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return times_power_of_two(x.double(), bits - exponent).round_(), exponent


def _change(factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """``s (g - 1)`` in float64."""
    return factors.s.double() * (scales.to(factors.s.device).double() - 1.0)


class _Update:
    """``W + left right^T``, rounded once.

    Two-byte weights are computed in float32 first, with a bound on the error. If both ends of that interval round to
    the same number, so does the exact value; the few entries where they do not are computed in float64.
    """

    def __init__(self, change: Addition, dtype: torch.dtype) -> None:
        self._left = change.left.double()
        self._right = change.right.double()
        self._dtype = dtype
        k = change.left.shape[1]
        self._in_float64 = k > _MOST_IN_FLOAT32[dtype]
        if self._in_float64:
            self._right_rows = self._right.T.contiguous()
            return
        self._left_single, self._right_single = self._left.float(), change.right.T.contiguous()
        # Each product and each sum is off by 2^-24 of its size, of which there are k + 2; twice that to be safe.
        bound = self._left.norm(dim=1) * self._right.norm(dim=1).max() * (2 * (k + 2) * 2.0**-24)
        self._error = bound.float()[:, None].clamp_(min=1e-40)

    def _exactly(self, block: torch.Tensor, rows: slice, entries: torch.Tensor) -> torch.Tensor:
        """Updated entries of rows (r, n), computed in float64; ``entries`` are indices into the flattened rows."""
        n = block.shape[1]
        i, j = entries.div(n, rounding_mode="floor"), entries % n
        sums = block.view(-1)[entries].double() + (self._left[rows][i] * self._right[j]).sum(dim=1)
        return round_once(sums, self._dtype)

    def worker(self, most: int) -> Callable[[torch.Tensor, slice], None]:
        """A function that updates the given rows (r, n) of the weight in place, r <= ``most``."""
        n = len(self._right)
        if self._in_float64:
            wide = scratch("update sums", (most, n), torch.float64, self._left.device)

            def exactly(block: torch.Tensor, rows: slice) -> None:
                sums = wide[: len(block)].copy_(block).addmm_(self._left[rows], self._right_rows)
                block.copy_(round_once(sums, self._dtype))

            return exactly
        device = self._left.device
        single, reach, end = (
            scratch(f"update {part}", (most, n), torch.float32, device) for part in ("product", "reach", "end")
        )
        low, high = (scratch(f"update {part}", (most, n), self._dtype, device) for part in ("low", "high"))

        def update(block: torch.Tensor, rows: slice) -> None:
            count = len(block)
            sums = torch.mm(self._left_single[rows], self._right_single, out=single[:count]).add_(end[:count].copy_(block))
            error = torch.abs(sums, out=reach[:count]).mul_(2.0**-22).add_(self._error[rows])
            low[:count] = torch.sub(sums, error, out=end[:count])
            high[:count] = sums.add_(error)
            doubtful = _differing(bits_of(low[:count]), bits_of(high[:count]))
            exact = [self._exactly(block, rows, some) for some in torch.split(doubtful, _DOUBTFUL_AT_ONCE)]
            block.copy_(low[:count])
            if len(doubtful):
                block.view(-1)[doubtful] = torch.cat(exact)

        return update


def _differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two integer tensors differ, as indices into the flattened ones."""
    if a.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(a.numpy() != b.numpy()))  # many times faster than torch on a CPU
    return (a != b).view(-1).nonzero().flatten()


def _step(n: int) -> int:
    return max(1, BLOCK_ENTRIES // n)


def _slices(m: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def _for_each(worker: Callable[[int], Callable[[slice], _T]], m: int, step: int, device: torch.device) -> list[_T]:
    """Process m rows, ``step`` at a time on a CPU and a multiple of it elsewhere; returns the results in order.

    On a CPU there is one single-threaded worker per core. ``worker(most)`` makes its function, with its own buffers for
    up to ``most`` rows: fresh memory for every block would cost as much as the arithmetic.
    """
    if device.type != "cpu":
        work = worker(min(m, step * DEVICE_BLOCKS))
        return [work(rows) for rows in _slices(m, step * DEVICE_BLOCKS)]
    blocks = _slices(m, step)
    workers = min(len(blocks), torch.get_num_threads())
    if workers < 2:
        with one_thread():
            work = worker(min(m, step))
            return [work(rows) for rows in blocks]
    results: list[_T | None] = [None] * len(blocks)
    waiting = iter(enumerate(blocks))

    def run(_: int) -> None:
        work = worker(step)
        for i, rows in waiting:
            results[i] = work(rows)

    with one_thread_each(workers) as pool:
        list(pool.map(run, range(workers)))
    return results  # type: ignore[return-value]  # every block has been taken by somebody
