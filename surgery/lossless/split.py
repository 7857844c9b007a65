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

import torch

from surgery.arithmetic import exact_arithmetic
from surgery.lossless.blocks import for_each, rows_at_a_time
from surgery.lossless.correction import CorrectionBlock, assemble
from surgery.lossless.factors import Factors
from surgery.lossless.parts import Parts, residual_error
from surgery.lossless.prediction import Prediction, working_dtype
from surgery.lossless.rounding import all_finite, bits_of, indices_of_others
from surgery.lossless.split_batch import split_batch
from surgery.memory import scratch
from surgery.timing import timed
from surgery.torch_threads import one_thread


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
    if weight.device.type != "cpu":
        whole = Factors(factors.U[None], factors.s[None], factors.V[None])
        found = split_batch(weight[None], whole, correct=correct, out=None if out is None else out[None])[0]
        with timed("correction"):
            return found.encoded()
    m, n = weight.shape
    residual = torch.empty_like(weight) if out is None else out
    with one_thread():
        prediction = Prediction(factors, weight.dtype)

    def worker(most: int) -> Callable[[slice], tuple[bytes, int]]:
        predict = prediction.worker(most)
        wide = scratch("split sums", (most, n), working_dtype(weight.dtype), weight.device)
        left, predicted = (scratch(f"split {part}", (most, n), weight.dtype, weight.device) for part in ("residual", "guess"))

        def work(rows: slice) -> tuple[bytes, int]:
            block, count = weight[rows], rows.stop - rows.start
            low_rank, sums = predict(rows), wide[:count]
            rounded = left[:count].copy_(sums.copy_(block).sub_(low_rank))
            if not all_finite(rounded):
                raise residual_error(sums.abs().max().item(), weight.dtype)
            guess = predicted[:count].copy_(sums.copy_(rounded).add_(low_rank))
            encoded = b""
            if correct:
                with timed("correction"):
                    differences = CorrectionBlock.of(bits_of(block).numpy().ravel(), bits_of(guess).numpy().ravel())
                    encoded, differing = differences.encoded(), len(differences.values)
            else:
                differing = len(indices_of_others(bits_of(block), bits_of(guess)))
            residual[rows] = rounded  # last: it may be the weight itself
            return encoded, differing

        return work

    blocks, differing = zip(*for_each(worker, m, rows_at_a_time(n), weight.device), strict=True)
    correction = assemble(list(blocks), rows_at_a_time(n)) if correct else None
    return Parts(residual, correction, sum(differing) / weight.numel())
