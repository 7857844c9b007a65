"""Scales attached to models of many families: what is attached is what is folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery
from tests.families import FAMILIES, Family


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, None) for name in FAMILIES), *((name, True) for name, family in FAMILIES.items() if family.fused)],
)
def test_attached_is_folded(name: str, split: bool | None, tmp_path: Path) -> None:
    """Untouched, not a bit changes; with random scales the output is that of the folded model, and all get a gradient."""
    _check(FAMILIES[name], split, tmp_path)


def test_experts_whose_weights_another_module_reads(tmp_path: Path) -> None:
    """DBRX's modules of experts hold the weights, and their parent computes with them."""
    blocks = {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    }
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 50}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def make() -> Any:
        return transformers.DbrxForCausalLM(transformers.DbrxConfig(**sizes, **special, **blocks))

    _check(Family(make, FAMILIES["llama"].run, None, set(), {}), None, tmp_path)


def _check(family: Family, split: bool | None, tmp_path: Path) -> None:
    folder = family.save(tmp_path / "model")
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay", split=split)
    model = family.load(folder)
    with torch.no_grad():
        before = family.run(model)
    scales = surgery.attach(model, tmp_path / "f")
    trainable = {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.requires_grad}
    assert sum(trainable.values()) == sum(target.trainable for target in manifest.targets)
    untouched = family.run(model)
    assert torch.equal(untouched, before)

    generator = torch.Generator().manual_seed(1)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)
    attached = family.run(model)
    attached.float().square().mean().backward()
    unused = {key for key, delta in zip(scales.values(), scales.parameters(), strict=True) if delta.grad is None}
    assert unused == set()
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out", base=folder)
    folded = family.output(tmp_path / "out")
    assert not torch.allclose(folded, before, rtol=1e-3, atol=1e-4)
    assert torch.allclose(attached, folded, rtol=1e-3, atol=1e-4 * folded.abs().max().item())
