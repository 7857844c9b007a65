"""Directions of a target as they lie in a parameter of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Term:
    """Directions of one matrix of a target, as they lie in a parameter.

    Attributes:
        first: where the scales of the matrix begin among those of the target.
        matrix: which matrix of the parameter, 0 unless it is a stack.
        left: (rows, k), zero where the matrix is not.
        right: (columns, k).
    """

    first: int
    matrix: int
    left: torch.Tensor
    right: torch.Tensor
