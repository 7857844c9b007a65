"""Whether singular triplets are the leading ones: what is known of values that were not found.

A residual proves that a value found is near some singular value of the matrix, and nothing about larger ones that were
missed. But an iteration from random rows can only miss what these rows hardly contain, and how improbable that is can be
said. With B the matrix or its transpose and ``C = B^T B`` on its shorter side, of n dimensions, let S be the space in which
the triplets were found, and v an eigenvector of C that was not, with a value ``lambda = h^2 mu`` above ``mu = s_k^2``. If the
directions found are exact, then for every row z in the span of the start rows and every polynomial p for which S holds ``p(C)
z``, what is left of that without the directions found is in S as well, and its Rayleigh quotient is at most mu:

    sum over the eigenvectors v_i that were not found of  p(lambda_i)^2 (lambda_i - mu) (v_i . z)^2  <=  0.

Those above mu add nothing negative. So with M the largest ``p(x)^2 (mu - x)`` for x in [0, mu]

    R (v . z)^2  <=  |z|^2 - (v . z)^2    where    R = p(lambda)^2 (lambda - mu) / M,

and the projection of v on the span of the start rows, squared, is at most ``1 / (1 + R)``. That of a fixed v on b Gaussian
rows has the distribution Beta(b / 2, (n - b) / 2), whatever became of the rows afterwards: it is hardly ever so small. For a
Krylov space of q steps p is the Chebyshev polynomial of the second kind ``U_{2q-2}(sqrt(x / mu))``: ``p(x)^2 (mu - x) / mu``
is the ``sin^2`` of 2q - 1 times an angle below mu, at most 1, and above it is ``sinh^2((2q - 1) t)`` with ``h = cosh t``,
which makes ``1 / (1 + R) = 1 / cosh^2((2q - 1) t)``. This is the argument of Kuczynski, Wozniakowski, "Estimating the largest
eigenvalue by the power and Lanczos algorithms with a random start" (SIAM J. Matrix Anal. 13, 1992), Theorem 3.2, for blocks.

Directions found are not quite exact, and p may magnify what is left of them. Without that assumption they take something
away. Of a block under filters it is k rows: combinations of the start rows that have nothing of k fixed directions are as
good as b - k Gaussian rows. Of a Krylov space it is taken to be as many steps as k directions fill blocks, since a polynomial
may vanish at their values. For k = 1 and no direction found before, nothing of this is needed. Beyond, that k directions take
so much, and no more, is no theorem: it is what trials with planted values show (``tests/linalg/test_top_k.py``).

The direction that was missed first is one of k, as so many may be above it: their chances add up. Where it is one of c + 1
equal values of which c were found, it may be any in the space of these; then the least projection counts of a vector of that
space, which is at least ``1 / sqrt(c + 1)`` times the least distance of the projection of one of c + 1 axes from the span of
those of the others. Such a distance, squared, has the distribution Beta((b - c) / 2, (n - b) / 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from surgery.solvers.search import Decomposed, Search

Verdict = Literal["proven", "likely", "unknown"]

#: The probability that a ``likely`` verdict is wrong, at most.
CHANCE = 1e-6
#: A solve goes through so many searches at most, and what they find decides which one counts.
_SEARCHES = 4
#: A margin says something if it is at most this share of s_k, or this share of s_1, to which no value is known by default.
_SHARE = 0.1
_TINY = 1e-5
#: Values found within this of each other, relatively, count as equal.
_EQUAL = 1e-3
#: Parts of [0, mu] in each of which the largest value of a filter is bounded.
_PARTS = 32


@dataclass(frozen=True, slots=True)
class TopK:
    """What is known about the singular values of a matrix that are not among the k that were found.

    Attributes:
        verdict: ``proven``: shown by arithmetic that accounts for all rounding. ``likely``: holds with high
            probability, because the search began with random rows. ``unknown``: there is no useful bound. A bound is
            useful if its margin is at most a tenth of s_k, or at most 1e-5 s_1.
        margin: no singular value that was not found is above ``s_k + margin * s_1``; infinite if ``unknown``.
        chance: an upper bound on the probability that this is wrong: 0 if ``proven``, 1e-6 if ``likely``, 1 if
            ``unknown``.
    """

    verdict: Verdict
    margin: float
    chance: float


UNKNOWN = TopK("unknown", math.inf, 1.0)
#: Where there are no other values, or all of them are zero.
NOTHING_ELSE = TopK("proven", 0.0, 0.0)


def known(s: torch.Tensor, limit: float, chance: float) -> TopK:
    """The verdict if no value that was not found is above ``limit``, but for a ``chance``.

    Args:
        s: float64 (k,) on the CPU, descending, s_1 above 0.
    """
    top, last = s[0].item(), s[-1].item()
    margin = max(0.0, limit - last) / top
    if not margin <= max(_SHARE * last / top, _TINY):
        return UNKNOWN
    return TopK("likely" if chance else "proven", margin, chance)


def norm_with_rest(norm: float, rest: float) -> float:
    """A bound on the norm of A without triplets ``U diag(s) V^T``, and so on all values but theirs.

    Beside ``D = (I - U U^T) A (I - V V^T)`` it holds what the triplets have left within their directions and across.

    Args:
        norm: of D.
        rest: root of the sum of the squared residuals.
    """
    return (norm + rest) / 2 + math.hypot((norm - rest) / 2, rest)  # the norm of [[rest, rest], [rest, norm]]


def top_k_of(search: Search | Decomposed, s: torch.Tensor, short: int, rounding: float) -> TopK:
    """What a search has left unseen, from how it went.

    Args:
        search: of a matrix with this shorter side.
        s: float64 (k,) on the CPU, the values found, descending, in the units of the search.
        rounding: of the precision that it worked in. What lies below its root, over s_1, may be lost in products with C.
    """
    if len(s) == short:
        return NOTHING_ELSE
    if s[0] <= 0:  # too small for their dtype
        return UNKNOWN
    if isinstance(search, Decomposed):
        return known(s, search.next_bound, 0.0)
    least = max(s[-1].item(), math.sqrt(rounding) * s[0].item())
    equal = _most_equal(s.tolist(), least)
    left = _left(search, len(s), equal)
    share = least_projection(left.rows, short, equal + 1, CHANCE / (_SEARCHES * len(s)))
    return known(s, least * stretch(left, share, least * least), CHANCE)


def _left(search: Search, k: int, equal: int) -> Search:
    """What the k directions that were found have left of a search for others; ``equal`` of them are counted by other means."""
    if search.filters:
        return replace(search, rows=search.rows - k + equal)
    return replace(search, steps=max(0, search.steps - math.ceil(k / search.rows)))


def least_projection(rows: int, dimension: int, axes: int, chance: float) -> float:
    """The squared projection that every unit vector of a given space has, at the least, on the span of Gaussian rows.

    Args:
        rows: how many, fewer than the ``dimension`` of the vectors.
        axes: the dimension of the given space.
        chance: with which this may be wrong.

    Returns:
        A positive number below 1, or 0 where there are too few rows.
    """
    a, b = (rows - axes + 1) / 2, (dimension - rows) / 2
    if a <= 0 or b < 1:
        return 0.0
    # Beta(a, b) is below x with a chance of at most x^a / (a B(a, b)).
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return min(math.exp((math.log(chance / axes * a) + log_beta) / a) / axes, 1.0)


def stretch(search: Search, share: float, mu: float) -> float:
    """How many times ``sqrt(mu)`` a singular value is, at most, that was missed though its direction is in the start rows.

    Args:
        share: the squared projection of the direction on the start rows, at the least; see the head of this module.
        mu: no Ritz value but those of the directions found is larger.
    """
    if share <= 0:
        return math.inf
    if not search.filters:
        return math.cosh(math.acosh(share**-0.5) / (2 * search.steps - 1)) if search.steps else math.inf
    # The filters grow beyond all edges, so that the largest value in a part is below that at its end.
    ends = [mu * i / _PARTS for i in range(1, _PARTS + 1)]
    most = max(2 * _log_filter(search, x) + math.log(mu - x + mu / _PARTS) for x in ends)
    needed = math.log(1 / share - 1) + most
    low, high = 1.0, 1 + 2 * _SHARE  # what is above says nothing
    for _ in range(20):
        middle = (low + high) / 2
        reached = 2 * _log_filter(search, mu * middle**2) + math.log(mu * (middle**2 - 1)) >= needed
        low, high = (low, middle) if reached else (middle, high)
    return high if high < 1 + 2 * _SHARE else math.inf


def steps_for(limit: float, share: float) -> int:
    """How many block steps make ``stretch`` no more than a ``limit`` above 1."""
    return math.ceil((math.acosh(share**-0.5) / math.acosh(limit) + 1) / 2)


def _log_filter(search: Search, x: float) -> float:
    """The logarithm of ``p(x)``, p the product of the filters and x^2; an upper bound where a filter oscillates."""
    total = 2 * math.log(x)
    for edge, degree in search.filters:
        if x > edge:
            angle = degree * math.acosh(2 * x / edge - 1)
            total += angle + math.log1p(math.exp(-2 * angle)) - math.log(2)
    return total


def _most_equal(s: list[float], least: float) -> int:
    """The most values that lie within ``_EQUAL`` of each other; at least 1, since one may have an equal that was not found."""
    most = first = 0
    for last, value in enumerate(s):
        if value < least:
            break
        while s[first] - value > _EQUAL * s[first]:
            first += 1
        most = max(most, last - first + 1)
    return max(most, 1)
