"""``AdapterUpdate``: what one adapter, or a weighted sum of several, does to the tensors of a checkpoint."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from surgery.format.manifest_records import TargetRecord
from surgery.updates.changes import TensorChange, summed


@dataclass(frozen=True, slots=True)
class AdapterUpdate:
    """Implements ``Update``. It can be pickled: what is large is read from the adapters' files when it is needed.

    Attributes:
        changed: tensor of the checkpoint -> all that is done to it.
        accounts: for each adapter: name of a tensor in its file -> the tensors of the checkpoint that it went to; none for a
            tensor that is only to be compared, such as PEFT's copy of an adapted embedding. All tensors of the file are there,
            but for those of another component of a diffusion model, of which a note has told.
    """

    changed: Mapping[str, TensorChange]
    accounts: Sequence[Mapping[str, tuple[str, ...]]] = ()

    def tied(self, targets: Iterable[TargetRecord]) -> AdapterUpdate:
        """The update for tied tensors: all tensors of one parameter get the sum of what is done to any of them.

        What is done alike under several names, as PEFT stores it with ``ensure_weight_tying``, counts once.

        Args:
            targets: with the tensors that are one parameter, by their aliases.

        Raises:
            OptionError: what is done to them cannot be summed.
            ReadError, FormatError: see ``StoredTensor.read``.
        """
        changed = dict(self.changed)
        for target in targets:
            if target.aliases and any(tensor in changed for tensor in target.tensors):
                different = {_digest(changed[tensor]): changed[tensor] for tensor in target.tensors if tensor in changed}
                changed |= dict.fromkeys(target.tensors, functools.reduce(summed, different.values()))
        return replace(self, changed=changed)

    def scales(self, target: TargetRecord, index: int) -> torch.Tensor | None:
        return None

    def changes(self, target: TargetRecord) -> bool:
        return False

    def change(self, tensor: str) -> TensorChange | None:
        return self.changed.get(tensor)

    def tensors(self) -> Collection[str]:
        return self.changed.keys()

    def digests(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for tensor, change in sorted(self.changed.items()):
            digest.update(f"{tensor}\0".encode())
            change.hash_into(digest)
        return {"lora": digest.hexdigest()}

    def part(self, keys: Collection[str], tensors: Collection[str]) -> AdapterUpdate:
        return AdapterUpdate({tensor: self.changed[tensor] for tensor in tensors if tensor in self.changed})


def _digest(change: TensorChange) -> str:
    digest = hashlib.sha256()
    change.hash_into(digest)
    return digest.hexdigest()
