"""Training an attached model keeps rank-k activations on top of what the frozen model keeps, and nothing of full size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

import surgery
from surgery.training.ways import Way
from tests.models import save_llama

TOKENS = 256
EXPERTS_PER_TOKEN = 2
#: Rank-k activations that a target may keep: the gradient of its scales needs x V, and a product may keep its input too.
KEPT = 2
_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": EXPERTS_PER_TOKEN}


def _saved_for_backward(model: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without parameters and buffers.

    The input requires a gradient, so that every layer keeps what it needs to hand one on, whatever is trained.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive, so that no other storage gets its address

    ids = torch.arange(TOKENS).reshape(4, -1) % 50
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(inputs_embeds=embedded, labels=ids).loss
    loss.backward()
    assert embedded.grad is not None
    return sum(kept.values())


def _llama(folder: Path, dtype: torch.dtype) -> None:
    save_llama(folder, dtype)


def _gpt2(folder: Path, dtype: torch.dtype) -> None:
    """Linear layers that hold their weight transposed."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(dtype).save_pretrained(folder)


def _granite(folder: Path, dtype: torch.dtype) -> None:
    """Experts in a stack that computes ``x W^T``."""
    transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**_SIZES, **_EXPERTS)).to(dtype).save_pretrained(folder)


def _gpt_oss(folder: Path, dtype: torch.dtype) -> None:
    """Experts in a stack that computes ``x W``."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(**_SIZES, **_EXPERTS, head_dim=16, sliding_window=8, rope_parameters=rope)
    transformers.GptOssForCausalLM(config).to(dtype).save_pretrained(folder)


@pytest.mark.parametrize("train", ["scales", "core", "orthogonal"])
@pytest.mark.parametrize("make", [_llama, _gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_rank_k_activations_are_kept(make: Callable[..., None], dtype: torch.dtype, train: Way, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make(tmp_path / "m", dtype)
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2).manifest
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).eval()
    everything = _saved_for_backward(model)
    model.requires_grad_(False)
    frozen = _saved_for_backward(model)
    scales = surgery.attach(model, tmp_path / "f", train=train)
    for keep in (2, 1):
        extra = _saved_for_backward(model) - frozen
        allowed = KEPT * TOKENS * keep * len(manifest.targets) * dtype.itemsize
        assert 0 < extra <= allowed
        assert everything - frozen > 5 * allowed  # the full-size inputs that training the weights keeps would be seen
        scales.choose(keep=1)
    scales.detach()
    assert _saved_for_backward(model) == frozen


@pytest.mark.parametrize("make", [_granite, _gpt_oss])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("train", ["scales", "core"])
def test_stacked_experts_keep_rank_k_activations_too(
    make: Callable[..., None], experts: str, train: Way, tmp_path: Path
) -> None:
    """And one factor of each expert, whatever the number of tokens: what is between the factors is multiplied into it."""
    torch.manual_seed(0)
    make(tmp_path / "m", torch.float32)
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=8).manifest
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "f", dtype=torch.float32, experts_implementation=experts
    ).eval()
    everything = _saved_for_backward(model)
    model.requires_grad_(False)
    frozen = _saved_for_backward(model)
    surgery.attach(model, tmp_path / "f", train=train)
    extra = _saved_for_backward(model) - frozen
    allowed = 0
    for target in manifest.targets:
        count, m, n = target.matrices
        rows = TOKENS * (EXPERTS_PER_TOKEN if target.view == "stack" else 1)
        factor = count * max(m, n) * target.rank if target.view == "stack" else 0
        allowed += (KEPT * rows * target.rank + factor) * 4
    assert 0 < extra <= allowed
    assert everything - frozen > 2 * allowed
