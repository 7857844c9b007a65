"""Training scales in a loaded model: what is trained is what is folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import surgery
from surgery.errors import FormatError, OptionError, SourceError
from surgery.planning.plan import Layout
from tests.models import save_llama


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


IDS = torch.arange(40)[None]


def _train(model: torch.nn.Module, scales: surgery.Scales, steps: int = 5) -> None:
    optimizer = torch.optim.Adam(scales.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("layout", "loaded"), [("residual", "factorized"), ("residual", "original"), ("overlay", "original")])
def test_what_is_trained_is_what_is_folded(layout: Layout, loaded: str, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8, layout=layout)
    model = _load(tmp_path / "f" if loaded == "factorized" else llama)
    scales = surgery.attach(model, tmp_path / "f")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in scales.parameters()}
    assert sum(p.numel() for p in trainable) == 14 * 8
    untouched = _load(llama)(IDS).logits
    if loaded == "original":
        assert torch.equal(model(IDS).logits, untouched)
    else:
        assert torch.allclose(model(IDS).logits, untouched, atol=1e-4)
    before = model(input_ids=IDS, labels=IDS).loss.item()
    _train(model, scales)
    attached = model(input_ids=IDS, labels=IDS)
    assert attached.loss.item() < before
    scales.save(tmp_path / "scales.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "scales.safetensors", tmp_path / "out", base=llama if layout == "overlay" else None)
    assert torch.allclose(_load(tmp_path / "out")(IDS).logits, attached.logits, atol=1e-4)
    assert not torch.allclose(attached.logits, untouched, atol=1e-2)


def test_save_load_and_detach(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    model = _load(llama)
    names = set(model.state_dict())
    original = model(IDS).logits
    scales = surgery.attach(model, tmp_path / "f")
    _train(model, scales, 2)
    trained = model(IDS).logits
    scales.save(tmp_path / "s.safetensors")
    scales.detach()
    assert torch.equal(model(IDS).logits, original)
    assert set(model.state_dict()) == names
    again = surgery.attach(model, tmp_path / "f")
    again.load(tmp_path / "s.safetensors")
    assert torch.allclose(model(IDS).logits, trained, atol=1e-5)
    with pytest.raises(OptionError, match="attached to this model already"):
        surgery.attach(model, tmp_path / "f")


def test_conv1d_stores_its_weight_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4)
    model = _load(tmp_path / "m").eval()
    with pytest.raises(OptionError, match=r"is not the weight of a linear layer of this model"):
        surgery.attach(model.transformer, tmp_path / "f")
    scales = surgery.attach(model, tmp_path / "f")
    for value in scales.parameters():
        value.data.uniform_(-0.5, 0.5)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out")
    assert torch.allclose(_load(tmp_path / "out").eval()(IDS).logits, model(IDS).logits, atol=1e-4)


def test_damaged_factors_are_refused(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    path = sorted((tmp_path / "f/surgery").glob("factors-*"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not the file that the manifest describes"):
        surgery.attach(_load(llama), tmp_path / "f")


def test_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    other = _load(llama)
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 0.01
    with pytest.raises(SourceError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of the model is neither"):
        surgery.attach(other, tmp_path / "f")


def test_a_model_loaded_in_fewer_bits_is_refused(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=4)
    with pytest.raises(SourceError, match="neither the original weight nor its residual"):
        surgery.attach(_load(llama, torch.bfloat16), tmp_path / "f")
