"""Quantized models with factors and scales for them, and what their weights become."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import surgery
from tests.quantized.hub_models import LAYOUTS, Layout, dequantized

RANK = 4


@dataclass
class Made:
    """A quantized model, factorized, and scales for it."""

    name: str
    folder: Path

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name]

    @property
    def model(self) -> Path:
        return self.folder / "m"

    @property
    def factorized(self) -> Path:
        return self.folder / "f"

    @cached_property
    def numbers(self) -> dict[str, torch.Tensor]:
        """What its weights are, float64."""
        return dequantized(self.model)

    @cached_property
    def scales(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        targets = surgery.Manifest.read(self.factorized).targets
        return {target.key: 1 + 0.3 * torch.randn(target.scales_shape, generator=generator) for target in targets}

    @cached_property
    def saved(self) -> Path:
        """The file that holds them."""
        path = self.folder / "scales.safetensors"
        surgery.write_scales(path, self.scales, surgery.inspect(self.factorized).fingerprint)
        return path

    @cached_property
    def factors(self) -> dict[str, torch.Tensor]:
        """U, s and V of all targets."""
        files = (self.factorized / "surgery").glob("factors-*")
        return {key: one for path in files for key, one in load_file(path).items()}

    @cached_property
    def updates(self) -> dict[str, torch.Tensor]:
        """``U diag(s (g - 1)) V^T`` of each target, float64."""
        found = {}
        for name, g in self.scales.items():
            U, s, V = (self.factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
            found[name] = U * (s * (g.double() - 1)).unsqueeze(-2) @ V.mT
        return found

    @cached_property
    def wanted(self) -> dict[str, torch.Tensor]:
        """The weights with the updates added, float64."""
        return {name: one + self.updates.get(name, 0) for name, one in self.numbers.items()}

    def folded(self, name: str, **options: Any) -> tuple[Path, surgery.FoldReport]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", surgery.SurgeryWarning)  # of what rounding has lost
            return self.folder / name, surgery.fold(
                self.factorized, self.scales, self.folder / name, base=self.model, **options
            )
