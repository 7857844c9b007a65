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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from surgery.arithmetic import exact_arithmetic
from surgery.errors import WeightError
from surgery.lossless.blocks import for_each, row_slices, rows_at_a_time
from surgery.lossless.correction import assemble, differences, encode_block
from surgery.lossless.factors import Factors
from surgery.lossless.prediction import Prediction, working_dtype
from surgery.lossless.rounding import all_finite, bits_of, flipped, indices_of_others
from surgery.memory import scratch
from surgery.timing import timed
from surgery.torch_threads import one_thread


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
    step = rows_at_a_time(n)
    with one_thread():
        prediction = Prediction(factors, weight.dtype)

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
                encoded = [(b"", len(indices_of_others(bits_of(block), bits_of(guess))))]
            residual[rows] = rounded  # last: it may be the weight itself
            return encoded

        return work

    blocks = [block for some in for_each(worker, m, step, weight.device) for block in some]
    inexact = sum(count for _, count in blocks) / weight.numel()
    if not correct:
        return Parts(residual, None, inexact)
    return Parts(residual, torch.frombuffer(assemble([data for data, _ in blocks], step), dtype=torch.uint8), inexact)


def _encoded(exact: torch.Tensor, guess: torch.Tensor, step: int) -> list[tuple[bytes, int]]:
    """For each ``step`` rows of (r, n): the encoded differences of ``guess`` from ``exact``, and how many there are."""
    if exact.device.type == "cpu":
        found = [differences(exact[rows].numpy().ravel(), guess[rows].numpy().ravel()) for rows in row_slices(len(exact), step)]
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
    for rows in row_slices(len(exact), step):
        block = mask[rows].ravel()
        last = first + int(np.count_nonzero(block))
        found.append((block, units[first:last]))
        first = last
    return found
