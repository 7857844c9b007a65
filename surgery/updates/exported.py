"""Scales or cores as an adapter of other tools: one that is merged or served, or one that is trained further.

Adapters that others have made are read by ``surgery.updates.adapters``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.files.json_files import read_json_object
from surgery.format.factors import FactorsReaders
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.factors import between, inner_change
from surgery.models.peft_api import taken_for_experts
from surgery.models.places import places_of
from surgery.models.skeleton import skeleton
from surgery.names import ADAPTER_CONFIG, CONFIG_FILE, Train
from surgery.progress import Progress, phase
from surgery.source.component import component_in
from surgery.updates.protocol import ScalesUpdate
from surgery.updates.writing.adapter import AdapterToWrite, Halving
from surgery.updates.writing.diffusion_layouts import check_component, in_diffusion_layout
from surgery.updates.writing.low_rank import AdapterForm, Copied, LowRankTensor, Refusal
from surgery.updates.writing.modules import AdaptedModule, AdaptedModules, Finding, Halved
from surgery.updates.writing.peft_layout import in_peft_layout
from surgery.updates.writing.single_experts import lost_module, wrong_experts
from surgery.updates.writing.tinylora_layout import TinyLora

#: What scales or cores are exported as: what they change, as a LoRA in one of three layouts; or all kept directions, to be
#: trained by PEFT, as an adapter of the original model or of the residual.
Exported = Literal["peft", "peft-trainable", "peft-pissa", "diffusers", "kohya"]
_REFUSAL = Refusal(
    "exported as LoRA",
    "fold instead: surgery fold gives standard weights for any model. Or factorize without it: --exclude GLOB",
)


@dataclass(frozen=True, slots=True)
class ExportForm:
    """What is asked of an export.

    Attributes:
        kind: of adapter.
        train: what is trained of one that PEFT trains: ``scales`` or ``core``.
        base: the model that the adapter names as the one it is for; None for the one that was factorized, if it is on the hub.
    """

    kind: Exported = "peft"
    train: Train = "scales"
    base: str | None = None


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """An adapter that is to be written, one module in memory at a time.

    Attributes:
        folder, manifest: of the factorized checkpoint.
        update: the scales or cores.
        kind: of adapter.
        form: what its files say of it.
        adapter: what is written.
        tinylora: how PEFT's TinyLoRA trains it; None for other kinds.
    """

    folder: Path
    manifest: Manifest
    update: ScalesUpdate
    kind: Exported
    form: AdapterForm
    adapter: AdapterToWrite
    tinylora: TinyLora | None = None

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, update: ScalesUpdate, form: ExportForm, progress: Progress) -> Self:
        """The adapter that does what scales or cores of a factorized checkpoint do, with one rank for all modules.

        Raises:
            OptionError: a target that such an adapter cannot change, or that its loaders are known to load wrongly; or an
                adapter for a residual that the checkpoint does not hold, or of a component that it is not.
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
        """
        config = read_json_object(folder / CONFIG_FILE, CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        made = _form(folder, manifest, form, config)
        if made.layout != "peft":
            check_component(made)
            tensors = [_low_rank(target) for target in manifest.targets]
            adapted = Finding(_REFUSAL, single_experts=False, layers_only=True).modules(None, tensors, {})
            return cls(folder, manifest, update, form.kind, made, in_diffusion_layout(adapted, made, _REFUSAL))
        with phase(progress, "loading transformers"):  # most of the time that a small export takes
            model = skeleton(folder, exact=True)
            adapted = adapted_modules(model, manifest, single_experts=form.kind == "peft")
            _check_held(manifest, update, adapted)
        if form.kind == "peft-trainable":
            tiny = TinyLora.of(adapted, model, form.train, _REFUSAL)
            return cls(folder, manifest, update, form.kind, made, tiny.adapter(made), tiny)
        return cls(folder, manifest, update, form.kind, made, in_peft_layout(adapted, made))

    def is_in(self, out: Path, progress: Progress) -> bool:
        """Whether a folder holds this adapter, byte for byte, perhaps but for the config, which comes last."""
        with self.halving() as halving:
            return self.adapter.is_in(out, halving, self._whole, progress)

    def write(self, out: Path, progress: Progress) -> None:
        """The weights, then the config; see ``AdapterToWrite.write``."""
        with self.halving() as halving:
            self.adapter.write_halved(out, halving, self._whole, progress)

    @property
    def _whole(self) -> Mapping[str, Copied]:
        return {} if self.tinylora is None else self.tinylora.whole(self.update.values)

    @property
    def trainable(self) -> int:
        """How many numbers PEFT trains of it; 0 for an adapter that is not meant for that."""
        if self.tinylora is not None:
            return self.tinylora.trainable
        return self.adapter.numbers if self.kind == "peft-pissa" else 0

    def initial(self) -> Generator[tuple[AdaptedModule, torch.Tensor, torch.Tensor]]:
        """Each module with A as it is written, and B (out, rank), float32, one module in memory at a time."""
        with self.halving() as halving:
            for pair in self.adapter.pairs:
                A, B = pair.module.halves(pair.rank, self.adapter.adapted.carriers, halving)
                yield pair.module, A.view(pair.module.shapes(pair.rank)[0]), B

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files, the one first without which no loader takes it."""
        return (self.adapter.file,) if self.adapter.config is None else (ADAPTER_CONFIG, self.adapter.file)

    @contextmanager
    def halving(self) -> Generator[Halving]:
        """The halves of each target.

        Of what changes: ``A = V^T`` and ``B = U diag(s (g - 1))``, or for a core ``U diag(sqrt s) (C - I) diag(sqrt s)``.
        Of the kept directions: ``A = diag(sqrt s) V^T`` and ``B = U diag(sqrt s)``; for a residual, in which no scales are,
        with g or C behind it.
        """
        targets = {target.key: target for target in self.manifest.targets}
        with FactorsReaders(self.folder, self.manifest) as factors:

            def halved(one: LowRankTensor) -> Halved:
                target = targets[one.key]
                with factors.of(target) as reader:
                    kept = reader.factors(target)
                scales = self.update.scales(target, 0)
                if self.kind in ("peft-trainable", "peft-pissa"):
                    root = kept.s.double().sqrt()
                    left, right = kept.U * root, (kept.V * root).float()
                    if scales is not None and self.kind == "peft-pissa":
                        left = left * scales.double() if scales.ndim == 1 else left @ scales.double()
                    return Halved(left.float(), right)
                inner = torch.zeros_like(kept.s) if scales is None else inner_change(kept, scales)
                if inner.ndim == 1:
                    return Halved(kept.U, kept.V, inner.float())
                return Halved(between(kept, inner).left.float(), kept.V)

            yield halved


def adapted_modules(model: nn.Module | None, manifest: Manifest, *, single_experts: bool) -> AdaptedModules:
    """The modules in which the targets of a checkpoint are, for an adapter of PEFT.

    Args:
        model: the skeleton; None where transformers does not know it.
        manifest: of the checkpoint.
        single_experts: whether experts are adapted one by one, where the checkpoint has them so.

    Raises:
        OptionError: a target that an adapter cannot change, or that PEFT is known to load wrongly.
    """
    places = {} if model is None else places_of(model, manifest)
    tensors = [_low_rank(target) for target in manifest.targets]
    by_weight = taken_for_experts(model)
    adapted = Finding(_REFUSAL, single_experts, layers_only=True, by_weight=by_weight).modules(model, tensors, places)
    wrong = None if model is None else wrong_experts(model, adapted) or lost_module(model, adapted)
    if wrong is not None:
        raise _REFUSAL.of(*wrong)
    return adapted


def _check_held(manifest: Manifest, update: ScalesUpdate, adapted: AdaptedModules) -> None:
    """Refuse what has been trained, and has no place in the model."""
    held = {one.key for module in adapted.modules for one, _ in module.tensors}
    for target in manifest.targets:
        if target.key not in held and update.changes(target):
            raise _REFUSAL.of(target.key, "trained, and not in the model that the config names")


def _form(folder: Path, manifest: Manifest, asked: ExportForm, config: Mapping[str, Any]) -> AdapterForm:
    """What the adapter's files say of it."""
    if asked.kind == "diffusers" or asked.kind == "kohya":
        return AdapterForm(asked.kind, component=component_in(config, manifest.source.subfolder), uniform_rank=True)
    base = manifest.source.repo_id if asked.base is None else asked.base
    revision = manifest.source.commit if asked.base is None else None
    if asked.kind == "peft":
        return AdapterForm("peft", uniform_rank=True, base=base, revision=revision)
    architectures = config.get("architectures")
    is_causal = isinstance(architectures, list) and str(architectures[:1]).endswith("ForCausalLM']")
    task = "CAUSAL_LM" if is_causal else None
    if asked.kind == "peft-trainable":
        return AdapterForm("peft", uniform_rank=True, base=base, revision=revision, task=task)
    if manifest.layout != "residual":
        raise OptionError(
            f"{folder} holds no residual that an adapter could be trained on",
            got=f"layout {manifest.layout}",
            expected="layout residual",
            hint="export --to peft-trainable, whose base is the original model; or, if it is not FP8, factorize with --layout "
            "residual",
        )
    base = str(folder.resolve()) if asked.base is None else asked.base
    return AdapterForm("peft", uniform_rank=True, base=base, task=task, residual_of=manifest.fingerprint)


def _low_rank(target: TargetRecord) -> LowRankTensor:
    aliases = tuple(alias.tensor for alias in target.aliases)
    view: Any = target.view
    return LowRankTensor(target.tensor, tuple(target.shape), view, target.rank, aliases, target.slice)
