"""What an engine has gone through to find leading singular triplets, from which follows what it may have missed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Search:
    """A random search of one matrix for the leading eigenvectors of ``C = B^T B``, B the matrix or its transpose.

    It began with ``rows`` independent Gaussian rows Omega (rows, short), of any lengths. The space in which the triplets were
    found holds ``Omega p(C)``, in exact arithmetic, for every polynomial p of degree below ``steps``; or, if there are
    ``filters``, for ``p(x) = x^2`` times all of these.

    Attributes:
        rows: how many.
        steps: how many blocks of products with C it went through before it first let go of anything.
        filters: (edge, degree) of Chebyshev polynomials ``T_degree(2 x / edge - 1)``.
    """

    rows: int
    steps: int = 0
    filters: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decomposed:
    """All singular values of the matrix were computed, so that nothing can have been missed but by rounding.

    Attributes:
        next_bound: how large the singular value after those that are wanted is at most, with all rounding; 0 if there is none.
    """

    next_bound: float
