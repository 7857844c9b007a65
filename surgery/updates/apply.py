"""Tensors with an update: computed matrix by matrix, and rounded once to the numbers that are written."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from surgery.errors import ScalesError, WeightError
from surgery.format.header import TensorEntry
from surgery.format.manifest_records import TargetRecord
from surgery.format.views import Slice
from surgery.lossless.factors import Addition, between, both, inner_change
from surgery.lossless.grids import Grid
from surgery.lossless.rounding import all_finite, round_once
from surgery.lossless.update import Rounding
from surgery.updates.changes import TensorChange
from surgery.updates.kept_updates import KeptUpdate
from surgery.updates.magnitudes import addition_of
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint
from surgery.weights.matrix import StoredMatrix, added
from surgery.weights.protocol import check_entry


@dataclass(frozen=True, slots=True)
class WrittenAs:
    """What a tensor is written as.

    Attributes:
        dtype: of the result; float32 for what is quantized after.
        rounding: how its matrices are rounded; None for the better way for each.
        grid: gives the numbers that a matrix of the tensor may hold, by its index in a stack and the slice that it is of the
            tensor, if it is one; None for all numbers of the dtype.
    """

    dtype: torch.dtype
    rounding: Rounding | None
    grid: Callable[[int, Slice | None], Grid | None] = lambda index, part: None


@dataclass(frozen=True, slots=True)
class Updated:
    """A tensor with an update.

    Attributes:
        tensor: on the CPU, in shape and dtype as it was asked for.
        kept: key of a target, or name of a tensor -> what its rounding kept of the update.
    """

    tensor: torch.Tensor
    kept: dict[str, KeptUpdate] = field(default_factory=dict)

    def keep(self, more: KeptUpdate) -> None:
        """Count what was kept of one more matrix."""
        self.kept[more.name] = self.kept[more.name] + more if more.name in self.kept else more

    def check(self) -> None:
        """Refuse an update that is so large that it cannot be told what was kept of it. Raises ScalesError."""
        for name, one in self.kept.items():
            if not math.isfinite(one.kept.arrived):
                raise ScalesError(
                    f"the update of {name!r} is so large that it cannot be told what its rounding keeps",
                    hint="the training diverged, or an alpha or weight is wrong",
                )


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

    def change(self, tensor: str) -> TensorChange | None:
        """What is done to a tensor besides scales; None for nothing."""
        return self._update.change(tensor)

    def is_changed(self, tensor: str) -> bool:
        """Whether any scales or core of any target in a tensor are not untouched, or anything else is done to it."""
        return self.change(tensor) is not None or any(map(self._update.changes, self.targets(tensor)))

    def is_matrix_changed(self, tensor: str, index: int) -> bool:
        """Whether any scales or core of one matrix of a stack are not untouched, or anything else is done to it."""
        change = self.change(tensor)
        return (change is not None and (not change.is_stack or index in change.parts)) or any(
            self._update.scales(target, index) is not None for target in self.targets(tensor)
        )

    def tensor(self, weight: torch.Tensor, entry: TensorEntry, first: int, device: torch.device, written: WrittenAs) -> Updated:
        """A tensor, or some consecutive matrices of a stack, with the update.

        Args:
            weight: what is stored of it, residual or weight, dequantized. Its memory may be used for the result.
            entry: of the tensor in the header.
            first: the index of the first of these matrices; 0 for a whole tensor.
            device: where the arithmetic runs; it must have float64.
            written: what it is written as.

        Raises:
            ScalesError: the result is beyond the range of the dtype.
            FormatError: the tensor is not as the manifest describes it, its correction is damaged, or an adapter's file is.
        """
        for target in self.targets(entry.name):
            check_entry(entry, target)
        change = self.change(entry.name)
        if change is None:
            updated = self._by_targets(weight, entry.name, first, device, written)
        elif change.replacement is not None:
            updated = Updated(change.replacement.read().view(weight.shape))
        elif not change.parts:
            updated = Updated(self._originals(weight, entry.name, first, device))
        elif _has_one_view(self.targets(entry.name)) and not _has_magnitudes(change):
            updated = self._by_targets(weight, entry.name, first, device, written)
        else:
            updated = self._as_a_whole(self._originals(weight, entry.name, first, device), entry.name, first, device, written)
        result = updated.tensor
        if change is not None and change.offset is not None:
            result = result.double() + change.offset.view(result.shape)
        result = round_once(result, written.dtype) if result.dtype == torch.float64 else result.to(written.dtype)
        if change is not None and change.rows is not None:
            result[change.rows.indices] = round_once(change.rows.values.double(), written.dtype).view(-1, *result.shape[1:])
        if change is not None and written.dtype == weight.dtype:
            _check_finite(result, f"the update pushes {entry.name!r} to", None)
        return Updated(result, updated.kept)

    def _by_targets(self, weight: torch.Tensor, name: str, first: int, device: torch.device, written: WrittenAs) -> Updated:
        """A tensor whose targets are updated one by one; what else is added has the one view that its only target has."""
        result = Updated(weight)
        change = self.change(name)
        for target in self.targets(name):
            if not self.is_residual(name) and not self._update.changes(target) and change is None:
                continue
            view = target.seen_as
            matrices = list(view.matrices(weight))
            new = []
            for i, matrix in enumerate(matrices, first):
                parts = () if change is None else change.parts.get(i, ())
                addition = addition_of(parts, matrix, name) if parts else None
                stored = self._stored(name, matrix, target, i)
                new.append(self._matrix(stored, i, device, addition, written, result))
            if view.slice is not None:
                view.store(torch.stack(new), weight)
            elif len(new) == 1:
                return Updated(new[0].view(weight.shape), result.kept)
            else:
                for matrix, one in zip(matrices, new, strict=True):
                    if one is not matrix:  # computed elsewhere
                        matrix.copy_(one)
        return result

    def _stored(self, tensor: str, stored: torch.Tensor, target: TargetRecord, index: int) -> StoredMatrix:
        """One matrix of a tensor, which belongs to a target or is an alias of one, with the factors that its update needs."""
        if self.is_residual(tensor):
            return self._checkpoint.residual(target, index, stored)
        scaled = self._update.scales(target, index) is not None
        return self._checkpoint.weight(target, index, stored, scaled=scaled)

    def _matrix(
        self,
        matrix: StoredMatrix,
        index: int,
        device: torch.device,
        addition: Addition | None,
        written: WrittenAs,
        counted: Updated,
    ) -> torch.Tensor:
        """One matrix (m, n) with the update, on the CPU, perhaps in the memory of ``matrix.stored``."""
        target, scales = matrix.target, self._update.scales(matrix.target, index)
        if not matrix.is_residual and scales is None and addition is None:
            return matrix.stored
        square = None if addition is None else matrix.squared_norm()
        result, kept = matrix.updated(device, scales, addition, written.rounding, written.grid(index, target.slice))
        if scales is not None or addition is not None:
            counted.keep(KeptUpdate(target.key, kept, square))
            own = "core" if scales is not None and scales.ndim == 2 else "scales"
            what = f"the {own} of {target.key!r} push" + ("es" if own == "core" else "")
            _check_finite(result, what if addition is None else f"{own} and adapter push {target.key!r}", scales)
        elif matrix.correction is None and not all_finite(result):
            raise WeightError(
                f"{target.shard}: without its correction {target.key!r} is beyond the range of its dtype",
                hint="factorize again, without --no-correction",
            )
        return result

    def _originals(self, weight: torch.Tensor, name: str, first: int, device: torch.device) -> torch.Tensor:
        """A tensor without any update: as it is stored, or recovered from its residual, perhaps in the memory of ``weight``."""
        if not self.is_residual(name):
            return weight
        for target in self.targets(name):
            view = target.seen_as
            matrices = view.matrices(weight)
            stored = (self._checkpoint.residual(target, i, matrix) for i, matrix in enumerate(matrices, first))
            view.store(torch.stack([one.original(device).cpu() for one in stored]), weight)
        return weight

    def _as_a_whole(self, weight: torch.Tensor, name: str, first: int, device: torch.device, written: WrittenAs) -> Updated:
        """A tensor of which each matrix is updated as a whole, whatever slices of it are targets.

        Args:
            weight: without any update.
        """
        change = self.change(name)
        assert change is not None
        result = Updated(weight)
        matrices = weight if change.is_stack else weight.view(1, len(weight), -1)
        for i, matrix in enumerate(matrices, first):
            if not self.is_matrix_changed(name, i):
                continue
            norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float32))
            if not math.isfinite(norm) and not all_finite(matrix):
                raise WeightError(f"{name!r} of the model holds NaN or infinity", hint="take a sound copy of the model")
            additions = [addition_of(parts, matrix, name)] if (parts := change.parts.get(i, ())) else []
            for target in self.targets(name):
                if (scales := self._update.scales(target, i)) is not None:
                    factors = self._checkpoint.weight(target, i, matrix, scaled=True).factors
                    assert factors is not None
                    additions.append(_in_whole(between(factors, inner_change(factors, scales)), target.slice, matrix.shape))
            addition = functools.reduce(both, additions)
            new, kept = added(device, matrix, addition, written.rounding, written.grid(i, None))
            result.keep(KeptUpdate(name, kept, norm * norm))
            if new is not matrix:
                matrix.copy_(new)
        return result


def _has_one_view(targets: Sequence[TargetRecord]) -> bool:
    """Whether a tensor has one target, which is no slice."""
    return len(targets) == 1 and targets[0].slice is None


def _has_magnitudes(change: TensorChange) -> bool:
    """Whether what is added depends on the weight itself, which a residual is not."""
    return any(part.magnitude is not None for parts in change.parts.values() for part in parts)


def _numbers(scales: torch.Tensor) -> str:
    return "scales" if scales.ndim == 1 else "numbers in a core"


def _check_finite(weight: torch.Tensor, what: str, scales: torch.Tensor | None) -> None:
    if weight.numel() and not all_finite(weight):
        raise ScalesError(
            f"{what} weights beyond the range of {str(weight.dtype).removeprefix('torch.')}",
            got=None if scales is None else f"{_numbers(scales)} of up to {scales.abs().max().item():.3g}",
            hint="the training diverged: take an earlier checkpoint",
        )


def _in_whole(addition: Addition, part: Slice | None, shape: Sequence[int]) -> Addition:
    """What is added to a matrix (m, n) of ``shape`` where ``addition`` is added to a slice of it."""
    if part is None:
        return addition
    sides = [addition.left, addition.right]
    whole = sides[part.axis].new_zeros(shape[part.axis], sides[part.axis].shape[1])
    whole[part.holds(torch.arange(shape[part.axis]))] = sides[part.axis]
    sides[part.axis] = whole
    return Addition(*sides)
