"""The models of diffusers, made on the meta device, and what the module that owns a parameter says of each tensor.

So the choice of targets, which knows names, shapes and configs only, is held against the models themselves. No weight has
values, so that widths stay as the classes have them by default; layers are two of a kind. A file of diffusers has the names of
the state.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers.pytorch_utils import Conv1D

#: What a module does with a parameter.
Owner = Literal[
    "linear", "in_proj", "experts", "convolution", "transposed convolution", "depthwise convolution", "embedding", "other"
]

_LAYERS = re.compile(
    r"(num|n)_.*(layers|blocks)|num_layers|n_?layers?|depth|layers|\w+_depth|\w*layers_per_block|\w+_num_layers|mmdit_layers"
)
#: Configs for classes that cannot be made from defaults alone, and those with parts that defaults leave out.
_CONFIGS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "AudioLDM2ProjectionModel": ({"text_encoder_dim": 768, "text_encoder_1_dim": 1024, "langauge_model_dim": 768},),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": (128, 256),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "sample_size": 64,
        },
    ),
    "ControlNetModel": ({}, {"use_linear_projection": True, "transformer_layers_per_block": 2, "attention_head_dim": 64}),
    "ControlNetUnionModel": (
        {
            "conditioning_embedding_out_channels": (16, 32, 96, 256),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "DreamLiteTransformer2DModel": ({"in_channels": 320, "cross_attention_dim": 768},),
    "EasyAnimateTransformer3DModel": (
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "mmdit_layers": 1},
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "text_embed_dim_t5": 2048, "after_norm": True},
    ),
    "HiDreamImageTransformer2DModel": ({"patch_size": 2, "caption_channels": [4096, 4096], "llama_layers": [0, 1]},),
    "HunyuanDiT2DControlNetModel": ({"in_channels": 4, "patch_size": 2, "transformer_num_layers": 4},),
    "HunyuanDiT2DModel": ({"in_channels": 4, "patch_size": 2, "num_layers": 4},),
    "LatteTransformer3DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "caption_channels": 4096,
            "cross_attention_dim": 1152,
        },
    ),
    "LuminaNextDiT2DModel": ({"num_kv_heads": 8},),
    "NucleusMoEImageTransformer2DModel": ({}, {"moe_enabled": True, "num_layers": 5}),
    "OmniGenTransformer2DModel": ({"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},),
    "RFD4ProteinaAutoencoder": ({"atom37_mask": [[True] * 37] * 20, "allowed_residue_types": [[True] * 20] * 7},),
    "SD3Transformer2DModel": ({}, {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "StableAudioProjectionModel": ({"text_encoder_dim": 768, "conditioning_dim": 768, "min_value": 0, "max_value": 512},),
    "Transformer2DModel": (
        {"in_channels": 320, "cross_attention_dim": 768},
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 64,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "caption_channels": 4096,
        },
        {"num_vector_embeds": 100, "sample_size": 16, "num_embeds_ada_norm": 100, "norm_type": "ada_norm"},
    ),
    "UNet2DConditionModel": (
        {},
        {  # SDXL
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 2),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {  # DeepFloyd's
            "down_block_types": (
                "ResnetDownsampleBlock2D",
                "SimpleCrossAttnDownBlock2D",
                "KDownBlock2D",
                "KCrossAttnDownBlock2D",
            ),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj",
            "class_embed_type": "timestep",
            "attention_head_dim": 64,
        },
    ),
    "UNet2DModel": (
        {},
        {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "TransformerTemporalModel": ({"in_channels": 320},),
    "UTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_size": 64, "use_patch_pos_embed": True, "num_layers": 5},
    ),
    "UnCLIPTextProjModel": ({"time_embed_dim": 1536, "cross_attention_dim": 2048},),
    "UniDiffuserModel": (
        {"in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_size": 64, "use_patch_pos_embed": True, "num_layers": 5},
    ),
    "UniDiffuserTextDecoder": ({"prefix_length": 77, "prefix_inner_dim": 768},),
    "WanTransformer3DModel": ({}, {"image_dim": 1280, "added_kv_proj_dim": 5120}),
    "WanVACETransformer3DModel": ({"vace_layers": [0, 1]},),
    "ZImageControlNetModel": (
        {"control_layers_places": [0, 1], "control_refiner_layers_places": [0, 1], "control_in_dim": 16},
    ),
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a model's state.

    Attributes:
        name: of the tensor.
        shape: its sizes.
        owner: what the module that owns the parameter says of it.
        modules: the classes of the modules around it, the outermost first.
        in_block: whether a numbered module holds the module that owns it.
    """

    name: str
    shape: tuple[int, ...]
    owner: Owner
    modules: tuple[str, ...]
    in_block: bool


@dataclass(frozen=True, slots=True)
class Made:
    """A model without values.

    Attributes:
        name: of its class, with a number where there are several configs.
        config: its ``config.json``.
        weights: the tensors of its state.
    """

    name: str
    config: dict[str, Any]
    weights: tuple[Weight, ...]


def class_names() -> list[str]:
    """All classes of models that diffusers exports, and those of its pipelines' other parts."""
    for name in dir(diffusers):
        getattr(diffusers, name, None)  # imports its module
    found = {kind.__name__ for kind in _subclasses(ModelMixin) if kind.__module__.startswith("diffusers.")}
    return sorted(found - {"LegacyModelMixin"})


def _subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


@cache
def models_of(name: str) -> tuple[Made, ...] | str:
    """The models of a class, one for each config; or why they cannot be made."""
    kind = next(one for one in _subclasses(ModelMixin) if one.__name__ == name)
    made = []
    for number, config in enumerate(_CONFIGS.get(name, ({},))):
        try:
            model = _make(kind, config)
            saved = {**dict(model.config), "_class_name": name, "_diffusers_version": diffusers.__version__}
        except Exception as error:  # whatever a class raises that cannot be made so
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        made.append(Made(f"{name} {number}" if number else name, saved, tuple(_weights(model))))
    return tuple(made)


def _make(kind: Any, config: Mapping[str, Any]) -> Any:
    few = {
        name: 2
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if _LAYERS.fullmatch(name) and type(parameter.default) is int and parameter.default > 2
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that diffusers means to give up
        try:
            with torch.device("meta"):
                return kind(**{**few, **config})
        except RuntimeError as error:
            if "not on the expected device" not in str(error):
                raise
            # A table that is computed on the CPU, as MMAudioVAE's once torch.compile has been used in the process.
            return kind(**{**few, **config})


def _weights(model: nn.Module) -> Iterator[Weight]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        *parts, last = name.split(".")
        around = [modules[".".join(parts[:i])] for i in range(len(parts) + 1)]
        numbered = any(
            part.isdecimal()
            and isinstance(around[i], nn.ModuleList | nn.Sequential | nn.ModuleDict)
            and not _is_layer(around[i + 1])
            for i, part in enumerate(parts[:-1])
        )
        classes = tuple(type(module).__name__ for module in around)
        yield Weight(name, tuple(tensor.shape), _owner(around[-1], last, tensor), classes, numbered)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one layer with its activation, as those of a feed-forward layer are."""
    return type(module).__module__ == diffusers.models.activations.__name__


def _owner(module: Any, name: str, tensor: torch.Tensor) -> Owner:
    kind = type(module).__name__
    if "Experts" in kind and tensor.ndim == 3:
        return "experts"
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return "in_proj"
    if name != "weight":
        return "other"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if isinstance(module, nn.modules.conv._ConvNd) or (tensor.ndim > 2 and "Conv" in kind):
        return "depthwise convolution" if tensor.shape[1] == 1 else "convolution"
    return "embedding" if isinstance(module, nn.Embedding) else "other"
