"""Which matrices of a window are solved together. It follows from headers alone, as the bits of a result may depend on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import torch

from surgery.engine.sharing import batch_limit
from surgery.planning.targets import Target


class OfTarget(Protocol):
    """A matrix of a target.

    Attributes:
        target: the target that it is a matrix of.
        index: which of its matrices.
        weight: (m, n).
    """

    @property
    def target(self) -> Target: ...

    @property
    def index(self) -> int: ...

    @property
    def weight(self) -> torch.Tensor: ...


_Matrix = TypeVar("_Matrix", bound=OfTarget)


def batches(matrices: Sequence[_Matrix], window_bytes: int | None) -> Iterator[Sequence[_Matrix]]:
    """The matrices of a window in batches: those of one shape, dtype and rank together.

    Args:
        matrices: in the order of the file.
        window_bytes: of the window, by which batches on a GPU are bounded: so many of one kind are shared out evenly. None on
            other devices, which take as many at a time as they are fast with.
    """
    groups: dict[object, list[_Matrix]] = {}
    for matrix in matrices:
        target = matrix.target
        # With an energy the rank is not known before the SVD, so that such a matrix is solved alone.
        alone = (target.key, matrix.index) if target.energy is not None else None
        groups.setdefault((matrix.weight.shape, matrix.weight.dtype, target.rank, alone), []).append(matrix)
    for group in groups.values():
        count = 1 if window_bytes is None else -(-len(group) // batch_limit(group[0].weight.nbytes, window_bytes))
        ends = [len(group) * i // count for i in range(count + 1)]
        yield from (group[first:end] for first, end in pairwise(ends))
