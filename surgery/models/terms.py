"""``Term``: the directions of a target in the coordinates of a model's parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Term:
    """The k directions of one matrix of a target, in the rows and columns of the parameter that it is in.

    Attributes:
        first: index of the matrix's first scale among those of the target.
        matrix: index of the parameter's matrix; 0 unless it is a stack.
        left: (rows, k), float32; zero in rows of the parameter that are not of this matrix.
        right: (columns, k), float32; zero likewise.
        transposed: whether the parameter holds the matrix transposed, so that ``left`` is made of V and ``right`` of U: what
            is between U and V^T is transposed then between the two.
    """

    first: int
    matrix: int
    left: torch.Tensor
    right: torch.Tensor
    transposed: bool
