"""A weight with an update, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from surgery.arithmetic import exact_arithmetic
from surgery.lossless.blocks import for_each, rows_at_a_time
from surgery.lossless.factors import Addition, Factors, both
from surgery.lossless.rounding import bits_of, indices_of_others, round_once
from surgery.memory import scratch
from surgery.precision import full_precision
from surgery.torch_threads import one_thread

#: Beyond this rank the bound on float32 sums leaves too many entries in doubt (3 % here).
_MOST_IN_FLOAT32 = {torch.bfloat16: 64, torch.float16: 16, torch.float32: 0}
#: How many entries in doubt are computed in float64 at a time.
_DOUBTFUL_AT_ONCE = 1 << 15


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
        update = update_of(factors, scales, addition, weight.dtype)
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
        kept = scaled(factors, s if scales is None else s * scales.to(s))
        update = OneRounding(kept if addition is None else both(kept, addition), residual.dtype)
    return _updated(residual, update, out)


def update_of(
    factors: Factors | None, scales: torch.Tensor | None, addition: Addition | None, dtype: torch.dtype
) -> OneRounding | None:
    """The update of a weight by scales and an addition; None if there is neither."""
    if factors is None or scales is None:
        return None if addition is None else OneRounding(addition, dtype)
    change = scaled(factors, _change(factors, scales))
    return OneRounding(change if addition is None else both(change, addition), dtype)


def scaled(factors: Factors, values: torch.Tensor) -> Addition:
    """``U diag(values) V^T`` for values float64 (k,)."""
    return Addition(factors.U.double() * values, factors.V)


def _change(factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """``s (g - 1)`` in float64."""
    return factors.s.double() * (scales.to(factors.s.device).double() - 1.0)


def _updated(weight: torch.Tensor, update: OneRounding | None, out: torch.Tensor | None) -> torch.Tensor:
    if update is None:
        return weight
    m, n = weight.shape
    result = torch.empty_like(weight) if out is None else out

    def worker(most: int) -> Callable[[slice], None]:
        apply = update.worker(most)
        return lambda rows: apply(result[rows] if result is weight else result[rows].copy_(weight[rows]), rows)

    with full_precision(weight.device):
        for_each(worker, m, rows_at_a_time(n), weight.device)
    return result


class OneRounding:
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
            doubtful = indices_of_others(bits_of(low[:count]), bits_of(high[:count]))
            exact = [self._exactly(block, rows, some) for some in torch.split(doubtful, _DOUBTFUL_AT_ONCE)]
            block.copy_(low[:count])
            if len(doubtful):
                block.view(-1)[doubtful] = torch.cat(exact)

        return update
