"""The models that adapters are merged into, as transformers and diffusers save them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.families import DECODER, FAMILIES, Family

_IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _text(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=_IDS).logits
    return logits


def _image(model: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 3 * 32 * 32, dtype=next(model.parameters()).dtype).reshape(1, 3, 32, 32)
    logits: torch.Tensor = model(pixel_values=pixels).logits
    return logits


def _of(make: Callable[[], Any], run: Callable[[Any], torch.Tensor] = _text) -> Family:
    return Family(make, run, None, set(), {})


def _llava() -> Any:
    vision = hf.CLIPVisionConfig(**_VISION, image_size=32, patch_size=8, projection_dim=24)
    text = hf.LlamaConfig(**DECODER)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))


def _qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    vision |= {"fullatt_block_indexes": [1], "window_size": 16}
    config = hf.Qwen2_5_VLConfig(text_config={**DECODER, "rope_parameters": rope}, vision_config=vision)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _opt() -> Any:
    sizes = {name: size for name, size in DECODER.items() if name not in ("intermediate_size", "num_key_value_heads")}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32))


def _convnext() -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32, "num_labels": 3}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes, layer_scale_init_value=1.0))


_WIDE: dict[str, Any] = {**DECODER, "hidden_size": 128, "intermediate_size": 192}

_WIDE_GPT2: dict[str, Any] = {"vocab_size": 50, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4}


def _wide_unet() -> Any:
    unet: Any = diffusers.UNet2DConditionModel
    return unet(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _wide_experts() -> Any:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 32}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_WIDE, **experts))


#: By name. ``tied`` is a Llama whose head is its embedding; ``llava, new names`` has the names of modules on disk.
#: In the wide ones each matrix has entries enough for a rounding that keeps directions.
MODELS: Mapping[str, Family] = {
    **FAMILIES,
    "llama, wide": _of(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_WIDE))),
    "gpt2, wide": _of(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=64, n_embd=128, n_layer=2, n_head=4))
    ),
    "qwen3_moe, wide": _of(_wide_experts),
    "UNet, wide": _of(_wide_unet, FAMILIES["UNet"].run),
    "tied": _of(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))),
    "llava": _of(_llava),
    "llava, new names": _of(_llava),
    "qwen2_5_vl": _of(_qwen2_5_vl),
    "opt": _of(_opt),
    "convnext": _of(_convnext, _image),
}


def _to_new_names(name: str) -> str:
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


@functools.cache
def saved_model(root: Path, name: str, dtype: torch.dtype) -> Path:
    """The folder of a model of ``MODELS`` below ``root``, written when it is first asked for. Read-only.

    ``llama`` is in several files.
    """
    folder = root / "models" / f"{name}-{dtype}".replace(" ", "-").replace(",", "")
    torch.manual_seed(0)
    model: Any = MODELS[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are ones and zeros in a fresh model
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": "30KB"} if name == "llama" else {}))
    if name.endswith("new names"):
        rename(folder / "model.safetensors", _to_new_names)
    return folder


def rename(path: Path, new: Callable[[str], str]) -> None:
    """Give the tensors of a safetensors file other names. Its metadata stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({new(name): tensor for name, tensor in load_file(path).items()}, path, metadata=metadata)
