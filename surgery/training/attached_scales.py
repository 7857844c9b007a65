"""The scales that are attached to a model: their values, saved and loaded, and taken out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.arguments import as_path
from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import read_scales
from surgery.format.scales.writing import write_scales
from surgery.models.carriers import is_sharded
from surgery.progress import note
from surgery.training.attached_path import AttachedPath


class Scales:
    """The scales attached to a model; made by ``attach``."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        manifest: Manifest,
        homes: dict[str, tuple[AttachedPath, int]],
        attached: list[AttachedPath],
    ) -> None:
        self._model = model
        self._folder = folder
        self._manifest = manifest
        self._homes = homes
        self._attached = attached
        #: ``g`` of the targets that the model does not have.
        self._absent = {t.key: torch.ones(t.scales_shape, dtype=torch.float32) for t in manifest.targets if t.key not in homes}

    def __repr__(self) -> str:
        """How many targets and numbers, of which folder, where they are, and whether they have been changed."""
        deltas = [home.path.delta(i) for home, i in self._homes.values()]
        there, every = len(self._homes), len(self._manifest.targets)
        parts = [
            f"{there} targets" + (f" of {every}" if there < every else ""),
            f"{sum(delta.numel() for delta in deltas):,} trainable",
            repr(str(self._folder)),
            ", ".join(sorted({str(delta.device) for delta in deltas})),
            _state(deltas),
        ]
        if not self._attached:
            parts.append("detached")
        return f"Scales({', '.join(parts)})"

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the model are trained, and how many it has, as PEFT does.

        All of the model's count: with a LoRA beside the scales, its parameters are trainable as well.
        """
        trainable = every = 0
        for parameter in self._model.parameters():
            count = _count(parameter)
            every += count
            trainable += count if parameter.requires_grad else 0
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}")

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to hand to an optimizer: ``g - 1`` of each target in the model, float32 (B k,). Use no weight decay.

        Raises:
            OptionError: they have been offloaded, where nothing can train them.
        """
        return iter([_trainable(home.path.delta(i)) for home, i in self._homes.values()])

    def values(self) -> dict[str, torch.Tensor]:
        """Key of a target -> ``g``, float32 (k,), or (B, k) for a stack, on the CPU.

        Of a target that the model does not have: 1, or what was last loaded. Where they are sharded over processes, all of
        these must ask together.
        """
        shapes = {target.key: target.scales_shape for target in self._manifest.targets}
        values = {key: 1 + _whole(home.path.delta(i), shapes[key]) for key, (home, i) in self._homes.items()}
        return values | {key: value.clone() for key, value in self._absent.items()}

    @on_its_own_terms
    def save(self, path: str | Path) -> None:
        """Write the scales file that ``surgery fold`` takes.

        In a distributed run all processes must call it, and the first one writes.

        Args:
            path: of the file, replaced if it is there.

        Raises:
            OptionError: no path; or the scales have been offloaded, or taken over in a way that is not known here.
            OutputError: it cannot be written.

        Warns:
            SurgeryWarning: the model was run, and some scales had no part in it; or they are frozen.
        """
        path = as_path(path, "path")
        used = {key: home.used for key, (home, _) in self._homes.items()}
        unused = sorted(key for key, (_, every) in used.items() if not every)
        if unused and any(some for some, _ in used.values()):
            note(
                f"the scales of {unused[0]!r} and of {len(unused) - 1} other targets were never used, or not by all layers "
                "that share the weight: the model does not run these, or reads their weights in a way that is not known here"
            )
        if frozen := [key for key, (home, i) in self._homes.items() if not home.path.delta(i).requires_grad]:
            note(
                f"the scales of {frozen[0]!r} and of {len(frozen) - 1} other targets are frozen: what freezes a model, such as "
                "PEFT's get_peft_model, comes before attach"
            )
        values = self.values()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            write_scales(path, values, self._manifest.fingerprint)

    @on_its_own_terms
    def load(self, path: str | Path) -> None:
        """Take the values of a scales file.

        Those of targets that the model does not have are kept for ``values`` and ``save``.

        Args:
            path: of the file, written with the same factorized folder.

        Raises:
            ScalesError: no such file, or scales of other factors, or not finite.
            ReadError, FormatError: it cannot be read, or is no safetensors file.
            OptionError: no path; or the scales have been offloaded.

        Warns:
            SurgeryWarning: see ``surgery.format.scales.reading.read_scales``.
        """
        values = read_scales(Path(path), self._manifest)
        self._absent = {key: values[key] for key in self._absent}
        with torch.no_grad():
            for key, (home, i) in self._homes.items():
                delta: Any = _trainable(home.path.delta(i))
                value = values[key].flatten() - 1
                if is_sharded(delta):
                    from torch.distributed.tensor import distribute_tensor

                    value = distribute_tensor(value.to(delta.device), delta.device_mesh, delta.placements)
                delta.copy_(value)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A context in which the model computes as with scales of 1. Their values stay, and hold again after it.

            with scales.untouched():
                reference = model(ids).logits

        On the original weights that is the original model, bit for bit; on a residual it is within the rounding of the
        dtype. No gradients are recorded.
        """
        paths = [attached.path for attached in self._attached]
        before = [path.untouched for path in paths]
        for path in paths:
            path.untouched = True
        try:
            with torch.no_grad():
                yield
        finally:
            for path, value in zip(paths, before, strict=True):
                path.untouched = value

    def act_on(self, module: nn.Module) -> bool:
        """Whether a weight of the module itself, not of one inside it, has scales.

        Args:
            module: any module of the model.
        """
        return any(module is other for attached in self._attached for other in attached.modules)

    def detach(self) -> None:
        """Take the scales out of the model again. Its weights are what they were; they stay frozen."""
        for attached in self._attached:
            attached.remove()
        self._attached.clear()


def _state(deltas: Sequence[nn.Parameter]) -> str:
    """Describe ``g - 1`` of all targets, as far as this process holds it."""
    if any(delta.is_meta for delta in deltas):
        return "offloaded"
    frozen = "" if all(delta.requires_grad for delta in deltas) else ", frozen"
    if any(map(is_sharded, deltas)):
        return "sharded" + frozen
    changed = sum(bool(delta.detach().any()) for delta in deltas)
    return (f"{changed} changed" if changed else "untouched") + frozen


def _count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter. bitsandbytes packs two of 4 bits into a byte; DeepSpeed leaves what is elsewhere empty."""
    count = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
    return 2 * parameter.element_size() * count if type(parameter).__name__ == "Params4bit" else count


def _trainable(delta: nn.Parameter) -> nn.Parameter:
    if delta.is_meta:
        raise OptionError("the scales have been offloaded with the model", hint="offload the model first, then attach")
    return delta


def _whole(delta: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter's values on the CPU, gathered if it is sharded over processes."""
    value: Any = _trainable(delta).detach()
    gathered: torch.Tensor = value.full_tensor() if is_sharded(value) else value
    if gathered.numel() != math.prod(shape):
        raise OptionError(
            "the scales have been taken over by a trainer in a way that is not known here",
            got=list(gathered.shape),
            expected=list(shape),
            hint="shard with DistributedDataParallel or FSDP2 (fully_shard)",
        )
    return gathered.float().cpu().reshape(shape)
