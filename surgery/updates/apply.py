"""Weights with an update, matrix by matrix, rounded once to the dtype that they are worked on in."""

from __future__ import annotations

import torch

from surgery.errors import ScalesError, WeightError
from surgery.format.header import TensorEntry
from surgery.format.manifest_records import TargetRecord
from surgery.linalg.lossless import Addition, rescale
from surgery.linalg.rounding import all_finite
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import FactorizedWeights
from surgery.weights.matrix import StoredMatrix, computed_on
from surgery.weights.protocol import check_entry


class UpdatedWeights:
    """The tensors of a factorized checkpoint with an update. For any number of threads.

    Args:
        checkpoint: the weights, and the factors that scales belong to.
        update: what is added.
    """

    def __init__(self, checkpoint: FactorizedWeights, update: Update) -> None:
        self._checkpoint = checkpoint
        self._update = update

    def targets(self, tensor: str) -> tuple[TargetRecord, ...]:
        """The targets in a tensor; none if it has none."""
        return self._checkpoint.targets.get(tensor, ())

    def is_residual(self, tensor: str) -> bool:
        """Whether a tensor is stored as its residual."""
        return bool(self.targets(tensor)) and self._checkpoint.is_residual(tensor)

    def is_scaled(self, tensor: str) -> bool:
        """Whether any scale of a tensor is another than 1."""
        return any(map(self._update.changes, self.targets(tensor)))

    def is_added_to(self, tensor: str) -> bool:
        """Whether something else is added to a tensor."""
        return self._update.addition(tensor) is not None

    def is_matrix_scaled(self, tensor: str, index: int) -> bool:
        """``is_scaled`` of one matrix."""
        return any(self._update.scales(target, index) is not None for target in self.targets(tensor))

    def tensor(self, weight: torch.Tensor, entry: TensorEntry, first: int, device: torch.device) -> torch.Tensor:
        """A tensor, or some matrices of a stack, with its update.

        Args:
            weight: what is stored, dequantized; its memory may be used for the result.
            entry: of the tensor.
            first: the first of the matrices.
            device: where the arithmetic runs; it must have float64.

        Returns:
            In shape and dtype of ``weight``, on the CPU.

        Raises:
            ScalesError: the result is beyond the range of the dtype.
            FormatError: the tensor is not as the manifest describes it, or its correction is damaged.
        """
        addition = self._update.addition(entry.name)
        result = weight
        targets = self.targets(entry.name)
        if addition is not None and not (len(targets) == 1 and targets[0].slice is None):
            # What is in no slice; the slices are computed from the weight below.
            result = _added(weight.view(len(weight), -1), addition, device).view(weight.shape)
            _check_finite(result, f"the adapter pushes {entry.name!r}", None)
        for target in targets:
            check_entry(entry, target)
            if not self.is_residual(entry.name) and not self._update.changes(target) and addition is None:
                continue
            view, part = target.seen_as, None if addition is None else _of_slice(addition, target)
            matrices = list(view.matrices(weight))
            dense = [
                self._matrix(self._stored(entry.name, matrix, target, i), i, device, part)
                for i, matrix in enumerate(matrices, first)
            ]
            if view.slice is not None:
                view.store(torch.stack(dense), result)
            elif len(dense) == 1:
                return dense[0].view(weight.shape)
            else:
                for matrix, new in zip(matrices, dense, strict=True):
                    if new is not matrix:  # computed elsewhere
                        matrix.copy_(new)
        return result

    def _stored(self, tensor: str, stored: torch.Tensor, target: TargetRecord, index: int) -> StoredMatrix:
        """One matrix of a tensor, of a target or an alias of one, with what its update needs."""
        if self.is_residual(tensor):
            return self._checkpoint.residual(target, index, stored)
        scaled = self._update.scales(target, index) is not None
        return self._checkpoint.weight(target, index, stored, scaled=scaled)

    def _matrix(self, matrix: StoredMatrix, index: int, device: torch.device, addition: Addition | None) -> torch.Tensor:
        """One matrix (m, n) with its update, on the CPU, perhaps in the memory of what was stored."""
        target, scales = matrix.target, self._update.scales(matrix.target, index)
        if not matrix.is_residual and scales is None and addition is None:
            return matrix.stored
        result = matrix.updated(device, scales, addition)
        if scales is not None or addition is not None:
            what = f"the scales of {target.key!r} push" if addition is None else f"scales and adapter push {target.key!r}"
            _check_finite(result, what, scales)
        elif matrix.correction is None and not all_finite(result):
            raise WeightError(
                f"{target.shard}: without its correction {target.key!r} is beyond the range of its dtype",
                hint="factorize again, without --no-correction",
            )
        return result


def _added(weight: torch.Tensor, addition: Addition, device: torch.device) -> torch.Tensor:
    """A weight (m, n) and what is added to it, rounded once, in memory of its own."""
    return computed_on(device, weight, lambda there, where: rescale(there, None, None, addition.to(where)))


def _check_finite(weight: torch.Tensor, what: str, scales: torch.Tensor | None) -> None:
    if not all_finite(weight):
        raise ScalesError(
            f"{what} weights beyond the range of {str(weight.dtype).removeprefix('torch.')}",
            got=None if scales is None else f"scales of up to {scales.abs().max().item():.3g}",
            hint="the training diverged: take an earlier checkpoint",
        )


def _of_slice(addition: Addition, target: TargetRecord) -> Addition:
    """The part of what is added to a tensor that concerns a target."""
    part = target.slice
    if part is None:
        return addition
    sides = [addition.left, addition.right]
    phase = torch.arange(len(sides[part.axis])) % part.period
    sides[part.axis] = sides[part.axis][(phase >= part.start) & (phase < part.stop)]
    return Addition(*sides)
