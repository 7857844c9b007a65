"""Adapters as PEFT writes them, what PEFT makes of them, and changes applied in float64, in a few lines of their own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.reading import read_adapters
from surgery.updates.changes import LowRankPart, TensorChange
from tests.models import tensors_of
from tests.releases import under_names_of


def adapt(model: Any, out: Path, **options: Any) -> Path:
    """Save an adapter of a model with random numbers in all that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))
        randomize(adapted)
        adapted.save_pretrained(out)
    return out


def randomize(adapted: Any, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * noise)
        elif parameter.requires_grad:  # in place, for tied ones are views of each other
            parameter.data.mul_("lora_" not in name).add_(noise, alpha=0.1)


def merged_on_disk(model: Any, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges in float32, as the model saves it: by the names that a checkpoint has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(out)
    return tensors_of(out)


def entries_of(folder: Path) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for path in folder.glob("*.safetensors"):
        with ShardReader(path) as reader:
            found |= reader.entries
    return found


def update_of(folder: Path, *adapters: Path, weights: Sequence[float] | None = None) -> AdapterUpdate:
    pairs = list(zip(adapters, weights or [1.0] * len(adapters), strict=True))
    return read_adapters(pairs, folder, entries_of(folder))


def merged_by_us(folder: Path, update: AdapterUpdate) -> dict[str, torch.Tensor]:
    """float64 weights of a checkpoint with an update."""
    tensors = tensors_of(folder)
    assert set(update.tensors()) <= tensors.keys()
    return {
        name: tensor.double() if (change := update.change(name)) is None else applied(tensor, change)
        for name, tensor in tensors.items()
    }


def applied(tensor: torch.Tensor, change: TensorChange) -> torch.Tensor:
    """A tensor with a change, in float64."""
    weight = tensor.double()
    if change.replacement is not None:
        weight = change.replacement.read().double()
        assert weight.shape == tensor.shape
    if change.rows is not None:
        weight = weight.clone()
        weight[change.rows.indices] = change.rows.values.double()
    matrices = weight if change.is_stack else weight.reshape(1, len(weight), -1) if change.parts else None
    if matrices is not None:
        matrices = matrices.clone()
        for index, parts in change.parts.items():
            before = matrices[index].clone()
            for part in parts:
                matrices[index] += _of_part(before, part)
        weight = matrices.reshape(weight.shape)
    return weight if change.offset is None else weight + change.offset


def _of_part(weight: torch.Tensor, part: LowRankPart) -> torch.Tensor:
    low = part.scaling * (part.left.double() @ part.right.double().T)
    if part.magnitude is None:
        return part.weight * low
    whole = weight + low
    norms = torch.linalg.norm(whole, dim=1 - part.axis, keepdim=True)
    magnitude = part.magnitude.double().view((-1, 1) if part.axis == 0 else (1, -1))
    change: torch.Tensor = part.weight * (magnitude / norms * whole - weight)
    return change


def assert_equal(
    ours: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> None:
    """All tensors within the rounding of float32, and at least one changed by far more."""
    truth = under_names_of(before, truth)
    assert ours.keys() == truth.keys()
    changed = 0
    for name, expected in truth.items():
        largest = expected.double().abs().max().item() or 1.0
        assert (ours[name] - expected.double()).abs().max().item() <= 1e-6 * largest, name
        changed += bool((before[name].double() - expected.double()).abs().max().item() > 1e-3 * largest)
    assert changed
