"""Why tensors are passed over; the globs; the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import OptionError
from surgery.planning.plan import Plan


def test_reasons(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.q.weight": torch.randn(8, 8),
        "model.layers.0.q.bias": torch.randn(8),
        "model.layers.0.norm.weight": torch.randn(8, 8),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 8),
        "model.layers.0.mlp.router.weight": torch.randn(4, 8),
        "model.layers.0.mlp.experts.down_proj_bias": torch.randn(4, 8),
        "model.layers.0.mixer.A_log": torch.randn(8, 4),
        "model.layers.0.conv.weight": torch.randn(8, 1, 4),
        "model.layers.0.one.weight": torch.randn(1, 8),
        "model.layers.0.quantized.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "model.layers.0.table": torch.randn(8, 8),
        "model.embed_tokens.weight": torch.randn(9, 8),
        "model.position_ids": torch.arange(4)[None],
        "lm_head.weight": torch.randn(9, 8),
        "projection.weight": torch.randn(8, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    steps = surgery.plan(tmp_path, rank=2)
    assert [target.tensor for target in steps.targets] == ["model.layers.0.q.weight"]
    reasons = {item.tensor: item.reason for item in steps.skipped}
    expected = {
        "q.bias": "a vector",
        "norm.weight": "a norm",
        "mlp.gate.weight": "a router",
        "mlp.router.weight": "a router",
        "down_proj_bias": "no weight",
        "A_log": "no weight",
        "conv.weight": "a depthwise convolution",
        "one.weight": "a single row",
        "quantized.weight": "F8_E4M3",
        "table": "no weight of a linear layer",
        "embed_tokens.weight": "an embedding",
        "position_ids": "no floating-point weight",
        "lm_head.weight": "an output head",
        "projection.weight": "outside the transformer blocks",
    }
    for ending, reason in expected.items():
        (found,) = [text for name, text in reasons.items() if name.endswith(ending)]
        assert reason in found, ending


def _names(steps: Plan) -> list[str]:
    return sorted(re.sub(r"\.\d+\.", ".N.", target.tensor) for target in steps.targets)


def test_include_and_exclude(llama: Path) -> None:
    assert set(_names(surgery.plan(llama, include=["*q_proj*"]))) == {"model.layers.N.self_attn.q_proj.weight"}
    assert set(_names(surgery.plan(llama, include=["*q_proj*", "*k_proj*"], exclude=["*.1.*"]))) == {
        "model.layers.N.self_attn.q_proj.weight",
        "model.layers.N.self_attn.k_proj.weight",
    }
    assert not [name for name in _names(surgery.plan(llama, exclude=["*mlp*"])) if "mlp" in name]
    assert _names(surgery.plan(llama, include=["lm_head.weight", "model.embed_tokens.weight"], rank=3)) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    # What is no matrix cannot be asked for.
    with pytest.raises(OptionError, match="nothing that --include matches") as caught:
        surgery.plan(llama, include=["*layernorm*"])
    assert "input_layernorm.weight (a vector (norm, bias))" in str(caught.value)


def test_glob_that_matches_nothing_names_near_misses(llama: Path) -> None:
    with pytest.raises(OptionError, match=r"--include '\*qproj\*' matches no tensor") as caught:
        surgery.plan(llama, include=["*qproj*"])
    assert "q_proj" in str(caught.value)
    with pytest.raises(OptionError, match="--exclude"):
        surgery.plan(llama, exclude=["nothing"])


def test_model_without_targets_lists_what_came_close(tmp_path: Path) -> None:
    save_file({"head.weight": torch.randn(4, 4), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="is a target") as caught:
        surgery.plan(tmp_path)
    assert "head.weight (an output head)" in str(caught.value)


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one(llama: Path, rank: int) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        surgery.plan(llama, rank=rank)


def test_rank_is_cut_to_small_matrices_and_says_so(llama: Path) -> None:
    steps = surgery.plan(llama, rank=32)
    assert {target.rank for target in steps.targets if "k_proj" in target.tensor} == {24}
    assert {target.rank for target in steps.targets if "q_proj" in target.tensor} == {32}
    assert len(steps.notes) == 1
    assert "larger than 4 of 14 targets" in steps.notes[0]
    assert steps.trainable == 4 * 24 + 10 * 32
    with pytest.raises(OptionError, match="larger than every target") as caught:
        surgery.plan(llama, rank=1000)
    assert "at most 48" in str(caught.value)
