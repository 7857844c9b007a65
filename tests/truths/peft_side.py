"""Adapters as PEFT makes and saves them, and what PEFT's own merge of them writes."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch

from tests.families import Family
from tests.models import tensors_of
from tests.releases import under_names_of


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """PEFT and diffusers warn of what is meant to be so here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_float64(family: Family, folder: Path) -> Any:
    """A saved model, its weights as exact as they are on disk."""
    with quietly():
        return family.load(folder).to(torch.float64)


def perturb(model: Any, size: float, seed: int) -> None:
    """As if it had been trained: random numbers for all that an adapter trains, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "magnitude" in name:
                parameter.mul_(1 + size * noise)
            elif "lora_" in name:
                parameter.copy_(size * noise)
            else:  # copies of weights, rows of embeddings, biases
                parameter.add_(size * noise)


def adapted(family: Family, folder: Path, options: dict[str, Any], *, size: float = 0.1, seed: int = 2) -> Any:
    """A model of float32 with a trained adapter."""
    with quietly():
        torch.manual_seed(seed)
        model: Any = peft.get_peft_model(
            family.load(folder).to(torch.float32), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options})
        )
    perturb(model, size, seed)
    return model


def merged_by_peft(family: Family, folder: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What PEFT's ``merge_and_unload`` and ``save_pretrained`` write in ``dtype``: name in the checkpoint -> tensor."""
    with quietly():
        model = peft.PeftModel.from_pretrained(
            family.load(folder).to(dtype), str(adapter), autocast_adapter_dtype=dtype != torch.float64
        )
        merged: Any = model.merge_and_unload()
        with tempfile.TemporaryDirectory() as out:
            merged.save_pretrained(out)
            return under_names_of(tensors_of(folder), tensors_of(Path(out)))


def output_of(family: Family, model: Any) -> torch.Tensor:
    """Of a model in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the inputs that families make by themselves
    try:
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_experts_implementation"):
                module.config._experts_implementation = "eager"  # torch's grouped product knows no float64
        with torch.no_grad():
            return family.run(model.to(torch.float64).eval())
    finally:
        torch.set_default_dtype(default)
