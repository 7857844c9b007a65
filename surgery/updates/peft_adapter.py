"""Scales as a LoRA adapter in the format of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Adapters that others have made are read by ``surgery.updates.adapters``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from surgery.files.access import write_errors
from surgery.files.file_writer import FileWriter, sync_directory, write_file
from surgery.format.factors import FactorsReaders
from surgery.format.header import TensorEntry, make_header
from surgery.format.manifest import Manifest
from surgery.memory import bytes_of
from surgery.models.skeleton import skeleton
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from surgery.progress import Progress, phase
from surgery.updates.adapted_modules import AdaptedModule, AdaptedModules, not_exportable
from surgery.updates.protocol import ScalesUpdate

#: What an adapter consists of.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
#: Families whose experts PEFT takes one by one and puts together as transformers does; measured (docs/training.md).
_EXPERTS_ONE_BY_ONE = ("mixtral", "olmoe", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter that is to be written, one half of a module in memory at a time.

    Attributes:
        folder, manifest: of the factorized checkpoint.
        update: the scales.
        adapted: the modules that it changes.
        config: the text of ``adapter_config.json``.
    """

    folder: Path
    manifest: Manifest
    update: ScalesUpdate
    adapted: AdaptedModules
    config: bytes

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, update: ScalesUpdate, progress: Progress) -> Self:
        """The adapter that does what scales of a factorized checkpoint do.

        Raises:
            OptionError: a target that an adapter cannot change, or that PEFT is known to load wrongly.
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
        """
        with phase(progress, "loading transformers"):  # most of the time that a small export takes
            model = skeleton(folder, exact=True)
            adapted = AdaptedModules.of(model, manifest)
            if adapted.experts and model is not None:
                _check_experts(model, adapted)
        held = {target.key for module in adapted.modules for target, _ in module.targets}
        for target in manifest.targets:
            if target.key not in held and update.changes(target):
                raise not_exportable(target, "scales other than 1, and the model that the config names does not have it")
        config = json.dumps(_config(adapted, manifest), indent=1).encode() + b"\n"
        return cls(folder, manifest, update, adapted, config)

    @property
    def has_experts(self) -> bool:
        """Whether it changes experts that the model stacks, one by one."""
        return any(module.carrier is None for module in self.adapted.modules)

    def is_in(self, out: Path, progress: Progress) -> bool:
        """Whether a folder holds this adapter, byte for byte, perhaps but for the config, which comes last."""
        try:
            if (out / ADAPTER_CONFIG).exists() and (out / ADAPTER_CONFIG).read_bytes() != self.config:
                return False
            with open(out / ADAPTER_WEIGHTS, "rb") as weights, closing(self._contents("comparing", progress)) as contents:
                return all(weights.read(len(data)) == data for data in contents) and not weights.read(1)
        except OSError:
            return False

    def write(self, out: Path, progress: Progress) -> None:
        """The weights, then the config, without which there is no adapter. An earlier one is there until the weights are."""
        with FileWriter(out / ADAPTER_WEIGHTS) as writer:
            for data in self._contents("exporting", progress):
                writer.write(data)
            with write_errors(out):
                (out / ADAPTER_CONFIG).unlink(missing_ok=True)
                sync_directory(out)
            writer.commit(ADAPTER_WEIGHTS)
        self.write_config(out)

    def write_config(self, out: Path) -> None:
        """The config alone, beside weights that are there."""
        write_file(out / ADAPTER_CONFIG, self.config)

    def _contents(self, what: str, progress: Progress) -> Generator[bytes | memoryview]:
        """The file of weights, one half of a module at a time."""
        modules = sorted(self.adapted.modules, key=lambda module: module.name)
        entries = [entry for module in modules for entry in self._entries(module)]
        size = sum(entry.nbytes for entry in entries)
        with phase(progress, what, size), FactorsReaders(self.folder, self.manifest) as factors:
            yield make_header(entries, {"format": "pt"})
            for module in modules:
                progress.item(module.name)
                for half in self.adapted.halves(module, factors, self.update):
                    yield bytes_of(half)
                    progress.advance(half.nbytes)

    def _entries(self, module: AdaptedModule) -> list[TensorEntry]:
        """The two tensors of a module."""
        return [
            TensorEntry(f"{PEFT_PREFIX}{module.name}.{half}.weight", "F32", shape, 0, 4 * math.prod(shape))
            for half, shape in zip(("lora_A", "lora_B"), self.adapted.shapes(module), strict=True)
        ]


def _check_experts(model: nn.Module, adapted: AdaptedModules) -> None:
    """PEFT puts the updates of experts together by the last part of their names, for some families.

    A dense or shared MLP beside them has the same names and is lost without a word (deepseek_v3, qwen2_moe).
    """
    first = next(iter(adapted.experts.values()))[0]
    config: Any = model.config
    family = str(getattr(config, "model_type", None))
    if family not in _EXPERTS_ONE_BY_ONE:
        raise not_exportable(first, f"experts of {family}, which PEFT does not load as they are")
    projections = {target.tensor.rsplit(".", 2)[-2] for targets in adapted.experts.values() for target in targets}
    names = (module.name for module in adapted.modules if module.carrier is not None)
    beside = next((name for name in names if name.rsplit(".", 1)[-1] in projections), None)
    if beside is not None:
        raise not_exportable(first, f"experts beside {beside!r}, which PEFT would take for one of them")
    for parameter, targets in adapted.experts.items():
        size = model.get_parameter(parameter).shape[0]
        parts = 2 if "gate_up" in parameter else 1
        if len(targets) != parts * size:
            raise not_exportable(first, f"{len(targets)} of the {parts * size} matrices in {parameter!r}")


def _config(adapted: AdaptedModules, manifest: Manifest) -> dict[str, Any]:
    """What PEFT is told of the adapter. With alpha equal to the rank, ``B A`` is added as it is."""
    # Experts by the last part of their names, which is what PEFT looks at; there may be tens of thousands.
    modules = adapted.modules
    names = {module.name if module.carrier is not None else module.name.rsplit(".", 1)[-1] for module in modules}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": manifest.source.repo_id,
        "revision": manifest.source.commit,
        "r": adapted.rank,
        "lora_alpha": adapted.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "fan_in_fan_out": any(module.is_transposed for module in modules),
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }
