"""What an extraction finds of the tensors of two models, and how the low-rank part of a change is split into two halves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.files.file_records import FileRecord
from surgery.lossless.factors import Factors

#: How approximations are ended, from what says most to what says least.
RULES = ("zero", "directions", "error", "passes")
#: What may have become of a tensor that is no target.
FATES = ("same", "changed", "resized", "gone")


@dataclass(frozen=True, slots=True)
class ExtractedMatrix:
    """What was found of one matrix. All norms are Frobenius norms.

    Attributes:
        before, after, change: norms of the matrix, of the tuned one, and of their difference.
        values: the singular values of the difference that are kept, descending.
        error: norm of what they leave of the difference.
        rule, excess, above_floor: how the approximation was ended and how good it is, see ``surgery.linalg.low_rank``.
        merged: norm of the difference between the tuned matrix and what ``merge`` writes with the adapter; None where the
            rank is not decided yet.
    """

    before: float
    after: float
    change: float
    values: list[float]
    error: float
    rule: str
    excess: float | None
    above_floor: int
    merged: float | None


@dataclass(frozen=True, slots=True)
class ExtractedTensor:
    """What was found of a target.

    Attributes:
        tensor: its name.
        rank: of its factors, which are in the job's file: the largest of its matrices'; 0 if nothing has changed.
        matrices: what was found of each.
    """

    tensor: str
    rank: int
    matrices: list[ExtractedMatrix]

    def is_possible(self, count: int, most: int) -> bool:
        """Whether it may be what was found of so many matrices, with so many directions of each at most."""
        lengths = [len(one.values) for one in self.matrices]
        known = all(one.rule in RULES for one in self.matrices)
        return known and len(lengths) == count and self.rank == max(lengths) <= most


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """What was found of a tensor that is no target.

    Attributes:
        tensor: its name.
        fate: ``same``; ``changed``; ``resized``: of another shape, with its first rows compared where only their number
            differs; ``gone``: not in the tuned model.
        norm, change: Frobenius norms of the tensor and of its change; None where they cannot be told.
        shape: that it has in the tuned model; None if it is gone.
    """

    tensor: str
    fate: str
    norm: float | None
    change: float | None
    shape: list[int] | None

    def is_possible(self) -> bool:
        """Whether its fate is one that there is, and all is known that goes with it."""
        return self.fate in FATES and (self.shape is None) == (self.fate == "gone")


@dataclass(frozen=True, slots=True)
class ExtractedShard:
    """What the job of a weight file gives.

    Attributes:
        file: the file with the factors of its targets, and the new numbers of tensors that are saved as a whole; None if there
            are none of either.
        targets, others: what was found of its tensors.
    """

    file: FileRecord | None
    targets: list[ExtractedTensor]
    others: list[ComparedTensor]


def saved_key(tensor: str) -> str:
    """The key under which a job's file holds the new numbers of a tensor: its bytes, and zeros up to a multiple of four."""
    return f"{tensor}.saved"


def balanced(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """``B = U sqrt(s)`` and ``A^T = V sqrt(s)``, float32 (..., m, k) and (..., n, k): halves of one size."""
    root = factors.s.double().sqrt()[..., None, :]
    return (factors.U.double() * root).float(), (factors.V.double() * root).float()
