"""What is added to weights, by tensor. An update knows no files, no dtypes and no rounding."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from surgery.format.manifest_records import TargetRecord
from surgery.linalg.lossless import Addition, both
from surgery.memory import bytes_of


class Update(Protocol):
    """One kind of update: scales of kept directions, or low-rank pairs that are added to tensors."""

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        """Multipliers ``g`` of the kept directions of one matrix, float32 (k,), on the CPU; None where all are 1."""

    def changes(self, target: TargetRecord) -> bool:
        """Whether any kept direction of a target has another scale than 1."""

    def addition(self, tensor: str) -> Addition | None:
        """What is added to a tensor besides, seen as a matrix (m, n); None for nothing."""

    def tensors(self) -> Collection[str]:
        """The tensors that something is added to."""

    def digests(self) -> dict[str, str]:
        """sha256 of all that it is, by the name of what it came from."""

    def part(self, keys: Collection[str], tensors: Collection[str]) -> Self:
        """What it does to some targets, by their keys, and to some tensors: for another process."""


@dataclass(frozen=True, slots=True)
class ScalesUpdate:
    """Trained scales: ``U diag(s (g - 1)) V^T`` for each target.

    Attributes:
        values: key of a target -> ``g``, float32 (k,), or (B, k) for a stack, on the CPU, finite.
    """

    values: Mapping[str, torch.Tensor]

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        values = self.values[target.key].view(-1, target.rank)[index]
        return values if bool((values != 1).any()) else None

    def changes(self, target: TargetRecord) -> bool:
        return self.is_changed(target.key)

    def is_changed(self, key: str) -> bool:
        """``changes`` by the key of a target."""
        return bool((self.values[key] != 1).any())

    def change_of_values(self, target: TargetRecord, s: torch.Tensor) -> torch.Tensor:
        """``s (g - 1)``, float32 (k,): what is added to the kept singular values (k,) of a target that is no stack."""
        return (s.double() * (self.values[target.key].double() - 1)).float()

    def addition(self, tensor: str) -> Addition | None:
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
class LowRankUpdate:
    """Low-rank pairs, such as those of a LoRA adapter, with their scaling in them.

    Attributes:
        additions: tensor -> what is added to it.
    """

    additions: Mapping[str, Addition]

    @classmethod
    def tied(cls, additions: Mapping[str, Addition], targets: Iterable[TargetRecord]) -> Self:
        """An update that leaves the tensors of one parameter the same: each gets the sum of what is added to all of them."""
        found = dict(additions)
        for target in targets:
            if target.aliases and (several := [found[tensor] for tensor in target.tensors if tensor in found]):
                found |= dict.fromkeys(target.tensors, functools.reduce(both, several))
        return cls(found)

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        return None

    def changes(self, target: TargetRecord) -> bool:
        return False

    def addition(self, tensor: str) -> Addition | None:
        return self.additions.get(tensor)

    def tensors(self) -> Collection[str]:
        return self.additions.keys()

    def digests(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for tensor, added in sorted(self.additions.items()):
            digest.update(f"{tensor}\0".encode() + bytes_of(added.left.contiguous()) + bytes_of(added.right.contiguous()))
        return {"lora": digest.hexdigest()}

    def part(self, keys: Collection[str], tensors: Collection[str]) -> LowRankUpdate:
        return LowRankUpdate({tensor: self.additions[tensor] for tensor in tensors if tensor in self.additions})


@dataclass(frozen=True, slots=True)
class UpdateSum:
    """Several updates at once, added before the one rounding.

    Attributes:
        parts: at most one of them scales kept directions.
    """

    parts: Sequence[Update]

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        return next((scales for part in self.parts if (scales := part.scales(target, index)) is not None), None)

    def changes(self, target: TargetRecord) -> bool:
        return any(part.changes(target) for part in self.parts)

    def addition(self, tensor: str) -> Addition | None:
        additions = [added for part in self.parts if (added := part.addition(tensor)) is not None]
        return functools.reduce(both, additions) if additions else None

    def tensors(self) -> Collection[str]:
        return {tensor for part in self.parts for tensor in part.tensors()}

    def digests(self) -> dict[str, str]:
        return {name: digest for part in self.parts for name, digest in part.digests().items()}

    def part(self, keys: Collection[str], tensors: Collection[str]) -> UpdateSum:
        return UpdateSum([part.part(keys, tensors) for part in self.parts])
