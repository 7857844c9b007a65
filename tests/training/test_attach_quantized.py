"""Scales on a base that is quantized in memory: bitsandbytes in 4 and 8 bits, and FP8 checkpoints loaded dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from surgery.errors import SourceError
from surgery.names import TRAINS, Train
from tests.models import save_llama
from tests.releases import needs

IDS = torch.arange(40)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    needs("bitsandbytes", ">=0.50.2", "a quantized base"),
]

#: bitsandbytes' CPU kernel takes another block's scale where a row is no multiple of its 64.
_SIZES = {"hidden_size": 64, "intermediate_size": 128}
_BITS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


def _quantized(folder: Path, bits: str) -> Any:
    config = transformers.BitsAndBytesConfig(**_BITS[bits])
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).train()


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in (folder / "surgery").glob("factors-*") for key, value in load_file(path).items()}


def _dense(model: Any) -> dict[str, torch.Tensor]:
    """What the quantized layers compute with, each asked for the images of the unit vectors."""
    found = {}
    for name, layer in model.named_modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            unit = torch.eye(layer.in_features, requires_grad=True)
            found[f"{name}.weight"] = layer(unit).detach().T.clone()
    return found


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("bits", _BITS)
def test_scales_on_a_quantized_base(bits: str, train: Train, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32, **_SIZES)
    surgery.factorize(llama, tmp_path / "f", rank=8, layout="overlay")
    model = _quantized(llama, bits)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    before = model(inputs_embeds=embeds).logits
    weights = _dense(model)
    assert len(weights) == 14
    scales = surgery.attach(model, tmp_path / "f", train=train)
    assert torch.equal(model(inputs_embeds=embeds).logits, before)
    for delta in scales.parameters():
        delta.data.uniform_(-0.3, 0.3)
    loss = model(inputs_embeds=embeds, labels=IDS).loss
    loss.backward()

    # The same in float64, every layer with the weight that it had and the directions scaled and turned by hand.
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    factors = _factors(tmp_path / "f")
    leaves = {}
    for name, value in scales.values().items():
        U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
        leaves[name] = (value.double() - (1 if train == "scales" else torch.eye(8))).requires_grad_()
        between = torch.diag(leaves[name]) if train == "scales" else leaves[name]
        changed = weights[name].double() + U @ torch.diag(s.sqrt()) @ between @ torch.diag(s.sqrt()) @ V.T
        module = dense.get_submodule(name.removesuffix(".weight"))
        del module.weight
        module.weight = changed
    expected = dense(inputs_embeds=embeds.detach().double(), labels=IDS).loss
    expected.backward()
    # 8 bits quantize the activations as well.
    tolerance = 1e-4 if bits == "4 bits" else 3e-2
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    got = torch.cat([delta.grad for delta in scales.parameters()]).double()  # type: ignore[misc]
    wanted = torch.cat([leaves[name].grad.flatten() for name in scales.values()])  # type: ignore[union-attr]
    assert (got - wanted).norm() <= 10 * tolerance * wanted.norm()


@pytest.mark.parametrize("bits", _BITS)
def test_what_a_quantized_base_holds_is_told(bits: str, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32, **_SIZES)
    surgery.factorize(llama, tmp_path / "f", rank=8)
    original = _quantized(llama, bits)
    residual = _quantized(tmp_path / "f", bits)
    surgery.attach(original, tmp_path / "f")
    surgery.attach(residual, tmp_path / "f")
    layer = "model.layers.0.mlp.up_proj.surgery_scale"
    assert original.get_submodule(layer).inner().values.abs().max() == 0
    s = _factors(tmp_path / "f")["model.layers.0.mlp.up_proj.weight.s"]
    assert torch.equal(residual.get_submodule(layer).inner().values, s)
    flipped = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for parameter in flipped.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    flipped.save_pretrained(tmp_path / "other")
    other = tmp_path / "other"
    with pytest.raises(SourceError, match="neither the original weight nor its residual"):
        surgery.attach(_quantized(other, bits), tmp_path / "f")
