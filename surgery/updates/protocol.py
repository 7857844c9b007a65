"""``Update``: what is added to the weights of a checkpoint, by tensor. An update knows no files, dtypes or rounding."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from surgery.format.manifest_records import TargetRecord
from surgery.memory import bytes_of
from surgery.updates.changes import TensorChange, summed


class Update(Protocol):
    """What is added to weights: trained scales of the kept directions, low-rank matrices, or a sum of such updates."""

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        """Multipliers ``g`` of the kept directions of one matrix, float32 (k,), or its core (k, k), on the CPU.

        None where nothing changes. A core that is diagonal is the multipliers that it amounts to.
        """

    def changes(self, target: TargetRecord) -> bool:
        """Whether any scale of a target differs from what it is when untouched."""

    def change(self, tensor: str) -> TensorChange | None:
        """All that is done to a tensor besides; None for nothing."""

    def tensors(self) -> Collection[str]:
        """The tensors that ``change`` changes."""

    def digests(self) -> dict[str, str]:
        """Kind of update, such as ``scales`` or ``lora`` -> the sha256 of all its numbers and names."""

    def part(self, keys: Collection[str], tensors: Collection[str]) -> Self:
        """The update restricted to the targets with these keys and to these tensors, to be sent to another process."""


@dataclass(frozen=True, slots=True)
class ScalesUpdate:
    """Trained scales: multipliers, ``U diag(s (g - 1)) V^T``, or cores, ``U diag(sqrt s) (C - I) diag(sqrt s) V^T``.

    Attributes:
        values: key of a target -> ``g``, float32 (k,), or (B, k) for a stack; or ``C``, (k, k), or (B, k, k) for a stack. On
            the CPU, finite.
    """

    values: Mapping[str, torch.Tensor]

    @classmethod
    def untouched(cls, targets: Iterable[TargetRecord]) -> Self:
        """The scales of these targets, all 1."""
        return cls({target.key: torch.ones(target.scales_shape) for target in targets})

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        values = self.values[target.key].view(target.matrices[0], target.rank, -1)[index]
        if values.shape[1] > 1 and not torch.equal(values, torch.diag(values.diagonal())):
            return values
        values = values[:, 0] if values.shape[1] == 1 else values.diagonal()
        return values if bool((values != 1).any()) else None

    def changes(self, target: TargetRecord) -> bool:
        values = self.values[target.key].view(target.matrices[0], target.rank, -1)
        return bool((values != (1 if values.shape[2] == 1 else torch.eye(target.rank))).any())

    def change(self, tensor: str) -> TensorChange | None:
        return None

    def tensors(self) -> Collection[str]:
        return ()

    def digests(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for key, value in sorted(self.values.items()):
            digest.update(f"{key}\0".encode() + bytes_of(value.contiguous()))
        return {"scales": digest.hexdigest()}

    def part(self, keys: Collection[str], tensors: Collection[str]) -> ScalesUpdate:
        return ScalesUpdate({key: self.values[key] for key in keys})


@dataclass(frozen=True, slots=True)
class UpdateSum:
    """The sum of several updates, taken before the one rounding.

    Attributes:
        parts: the updates; at most one of them may have scales.
    """

    parts: Sequence[Update]

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        return next((scales for part in self.parts if (scales := part.scales(target, index)) is not None), None)

    def changes(self, target: TargetRecord) -> bool:
        return any(part.changes(target) for part in self.parts)

    def change(self, tensor: str) -> TensorChange | None:
        changes = [change for part in self.parts if (change := part.change(tensor)) is not None]
        return functools.reduce(summed, changes) if changes else None

    def tensors(self) -> Collection[str]:
        return {tensor for part in self.parts for tensor in part.tensors()}

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for part in self.parts:
            for name, digest in part.digests().items():
                found[name] = f"{found[name]} {digest}" if name in found else digest
        return found

    def part(self, keys: Collection[str], tensors: Collection[str]) -> UpdateSum:
        return UpdateSum([part.part(keys, tensors) for part in self.parts])
