"""Scales on layers that have packed their weight under other names, and hold no parameter called ``weight``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.errors import OptionError, SourceError
from tests.models import save_llama

IDS = torch.arange(40)[None]
GROUP = 16


class Packed(nn.Module):
    """A linear layer as GPTQ's loaders keep it: eight numbers of four bits to an integer along the inputs, in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().T
        scales = weight.view(-1, GROUP, self.out_features).abs().amax(1) / 7
        codes = (weight / scales.repeat_interleave(GROUP, 0)).round().int() + 8
        packed = torch.zeros(self.in_features // 8, self.out_features, dtype=torch.int32)
        for i in range(8):
            packed |= codes.view(-1, 8, self.out_features)[:, i] << (4 * i)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales.half())

    def dense(self) -> torch.Tensor:
        """float32 (out, in)."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None, :, None]
        codes = ((self.get_buffer("qweight").unsqueeze(1) >> shifts) & 15).flatten(0, 1) - 8
        return (codes * self.get_buffer("scales").float().repeat_interleave(GROUP, 0)).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense())


def _loaded(folder: Path, kind: type[Packed] = Packed) -> Any:
    """A model whose blocks are packed; the output head is not."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, kind(module))
    return model.train()


def test_scales_on_packed_layers(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8, layout="overlay")
    model = _loaded(llama)
    before = model(IDS).logits
    scales = surgery.attach(model, tmp_path / "f")
    assert len(scales.values()) == 14
    assert torch.equal(model(IDS).logits, before)
    for delta in scales.parameters():
        delta.data.uniform_(-0.3, 0.3)
    loss = model(IDS, labels=IDS).loss
    loss.backward()

    # The same in float64, every layer with the weight that it has packed, and the directions scaled by hand.
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    factors = {key: one for path in (tmp_path / "f/surgery").glob("factors-*") for key, one in load_file(path).items()}
    leaves = {}
    for name, value in scales.values().items():
        layer = name.removesuffix(".weight")
        U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
        leaves[name] = (value.double() - 1).requires_grad_()
        module = dense.get_submodule(layer)
        del module.weight
        module.weight = model.get_submodule(layer).dense().double() + (U * (s * leaves[name])) @ V.T
    expected = dense(IDS, labels=IDS).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    got = torch.cat([delta.grad for delta in scales.parameters()]).double()  # type: ignore[misc]
    wanted = torch.cat([leaves[name].grad.flatten() for name in scales.values()])  # type: ignore[union-attr]
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()

    scales.detach()
    assert torch.equal(model(IDS).logits, before)


class Weighted(Packed):
    """The same with the numbers in a parameter called ``weight``, as transformers keeps the blocks of a GGUF file."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = nn.Parameter(self.get_buffer("qweight"), requires_grad=False)


class ForInference(Packed):
    """The same with a product that knows no gradients, as kernels of servers are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


def test_numbers_that_are_called_weight(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8, layout="overlay")
    found = []
    for kind in (Packed, Weighted):
        model = _loaded(llama, kind)
        scales = surgery.attach(model, tmp_path / "f", train="core")
        for i, delta in enumerate(scales.parameters()):
            delta.data = 0.1 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(i))
        found.append(model(IDS).logits)
    assert torch.equal(*found)


def test_layers_for_inference_alone(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8, layout="overlay")
    with pytest.raises(OptionError, match="a ForInference of the model passes no gradients on"):
        surgery.attach(_loaded(llama, ForInference), tmp_path / "f")


def test_what_packed_layers_hold_is_told(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8)
    residual = _loaded(tmp_path / "f")
    surgery.attach(residual, tmp_path / "f")
    path = residual.get_submodule("model.layers.0.mlp.up_proj.surgery_scale")
    assert path.inner().values.abs().min() > 0  # type: ignore[operator]  # it restores the directions
    other = _loaded(llama)
    other.model.layers[1].mlp.up_proj.qweight.copy_(other.model.layers[0].mlp.up_proj.qweight)
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj.* neither the original weight nor its residual"):
        surgery.attach(other, tmp_path / "f")
    larger = _loaded(llama)
    larger.model.layers[1].mlp.up_proj = Packed(nn.Linear(48, 96))
    with pytest.raises(OptionError, match="does not fit the parameter"):
        surgery.attach(larger, tmp_path / "f")
