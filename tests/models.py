"""Tiny models of real architectures, and matrices with the spectra of real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery

logging.disable_progress_bar()


def save_llama(folder: Path, dtype: torch.dtype, *, shard_size: str = "40KB", **config: Any) -> Path:
    """A random Llama with weights of realistic spectrum, saved by transformers."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    with torch.no_grad():
        # No two alike: planning would ask transformers' class whether equal ones are one parameter.
        for seed, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2:
                parameter.copy_(realistic(*parameter.shape, seed=seed))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/notes.jinja").write_bytes(b"any bytes \xff\x00\n")
    return folder


def realistic(m: int, n: int, *, seed: int = 0, exponent: float = 0.5) -> torch.Tensor:
    """float32 (m, n): a power-law spectrum, Gaussian bulk and a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    left, _ = torch.linalg.qr(torch.randn(m, r, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, r, generator=generator))
    matrix = (left * torch.arange(1, r + 1) ** -exponent) @ right.T
    matrix += 0.1 * torch.randn(m, n, generator=generator) / max(m, n) ** 0.5
    outliers = torch.randint(m * n, (max(1, m * n // 1000),), generator=generator)
    matrix.view(-1)[outliers] *= 8
    return matrix


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path -> contents."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save_mixed(folder: Path) -> Path:
    """Matrices of several shapes over several windows and files, and a stack of experts."""
    folder.mkdir()
    experts = torch.stack([realistic(64, 96, seed=seed) for seed in range(12)])
    big = {f"layers.{i}.mlp.up.weight": realistic(700, 900, seed=i) for i in range(8)}
    files = [
        {**{name: big[name] for name in list(big)[:5]}, "layers.0.experts.up": experts},
        {**{name: big[name] for name in list(big)[5:]}, "norm.weight": torch.ones(50)},
        {f"layers.{i}.attn.q.weight": realistic(64, 64, seed=i).half() for i in range(5)},
    ]
    place = {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name)
        place |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def planned(model: Path | str, **options: Any) -> surgery.Plan:
    """What ``surgery.plan`` says, whose notes are read from it, and are no warnings here."""
    return surgery.plan(model, **options, progress=surgery.Silent())
