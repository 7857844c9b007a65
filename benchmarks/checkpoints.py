"""LLM-shaped checkpoints of any size, with spectra like those of real weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file


def layer_shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """The matrices of one Llama block with grouped-query attention; MLP 3.5 times as wide."""
    inner = 7 * hidden // 2
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def llm_like(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """float32 (m, n): 256 directions with a power-law spectrum i^-0.5, a Gaussian bulk below, a few outliers.

    The directions are random vectors, orthogonal up to 1/sqrt(n), which costs one product where exact ones would
    cost a factorization.
    """
    k = min(256, m, n)
    left = torch.randn(m, k, generator=generator) / m**0.5
    right = torch.randn(n, k, generator=generator) / n**0.5
    matrix = (left * (4 * torch.arange(1, k + 1) ** -0.5)) @ right.T
    matrix += torch.randn(m, n, generator=generator) * (0.5 / (m**0.5 + n**0.5))
    outliers = torch.randint(m * n, (m * n // 100_000,), generator=generator)
    matrix.view(-1)[outliers] *= 10
    return matrix


#: Sizes of models by name: hidden, inner, key and value rows, layers, words.
MODELS = {"8B": (4096, 14336, 1024, 32, 128_256), "70B": (8192, 28_672, 1024, 80, 128_256)}


def write_headers(folder: Path, model: str, shard_bytes: float = 5e9) -> None:
    """Write a Llama in bfloat16 as transformers shards it: headers, and nothing after them (the files are sparse)."""
    folder.mkdir(parents=True)
    hidden, inner, rows, layers, words = MODELS[model]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        block = {"q": (hidden, hidden), "k": (rows, hidden), "v": (rows, hidden), "o": (hidden, hidden)}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": shape for name, shape in block.items()}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        shapes |= {f"model.layers.{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(shards[-1].values()) + 2 * math.prod(shape) > shard_bytes:
            shards.append({})
        shards[-1][name] = 2 * math.prod(shape)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        header, end = {}, 0
        for name in sorted(shard):
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + shard[name]]}
            end += shard[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            written.truncate(8 + len(text) + end)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden}
    config |= {"num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": rows // 128}
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": inner, "vocab_size": words}))


def write_checkpoint(
    folder: Path, n_bytes: float, hidden: int, dtype: torch.dtype = torch.bfloat16, shard_bytes: float = 5e8
) -> int:
    """Write a checkpoint of about ``n_bytes`` with config and index; returns the number of weights in its blocks."""
    folder.mkdir(parents=True)
    shapes = layer_shapes(hidden)
    layer_weights = sum(m * n for m, n in shapes.values())
    width = torch.empty(0, dtype=dtype).element_size()
    layers = max(1, round(n_bytes / (layer_weights * width)))
    generator = torch.Generator().manual_seed(0)
    pending: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": (torch.randn(8192, hidden, generator=generator) * 0.02).to(dtype)
    }
    weight_map: dict[str, str] = {}
    shard = 0

    def flush() -> None:
        nonlocal shard
        shard += 1
        name = f"model-{shard:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for layer in range(layers):
        for name, (m, n) in shapes.items():
            pending[f"model.layers.{layer}.{name}.weight"] = llm_like(m, n, generator).to(dtype)
            if sum(tensor.numel() * width for tensor in pending.values()) >= shard_bytes:
                flush()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            pending[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
    pending["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": shapes["mlp.up_proj"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers * layer_weights
