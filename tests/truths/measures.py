"""What is left of an update after rounding, from the weights before, the exact ones after, and those that were written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kept:
    """Of the update D of one matrix, written as W + R; sums over several have a meaning.

    Attributes:
        asked: ``<D, D>``.
        arrived: ``<R, D>``.
        within: the squared norm of D between the bases of its columns and rows.
        missed: that of R - D.
    """

    asked: float
    arrived: float
    within: float
    missed: float

    @property
    def share(self) -> float:
        """Of the update, that arrived."""
        return self.arrived / self.asked

    @property
    def error(self) -> float:
        """Within the update's directions, relative to it."""
        return math.sqrt(self.missed / self.within)

    @classmethod
    def of_all(cls, several: Iterable[Kept]) -> Kept:
        sums = [sum(values) for values in zip(*((k.asked, k.arrived, k.within, k.missed) for k in several), strict=True)]
        return cls(*sums)


def kept_of(before: torch.Tensor, truth: torch.Tensor, written: torch.Tensor, rank: int) -> list[Kept]:
    """For each matrix that changes, of a stack (B, m, n) or else (m, product of the rest); by at most ``rank``.

    Args:
        before, truth, written: of one shape.
        rank: of each update.
    """
    three = before.ndim == 3
    W, T, X = (tensor.double() if three else tensor.double().flatten(1)[None] for tensor in (before, truth, written))
    found = []
    for D, R in zip(T - W, X - W, strict=True):
        if not D.any():
            continue
        U, _, Vt = torch.linalg.svd(D, full_matrices=False)
        P, Q = U[:, :rank], Vt[:rank].T
        within, missed = ((P.T @ matrix @ Q).square().sum().item() for matrix in (D, R - D))
        found.append(Kept(D.square().sum().item(), (R * D).sum().item(), within, missed))
    return found
