"""Which matrices of a window are solved together. It follows from headers alone, as the bits of a result may depend on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import torch

from surgery.engine.sharing import batch_limit
from surgery.engine.walk import spans, windows
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.tensor_view import by_tensor
from surgery.planning.plan import ShardPlan
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


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """A matrix that will be factorized; ``weight`` is (m, n) on the meta device, without numbers."""

    target: Target
    index: int
    weight: torch.Tensor


def planned_batches(shard: ShardPlan, window_bytes: int, device: str) -> Iterator[Sequence[PlannedMatrix]]:
    """The batches in which a weight file will be factorized.

    Args:
        shard: the weight file and its targets, with their ranks.
        window_bytes: of the plan.
        device: the kind of device of the run.
    """
    targets = by_tensor(shard.targets)
    for window in windows(spans(shard.header, {name: some[0].at_a_time for name, some in targets.items()}), window_bytes):
        matrices = []
        for span in window:
            for target in () if span.entry is None else targets[span.entry.name]:
                count, m, n = target.matrices
                dtype = torch.float32 if target.quantized is not None else TORCH_DTYPES[target.dtype]
                weight = torch.empty(m, n, dtype=dtype, device="meta")
                for index in range(span.first, span.first + (count if span.count is None else span.count)):
                    matrices.append(PlannedMatrix(target, index, weight))
        yield from batches(matrices, window_bytes if device == "cuda" else None)
