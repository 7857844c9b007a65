"""Figures for what others claim of fine-tuning: one factor for all singular values, left and right vectors turned alike.

The claims: He, Cao, "Understanding Post-Training Structural Changes in Large Language Models" (arXiv 2509.17866). Figures for
others are among those of the directions (``surgery.study.directions``) and of the update (``surgery.study.spectrum``).

What close values turn into one another turns alike on both sides whatever the update is: to first order in D, with
``d = U^T D V``, the sum of the two turns is ``(d_ij + d_ji) / (s_j - s_i)``, their difference ``(d_ij - d_ji) / (s_i + s_j)``.
That is why turns are not only held against independent ones, but also against those that a random update makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from surgery.linalg.svd import TruncatedSVD
from surgery.solvers.random import generator_of
from surgery.study.directions import Flags, Matched, known_values, turn_rows
from surgery.study.matching import Floats, Indices, assignment, in_common

#: A change is told from the rounding of the stored weights, and from the error of the solver, if it is so many times as large.
_TIMES_NOISE = 2.0
#: The turns of the first r directions towards the first so many times r are looked at.
_TOWARDS = 4


@dataclass(frozen=True, slots=True)
class Scaling:
    """One factor c for all singular values of a matrix.

    Attributes:
        factor: c, by least squares of the k leading new values on the old ones, ``<s, s'> / <s, s>``.
        of_values: what it explains of their change, ``1 - ||s' - c s||^2 / ||s' - s||^2``.
        of_update: what it explains of the change D of the matrix W, ``1 - ||D - (c - 1) W||^2 / ||D||^2``; 0 if that is less.
    """

    factor: float
    of_values: float
    of_update: float


@dataclass(frozen=True, slots=True)
class Turning:
    """How the first r directions turned towards the first 4 r, on both sides.

    With L and R for what ``U^T U'`` and ``V^T V'`` are there besides the products of a vector and the one that it became:

    Attributes:
        left, right: ``||L||`` and ``||R||`` over the square root of the number of directions: sines, root mean square.
        alike: ``2 <L, R> / (||L||^2 + ||R||^2)``: 1 if the two sides turned by the same matrix, -1 if by opposite ones.
        independent: the standard deviation of that for turns of these sizes whose signs are independent; its mean is then 0.
        random: the same figure for a random update of the same size.
    """

    left: float
    right: float
    alike: float
    independent: float
    random: float


@dataclass(frozen=True, slots=True)
class Claims:
    """Figures of one matrix and what it became.

    Attributes:
        rounding: share of ``||D||^2`` of the update D that the rounding to the stored dtypes may account for, at most 1; None
            where nothing has changed.
        scaling: None where the change of the values is no more than the errors of rounding and solver.
        turning: None where the directions have not turned by more than these errors, or fewer than two are determined.
    """

    rounding: float | None
    scaling: Scaling | None
    turning: Turning | None


def claims_of(found: Matched, size: float, k: int, r: int, seed: int) -> Claims:
    """The figures of a matrix (m, n) and what it became.

    Args:
        found: their directions.
        size: the Frobenius norm of the difference.
        k: how many values are told.
        r: as many count as the top.
        seed: of the random update.
    """
    if size == 0:
        return Claims(None, None, None)
    entries = found.before.U.shape[0] * found.before.V.shape[0]
    return Claims(
        rounding=min(1.0, found.noise**2 * entries / size**2),
        scaling=_scaling(found, size, k),
        turning=_turning(found, size / math.sqrt(entries), r, seed),
    )


def _scaling(found: Matched, size: float, k: int) -> Scaling | None:
    known = (known_values(found.before) & known_values(found.after)).numpy()[:k]
    old, new = (svd.s.double().cpu().numpy()[:k][known] for svd in (found.before, found.after))
    change = float(np.square(new - old).sum())
    errors = sum(np.square(_value_errors(svd)[:k][known]) for svd in (found.before, found.after)) + found.noise**2
    if not len(old) or change <= _TIMES_NOISE**2 * float(np.sum(errors)):
        return None
    factor = float(old @ new / (old @ old))
    before, after = (svd.norm.item() ** 2 for svd in (found.before, found.after))
    along = (after - before - size**2) / 2  # <D, W>
    gain = 2 * (factor - 1) * along - (factor - 1) ** 2 * before
    of_values = 1 - float(np.square(new - factor * old).sum()) / change
    return Scaling(factor, max(0.0, of_values), min(1.0, max(0.0, gain / size**2)))


def _value_errors(svd: TruncatedSVD) -> Floats:
    """Bounds of the errors of singular values: the residual, or its square over the gap where that is less."""
    residual, gap = svd.certificate.residual.numpy(), svd.certificate.gap.numpy()
    bounds: Floats = np.minimum(residual, residual**2 / np.maximum(gap, 1e-300)) * svd.s[0].item()
    return bounds


def _turning(found: Matched, spread: float, r: int, seed: int) -> Turning | None:
    """``spread`` is the root mean square of the entries of the difference."""
    rows = np.flatnonzero(found.sure[:r])
    width = min(_TOWARDS * r, len(found.match))
    if len(rows) < 2:
        return None
    columns = found.groups_after >= 0
    columns[width:] = False
    products, sizes = _turns(found.left, found.right, found.match, rows, columns)
    total = sizes[0] + sizes[1]
    if total <= 2 * _TIMES_NOISE**2 * _turned_by_errors(found, rows, width):
        return None
    owner = np.argsort(found.match)
    by_pair = np.zeros_like(products)
    by_pair[:, owner] = products
    # What i turned towards j and what j turned towards i are one and the same turn.
    pairs = np.triu(by_pair + by_pair.T)
    return Turning(
        left=math.sqrt(sizes[0] / len(rows)),
        right=math.sqrt(sizes[1] / len(rows)),
        alike=2 * float(products.sum()) / total,
        independent=2 * float(np.linalg.norm(pairs)) / total,
        random=_at_random(found, spread, rows, width, seed),
    )


def _turns(left: Floats, right: Floats, match: Indices, rows: Indices, columns: Flags) -> tuple[Floats, tuple[float, float]]:
    """The products (K, K) of the entries of L and R, 0 outside of the rows and columns, and the squared norms of these two."""
    inside = np.zeros(left.shape, dtype=bool)
    inside[rows] = columns
    every = np.arange(len(match))
    inside[every, match] = False
    # A pair (u, -v) is the same direction, with a negative factor.
    signs = np.ones(len(match))
    signs[match] = np.where(left[every, match] * right[every, match] < 0, -1.0, 1.0)
    L, R = np.where(inside, left, 0.0), np.where(inside, right * signs, 0.0)
    return L * R, (float(np.square(L).sum()), float(np.square(R).sum()))


def _turned_by_errors(found: Matched, rows: Indices, width: int) -> float:
    """The squared norm, of one side, that the rounding of the stored weights gives L to first order, and the solver's error."""
    s = found.before.s.double().cpu().numpy()[:width]
    squares, apart = np.square(s), found.groups[rows, None] != found.groups[:width]
    differences = np.where(apart, squares[rows, None] - squares, np.inf)
    rounding = found.noise**2 * (squares[rows, None] + squares) / np.maximum(np.square(differences), 1e-300)
    total = float(np.minimum(rounding, 1.0).sum())
    for svd, which in ((found.before, rows), (found.after, found.match[rows])):
        residual, gap = svd.certificate.residual.numpy()[which], svd.certificate.gap.numpy()[which]
        # What belongs to a group has no angle of its own, and has been turned to match.
        total += float(np.square(np.where(residual < gap, residual / np.maximum(gap, 1e-300), 0.0)).sum())
    return total


def _at_random(found: Matched, spread: float, rows: Indices, width: int, seed: int) -> float:
    """What ``alike`` is for an update of independent entries of the given root mean square.

    Within the first ``width`` directions, which to second order are all that matters for turns among them.
    """
    noise = torch.randn(width, width, generator=generator_of(seed), dtype=torch.float64)
    core = torch.diag(found.before.s[:width].double().cpu()) + spread * noise
    U, _, Vh = torch.linalg.svd(core)
    left, right = U.numpy(), Vh.T.numpy().copy()
    match = assignment(in_common(left, right))
    groups = found.groups[:width]
    for first in np.unique(groups[groups >= 0]):
        group = np.flatnonzero(groups == first)
        if len(group) > 1:
            turn_rows(left, right, group, match[group])
    products, sizes = _turns(left, right, match, rows, np.ones(width, dtype=bool))
    total = sizes[0] + sizes[1]
    return 2 * float(products.sum()) / total if total > 0 else 0.0
