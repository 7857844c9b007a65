"""Rounding that keeps the directions of an update: the search for what has to be added so that it arrives.

Weights lie on the grid of their format. An update moves few of them by half a step, and rounding to nearest puts all others
back. Of ``W + lambda D`` with lambda > 1 more entries are moved, first those that D moves most, in steps; at the right lambda
they have moved by D in sum. What is left is noise in the r^2 directions, a few percent of D. If the entries of D are normally
distributed, K answers to a small change of C in any direction as to C itself, by 1 / lambda (Bussgang's theorem).

A sweep goes over the weight by runs of rows. What one has missed, the next ones make up for, and what the first ones tell of
how K answers, the next ones use; so the noise of the last, short run remains. Where a sample foresees that this is little,
the first sweep writes. Otherwise sweeps only measure, each from the C of every run in the one before, and the best is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from surgery.lossless.directions import Arrived, Bases, Directions
from surgery.lossless.grids import Grid
from surgery.lossless.integers import to_integers
from surgery.lossless.kept import Kept
from surgery.lossless.rounding import times_power_of_two
from surgery.precision import full_precision
from surgery.torch_threads import one_thread

#: The error within the directions that is good enough.
TOLERANCE = 0.01
#: Where rounding to nearest keeps this share of an update, by a sample, it is good enough.
NEAREST_SUFFICES = 0.995
#: Entries of the sample, and its fewest rows.
_SAMPLE_ENTRIES, _SAMPLE_ROWS = 1 << 17, 48
#: lambda at most; how far from all the share may be with it, on the sample; how many others are tried.
_LARGEST_LAMBDA, _NEAR, _TRIALS = 2.0**14, 0.04, 16
#: How narrow its bracket has to be, and how close to the ends of one the next trial may be.
_NARROW, _EDGE = 0.3, 0.15
#: How many entries have to change in a run of rows for each number that is corrected; the fewest rows for each direction; the
#: least share of P in a run.
_RUN_MOVES, _RUN_ROWS, _LEAST_RUN = 2.0, 0.5, 2.0**-9
#: Of a run's error this is taken for noise, before all rows tell; and what inverses of ``P^T P`` are kept from growing beyond.
_DOUBT, _RIDGE, _SHY = 0.05, 0.02, 0.3
#: The first sweep writes if this times the foreseen error is small enough, and K does not answer so many times as much as it
#: should to more of the update.
_CAUTION, _STEEPEST, _HELD = 4.5, 2.5, 0.2
#: Sweeps at most, and without the error falling by a tenth; then for the share alone, unless so close, and its cost in error.
_MOST_SWEEPS, _PATIENCE, _LEVELLINGS, _LEVEL, _LEVEL_COSTS = 9, 3, 6, 0.003, 1.25
#: An error that is still so large stays, since single rows hold all of the update: then the share is all that is asked.
_HOPELESS = 0.15
#: Where the share answers so many times as much as it should, it is measured how K answers to so much in other directions, of
#: which at most so much is believed.
_STEEP, _ASIDE, _MOST_ACROSS = 2.3, 0.1, 8.0


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
        across: how many times as much as 1 / lambda K answers to what is added in other directions.
    """

    nearest: float
    scale: float
    slope: float
    largest: float
    noise: float
    moved: float
    across: float = 1.0


def probe(directions: Directions, core: torch.Tensor, some: torch.Tensor | None = None) -> Response:
    """Find lambda on a sample of some rows, or of all, in which the update changes anything."""
    m, n = directions.weight.shape
    rows = directions.active_rows(max(_SAMPLE_ROWS, min(_SAMPLE_ENTRIES // n, m // 8)), some)
    gram = directions.gram(rows)
    expected = _times(gram, core)
    asked, largest, noise, moved = _dot(gram, _times(core, core.T)), 0.0, 0.0, 0.0

    def share(scale: float) -> float:
        nonlocal largest, noise, moved
        found = directions.measured(core * scale, largest, rows, counts=True)
        if not math.isfinite(found.largest):
            return math.nan
        largest, moved = max(largest, found.largest), found.moved
        # Of noise that is as large in all rows, and adds up in squares: relative to all, not to the sample.
        noise = math.sqrt(_dot(found.core - expected, found.core - expected) / asked)
        return _dot(found.core, core) / asked

    nearest = share(1.0)
    if not math.isfinite(nearest) or abs(nearest - 1.0) < 1.0 - NEAREST_SUFFICES:
        return Response(nearest, 1.0, 1.0, largest, noise, moved)
    low, high = (0.0, 0.0), (math.inf, math.inf)
    scale, there, tried = 1.0, nearest, 0
    while True:
        if there < 1.0:
            low = scale, there
        else:
            high = scale, there
        if math.isinf(high[0]):
            # The share grows about as the square of lambda where it is small.
            scale, slope = scale * min(max(there, 0.01) ** -0.5 * 1.05, 8.0), 1.0 / scale
        else:
            slope = (high[1] - low[1]) / (high[0] - low[0])
            within = (1.0 - low[1]) / (high[1] - low[1])
            scale = low[0] + (high[0] - low[0]) * min(max(within, _EDGE), 1.0 - _EDGE)
        # The slope has to be that of there.
        if (abs(there - 1.0) < _NEAR and high[0] - low[0] < _NARROW * high[0]) or tried == _TRIALS:
            across = 1.0
            if (slope * scale > _STEEP or some is not None) and len(core) > 1:
                gain = _ASIDE * _aside(core)
                without, with_it = (directions.measured(core * scale + more, largest, rows) for more in (0.0, gain * scale))
                foreseen = _product(gram, gain)
                across = _dot(with_it.core - without.core, foreseen) / _dot(foreseen, foreseen)
            return Response(nearest, scale, slope, largest, noise, moved, across)
        tried += 1
        if scale > _LARGEST_LAMBDA or not math.isfinite(there := share(scale)):
            start = max(low[0], 1.0)
            return Response(nearest, start, max(low[1], 1e-3) / start, largest, noise, moved)


def _aside(core: torch.Tensor) -> torch.Tensor:
    """What is about as large as an update (r, r), r > 1, and orthogonal to it."""
    square = _dot(core, core)
    turned = core.roll(1, dims=1)
    gain = turned - core * (_dot(core, turned) / square)
    if _dot(gain, gain) > square / 2:
        return gain
    # Its columns are much alike, and every second one has the other sign.
    turned = core * (1.0 - 2.0 * (torch.arange(len(core)) % 2))
    return turned - core * (_dot(core, turned) / square)


class _Answer:
    """What has to be added to C for K to change, as far as the sample tells."""

    def __init__(self, asked: torch.Tensor, response: Response) -> None:
        self._asked = asked
        self._square = _dot(asked, asked)
        self._scale = response.scale / min(max(response.across, 1.0), _MOST_ACROSS)
        # Along the update itself the share answers faster than to noise.
        self.along = 1.0 / max(response.slope, 1.0 / response.scale)

    def to(self, gain: torch.Tensor) -> torch.Tensor:
        """For K, of all rows, to gain so much (r, r). Never more than about what is asked is gained at once."""
        size = math.sqrt(_dot(gain, gain) / self._square)
        gain = gain / max(size, 1.0)
        along = self._asked * (_dot(self._asked, gain) / self._square)
        return (gain - along) * self._scale + along * self.along


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
    asked = bases.core
    if not len(asked):
        return None
    with full_precision(weight.device):
        with one_thread():
            directions = Directions(weight, bases, grid)
        response = probe(directions, asked)
        if not math.isfinite(response.nearest) or (only_if_needed and response.nearest >= NEAREST_SUFFICES):
            return None
        search = _CoreSearch(directions, asked, response)
        if bases.factor is None and _has_room(weight) and search.is_safe:
            return _kept(asked, search.sweep(out))
        found = search.run()
        if not math.isfinite(found.largest):
            return None
        kept = _kept(asked, found) if bases.factor is None else search.kept_with_factor(found)
        search.write(out)
        return kept


def _has_room(weight: torch.Tensor) -> bool:
    """Whether numbers that are some times as large as the weight's are far from the end of its dtype."""
    return weight.dtype != torch.float16 or max(abs(end.item()) for end in torch.aminmax(weight)) < 2.0**12


class _CoreSearch:
    """The search for C, one for each run of rows."""

    def __init__(self, directions: Directions, asked: torch.Tensor, response: Response) -> None:
        m, n = directions.weight.shape
        r = len(asked)
        self._directions, self._response = directions, response
        self._asked = asked
        self._norm = math.sqrt(_dot(self._asked, self._asked))
        least = max(_RUN_MOVES * r * r / max(response.moved * m * n, 1.0), _RUN_ROWS * r / m, _LEAST_RUN)
        with one_thread():
            self._runs = directions.stages(least)
            self._grams = [directions.gram(rows) for rows in self._runs]
            self._left = list(accumulate(reversed(self._grams)))[::-1]
            self._inverses = [_inverse(gram, 0.0) for gram in self._left] if isinstance(self._runs[0], slice) else []
        self._largest = response.largest
        #: Where runs are of different rows, each answers in its own way.
        self._is_even = isinstance(self._runs[0], slice)
        responses = [response if isinstance(rows, slice) else probe(directions, asked, rows) for rows in self._runs]
        self._answers = [_Answer(asked, some) for some in responses]
        self._cores = [self._asked * some.scale for some in responses]
        #: What has arrived in each run with these; None before any sweep.
        self._arrived: list[torch.Tensor] | None = None
        #: How much of a step is taken in each run.
        self._trust = [1.0] * len(self._runs)
        last = _dot(self._grams[-1].diagonal(), self._grams[-1].diagonal()) / r
        #: Whether the first sweep is foreseen to leave little enough.
        self.is_safe = (
            len(self._runs) > 1
            and m * n > 2 * _SAMPLE_ENTRIES  # of smaller ones the sample tells too little
            and _CAUTION * response.noise * last**0.25 < TOLERANCE
            and 1.0 / _STEEPEST < response.slope * response.scale < _STEEPEST
            and self._is_even
            and self._grams[-1].diagonal().min().item() > _HELD * self._grams[-1].diagonal().mean().item()
        )

    def run(self) -> Arrived:
        """Find the C of each run; what arrives with them, which is not finite if no result is."""
        least, since = math.inf, 0
        best, found = self._cores, Arrived(self._asked, math.inf)
        arrived = self._arrived
        for _ in range(_MOST_SWEEPS):
            total = self.sweep()
            if not math.isfinite(total.largest):
                break
            error = self._error(total)
            since = 0 if error < 0.9 * least else since + 1
            if error < least:
                least, best, found, arrived = error, self._cores, total, self._arrived
            else:  # from the best one again, with shorter steps
                self._cores, self._arrived = best, arrived
                self._trust = [trust / 2 for trust in self._trust]
            if error < TOLERANCE or since == _PATIENCE:
                break
        self._cores = best
        if TOLERANCE <= least < math.inf:
            found = self._levelled(found)
            if least > _HOPELESS:  # what chases the noise only adds to it
                found = self._without_chasing(found)
            least = self._error(found)
        if least >= TOLERANCE:  # so many directions, or so few entries, that nearest may be better
            cores = [self._asked] * len(self._runs)
            nearest = _total([self._measured(core, rows) for core, rows in zip(cores, self._runs, strict=True)])
            if math.isfinite(nearest.largest) and self._error(nearest) <= least:
                self._cores, found = cores, nearest
        return found

    def _without_chasing(self, found: Arrived) -> Arrived:
        """The same C for all runs, a multiple of what is asked, if the share is about right with it; else what was found."""
        cores, self._cores = self._cores, [self._asked * self._response.scale] * len(self._runs)
        even = self._levelled(_total([self._measured(core, rows) for core, rows in zip(self._cores, self._runs, strict=True)]))
        if abs(1.0 - self._share(even)) <= max(abs(1.0 - self._share(found)), TOLERANCE):
            return even
        self._cores = cores
        return found

    def _levelled(self, found: Arrived) -> Arrived:
        """Where the noise does not fall: more or less of the update as a whole, so that at least the share is right."""
        best, gain, most = found, self._answers[0].along, _LEVEL_COSTS * self._error(found)
        for _ in range(_LEVELLINGS):
            short = 1.0 - self._share(best)
            if abs(short) < _LEVEL:
                break
            cores = [core + self._asked * (gain * short) for core in self._cores]
            total = _total([self._measured(core, rows) for core, rows in zip(cores, self._runs, strict=True)])
            if not math.isfinite(total.largest):
                break
            if abs(1.0 - self._share(total)) < abs(short) and self._error(total) < most:
                best, self._cores = total, cores
            else:  # it answers in jumps
                gain /= 2
        return best

    def _share(self, found: Arrived) -> float:
        return _dot(self._asked, found.core) / (self._norm * self._norm)

    def sweep(self, out: torch.Tensor | None = None) -> Arrived:
        """Measure all runs, each with what makes up for what those before have missed; into ``out``, if it is given."""
        first = self._arrived is None
        before = [_times(gram, self._asked) for gram in self._grams] if self._arrived is None else self._arrived
        later = [*list(accumulate(reversed(before)))[::-1]]
        total, surplus, held = (torch.zeros_like(self._asked) for _ in range(3))
        cores, parts = [], []
        for i, rows in enumerate(self._runs):
            missing = self._asked - total - later[i]
            gain = _product(self._inverse(i, missing), missing)
            if first and self._is_even:  # of what the runs before have had too much or too little, these will have as much
                gain = gain - surplus / (held.diagonal() + _DOUBT)[:, None]
            if first and i == 0:
                gain = torch.zeros_like(gain)
            step = self._answers[i].to(gain)
            cores.append(self._cores[i] + step * self._trust[i])
            parts.append(self._measured(cores[i], rows, out))
            if not math.isfinite(self._largest):
                break
            total = total + parts[i].core
            change, foreseen = parts[i].core - before[i], _product(self._grams[i], gain)
            if first:
                held = held + self._grams[i]
                surplus = surplus + change - foreseen
            elif (square := _dot(foreseen, foreseen)) > 0:
                self._trust[i] /= min(max(_dot(change, foreseen) / square, 0.5), 2.0)
        self._cores, self._arrived = cores, [part.core for part in parts]
        return _total(parts)

    def write(self, out: torch.Tensor) -> None:
        """Round with the C of each run into ``out``; may be the weight itself."""
        for core, rows in zip(self._cores, self._runs, strict=True):
            self._directions.write(core, out, rows)

    def kept_with_factor(self, found: Arrived) -> Kept:
        """What is kept of an update with a factor, of which ``found`` has arrived beside the factor."""
        parts = [self._directions.kept_with_factor(core, rows) for core, rows in zip(self._cores, self._runs, strict=True)]
        squares, arrived, sums = zip(*parts, strict=True)
        missing = self._asked - found.core
        within = self._directions.within(torch.stack(sums).sum(dim=0))
        return Kept(math.fsum(squares), math.fsum(arrived), _dot(missing, missing), within)

    def _measured(self, core: torch.Tensor, rows: slice | torch.Tensor, out: torch.Tensor | None = None) -> Arrived:
        found = self._directions.measured(core, self._largest, rows, out)
        self._largest = max(self._largest, found.largest)
        return found

    def _inverse(self, i: int, missing: torch.Tensor) -> torch.Tensor:
        """Of ``P^T P`` in a run and all later ones; of directions that are hardly held there, as little is asked."""
        if self._is_even:
            return self._inverses[i]
        with one_thread():
            return _inverse(self._left[i], _SHY * math.sqrt(_dot(missing, missing)) / self._norm)

    def _error(self, found: Arrived) -> float:
        return math.sqrt(_dot(self._asked - found.core, self._asked - found.core)) / self._norm


def _inverse(gram: torch.Tensor, least: float) -> torch.Tensor:
    """The inverse of ``P^T P`` of some rows (r, r), by elimination: of directions that are hardly held, less.

    In operations that IEEE 754 prescribes: the same bits everywhere.
    """
    r = len(gram)
    ridge = max(_RIDGE * math.fsum(gram.diagonal().tolist()) / r, least)
    a = torch.cat([gram + ridge * torch.eye(r, dtype=gram.dtype), torch.eye(r, dtype=gram.dtype)], dim=1)
    for i in range(r):
        row = a[i] / a[i, i]
        a = a - a[:, i : i + 1] * row
        a[i] = row
    return a[:, r:]


def _total(parts: list[Arrived]) -> Arrived:
    return Arrived(sum((part.core for part in parts[1:]), parts[0].core), max(part.largest for part in parts))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` of float64 matrices (r, r), each rounded to integers first: the same bits everywhere."""
    bits = (53 - len(a).bit_length()) // 2
    (left, of_left), (right, of_right) = to_integers(a, bits), to_integers(b, bits)
    return times_power_of_two(left @ right, of_left + of_right - 2 * bits)


def _times(a: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """``a core``; exact up to one rounding of each entry where the core is diagonal."""
    diagonal = core.diagonal()
    return a * diagonal if torch.equal(core, torch.diag(diagonal)) else _product(a, core)


def _kept(asked: torch.Tensor, found: Arrived) -> Kept:
    square, missing = _dot(asked, asked), asked - found.core
    return Kept(square, _dot(found.core, asked), _dot(missing, missing), square)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product of two tensors of one shape, the same bits everywhere."""
    return math.fsum((a * b).flatten().tolist())
