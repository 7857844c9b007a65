"""Rounding that keeps the directions of an update: the search for what has to be added so that it arrives.

Weights lie on the grid of their format. An update moves few of them by half a step, and rounding to nearest puts all others
back. Of ``W + lambda D`` with lambda > 1 more entries are moved, first those that D moves most, in steps; at the right lambda
they have moved by D in sum. What is left is noise in the r^2 directions, a few percent of D. If the entries of D are normally
distributed, K answers to a small change of C in any direction as to C itself, by 1 / lambda (Bussgang's theorem), so one step
takes most of it away; further steps take the response from all earlier ones (Anderson, "Iterative Procedures for Nonlinear
Integral Equations", J. ACM 12, 1965).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from surgery.lossless.directions import Arrived, Bases, Directions
from surgery.lossless.grids import Grid
from surgery.lossless.kept import NOTHING_ASKED, Kept
from surgery.lossless.prediction import to_integers
from surgery.lossless.rounding import times_power_of_two
from surgery.precision import full_precision
from surgery.torch_threads import one_thread

#: The error within the directions that is good enough.
TOLERANCE = 0.01
#: Where rounding to nearest keeps this share of an update, by a sample, it is good enough.
NEAREST_SUFFICES = 0.995
#: Entries of the sample, and its fewest rows.
_SAMPLE_ENTRIES, _SAMPLE_ROWS = 1 << 18, 64
#: Entries of the sample for each direction's own lambda, and how often it is rounded.
_TUNING_ENTRIES, _TUNING_PASSES = 1 << 20, 4
#: Passes at most; how many may go by without the error falling by a tenth.
_MOST_PASSES, _PATIENCE = 12, 3
#: A later step from error e leads to about at most so many times e^1.5, as only the entries that it moves add noise (1.1 to 1.5
#: measured, and up to 3.3 where e is at its least). The first step leads to 0.4 to 1 times e^1.5, less in large matrices.
_AFTER_LATER = 2.0
#: Where fewer entries than this share move, later steps leave more, as each counts for more.
_MANY_MOVED = 0.15
#: Stages of a pass that writes, at most: of the only one, and after others, where what these have told is lost with large
#: corrections. The fewest rows of one, and how many entries have to change in it for each number that is corrected.
_STAGES_OF_ONE, _STAGES_AFTER, _STAGE_ROWS, _STAGE_MOVES = 8, 5, 8, 3.0
#: What stages leave of an error at best; what they leave of the sample's noise; and of the noise of a grid whose steps are as
#: large as the updates, r / sqrt(m n) (measured: 0.14 to 0.4, 0.14 to 0.31, 0.9 to 1.75).
_STAGES_LEAVE, _LEFT_OF_SAMPLE, _LEFT_OF_ALL = 0.4, 0.45, 1.75
#: Less than this of a direction in the rows that are left is no hold to correct it.
_LEAST_HELD = 2.0**-12
#: lambda at most, and how often its bracket is halved.
_LARGEST_LAMBDA, _HALVINGS = 2.0**14, 3


@dataclass(frozen=True, slots=True)
class Response:
    """How much of an update arrives on a sample of rows.

    Attributes:
        nearest: the share that rounding to nearest keeps.
        scale: lambda: so many times the update has to be added for all of it to arrive.
        slope: how much more arrives with a larger lambda, there.
        largest: the largest difference of an entry.
        noise: about the error within the directions with all of the weight updated like that.
        moved: the share of the entries that change.
    """

    nearest: float
    scale: float
    slope: float
    largest: float
    noise: float
    moved: float


def probe(directions: Directions, strengths: torch.Tensor) -> Response:
    """Find lambda on a sample of the rows in which the update changes anything."""
    m, n = directions.weight.shape
    rows = directions.active_rows(max(_SAMPLE_ROWS, min(_SAMPLE_ENTRIES // n, m // 8)))
    gram, core = directions.gram(rows), torch.diag(strengths)
    expected = gram * strengths
    asked, largest, noise, moved = math.fsum((gram.diagonal() * strengths.square()).tolist()), 0.0, 0.0, 0.0

    def share(scale: float) -> float:
        nonlocal largest, noise, moved
        found = directions.measured(core * scale, largest, rows)
        if not math.isfinite(found.largest):
            return math.nan
        largest, moved = max(largest, found.largest), found.moved
        # Of noise that is as large in all rows, and adds up in squares: relative to all, not to the sample.
        noise = math.sqrt(_dot(found.core - expected, found.core - expected) / asked)
        return math.fsum((found.core.diagonal() * strengths).tolist()) / asked

    nearest = share(1.0)
    if not math.isfinite(nearest) or abs(nearest - 1.0) < 1.0 - NEAREST_SUFFICES:
        return Response(nearest, 1.0, 1.0, largest, noise, moved)
    low, high = (0.0, 0.0), (1.0, nearest)
    while high[1] < 1.0:
        low, scale = high, high[0] * 2
        if scale > _LARGEST_LAMBDA or not math.isfinite(there := share(scale)):
            return Response(nearest, low[0], max(low[1], 1e-3) / low[0], largest, noise, moved)
        high = scale, there
    for _ in range(_HALVINGS):
        middle = (low[0] + high[0]) / 2
        if (there := share(middle)) < 1.0:
            low = middle, there
        else:
            high = middle, there
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return Response(nearest, low[0] + (1.0 - low[1]) / slope, slope, largest, noise, moved)


class _Steps:
    """Steps towards the C with which K is what is asked, from what earlier steps have changed. Vectors are float64 (r^2,)."""

    def __init__(self, strengths: torch.Tensor, response: Response) -> None:
        asked = torch.diag(strengths).flatten()
        self._asked, self._asked_square = asked, _dot(asked, asked)
        self._scale = response.scale
        # Along the update itself the share answers faster than to noise, as the sample tells.
        self._along = 1.0 / max(response.slope, 1.0 / response.scale)
        self._changes: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def next(self, core: torch.Tensor, missing: torch.Tensor, error: float) -> torch.Tensor:
        """The next C (r, r), after C ``core`` has left ``missing``, which is an ``error`` relative to what is asked.

        A large step moves entries on all sides, and K answers by more than to a small one: it is made shorter.
        """
        point, left = core.flatten(), missing.flatten()
        if self._last is not None:
            self._remember(point - self._last[0], self._last[1] - left)
        self._last = point, left
        for step, change, square in self._changes:
            share = _dot(change, left) / square
            point, left = point + step * share, left - change * share
        return (point + self.answer(left, self._scale / (1.0 + 4.0 * error**2))).view_as(core)

    def answer(self, missing: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """What has to be added to C for K to gain ``missing`` (r^2,), as far as the sample tells."""
        along = self._asked * (_dot(self._asked, missing) / self._asked_square)
        return (missing - along) * (self._scale if scale is None else scale) + along * self._along

    def _remember(self, step: torch.Tensor, change: torch.Tensor) -> None:
        """A step of C has changed K; of both, what earlier ones do not tell is kept: the changes are orthogonal."""
        for earlier, its_change, square in self._changes:
            share = _dot(its_change, change) / square
            step, change = step - earlier * share, change - its_change * share
        if (square := _dot(change, change)) > 0:
            self._changes.append((step, change, square))


def round_in_directions(
    weight: torch.Tensor, bases: Bases, grid: Grid, out: torch.Tensor, *, only_if_needed: bool
) -> Kept | None:
    """Round a weight with an update so that the update arrives in its directions.

    Args:
        weight: (m, n), floats of at most 32 bits, on a device with float64.
        bases: of the update.
        grid: what is rounded to.
        out: where the result goes, like the weight; may be the weight itself.
        only_if_needed: whether to do nothing where, by a sample, rounding to nearest keeps enough.

    Returns:
        What was kept; None if nothing has been done: nearest is enough, or the result would not be finite.
    """
    strengths = bases.strengths
    if not len(strengths):
        return None
    with full_precision(weight.device):
        with one_thread():
            directions = Directions(weight, bases, grid)
        response = probe(directions, strengths)
        if not math.isfinite(response.nearest) or (only_if_needed and response.nearest >= NEAREST_SUFFICES):
            return None
        search = _CoreSearch(directions, strengths, response, in_stages=bases.factor is None and _has_room(weight))
        found = search.run()
        if found is None:
            kept = _kept(strengths, search.write(out))
        elif not math.isfinite(found.largest):
            return None
        else:
            kept = _kept(strengths, found) if bases.factor is None else directions.kept_with_factor(search.core, found)
            directions.write(search.core, out)
        return kept


def _has_room(weight: torch.Tensor) -> bool:
    """Whether numbers that are some times as large as the weight's are far from the end of its dtype."""
    return weight.dtype != torch.float16 or max(abs(end.item()) for end in torch.aminmax(weight)) < 2.0**12


def kept_between(before: torch.Tensor, after: torch.Tensor, bases: Bases | None) -> Kept:
    """What was kept of an update without a factor, from the weight before and after.

    Args:
        before, after: (m, n), floats of at most 32 bits, on one device with float64.
        bases: of the update; None for none.
    """
    if bases is None:
        return NOTHING_ASKED
    with full_precision(before.device):
        with one_thread():
            directions = Directions(before, bases, _Given(after))
        return _kept(bases.strengths, directions.measured(torch.zeros_like(bases.core), 0.0))


@dataclass(frozen=True, slots=True)
class _Given:
    """A grid that has one number for each entry: what is there already."""

    after: torch.Tensor

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        return x.copy_(self.after[rows])


def _tuned(directions: Directions, strengths: torch.Tensor, response: Response) -> torch.Tensor:
    """``diag(lambda strengths)`` with one lambda for each direction, from a larger sample.

    Directions do not answer alike: in a strong one large entries of the weight, which have large steps, meet large changes.
    """
    m, n = directions.weight.shape
    rows = directions.active_rows(max(_SAMPLE_ROWS, min(_TUNING_ENTRIES // n, m // 4)))
    held = directions.gram(rows).diagonal().clamp(min=_LEAST_HELD)
    steps, core = _Steps(strengths, response), torch.diag(strengths * response.scale)
    norm = math.sqrt(_dot(strengths, strengths))
    least, best = math.inf, core
    for _ in range(_TUNING_PASSES):
        found = directions.measured(core, response.largest, rows)
        if not math.isfinite(found.largest):
            break
        missing = strengths - found.core.diagonal() / held
        error = math.sqrt(_dot(missing, missing)) / norm
        if error < least:
            least, best = error, core
        core = steps.next(core, torch.diag(missing), error)
    return best


class _CoreSearch:
    """The search for C.

    The last pass writes, and goes by stages, each of half of what is left of the rows: what one has missed, the next ones make
    up for. So the noise of the last one remains, a small part of all. The error that this leads to is foreseen; the passes
    before, which only measure, are as many as it takes for that to be small enough.
    """

    def __init__(self, directions: Directions, strengths: torch.Tensor, response: Response, *, in_stages: bool) -> None:
        m, n = directions.weight.shape
        self._directions, self._response = directions, response
        self._asked, self._steps = torch.diag(strengths), _Steps(strengths, response)
        self._norm = math.sqrt(_dot(self._asked, self._asked))
        r = len(strengths)
        most = int(max(min(m / _STAGE_ROWS, response.moved * m * n / (_STAGE_MOVES * r * r)), 1.0)).bit_length() - 1
        self._after_first = min(0.55 + 50.0 * r / math.sqrt(m * n), 1.0)
        self._after_later = _AFTER_LATER * max(_MANY_MOVED / max(response.moved, 1e-6), 1.0)
        #: Whether the pass that writes may be the only one.
        self._at_once = (
            in_stages
            and most > _STAGES_AFTER
            and max(_LEFT_OF_SAMPLE * response.noise, _LEFT_OF_ALL * r / math.sqrt(m * n)) < TOLERANCE
        )
        most = min(most, _STAGES_OF_ONE if self._at_once else _STAGES_AFTER)
        with one_thread():
            self._stages = directions.stages(most if in_stages else 0)
            self._grams = _sums_of_later([directions.gram(rows) for rows in self._stages])
        self._in_stages = in_stages
        self.core = self._asked * response.scale
        if not self._at_once and response.scale != 1.0:
            self.core = _tuned(directions, strengths, response)
        self._largest = response.largest
        #: What is expected to arrive with this C in each stage and all later ones.
        self._expected = [gram * strengths for gram in self._grams]

    def run(self) -> Arrived | None:
        """Find C; None if it is to be written in stages, and otherwise what arrives with it (not finite if no result is)."""
        if self._at_once:
            return None
        least, best, since = math.inf, (self.core, Arrived(self._asked, math.inf)), 0
        for number in range(_MOST_PASSES):
            parts = self._measured(self.core)
            found = _total(parts)
            if not math.isfinite(found.largest):
                break
            error = self._error(found)
            since = 0 if error < 0.9 * least else since + 1
            if error < least:
                least, best = error, (self.core, found)
            if error < TOLERANCE or since == _PATIENCE:
                break
            missing = self._asked - found.core
            self.core = self._steps.next(self.core, missing, error)
            if since == 0 and self._suffices(min(error, (self._after_later if number else self._after_first) * error**1.5)):
                arrived = _sums_of_later([part.core for part in parts])
                self._expected = [some + _product(gram, missing) for some, gram in zip(arrived, self._grams, strict=True)]
                return None
        self.core, found = best
        if least > 0.5 and self._response.scale != 1.0:  # so many directions, or so few entries, that nearest may be better
            of_nearest = _total(self._measured(self._asked))
            if math.isfinite(of_nearest.largest) and self._error(of_nearest) < least:
                self.core, found = self._asked, of_nearest
        return found

    def write(self, out: torch.Tensor) -> Arrived:
        """Round with C, corrected from stage to stage, into ``out``; may be the weight itself."""
        total = torch.zeros_like(self._asked)
        for rows, gram, expected in zip(self._stages, self._grams, self._expected, strict=True):
            missing = self._asked - total - expected
            missing /= gram.diagonal().clamp(min=_LEAST_HELD)[:, None]  # by what P has in the rows that are left
            size = math.sqrt(_dot(missing, missing)) / self._norm
            answer = self._steps.answer(missing.flatten() / max(size, 1.0)).view_as(self.core)
            found = self._directions.measured(self.core + answer, self._largest, rows, out)
            self._largest = max(self._largest, found.largest)
            total += found.core
        return Arrived(total, self._largest)

    def _suffices(self, error: float) -> bool:
        """Whether writing in stages is foreseen to leave little enough of an error that it would have in one."""
        return self._in_stages and max(_STAGES_LEAVE, 1.2 * 0.5 ** ((len(self._stages) - 1) / 2)) * error < TOLERANCE

    def _measured(self, core: torch.Tensor) -> list[Arrived]:
        parts = []
        for rows in self._stages:
            parts.append(self._directions.measured(core, self._largest, rows))
            self._largest = max(self._largest, parts[-1].largest)
            if not math.isfinite(self._largest):
                break
        return parts

    def _error(self, found: Arrived) -> float:
        return math.sqrt(_dot(self._asked - found.core, self._asked - found.core)) / self._norm


def _sums_of_later(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each part the sum of it and all later ones."""
    return list(accumulate(reversed(parts)))[::-1]


def _total(parts: list[Arrived]) -> Arrived:
    return Arrived(sum((part.core for part in parts[1:]), parts[0].core), max(part.largest for part in parts))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` of float64 matrices (r, r), each rounded to integers first: the same bits everywhere."""
    bits = (53 - len(a).bit_length()) // 2
    (left, of_left), (right, of_right) = to_integers(a, bits), to_integers(b, bits)
    return times_power_of_two(left @ right, of_left + of_right - 2 * bits)


def _kept(strengths: torch.Tensor, found: Arrived) -> Kept:
    asked = math.fsum(strengths.square().tolist())
    missing = (torch.diag(strengths) - found.core).flatten()
    return Kept(asked, math.fsum((found.core.diagonal() * strengths).tolist()), _dot(missing, missing), asked)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product of two tensors of one shape, the same bits everywhere."""
    return math.fsum((a * b).flatten().tolist())
