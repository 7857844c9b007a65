"""Fine-tuned models made from others tensor by tensor, and what an adapter lacks of their changes, in float64."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.commands.adapters.extract import ExtractReport, extract
from surgery.progress import Silent
from tests.models import tensors_of

Tensors = dict[str, torch.Tensor]


def trained(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None, size: float = 0.03, seed: int = 1
) -> Tensors:
    """Weights after some training: each matrix with a change of falling singular values; vectors with noise.

    Args:
        tensors: before.
        dtype: of the result; None: as they were.
        size: norm of the change, relative to the weight.
        seed: of the changes.
    """
    generator = torch.Generator().manual_seed(seed)
    after = {}
    for name, tensor in tensors.items():
        new = tensor.double()
        if tensor.ndim > 1:
            matrices = new.shape[:1] if tensor.ndim == 3 else ()
            m, n = (tensor.shape[0], tensor[0].numel()) if tensor.ndim != 3 else tensor.shape[1:]
            r = min(m, n)
            left, right = (torch.randn(*matrices, one, r, generator=generator, dtype=torch.double) for one in (m, n))
            change = (left * 0.7 ** torch.arange(r)) @ right.mT
            new = new + (size * new.norm() / change.norm() * change).view(tensor.shape)
        elif tensor.is_floating_point():
            new = new + size * torch.randn(tensor.shape, generator=generator, dtype=torch.double)
        after[name] = new.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor.clone()
    return after


def saved(folder: Path, tensors: Mapping[str, torch.Tensor], like: Path | None, *, files: int = 1, **config: Any) -> Path:
    """A model of these tensors.

    Args:
        folder: to be written.
        tensors: by name.
        like: a model whose other files go along; None for none.
        files: how many files of weights there are.
        config: entries that ``config.json`` is to have instead of those of ``like``.
    """
    folder.mkdir(parents=True)
    weights = "model"
    if like is not None:
        for path in like.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copy(path, folder)
        if any(like.glob("diffusion_pytorch_model*")):
            weights = "diffusion_pytorch_model"
    if config:
        given = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
        (folder / "config.json").write_text(json.dumps(given | config))
    if files == 1:
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, folder / f"{weights}.safetensors", {"format": "pt"}
        )
        return folder
    names = sorted(tensors)
    place = {name: f"{weights}-{1 + i % files:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        mine = {name: tensors[name].clone().contiguous() for name in names if place[name] == file}
        save_file(mine, folder / file, {"format": "pt"})
    (folder / f"{weights}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@dataclass(frozen=True)
class Extracted:
    """An adapter, its report, and what was said.

    Attributes:
        out: its folder.
        report: of the extraction.
        notes: the notes, in order.
    """

    out: Path
    report: ExtractReport
    notes: list[str]

    def ranks(self) -> dict[str, int]:
        return {one.tensor: one.rank for one in self.report.targets}

    def fates(self) -> dict[str, str]:
        return {one.tensor: one.fate for one in self.report.others}

    def pairs(self) -> Tensors:
        """float64 ``alpha / rank B A`` by the name of its weight, where PEFT's names are those of the file; matrices alone."""
        stored = load_file(self.out / "adapter_model.safetensors")
        alpha = json.loads((self.out / "adapter_config.json").read_text())["lora_alpha"]
        found = {}
        for key, A in stored.items():
            module, half, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
            if half:
                B = stored[key.replace("lora_A", "lora_B")]
                found[f"{module}.weight"] = alpha / len(A) * (B.double().flatten(1) @ A.double().flatten(1))
        return found


def extracted(base: Path, tuned: Path, out: Path, **options: Any) -> Extracted:
    heard = Silent()
    report = extract(base, tuned, out, device="cpu", progress=heard, **options)
    return Extracted(out, report, heard.notes)


def merged_by_us(base: Path, adapter: Path, out: Path, **options: Any) -> Tensors:
    """The weights that ``surgery merge`` writes."""
    surgery.merge(base, adapter, out, device="cpu", progress=Silent(), **options)
    return tensors_of(out)


def least_error(change: torch.Tensor, rank: int, *, stack: bool = False) -> float:
    """The norm of what the best approximation of a rank leaves of a change, relative to it; of a stack, of each matrix."""
    matrices = change.double() if stack else change.double().flatten(1)[None]
    values = torch.linalg.svdvals(matrices)
    return math.sqrt(values[:, rank:].square().sum().item() / values.square().sum().item())


def relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """The norm of a difference, relative to something; in float64."""
    return (difference.double().norm() / whole.double().norm()).item()


def assert_best(one: Extracted, old: Tensors, new: Tensors, merged: Mapping[str, torch.Tensor], rank: int) -> None:
    """The weights that an adapter gives lack of the tuned ones what the best approximations of a rank lack, as is told.

    Args:
        one: the adapter.
        old, new: both models, by the names of the base.
        merged: what something has made of the base and the adapter, by these names, with no rounding but that of float32.
        rank: of all.
    """
    assert one.report.targets
    for told in one.report.targets:
        change = new[told.tensor].double() - old[told.tensor].double()
        least = least_error(change, rank, stack=told.view == "stack")
        assert told.error is not None, told
        assert abs(told.error - least) <= 1e-5 * least, told
        missed = relative(merged[told.tensor].double() - new[told.tensor].double(), change)
        rounding = 2**-24 * relative(new[told.tensor], change)
        assert abs(missed - least) <= 1e-5 * least + rounding, (told, missed, least)
