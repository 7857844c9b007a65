"""Quantized models from the hub's layouts to folded ones: planned, factorized, attached to as trainers load them, folded."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from tests.models import files_of, planned, tensors_of
from tests.quantized.layouts import LAYOUTS, Layout, dequantized, save_dense
from tests.releases import needs

IDS = (torch.arange(24) * 7 % 90)[None]
RANK = 4

#: Loaded right by transformers; it has no quantizer for modelopt's, and leaves out the global scales of experts in NVFP4.
LOADED = [name for name in LAYOUTS if name not in ("nvfp4_llama_modelopt", "nvfp4_mixture")]
#: Stored in FP8, or in four bits: how far a weight is from what it should be, relative, after it is quantized again.
COARSE = {"deepseek_v3": 0.04}


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
    def updates(self) -> dict[str, torch.Tensor]:
        """``U diag(s (g - 1)) V^T`` of each target, float64."""
        factors: dict[str, torch.Tensor] = {}
        for path in (self.factorized / "surgery").glob("factors-*"):
            factors |= load_file(path)
        found = {}
        for name, g in self.scales.items():
            U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
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


_made: dict[str, Made] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Each is made once. Read-only, but for what is folded beside it."""
    name = request.param
    if name not in _made:
        folder = tmp_path_factory.mktemp(name)
        LAYOUTS[name].save(folder / "m", shards=2 if name in ("deepseek_v3", "kimi_k2") else 1)
        surgery.factorize(folder / "m", folder / "f", rank=RANK)
        _made[name] = Made(name, folder)
    yield _made[name]


each = pytest.mark.parametrize("made", LAYOUTS, indirect=True)
each_loaded = pytest.mark.parametrize("made", LOADED, indirect=True)
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def loaded(made: Made, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """As a trainer on a CPU loads it. What is not quantized stays in bfloat16 there, whatever dtype is asked for."""
    method = made.layout.described["quant_method"]
    kinds = {
        "fp8": transformers.FineGrainedFP8Config,
        "mxfp4": transformers.Mxfp4Config,
        "compressed-tensors": transformers.CompressedTensorsConfig,
    }
    options = {} if folder is not None and not _is_quantized(folder) else {"quantization_config": kinds[method](dequantize=True)}
    kind = type(made.layout.model())
    return kind.from_pretrained(folder or made.model, dtype=dtype, **options).to(dtype)


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def exact(made: Made, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    """The model with these weights, in float64."""
    save_dense(folder, made.model, tensors)
    # Grouped products of experts are there for fewer digits only.
    kind = type(made.layout.model())
    return kind.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@each
def test_all_linear_layers_of_blocks_are_reached(made: Made) -> None:
    plan = planned(made.model, rank=RANK)
    targets = {target.tensor for target in plan.targets}
    layer = re.compile(
        r"(.*\.)?layers\.[01]\..*(self_attn\.\w+_proj(_with_mqa)?|mlp\.\w+_proj|experts\.(\d+\.)?\w+_proj)(\.weight)?"
        r"|vision_tower\.encoder\.blocks\..*(wo|wqkv|fc\d)\.weight"
    )
    assert targets == {name for name, one in made.numbers.items() if layer.fullmatch(name) and one.ndim > 1}
    # Every tensor of the files is there once: as it is, or by the weight that its numbers are of.
    ends = "_(packed|blocks)$"
    named = [re.sub(ends, "", name) for name in tensors_of(made.model)]
    assert sorted(named) == sorted([*targets, *(skipped.tensor for skipped in plan.skipped)])
    assert surgery.verify(made.factorized, base=made.model).ok


@each
def test_untouched_scales_fold_to_the_bytes_of_the_source(made: Made) -> None:
    out = made.folder / "untouched"
    surgery.fold(made.factorized, made.factorized / "surgery/scales.safetensors", out, base=made.model)
    before = files_of(made.model)
    assert {name: one for name, one in files_of(out).items() if name in before} == before


@each_loaded
def test_scales_on_the_model_as_it_is_loaded(made: Made, tmp_path: Path) -> None:
    model = loaded(made)
    before = logits(model)
    # compressed-tensors' numbers are rounded to bfloat16 when they are unpacked.
    tolerance = 1e-2 if made.layout.described["quant_method"] == "compressed-tensors" else 1e-5
    assert off(before, logits(exact(made, made.numbers, tmp_path / "numbers"))) < tolerance
    scales = surgery.attach(model, made.factorized)
    assert set(scales.values()) == set(made.scales)
    assert torch.equal(logits(model), before)
    scales.load(made.saved)
    expected = logits(exact(made, made.wanted, tmp_path / "wanted"))
    assert off(logits(model), expected) < tolerance
    assert off(before, expected) > 0.05
