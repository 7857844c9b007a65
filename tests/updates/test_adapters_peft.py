"""Adapters of every kind that PEFT writes, onto checkpoints of every kind: equal to what PEFT merges in float32."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES
from tests.models import tensors_of
from tests.updates.merging import adapt, assert_equal, merged_by_us, merged_on_disk, update_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

_LLAMA = ["q_proj", "o_proj", "down_proj"]
_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": _LLAMA}),
    ("llama", {"target_modules": _LLAMA, "use_rslora": True}),
    (
        "llama",
        {
            "target_modules": _LLAMA,
            "rank_pattern": {"layers.1.mlp.down_proj": 5, "o_proj": 2},
            "alpha_pattern": {"down_proj": 7, r"layers\.0\..*q_proj": 4},
        },
    ),
    ("llama", {"target_modules": _LLAMA, "use_dora": True}),
    ("llama", {"target_modules": [*_LLAMA, "embed_tokens"], "use_dora": True}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 11, 5]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7], "lm_head": [9, 1]}}),
    ("llama", {"target_modules": _LLAMA, "layers_to_transform": [1]}),
    ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"], "alpha_pattern": {"q_proj.weight": 9}}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only", "lora_bias": True}),
    ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    ("bert", {"target_modules": ["query", "dense"], "lora_bias": True}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    ("t5", {"target_modules": ["q", "wo"]}),
    ("vit", {"target_modules": ["q_proj", "fc1", "projection"], "modules_to_save": ["classifier"]}),
    ("vit", {"target_modules": ["q_proj", "projection"], "use_dora": True}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("whisper", {"target_modules": ["q_proj", "conv1", "conv2"], "use_dora": True}),
    ("clip", {"target_modules": ["q_proj", "patch_embedding"]}),
    ("UNet", {"target_modules": ["to_q", "conv1", "conv_shortcut", "time_emb_proj"]}),
    ("UNet", {"target_modules": ["to_q", "conv1", "conv_shortcut"], "use_dora": True}),
]


@pytest.mark.parametrize(("name", "options"), _KINDS, ids=[f"{name} {sorted(of)}" for name, of in _KINDS])
def test_as_peft_merges_it(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    adapter = adapt(family.load(folder), tmp_path / "lora", **options)
    update = update_of(folder, adapter)
    truth = merged_on_disk(family.load(folder), adapter, tmp_path / "merged")
    before = tensors_of(folder)
    assert_equal(merged_by_us(folder, update), truth, before)
    assert set(update.accounts[0]) == tensors_of(adapter).keys()
    assert {tensor for to in update.accounts[0].values() for tensor in to} == set(update.tensors())
    again = pickle.loads(pickle.dumps(update.part([], list(update.tensors()))))
    assert again.digests() == update.digests()
