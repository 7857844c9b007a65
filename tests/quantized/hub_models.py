"""Tiny quantized models as they lie on the hub: the names, dtypes and configs of published ones, and what their numbers are.

``dequantized`` reads such a checkpoint in float64 by the definition of each format. It shares nothing with the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models import realistic, tensors_of

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
#: DeepSeek's blocks are of 128 x 128; so small that a tiny model has several.
BLOCK = 16

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """A kind of published checkpoint.

    Attributes:
        model: a tiny dense one.
        pack: the tensors that stand for a weight, by its name and numbers.
        packed: what is quantized, an expression for whole names of weights.
        described: ``quantization_config`` of its config.
        others: other tensors that it has, made of its own.
        renamed: names in the file, for those of transformers.
        beside: other files: name -> what is in them, as JSON.
        config: what else its config says.
    """

    model: Callable[[], Any]
    pack: Callable[[str, torch.Tensor], Tensors]
    packed: str
    described: Mapping[str, Any]
    others: Callable[[Tensors], Tensors] = lambda _: {}
    renamed: Callable[[str], str] = str
    beside: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    def save(self, folder: Path, *, shards: int = 1) -> Path:
        """Write it, the tensors of a weight spread over weight files if there are several."""
        torch.manual_seed(0)
        model = self.model()
        with torch.no_grad():
            for seed, (name, one) in enumerate(model.named_parameters()):
                if one.ndim == 2 and "embed" not in name:
                    one.copy_(realistic(*one.shape, seed=seed))
                elif one.ndim == 3:
                    one.copy_(torch.stack([realistic(*one.shape[1:], seed=100 * seed + i) for i in range(len(one))]))
        model.to(torch.bfloat16).save_pretrained(folder)
        dense = {self.renamed(name): one for name, one in load_file(folder / "model.safetensors").items()}
        dense |= self.others(dense)
        tensors: Tensors = {}
        for name, one in dense.items():
            tensors |= self.pack(name, one.float()) if re.fullmatch(self.packed, name) else {name: one}
        config = json.loads((folder / "config.json").read_text()) | (self.config or {})
        if self.described:
            config["quantization_config"] = dict(self.described)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for name, content in (self.beside or {}).items():
            (folder / name).write_text(json.dumps(content, indent=2))
        write(folder, tensors, shards)
        return folder


def write(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """The weight files of a model, and their index if there are several."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        some = dict(list(tensors.items())[i::shards])
        save_file(some, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def save_dense(folder: Path, model: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """What a quantized model stands for, as an unquantized one."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, dict(tensors))
    return folder


# What the tensors of a checkpoint stand for.


def dequantized(folder: Path, block: int = BLOCK) -> Tensors:
    """Name of each weight, as an unquantized model has it -> its numbers, float64."""
    tensors = tensors_of(folder)
    found: Tensors = {}
    for name, one in tensors.items():
        stem = name.removesuffix(".weight")
        if name.endswith("_blocks"):
            scale = 2.0 ** (tensors[name.removesuffix("blocks") + "scales"].double() - 127)
            values = _nibbles(one) * scale.unsqueeze(-1)
            found[name.removesuffix("_blocks")] = values.flatten(-2).mT
        elif name.endswith("_packed"):
            found[name.removesuffix("_packed")] = _of_compressed_tensors(name.removesuffix("_packed"), tensors)
        elif name.endswith(".weight") and one.dtype == torch.uint8:  # modelopt
            scale = tensors[f"{name}_scale"].double() * tensors[f"{name}_scale_2"].double()
            found[name] = _grouped(_nibbles(one), scale)
        elif one.dtype in (torch.int8, torch.float8_e4m3fn) and f"{name}_scale" in tensors:  # one, or one for each row
            scale = tensors[f"{name}_scale"]
            if scale.dtype == torch.uint8:
                found[name] = _grouped(one.double(), 2.0 ** (scale.double() - 127))
            else:
                found[name] = one.double() * scale.double()
        elif one.dtype == torch.int8:
            found[name] = _grouped(_nibbles(one.view(torch.uint8)), tensors[f"{stem}.scale"].double())
        elif one.dtype == torch.float8_e4m3fn and one.ndim == 2 and not name.endswith("_scale"):
            scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{stem}.scale"))
            assert scale is not None
            rows, columns = one.shape
            spread = scale.double().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
            found[name] = one.double() * spread
        elif one.is_floating_point() and not re.search(r"_scales?(_inv|_2)?$|\.scale$", name):
            found[name] = one.double()
    return found


def _of_compressed_tensors(name: str, tensors: Tensors) -> torch.Tensor:
    packed, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"].double()
    if packed.dtype == torch.uint8:
        return _grouped(_nibbles(packed), scale / tensors[f"{name}_global_scale"].double())
    rows, columns = tensors[f"{name}_shape"].tolist()
    codes = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)[:, :columns] - 8
    assert codes.shape == (rows, columns)
    return _grouped(codes.double(), scale)


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    """Two numbers in each byte, the first in the low half."""
    return _E2M1.double()[torch.stack([stored & 15, stored >> 4], -1).flatten(-2).long()]


def _grouped(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes * scale.repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)


# How the publishers' quantizers pack a weight.


def _fp8(scale_name: str, dtype: torch.dtype) -> Callable[[str, torch.Tensor], Tensors]:
    def pack(name: str, weight: torch.Tensor) -> Tensors:
        m, n = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -n % BLOCK, 0, -m % BLOCK))
        blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).abs().amax((1, 3))
        scale = (2.0 ** (blocks / 448).log2().ceil() if dtype == torch.float8_e8m0fnu else blocks / 448).to(dtype)
        spread = scale.float().repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :n]
        return {name: (weight / spread).to(torch.float8_e4m3fn), scale_name.format(name, name.removesuffix(".weight")): scale}

    return pack


def _by_row(dtype: torch.dtype) -> Callable[[str, torch.Tensor], Tensors]:
    """A scale for each output, as llm-compressor has it; the inputs are quantized when they come."""

    def pack(name: str, weight: torch.Tensor) -> Tensors:
        largest = 127 if dtype == torch.int8 else 448
        scale = (weight.abs().amax(1, keepdim=True) / largest).bfloat16()
        scaled = (weight / scale.float()).clamp(-largest, largest)
        return {name: (scaled.round() if dtype == torch.int8 else scaled).to(dtype), f"{name}_scale": scale}

    return pack


def _mxfp8(name: str, weight: torch.Tensor) -> Tensors:
    scale = 2.0 ** (weight.unflatten(-1, (-1, 32)).abs().amax(-1) / 448).log2().ceil()
    numbers = (weight / scale.repeat_interleave(32, 1)).to(torch.float8_e4m3fn)
    return {name: numbers, f"{name}_scale": (scale.log2() + 127).to(torch.uint8)}


def _fp8_modelopt(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    layer = name.removesuffix("weight")
    tensors = {
        name: (weight / scale).to(torch.float8_e4m3fn),
        f"{name}_scale": scale,
        f"{layer}input_scale": torch.tensor(0.02),
    }
    if layer.endswith((".k_proj.", ".v_proj.")):
        tensors[f"{layer}{layer[-7]}_scale"] = torch.tensor(1.0)
    return tensors


def _int4(name: str, weight: torch.Tensor, group: int = 32) -> Tensors:
    m, n = weight.shape
    scale = (weight.view(m, -1, group).abs().amax(-1) / 7).bfloat16()
    codes = (weight / scale.float().repeat_interleave(group, 1)).round().clamp(-8, 7).int() + 8
    packed = torch.zeros(m, n // 8, dtype=torch.int32)
    for i in range(8):
        packed |= codes.view(m, -1, 8)[..., i] << (4 * i)
    return {
        f"{name}_packed": packed,
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor([m, n], dtype=torch.int32),
    }


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of E2M1, two in each byte."""
    codes = (scaled.unsqueeze(-1) - _E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _powers(amax: torch.Tensor) -> torch.Tensor:
    return 2.0 ** (amax / 6).log2().ceil()


def _mxfp4_blocks(name: str, weight: torch.Tensor) -> Tensors:
    groups = weight.mT.unflatten(-1, (-1, 32))
    scale = _powers(groups.abs().amax(-1))
    stored = (scale.log2() + 127).to(torch.uint8)
    return {f"{name}_blocks": _codes(groups / scale.unsqueeze(-1)), f"{name}_scales": stored}


def _mxfp4_nibbles(name: str, weight: torch.Tensor) -> Tensors:
    scale = _powers(weight.unflatten(-1, (-1, 32)).abs().amax(-1))
    codes = _codes(weight / scale.repeat_interleave(32, 1)).view(torch.int8)
    return {name: codes, f"{name.removesuffix('weight')}scale": scale.to(torch.float8_e8m0fnu)}


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, scales, and the number that divides these."""
    whole = 448 * 6 / weight.abs().max()
    scale = (weight.unflatten(-1, (-1, 16)).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    return _codes(weight / (scale.float() / whole).clamp(min=1e-12).repeat_interleave(16, 1)), scale, whole


def _nvfp4_modelopt(name: str, weight: torch.Tensor) -> Tensors:
    codes, scale, whole = _nvfp4(weight)
    layer = name.removesuffix("weight")
    tensors = {name: codes, f"{name}_scale": scale, f"{name}_scale_2": 1 / whole, f"{layer}input_scale": torch.tensor(0.02)}
    if layer.endswith((".k_proj.", ".v_proj.")):  # of the cache, in FP8
        tensors[f"{layer}{layer[-7]}_scale"] = torch.tensor(1.0)
    return tensors


def _nvfp4_compressed(name: str, weight: torch.Tensor) -> Tensors:
    codes, scale, whole = _nvfp4(weight)
    layer = name.removesuffix("weight")
    return {
        f"{name}_packed": codes,
        f"{name}_scale": scale,
        f"{name}_global_scale": whole.view(1),
        f"{layer}input_global_scale": torch.tensor([300.0]),
    }


# The models.

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_FINE_GRAINED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
_DEEPSEEK = {
    **_SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def _deepseek(**sizes: Any) -> Any:
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**_DEEPSEEK, **sizes}))


def _with_prediction(tensors: Tensors) -> Tensors:
    """The layer for multi-token prediction that DeepSeek-V3 has after the last one: 61 of 0 to 60."""
    layer = {name.replace("layers.1.", "layers.2."): one.clone() for name, one in tensors.items() if "layers.1." in name}
    hidden = _SIZES["hidden_size"]
    assert isinstance(hidden, int)
    return layer | {
        "model.layers.2.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.2.enorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "model.layers.2.hnorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "model.layers.2.eh_proj.weight": realistic(hidden, 2 * hidden, seed=9).bfloat16(),
        "model.layers.2.shared_head.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "model.layers.2.shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }


def save_deepseek_v4(folder: Path) -> Path:
    """Its own names, FP8 with powers of two by block, and routed experts in MXFP4; sparse attention, and a layer to predict."""
    hidden, heads, inner, low = 64, 4, 32, 32
    names = {
        "attn.wq_a": (low, hidden),
        "attn.wq_b": (heads * 16, low),
        "attn.wkv": (48, hidden),
        "attn.wo_a": (2 * low, heads * 8),
        "attn.wo_b": (hidden, 2 * low),
        "ffn.shared_experts.w1": (inner, hidden),
        "ffn.shared_experts.w2": (hidden, inner),
        "ffn.shared_experts.w3": (inner, hidden),
    }
    experts = {f"ffn.experts.{i}.w{j}": (hidden, inner) if j == 2 else (inner, hidden) for i in range(4) for j in (1, 2, 3)}
    fp8 = _fp8("{1}.scale", torch.float8_e8m0fnu)
    tensors: Tensors = {
        "embed.weight": realistic(97, hidden, seed=1).bfloat16(),
        "head.weight": realistic(97, hidden, seed=2).bfloat16(),
        "norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "hc_head_fn": realistic(4, 4 * hidden, seed=3),
        "hc_head_base": torch.zeros(4),
        "hc_head_scale": torch.ones(1),
    }
    for i, layer in enumerate(("layers.0", "layers.1", "mtp.0")):
        for seed, (name, shape) in enumerate(names.items()):
            tensors |= fp8(f"{layer}.{name}.weight", realistic(*shape, seed=100 * i + seed))
        for seed, (name, shape) in enumerate(experts.items()):
            tensors |= _mxfp4_nibbles(f"{layer}.{name}.weight", realistic(*shape, seed=100 * i + 50 + seed))
        tensors |= {
            f"{layer}.ffn.gate.weight": realistic(4, hidden, seed=7 + i).bfloat16(),
            f"{layer}.ffn.gate.bias": torch.zeros(4),
            f"{layer}.attn.attn_sink": torch.zeros(heads),
            f"{layer}.attn_norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{layer}.hc_attn_fn": realistic(24, 4 * hidden, seed=40 + i),
            f"{layer}.hc_attn_base": torch.zeros(24),
        }
    for seed, name in enumerate(("e_proj", "h_proj")):
        tensors |= fp8(f"mtp.0.{name}.weight", realistic(hidden, hidden, seed=300 + seed))
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_hidden_layers": 2,
        "hidden_size": hidden,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
        "expert_dtype": "fp4",
        "torch_dtype": "bfloat16",
        "quantization_config": {**_FINE_GRAINED, "scale_fmt": "ue8m0"},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, tensors, shards=2)
    return folder


def _gpt_oss() -> Any:
    sizes = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **sizes))


def _kimi_k25() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**_DEEPSEEK, "model_type": "deepseek_v3", "tie_word_embeddings": False}
    config = transformers.Kimi_K25Config(
        text_config=text,
        vision_config={**vision, "pos_emb_height": 4, "pos_emb_width": 4},
        projection_hidden_size=32,
        image_token_id=95,
        video_token_id=96,
        tie_word_embeddings=False,
    )
    return transformers.Kimi_K25ForConditionalGeneration(config)


def _of_kimi(name: str) -> str:
    """The name on the hub, where transformers' way back from its own names leads to another."""
    return name.replace("language_model.model.blocks.", "language_model.model.layers.").removeprefix("model.")


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **_SIZES))


def _qwen3_moe() -> Any:
    sizes = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes)
    return transformers.Qwen3MoeForCausalLM(config)


def _compressed(format_name: str, ignore: list[str], inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    described = {
        "dynamic": False,
        "observer": "minmax",
        "symmetric": True,
        "actorder": None,
        "block_structure": None,
        **weights,
    }
    group = {"targets": ["Linear"], "weights": described, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "ignore": ignore,
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


_INT4 = _compressed(
    "pack-quantized",
    ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    num_bits=4,
    type="int",
    strategy="group",
    group_size=32,
)
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "producer": {"name": "modelopt", "version": "0.29.0"},
}
_HF_QUANT = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]},
}
_HF_QUANT_FP8 = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}
_BY_TOKEN = {"dynamic": True, "strategy": "token", "symmetric": True, "num_bits": 8}
_LINEAR = r".*\.(self_attn|mlp|experts\.\d+|shared_experts)\.\w+_proj(_with_mqa)?\.weight"

LAYOUTS: dict[str, Layout] = {
    "deepseek_v3": Layout(
        _deepseek,
        _fp8("{0}_scale_inv", torch.float32),
        _LINEAR,
        _FINE_GRAINED,
        _with_prediction,
        config={"num_nextn_predict_layers": 1},
    ),
    # As in the large one, whose 576 rows of kv_a_proj_with_mqa are four and a half blocks.
    "deepseek_v3_ragged": Layout(
        lambda: _deepseek(qk_rope_head_dim=8), _fp8("{0}_scale_inv", torch.float32), _LINEAR, _FINE_GRAINED
    ),
    "gpt_oss": Layout(
        _gpt_oss,
        _mxfp4_blocks,
        r".*\.experts\.(gate_up|down)_proj",
        {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    ),
    "kimi_k2": Layout(_deepseek, _int4, r".*\.experts\.\d+\.\w+_proj\.weight", _INT4),
    "kimi_k25": Layout(_kimi_k25, _int4, r".*\.experts\.\d+\.\w+_proj\.weight", _INT4, renamed=_of_kimi),
    "fp8_llama": Layout(
        _llama,
        _by_row(torch.float8_e4m3fn),
        _LINEAR,
        _compressed(
            "float-quantized", ["lm_head"], {**_BY_TOKEN, "type": "float"}, num_bits=8, type="float", strategy="channel"
        ),
    ),
    "int8_llama": Layout(
        _llama,
        _by_row(torch.int8),
        _LINEAR,
        _compressed("int-quantized", ["lm_head"], {**_BY_TOKEN, "type": "int"}, num_bits=8, type="int", strategy="channel"),
    ),
    "mxfp8_llama": Layout(
        _llama,
        _mxfp8,
        _LINEAR,
        _compressed(
            "mxfp8-quantized", ["lm_head"], num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
        ),
    ),
    # The config of older exports says nothing of it.
    "fp8_llama_modelopt": Layout(_llama, _fp8_modelopt, _LINEAR, {}, beside={"hf_quant_config.json": _HF_QUANT_FP8}),
    "nvfp4_llama_modelopt": Layout(_llama, _nvfp4_modelopt, _LINEAR, _MODELOPT, beside={"hf_quant_config.json": _HF_QUANT}),
    "nvfp4_llama": Layout(_llama, _nvfp4_compressed, _LINEAR, _compressed("nvfp4-pack-quantized", ["lm_head"], **_NVFP4)),
    "nvfp4_mixture": Layout(
        _qwen3_moe,
        _nvfp4_compressed,
        _LINEAR,
        _compressed("nvfp4-pack-quantized", ["lm_head", "re:.*mlp.gate$"], **_NVFP4),
    ),
}
