"""Matching: which singular direction of one matrix corresponds to which of another, whatever its place in the order.

Two directions (u, v) and (u', v') have ``((u . u')^2 + (v . v')^2) / 2`` in common. Summed over all directions of either matrix
that is at most 1. So a direction that has more than half in common with another one has less with every other.

Assignment: Kuhn, "The Hungarian method for the assignment problem" (Naval Research Logistics 2, 1955), with shortest
augmenting paths as in Jonker, Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
problems" (Computing 38, 1987).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Two directions with more than this in common are a pair in every best assignment: the two pairs that would have them apart
#: have less in common, together.
_CERTAIN = 2 / 3


def in_common(left: Floats, right: Floats) -> Floats:
    """What directions have in common, as defined above, from the cosines of their left and of their right vectors."""
    shares: Floats = (np.square(left) + np.square(right)) / 2
    return shares


def assignment(shares: Floats) -> Indices:
    """Assign rows to columns such that the sum of what pairs have in common is greatest.

    Args:
        shares: (k, k), what row and column have in common; no row or column has a sum above 1.

    Returns:
        (k,): the column of each row.
    """
    assigned = np.full(len(shares), -1, dtype=np.int64)
    rows, columns = np.nonzero(shares > _CERTAIN)
    assigned[rows] = columns
    others = np.flatnonzero(assigned < 0)
    left = np.setdiff1d(np.arange(len(shares)), columns)
    assigned[others] = left[_least(-shares[np.ix_(others, left)])]
    return assigned


def _least(costs: Floats) -> Indices:
    """The assignment of all rows to columns with the least sum of costs (k, k). Inside, rows and columns count from 1."""
    size = len(costs)
    of_row, of_column = np.zeros(size + 1), np.zeros(size + 1)
    owner = np.zeros(size + 1, dtype=np.int64)  # of a column: its row, counted from 1
    for row in range(1, size + 1):
        owner[0], column = row, 0
        distance, before = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int64)
        reached = np.zeros(size + 1, dtype=bool)
        while owner[column]:
            reached[column] = True
            length = costs[owner[column] - 1] - of_row[owner[column]] - of_column[1:]
            shorter = ~reached[1:] & (length < distance[1:])
            distance[1:][shorter], before[1:][shorter] = length[shorter], column
            nearest = int(np.where(reached, np.inf, distance)[1:].argmin()) + 1
            step = distance[nearest]
            of_row[owner[reached]] += step
            of_column[reached] -= step
            distance[~reached] -= step
            column = nearest
        while column:
            owner[column] = owner[before[column]]
            column = int(before[column])
    assigned = np.empty(size, dtype=np.int64)
    assigned[owner[1:] - 1] = np.arange(size)
    return assigned


def turned_onto(left: Floats, right: Floats) -> Floats:
    """The orthogonal matrix (j, j) that turns j directions among themselves so that they come closest to j others.

    Left and right vectors turn together, as those of equal singular values may.

    Args:
        left, right: (j, j), products of the vectors of the one (rows) and of the others (columns).

    Source: the orthogonal Procrustes problem, Golub, Van Loan, "Matrix Computations", section 6.4.
    """
    # A pair (u, -v) is the same direction, with a negative factor.
    signs = np.where((left * right).sum(axis=0) < 0, -1.0, 1.0)
    rows, _, columns = np.linalg.svd(left + right * signs)
    turn: Floats = rows @ columns
    return turn
