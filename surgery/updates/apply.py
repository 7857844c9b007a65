"""Tensors with an update: computed matrix by matrix, and rounded once to their dtype (float32 for what is quantized)."""

from __future__ import annotations

import torch

from surgery.errors import ScalesError, WeightError
from surgery.format.header import TensorEntry
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.factors import Addition
from surgery.lossless.rounding import all_finite
from surgery.lossless.update import rescale
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint
from surgery.weights.matrix import StoredMatrix, computed_on
from surgery.weights.protocol import check_entry


class UpdatedWeights:
    """The tensors of a checkpoint with an update. Any number of threads may use it.

    Args:
        checkpoint: the weights, and the factors that scales belong to.
        update: what is added to them.
    """

    def __init__(self, checkpoint: Checkpoint, update: Update) -> None:
        self._checkpoint = checkpoint
        self._update = update

    def targets(self, tensor: str) -> tuple[TargetRecord, ...]:
        """The targets in a tensor; empty if it has none."""
        return self._checkpoint.targets.get(tensor, ())

    def is_residual(self, tensor: str) -> bool:
        """Whether a tensor is stored as its residual."""
        return bool(self.targets(tensor)) and self._checkpoint.is_residual(tensor)

    def is_scaled(self, tensor: str) -> bool:
        """Whether any scale of any target in a tensor differs from 1."""
        return any(map(self._update.changes, self.targets(tensor)))

    def is_added_to(self, tensor: str) -> bool:
        """Whether the update adds a low-rank matrix to a tensor, besides scales."""
        return self._update.addition(tensor) is not None

    def is_matrix_scaled(self, tensor: str, index: int) -> bool:
        """Whether any scale of one matrix of a tensor differs from 1."""
        return any(self._update.scales(target, index) is not None for target in self.targets(tensor))

    def tensor(self, weight: torch.Tensor, entry: TensorEntry, first: int, device: torch.device) -> torch.Tensor:
        """A tensor, or some consecutive matrices of a stack, with the update.

        Args:
            weight: what is stored of it, residual or weight, dequantized. Its memory may be used for the result.
            entry: of the tensor in the header.
            first: the index of the first of these matrices; 0 for a whole tensor.
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
            # This is for the entries that are in no slice. The slices are computed below, from the weight without an update.
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
        """One matrix of a tensor, which belongs to a target or is an alias of one, with the factors that its update needs."""
        if self.is_residual(tensor):
            return self._checkpoint.residual(target, index, stored)
        scaled = self._update.scales(target, index) is not None
        return self._checkpoint.weight(target, index, stored, scaled=scaled)

    def _matrix(self, matrix: StoredMatrix, index: int, device: torch.device, addition: Addition | None) -> torch.Tensor:
        """One matrix (m, n) with the update, on the CPU, perhaps in the memory of ``matrix.stored``."""
        target, scales = matrix.target, self._update.scales(matrix.target, index)
        if not matrix.is_residual and scales is None and addition is None:
            return matrix.stored
        result, _ = matrix.updated(device, scales, addition)
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
    """A weight (m, n) plus a low-rank matrix, rounded once, on the CPU, in new memory."""
    return computed_on(device, weight, lambda there, where: rescale(there, None, None, addition.to(where))[0])


def _check_finite(weight: torch.Tensor, what: str, scales: torch.Tensor | None) -> None:
    if not all_finite(weight):
        raise ScalesError(
            f"{what} weights beyond the range of {str(weight.dtype).removeprefix('torch.')}",
            got=None if scales is None else f"scales of up to {scales.abs().max().item():.3g}",
            hint="the training diverged: take an earlier checkpoint",
        )


def _of_slice(addition: Addition, target: TargetRecord) -> Addition:
    """The rows or columns of what is added to a tensor that belong to a target, which may be a slice of it."""
    part = target.slice
    if part is None:
        return addition
    sides = [addition.left, addition.right]
    phase = torch.arange(len(sides[part.axis])) % part.period
    sides[part.axis] = sides[part.axis][(phase >= part.start) & (phase < part.stop)]
    return Addition(*sides)
