"""A weight with an update, rounded once, and what the rounding has kept of the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from surgery.arithmetic import exact_arithmetic
from surgery.lossless.blocks import for_each, rows_at_a_time
from surgery.lossless.directions import bases_of
from surgery.lossless.factors import Addition, Factors, between, both, inner_change
from surgery.lossless.grids import DtypeGrid, Grid
from surgery.lossless.kept import NOTHING_ASKED, Kept
from surgery.lossless.rounding import bits_of, indices_of_others, round_once
from surgery.lossless.search import round_in_directions
from surgery.memory import scratch
from surgery.precision import full_precision
from surgery.torch_threads import one_thread

#: How an updated weight is rounded: each entry to the nearest number, or so that the update arrives in its directions.
Rounding = Literal["nearest", "directions"]


@dataclass(frozen=True, slots=True)
class Written:
    """How and where an updated weight is written.

    Attributes:
        out: where the result goes, like the weight; may be the weight itself. None for new memory.
        rounding: of the update; None for nearest where that keeps 99.5 % of it, by a sample, and otherwise in its directions.
            Float32 is rounded to nearest, unless there is a grid.
        grid: what is rounded to; None for the numbers of the dtype. With a grid the weight is float32, and rounding to nearest
            is first to float32, then to the grid.
    """

    out: torch.Tensor | None = None
    rounding: Rounding | None = "nearest"
    grid: Grid | None = None


#: To nearest, in new memory.
NEAREST = Written()

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
    written: Written = NEAREST,
) -> tuple[torch.Tensor, Kept]:
    """``round(W + U diag(s (g - 1)) V^T)`` from the weight itself, for a core as ``join`` has it: the fold of an overlay.

    Rounded to nearest, each entry is the number nearest to the exact sum: the same bytes everywhere. Rounded in directions (see
    ``search``), the bytes do not depend on the number of threads. For scales or a core alone they are the same on every device;
    with an addition they follow the last bits of LAPACK on the CPU, and are the same wherever these are.

    Arguments and result are those of ``join``; ``factors`` may be None if there is an addition.
    """
    out, grid = written.out, written.grid
    bases = None
    if written.rounding != "nearest" and (grid is not None or weight.dtype != torch.float32):
        with one_thread():
            bases = bases_of(factors, scales, addition)
    if bases is not None:
        result = torch.empty_like(weight) if out is None else out
        to = DtypeGrid(weight.dtype) if grid is None else grid
        kept = round_in_directions(weight, bases, to, result, only_if_needed=written.rounding is None)
        if kept is not None:
            return result, kept
    with one_thread():
        update = update_of(factors, scales, addition, weight.dtype, grid)
    return (weight, NOTHING_ASKED) if update is None else _updated(weight, update, out)


@exact_arithmetic()
def approximate(
    residual: torch.Tensor,
    factors: Factors,
    scales: torch.Tensor | None = None,
    addition: Addition | None = None,
    written: Written = NEAREST,
) -> tuple[torch.Tensor, Kept]:
    """``round(R + U diag(s g) V^T)``, or for a core with what ``join`` adds: the fold of a residual without a correction.

    Arguments and result are those of ``join``. Untouched it gives the weight up to the rounding of the residual. Unless it is
    rounded to nearest, that weight is what the update is added to.
    """
    with one_thread():
        s = factors.s.double()
        changes = scales is not None or addition is not None
        recovers = changes and written.rounding != "nearest"
        kept = between(factors, s if scales is None or recovers else _inner(factors, scales))
        if recovers:
            update = OneRounding(kept, residual.dtype, None)
        else:
            whole = kept if addition is None else both(kept, addition)
            update = OneRounding(whole, residual.dtype, change_of(factors, scales, addition))
    result, of_it = _updated(residual, update, written.out)
    return rescale(result, factors, scales, addition, replace(written, out=result)) if recovers else (result, of_it)


def _inner(factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """What stands between U and V^T with scales, float64: (k,), or (k, k) for a core."""
    s = factors.s.double()
    return s * scales.to(s) if scales.ndim == 1 else torch.diag(s) + inner_change(factors, scales)


def change_of(factors: Factors | None, scales: torch.Tensor | None, addition: Addition | None) -> Addition | None:
    """What scales and an addition change, as one; None if there is neither."""
    if factors is None or scales is None:
        return addition
    change = between(factors, inner_change(factors, scales))
    return change if addition is None else both(change, addition)


def update_of(
    factors: Factors | None,
    scales: torch.Tensor | None,
    addition: Addition | None,
    dtype: torch.dtype,
    grid: Grid | None = None,
) -> OneRounding | None:
    """The update of a weight by scales and an addition; None if there is neither."""
    change = change_of(factors, scales, addition)
    return None if change is None else OneRounding(change, dtype, change, grid)


def _updated(weight: torch.Tensor, update: OneRounding, out: torch.Tensor | None) -> tuple[torch.Tensor, Kept]:
    m, n = weight.shape
    result = torch.empty_like(weight) if out is None else out

    def worker(most: int) -> Callable[[slice], torch.Tensor | None]:
        apply = update.worker(most)
        return lambda rows: apply(result[rows] if result is weight else result[rows].copy_(weight[rows]), rows)

    with full_precision(weight.device):
        return result, update.kept(for_each(worker, m, rows_at_a_time(n), weight.device))


class OneRounding:
    """``factor * W + left right^T``, rounded once.

    Two-byte weights are computed in float32 first, with a bound on the error. If both ends of that interval round to
    the same number, so does the exact value; the few entries where they do not are computed in float64.

    Args:
        change: what is added.
        dtype: of the weight.
        trained: the part of it of which it is measured what arrives: ``change`` itself for all of it, None for nothing.
        grid: what float32 numbers are rounded to after; None for nothing.
    """

    def __init__(self, change: Addition, dtype: torch.dtype, trained: Addition | None, grid: Grid | None = None) -> None:
        self._grid = grid
        self._left = change.left.double()
        self._right = change.right.double()
        self._factor = change.factor
        self._dtype = dtype
        self._asked = 0.0 if trained is None or trained.factor is not None else _square(trained)
        # Float32 keeps of an update what is worth the name.
        self._measured = trained is not None and (dtype != torch.float32 or trained.factor is not None or grid is not None)
        k = change.left.shape[1]
        self._in_float64 = k > _MOST_IN_FLOAT32[dtype] or self._factor is not None
        single = torch.float64 if self._in_float64 else torch.float32
        self._trained: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._measured and trained is not None and trained is not change:
            self._trained = trained.left.to(single), trained.right.T.to(single).contiguous()
        if self._in_float64:
            self._right_rows = self._right.T.contiguous()
            return
        self._left_single, self._right_single = self._left.float(), change.right.T.contiguous()
        # Each product and each sum is off by 2^-24 of its size, of which there are k + 2; twice that to be safe.
        bound = self._left.norm(dim=1) * self._right.norm(dim=1).max() * (2 * (k + 2) * 2.0**-24)
        self._error = bound.float()[:, None].clamp_(min=1e-40)

    def kept(self, parts: Iterable[torch.Tensor | None]) -> Kept:
        """What was kept, of what the functions of ``worker`` have returned."""
        sums = [(0.0, 0.0), *(part.tolist() for part in parts if part is not None)]
        beyond, more = (math.fsum(column) for column in zip(*sums, strict=True))
        asked = self._asked + more
        return Kept(asked, self._asked + beyond, None, asked) if asked else NOTHING_ASKED

    def _exactly(self, block: torch.Tensor, rows: slice, entries: torch.Tensor) -> torch.Tensor:
        """Updated entries of rows (r, n), computed in float64; ``entries`` are indices into the flattened rows."""
        n = block.shape[1]
        i, j = entries.div(n, rounding_mode="floor"), entries % n
        sums = block.view(-1)[entries].double() + (self._left[rows][i] * self._right[j]).sum(dim=1)
        return round_once(sums, self._dtype)

    def worker(self, most: int) -> Callable[[torch.Tensor, slice], torch.Tensor | None]:
        """A function that updates the given rows (r, n) of the weight in place, r <= ``most``.

        It returns what is added to the update's square for what has arrived, and to that square: (2,); None where nothing is.
        """
        return self._worker_in_float64(most) if self._in_float64 else self._worker(most)

    def _worker_in_float64(self, most: int) -> Callable[[torch.Tensor, slice], torch.Tensor | None]:
        n, device = len(self._right), self._left.device
        wide, low_rank = (scratch(f"update {part}", (most, n), torch.float64, device) for part in ("sums", "product"))

        def exactly(block: torch.Tensor, rows: slice) -> torch.Tensor | None:
            count = len(block)
            sums = wide[:count].copy_(block)
            if self._factor is not None:
                factor = self._factor if len(self._factor) == 1 else self._factor[rows]
                before, sums = sums, (sums * factor).addmm_(self._left[rows], self._right_rows)
                self._round(sums, block, rows)
                return torch.stack([((block - before) * sums.sub_(before)).sum(), sums.square().sum()])
            if not self._measured:
                sums.addmm_(self._left[rows], self._right_rows)
                self._round(sums, block, rows)
                return None
            change = torch.mm(self._left[rows], self._right_rows, out=low_rank[:count])
            sums.add_(change)
            self._round(sums, block, rows)
            if self._trained is not None:
                change = torch.mm(self._trained[0][rows], self._trained[1], out=change)
            return _beyond(sums.sub_(block), change)

        return exactly

    def _round(self, sums: torch.Tensor, block: torch.Tensor, rows: slice) -> None:
        """Round float64 sums (r, n) into rows of the weight."""
        block.copy_(round_once(sums, self._dtype))
        if self._grid is not None:
            block.copy_(self._grid.nearest(block, rows))

    def _worker(self, most: int) -> Callable[[torch.Tensor, slice], torch.Tensor | None]:
        n, device = len(self._right), self._left.device
        product, single, reach, end = (
            scratch(f"update {part}", (most, n), torch.float32, device) for part in ("product", "sums", "reach", "end")
        )
        low, high = (scratch(f"update {part}", (most, n), self._dtype, device) for part in ("low", "high"))

        def update(block: torch.Tensor, rows: slice) -> torch.Tensor | None:
            count = len(block)
            change = torch.mm(self._left_single[rows], self._right_single, out=product[:count])
            sums = torch.add(change, end[:count].copy_(block), out=single[:count])
            error = torch.add(self._error[rows], torch.abs(sums, out=reach[:count]), alpha=2.0**-22, out=reach[:count])
            low[:count] = torch.sub(sums, error, out=end[:count])
            high[:count] = error.add_(sums)
            doubtful = indices_of_others(bits_of(low[:count]), bits_of(high[:count]))
            exact = [self._exactly(block, rows, some) for some in torch.split(doubtful, _DOUBTFUL_AT_ONCE)]
            block.copy_(low[:count])
            if len(doubtful):
                block.view(-1)[doubtful] = torch.cat(exact)
            if not self._measured:
                return None
            if self._trained is not None:
                change = torch.mm(self._trained[0][rows], self._trained[1], out=change)
            return _beyond(sums.sub_(end[:count].copy_(block)), change)

        return update


def _beyond(missing: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """What has arrived of a change (r, n) beyond all of it, as ``worker`` returns it: ``missing`` is the exact sum minus it."""
    beyond = -torch.dot(missing.view(-1), change.view(-1))
    return torch.stack([beyond, torch.zeros_like(beyond)])


def _square(change: Addition) -> float:
    """``|left right^T|^2``, from products of the columns."""
    left, right = change.left.double(), change.right.double()
    return float(((left.T @ left) * (right.T @ right)).sum())
