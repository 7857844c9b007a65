"""Scales as a LoRA adapter in the format of PEFT.

Adapters that others have made are read by ``surgery.updates.adapters``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from surgery.format.factors import FactorsReaders
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.factors import between, inner_change
from surgery.models.carriers import places_of
from surgery.models.skeleton import skeleton
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from surgery.progress import Progress, phase
from surgery.updates.protocol import ScalesUpdate
from surgery.updates.writing.adapter import AdapterToWrite, Halving
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor, Refusal
from surgery.updates.writing.modules import Finding, Halved
from surgery.updates.writing.peft_layout import in_peft_layout
from surgery.updates.writing.single_experts import lost_module, wrong_experts

#: What an adapter consists of.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_REFUSAL = Refusal(
    "exported as LoRA",
    "fold instead: surgery fold gives standard weights for any model. Or factorize without it: --exclude GLOB",
)


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter that is to be written, one module in memory at a time.

    Attributes:
        folder, manifest: of the factorized checkpoint.
        update: the scales.
        adapter: what is written.
    """

    folder: Path
    manifest: Manifest
    update: ScalesUpdate
    adapter: AdapterToWrite

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, update: ScalesUpdate, progress: Progress) -> Self:
        """The adapter that does what scales of a factorized checkpoint do, with one rank for all modules.

        Raises:
            OptionError: a target that an adapter cannot change, or that PEFT is known to load wrongly.
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
        """
        with phase(progress, "loading transformers"):  # most of the time that a small export takes
            model = skeleton(folder, exact=True)
            places = {} if model is None else places_of(model, manifest)
            tensors = [_low_rank(target) for target in manifest.targets]
            adapted = Finding(_REFUSAL, single_experts=True, layers_only=True).modules(model, tensors, places)
            wrong = None if model is None else wrong_experts(model, adapted) or lost_module(model, adapted)
            if wrong is not None:
                raise _REFUSAL.of(*wrong)
        held = {one.key for module in adapted.modules for one, _ in module.tensors}
        for target in manifest.targets:
            if target.key not in held and update.changes(target):
                raise _REFUSAL.of(target.key, "trained, and not in the model that the config names")
        form = AdapterForm("peft", uniform_rank=True, base=manifest.source.repo_id, revision=manifest.source.commit)
        return cls(folder, manifest, update, in_peft_layout(adapted, form))

    def is_in(self, out: Path, progress: Progress) -> bool:
        """Whether a folder holds this adapter, byte for byte, perhaps but for the config, which comes last."""
        with self._halving() as halving:
            return self.adapter.is_in(out, halving, progress)

    def write(self, out: Path, progress: Progress) -> None:
        """The weights, then the config; see ``AdapterToWrite.write``."""
        with self._halving() as halving:
            self.adapter.write_halved(out, halving, {}, progress)

    @contextmanager
    def _halving(self) -> Generator[Halving]:
        """``A = V^T`` of each target, and ``B = U diag(s (g - 1))``, or for a core ``U diag(sqrt s) (C - I) diag(sqrt s)``."""
        targets = {target.key: target for target in self.manifest.targets}
        with FactorsReaders(self.folder, self.manifest) as factors:

            def halved(one: LowRankTensor) -> Halved:
                target = targets[one.key]
                with factors.of(target) as reader:
                    kept = reader.factors(target)
                scales = self.update.scales(target, 0)
                inner = torch.zeros_like(kept.s) if scales is None else inner_change(kept, scales)
                if inner.ndim == 1:
                    return Halved(kept.U, kept.V, inner.float())
                return Halved(between(kept, inner).left.float(), kept.V)

            yield halved


def _low_rank(target: TargetRecord) -> LowRankTensor:
    aliases = tuple(alias.tensor for alias in target.aliases)
    view: Any = target.view
    return LowRankTensor(target.tensor, tuple(target.shape), view, target.rank, aliases, target.slice)
