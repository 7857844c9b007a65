"""What a rounded weight has in a few directions, in fixed-point arithmetic: the same bits on every device.

For W (m, n), orthonormal P (m, r), Q (n, r) and a small matrix C (r, r), a pass computes ``R = round(W + P C Q^T)`` block by
block and ``K(C) = P^T (R - W) Q``: what has arrived in the directions. Of all numbers of the grid with this K, R is the
nearest to the exact weight, as C is the multiplier of a Lagrange function; ``search`` finds the C for which K is what is
asked.

All factors of products are first rounded to integers, short enough that every partial sum is an integer that the floats of
the product can hold: 24 bits for ``P C Q^T`` in float32, which needs no accuracy, since what comes of it is measured; 53 in
float64 for the measuring. So sums are exact in whatever order they are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from surgery.lossless.blocks import for_each, rows_at_a_time
from surgery.lossless.factors import Addition, Factors, between, both, inner_change
from surgery.lossless.grids import Grid
from surgery.lossless.integers import to_integers
from surgery.lossless.rounding import times_power_of_two
from surgery.memory import scratch
from surgery.torch_threads import one_thread

#: Columns of a product in float32 at a time: more of them leave less than 9 bits for each factor.
_GROUP = 64
#: Rows that are this much smaller than the largest, as a power of two, keep fewer bits: products stay normal numbers.
_RANGE = 30
#: Bits of the small matrix C, of the bases (16 at most), and of what is summed: the differences, and their sums.
_CORE_BITS, _BASIS_BITS, _UNIT_BITS = 20, 16, 24
#: How far differences may be above what was foreseen, as a power of two, before the bits do not suffice.
_SPARE_BITS = 2
#: The share of P in the first run of rows; where only one of so many rows has much of P, the order of rows is changed.
_FIRST_RUN, _UNEVEN = 1 / 16, 3.0
#: Directions that are weaker than this share of the strongest are no directions of the update.
_WEAKEST = 1e-6


@dataclass(frozen=True, slots=True)
class Bases:
    """The directions of an update, on the CPU.

    Attributes:
        P: float64 (m, r), orthonormal columns.
        Q: float64 (n, r), orthonormal columns.
        core: float64 (r, r), such that ``P core Q^T`` is what is added.
        factor: of the weight, see ``Addition``.
    """

    P: torch.Tensor
    Q: torch.Tensor
    core: torch.Tensor
    factor: torch.Tensor | None = None


def bases_of(factors: Factors | None, scales: torch.Tensor | None, addition: Addition | None) -> Bases | None:
    """The directions of an update by scales and an addition; None if nothing is added.

    Of scales or a core alone they are columns of U and V as they are stored: those whose scale is not 1, or whose row or column
    of the core is not that of the identity. Those of an addition come from LAPACK's QR and SVD in float64 on the CPU, whose
    last bits depend on the kind of processor. To be called in one thread.
    """
    inner = None if factors is None or scales is None else inner_change(factors, scales)
    if addition is None:
        if factors is None or inner is None or not bool((inner != 0).any()):
            return None
        core = (torch.diag(inner) if inner.ndim == 1 else inner).cpu()
        some = (core != 0).any(dim=0) | (core != 0).any(dim=1)
        return Bases(factors.U.cpu()[:, some].double(), factors.V.cpu()[:, some].double(), core[some][:, some])
    if factors is not None and inner is not None:
        addition = both(between(factors, inner), addition)
    (P, left), (Q, right) = (torch.linalg.qr(side.cpu().double()) for side in (addition.left, addition.right))
    u, strengths, vt = torch.linalg.svd(left @ right.T, full_matrices=False)  # a rank may be above a side of the matrix
    some = strengths > strengths[:1] * _WEAKEST
    factor = None if addition.factor is None else addition.factor.cpu()
    if not bool(some.any()) and factor is None:
        return None
    return Bases(P @ u[:, some], Q @ vt[some].T, torch.diag(strengths[some]), factor)


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a pass has measured.

    Attributes:
        core: K, float64 (r, r).
        largest: the largest difference ``|R - W|``; not finite if the result is not.
        moved: the share of entries that differ, of single rows; 0 where it is not counted.
    """

    core: torch.Tensor
    largest: float
    moved: float = 0.0


class Directions:
    """A weight that is rounded with something added in the directions of its update.

    Args:
        weight: (m, n), on any device with float64.
        bases: of the update.
        grid: what is rounded to.
    """

    def __init__(self, weight: torch.Tensor, bases: Bases, grid: Grid) -> None:
        self.weight, self.grid = weight, grid
        self._core = bases.core
        m, n = weight.shape
        self._device = weight.device
        self._factor = None if bases.factor is None else bases.factor.to(self._device).float()
        r = len(bases.core)
        bits = min(_BASIS_BITS, 53 - _UNIT_BITS - _SPARE_BITS - _bits(m), 53 - _CORE_BITS - _bits(r))
        self._left, exponent = to_integers(bases.P, bits)  # (m, r), integers
        self._left_unit = exponent - bits
        self._left_there = self._left.to(self._device)
        bits = min(_BASIS_BITS, 53 - _UNIT_BITS - _bits(n))
        self._right, exponent = to_integers(bases.Q, bits)
        self._right_unit = exponent - bits
        self._short = (24 - _bits(min(r, _GROUP))) // 2
        largest = bases.Q.abs().max().item() if bases.Q.numel() else 0.0
        self._right_exponent = math.frexp(largest)[1]
        shortened = _shortened(times_power_of_two(bases.Q, -self._right_exponent), self._short)
        self._right_short = shortened.T.contiguous().to(self._device)

    def active_rows(self, most: int, some: torch.Tensor | None = None) -> torch.Tensor:
        """At most ``most`` rows, evenly spread over those in which the update changes anything, int64 on the CPU.

        Args:
            some: the rows that are looked at, int64, sorted; None for all.
        """
        rows = torch.arange(len(self._left)) if some is None else some
        rows = rows[(self._left[rows] != 0).any(dim=1)]
        return rows[:: -(-len(rows) // most)] if len(rows) else rows

    def stages(self, least: float) -> list[slice | torch.Tensor]:
        """All rows in runs, the shares of P in which first double, up to a half in all, and then are halved, down to ``least``.

        What a run has missed can be made up for in later ones. If few rows have most of P, they come first, so that there is
        always a later one that can: then runs are indices of rows, int64 on the CPU, sorted.
        """
        masses = self._left.square().sum(dim=1)  # exact: integers
        order = None
        shares = (masses / masses.sum()).tolist()
        if len(shares) * math.fsum(share * share for share in shares) > _UNEVEN:
            order = torch.sort(masses, descending=True, stable=True).indices
            masses = masses[order]
        held = masses.cumsum(dim=0)
        shares = []
        share = max(_FIRST_RUN, least)
        while sum(shares) + share <= 0.5:
            shares.append(share)
            share *= 2 if len(shares) > 1 else 1
        while (left := 1.0 - sum(shares)) / 2 >= least:
            shares.append(left / 2)
        ends = torch.searchsorted(held, torch.tensor(shares, dtype=torch.float64).cumsum(dim=0) * held[-1]).tolist()
        runs = [slice(*pair) for pair in pairwise([0, *(end + 1 for end in ends), len(held)]) if pair[0] < pair[1]]
        return [*runs] if order is None else [order[run].sort().values for run in runs]

    def gram(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """``P^T P`` of some rows, float64 (r, r), on the CPU: the identity for all of them."""
        part = self._left[rows]
        return times_power_of_two(part.T @ part, 2 * self._left_unit)  # exact: integers

    def measured(
        self,
        core: torch.Tensor,
        foreseen: float,
        rows: slice | torch.Tensor = slice(None),
        out: torch.Tensor | None = None,
        *,
        counts: bool = False,
    ) -> Arrived:
        """Round rows of the weight with ``P core Q^T`` added, and measure what has arrived.

        Args:
            core: float64 (r, r), on the CPU.
            foreseen: about the largest difference, 0 if nothing is known; with many times larger ones the pass is done again,
                unless it writes.
            rows: consecutive ones, or int64, sorted, on the CPU.
            out: where these rows of the result go, like the weight; may be the weight itself. None for nowhere.
            counts: whether the entries that differ are counted.
        """
        while True:
            found = self._pass(core, foreseen, rows, out, counts)
            if not foreseen * 2.0**_SPARE_BITS < found.largest < math.inf or out is not None:
                return found
            foreseen = found.largest

    def write(self, core: torch.Tensor, out: torch.Tensor, rows: slice | torch.Tensor = slice(None)) -> None:
        """Round rows of the weight with ``P core Q^T`` added into ``out``; arguments as for ``measured``."""
        some = self._some(rows)
        with one_thread():
            product = self._product(core, rows)

        def worker(most: int) -> Callable[[slice], None]:
            rounded = self._rounded(product, most, some)

            def work(block: slice) -> None:
                some.put(out, block, rounded(block)[0])

            return work

        for_each(worker, some.count, rows_at_a_time(self.weight.shape[1]), self._device)

    def kept_with_factor(self, core: torch.Tensor, rows: slice | torch.Tensor) -> tuple[float, float, torch.Tensor]:
        """What is kept in some rows of an update D with a factor, entry by entry, when ``core`` is added.

        Returns:
            ``<D, D>``, ``<W_out - W, D>``, and ``P^T D`` in units of P, float64 (r, n), of these rows.
        """
        n, some = self.weight.shape[1], self._some(rows)
        with one_thread():
            product, low_rank = self._product(core, rows), self._product(self._core, rows)

        def worker(most: int) -> Callable[[slice], tuple[list[float], torch.Tensor]]:
            rounded = self._rounded(product, most, some)
            sums, more = (scratch(f"directions update {part}", (most, n), torch.float32, self._device) for part in "ab")

            def work(block: slice) -> tuple[list[float], torch.Tensor]:
                result, base = rounded(block)
                before = self.weight[some.of(block)].double()
                change = low_rank.rows(block, sums[: len(base)], more[: len(base)]).double().add_(base).sub_(before)
                parts = change.square().sum(), ((result - before) * change).sum()
                return [part.item() for part in parts], (self._left_there[some.of(block)].T @ change).cpu()

            return work

        blocks = for_each(worker, some.count, rows_at_a_time(n), self._device)
        with one_thread():
            square, arrived = (math.fsum(column) for column in zip(*(parts for parts, _ in blocks), strict=True))
            return square, arrived, torch.stack([sums for _, sums in blocks]).sum(dim=0)

    def _pass(
        self, core: torch.Tensor, foreseen: float, rows: slice | torch.Tensor, out: torch.Tensor | None, counts: bool
    ) -> Arrived:
        some = self._some(rows)
        with one_thread():
            product = self._product(core, rows)
            left = self._left_there[some.rows].T.contiguous()
        n = self.weight.shape[1]
        unit = max(math.frexp(foreseen)[1] - _UNIT_BITS, -149) if foreseen else -149
        # Added and taken away, it leaves multiples of the unit.
        magic = 1.5 * 2.0 ** (unit + 23) if unit < 100 else 0.0
        sums: list[torch.Tensor] = []
        moved: list[torch.Tensor] = []

        def worker(most: int) -> Callable[[slice], torch.Tensor]:
            rounded = self._rounded(product, most, some)
            wide = scratch("directions differences", (most, n), torch.float64, self._device)
            total = torch.zeros((len(left), n), dtype=torch.float64, device=self._device)
            sums.append(total)

            def work(block: slice) -> torch.Tensor:
                result, before = rounded(block)
                if out is not None:
                    some.put(out, block, result)
                differences = result.sub_(before)
                ends = torch.stack(torch.aminmax(differences))
                if counts:
                    moved.append(torch.count_nonzero(differences))
                total.addmm_(left[:, block], wide[: len(result)].copy_(differences.add_(magic).sub_(magic)))
                return ends

            return work

        # Sums are exact: blocks may be as the threads need them.
        step = min(rows_at_a_time(n), -(-some.count // torch.get_num_threads()))
        ends = for_each(worker, some.count, step, self._device)
        with one_thread():
            largest = torch.stack(ends).abs().max().item()
            if not math.isfinite(largest):
                return Arrived(torch.full_like(core, math.nan), math.inf)
            share = sum(count.item() for count in moved) / (some.count * n)
            total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
            return Arrived(self._core_of(total.cpu()), largest, share)

    def _some(self, rows: slice | torch.Tensor) -> _Rows:
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self.weight))
            return _Rows(slice(first, last), None, last - first)
        return _Rows(rows.to(self._device), rows, len(rows))

    def within(self, sums: torch.Tensor) -> float:
        """``|P^T D Q|^2``, of the sums that ``kept_with_factor`` gives."""
        return self._core_of(sums).square().sum().item()

    def _core_of(self, sums: torch.Tensor) -> torch.Tensor:
        """``sums Q`` (r, r), for integers ``P^T (R - W)`` (r, n) with a unit; those of P have another."""
        bits = 53 - _BASIS_BITS - _bits(sums.shape[1])
        integers, exponent = to_integers(sums, bits)
        return times_power_of_two(integers @ self._right, exponent - bits + self._left_unit + self._right_unit)

    def _product(self, core: torch.Tensor, rows: slice | torch.Tensor = slice(None)) -> _Product:
        """``P core Q^T`` of some rows, as factors in float32 whose products are exact."""
        integers, exponent = to_integers(core, _CORE_BITS)
        left = self._left[rows] @ integers
        largest = left.abs().max().item() if left.numel() else 0.0
        own = math.frexp(largest)[1]
        short = _shortened(times_power_of_two(left, -own), self._short)
        exponent += own + self._left_unit - _CORE_BITS + self._right_exponent
        if abs(exponent) <= _RANGE:  # far from the ends of float32: it is in one of the factors
            short, exponent = short.mul_(2.0**exponent), 0
        return _Product(short.to(self._device), self._right_short, exponent)

    def _rounded(self, product: _Product, most: int, some: _Rows) -> Callable[[slice], tuple[torch.Tensor, torch.Tensor]]:
        """A function that gives a block of some rows of the result, and what it is rounded from.

        Both are float32 (r, n), valid until the next call.
        """
        n = self.weight.shape[1]
        sums, before, more = (
            scratch(f"directions {part}", (most, n), torch.float32, self._device) for part in ("sums", "before", "more")
        )

        def rounded(block: slice) -> tuple[torch.Tensor, torch.Tensor]:
            count, which = block.stop - block.start, some.of(block)
            base = before[:count].copy_(self.weight[which])
            if self._factor is not None:
                base.mul_(self._factor if len(self._factor) == 1 else self._factor[which])
            added = product.rows(block, sums[:count], more[:count])
            return self.grid.nearest(added.add_(base), some.on_cpu(block)), base

        return rounded


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a matrix: consecutive ones, or their indices on its device and on the CPU."""

    rows: slice | torch.Tensor
    indices: torch.Tensor | None
    count: int

    def of(self, block: slice) -> slice | torch.Tensor:
        """Those of a block of them."""
        if isinstance(self.rows, slice):
            return slice(self.rows.start + block.start, self.rows.start + block.stop)
        return self.rows[block]

    def put(self, out: torch.Tensor, block: slice, result: torch.Tensor) -> None:
        """Write a block of them."""
        which = self.of(block)
        if isinstance(which, slice):
            out[which].copy_(result)
        else:
            out[which] = result.to(out.dtype)

    def on_cpu(self, block: slice) -> slice | torch.Tensor:
        return self.of(block) if self.indices is None else self.indices[block]


@dataclass(frozen=True, slots=True)
class _Product:
    """``left right 2^exponent`` with float32 factors, all of whose partial sums are exact within a group of columns."""

    left: torch.Tensor
    right: torch.Tensor
    exponent: int

    def rows(self, rows: slice, out: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """The rows of the product, (r, n), in ``out``; ``more`` is for what goes between."""
        torch.mm(self.left[rows, :_GROUP], self.right[:_GROUP], out=out)
        for first in range(_GROUP, self.left.shape[1], _GROUP):  # sums of groups are rounded, always in the same order
            some = slice(first, first + _GROUP)
            out.add_(torch.mm(self.left[rows, some], self.right[some], out=more))
        if self.exponent == 0:
            return out
        half = self.exponent // 2  # the whole may be no float32
        return out.mul_(_power(half)).mul_(_power(self.exponent - half))


def _power(exponent: int) -> float:
    return 2.0 ** min(max(exponent, -149), 127)


def _shortened(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers below 1, float64 (rows, r), rounded to ``bits`` bits of the largest in their row: float32.

    Rows whose largest is below 2^-``_RANGE`` keep fewer bits.
    """
    exponents = torch.frexp(x.abs().amax(dim=1, keepdim=True)).exponent.clamp(min=-_RANGE).long() - bits
    units = ((exponents + 1023) << 52).view(torch.float64)  # powers of two, exactly
    return (x / units).round_().mul_(units).float()


def _bits(count: int) -> int:
    """Bits that a sum of so many numbers may have more than each of them."""
    return math.ceil(math.log2(max(count, 1)))
