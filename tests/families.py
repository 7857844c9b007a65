"""Tiny models of many families, made from configurations by transformers and diffusers, and how to run each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as hf
from torch import nn

from tests.releases import OLDER, known_classes

_IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
ENCODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
_FALCON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
    **_SPECIAL,
}


def _ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, int(torch.Size(shape).numel())).reshape(shape)


def _text(model: Any) -> torch.Tensor:
    return model(input_ids=_IDS).logits


def _text_to_text(model: Any) -> torch.Tensor:
    return model(input_ids=_IDS, decoder_input_ids=_IDS).logits


def _image(model: Any) -> torch.Tensor:
    return model(pixel_values=_ramp(1, 3, 32, 32)).logits


def _both(model: Any) -> torch.Tensor:
    return model(input_ids=_IDS, pixel_values=_ramp(1, 3, 32, 32)).logits_per_image


def _sound(model: Any) -> torch.Tensor:
    return model(input_features=_ramp(1, 8, 32), decoder_input_ids=_IDS).logits


def _unet(model: Any) -> torch.Tensor:
    return model(_ramp(1, 4, 8, 8), torch.tensor([3]), encoder_hidden_states=_ramp(1, 5, 24)).sample


def _dit(model: Any) -> torch.Tensor:
    return model(_ramp(1, 4, 8, 8), timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample


def _flux(model: Any) -> torch.Tensor:
    return model(
        hidden_states=_ramp(1, 16, 4),
        encoder_hidden_states=_ramp(1, 5, 24),
        pooled_projections=_ramp(1, 20),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([1.0]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def _controlnet(model: Any) -> torch.Tensor:
    image = _ramp(1, 3, 16, 16)
    return model(_ramp(1, 4, 8, 8), torch.tensor([3]), _ramp(1, 5, 24), controlnet_cond=image).mid_block_res_sample


def _make_controlnet() -> Any:
    model: Any = diffusers.ControlNetModel(
        in_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    nn.init.normal_(model.controlnet_mid_block.weight)  # which is zero until it is trained
    return model


def _video(model: Any) -> torch.Tensor:
    return model(
        hidden_states=_ramp(1, 4, 1, 4, 4),
        timestep=torch.tensor([3]),
        encoder_hidden_states=_ramp(1, 5, 24),
        encoder_attention_mask=torch.ones(1, 5),
        pooled_projections=_ramp(1, 20),
        guidance=torch.tensor([1000.0]),
    ).sample


def _sana(model: Any) -> torch.Tensor:
    return model(_ramp(1, 4, 8, 8), _ramp(1, 5, 24), torch.tensor([3])).sample


def _autoencoder(model: Any) -> torch.Tensor:
    return model(_ramp(1, 3, 16, 16)).sample


@dataclass(frozen=True)
class Family:
    """A model of a family.

    Attributes:
        make: a random one.
        run: its output, for an input that suits it.
        recipe: the one it should take by itself; None for families without one.
        layers: by which endings of names its targets are known, all of them.
        fused: what of it ``--split`` takes apart: ending -> names of the slices.
    """

    make: Callable[[], nn.Module]
    run: Callable[[Any], torch.Tensor]
    recipe: str | None
    layers: set[str]
    fused: dict[str, tuple[str, ...]]

    def save(self, folder: Path) -> Path:
        torch.manual_seed(0)
        with known_classes():
            model = self.make()
        model.save_pretrained(folder)  # type: ignore[operator]
        return folder

    def load(self, folder: Path) -> Any:
        """A saved model, float32."""
        return type(self.make()).from_pretrained(folder).eval()  # type: ignore[attr-defined]

    def output(self, folder: Path) -> torch.Tensor:
        """Of a saved model, float32."""
        with torch.no_grad():
            return self.run(self.load(folder))


_QKVO = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
_GATED = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
_BERT = {"query.weight", "key.weight", "value.weight", "intermediate.dense.weight", "output.dense.weight"}
_SELF = {f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")}
_QKV = ("q", "k", "v")
_HALVES = ("gate", "up")
_NEOX = {"query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight"}
_NEOX_FUSED = {"query_key_value.weight": _QKV}
_DIFFUSERS_ATTENTION = {f"to_{name}.weight" for name in ("q", "k", "v", "out.0")}
_DIFFUSERS_MLP = {"net.0.proj.weight", "net.2.weight"}
_RESNET = {"conv.weight", "conv1.weight", "conv2.weight", "conv_shortcut.weight"}

FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), _text, "llama", _QKVO | _GATED, {}),
    "mistral": Family(
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, head_dim=8)), _text, "llama", _QKVO | _GATED, {}
    ),
    "qwen3": Family(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16)), _text, "llama", _QKVO | _GATED, {}),
    "gemma3": Family(
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=16, query_pre_attn_scalar=16)),
        _text,
        "llama",
        _QKVO | _GATED,
        {},
    ),
    "phi3": Family(
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)),
        _text,
        "phi3",
        {"qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight"},
        {"qkv_proj.weight": _QKV, "gate_up_proj.weight": _HALVES},
    ),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, **_SPECIAL)),
        _text,
        "gpt2",
        {"c_attn.weight", "c_proj.weight", "c_fc.weight"},
        {"c_attn.weight": _QKV},
    ),
    "mpt": Family(
        lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, **_SPECIAL)),
        _text,
        "gpt2",
        {"Wqkv.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight"},
        {"Wqkv.weight": _QKV},
    ),
    "gpt_neox": Family(
        lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(**{name: size for name, size in DECODER.items() if name != "num_key_value_heads"})
        ),
        _text,
        "gpt_neox",
        _NEOX,
        _NEOX_FUSED,
    ),
    "bloom": Family(
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL)),
        _text,
        "gpt_neox",
        _NEOX,
        _NEOX_FUSED,
    ),
    "falcon, grouped": Family(
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True)),
        _text,
        "gpt_neox",
        _NEOX,
        _NEOX_FUSED,
    ),
    "falcon, one key head": Family(
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON, new_decoder_architecture=False, multi_query=True)),
        _text,
        "gpt_neox",
        _NEOX,
        _NEOX_FUSED,
    ),
    "bert": Family(lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), _text, "bert", _BERT, {}),
    "modernbert": Family(
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(**ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
        _text,
        "bert",
        {"Wqkv.weight", "Wo.weight", "Wi.weight"},
        {"Wqkv.weight": _QKV, "Wi.weight": _HALVES},
    ),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=50,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=1,
            )
        ),
        _text_to_text,
        "t5",
        {*(f"Attention.{name}.weight" for name in "qkvo"), "DenseReluDense.wi.weight", "DenseReluDense.wo.weight"},
        {},
    ),
    "vit": Family(lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION, num_labels=5)), _image, "vit", _BERT, {}),
    "clip": Family(
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**ENCODER, "projection_dim": 24, "bos_token_id": 1, "eos_token_id": 2},
                vision_config={**_VISION, "projection_dim": 24},
                projection_dim=24,
            )
        ),
        _both,
        "vit",
        _SELF | {"fc1.weight", "fc2.weight"},
        {},
    ),
    "whisper": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=50,
                num_mel_bins=8,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=16,
                max_target_positions=16,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
                **_SPECIAL,
            )
        ),
        _sound,
        "whisper",
        _SELF | {f"encoder_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")} | {"fc1.weight", "fc2.weight"},
        {},
    ),
    "mixtral": Family(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, **_EXPERTS)),
        _text,
        "mixtral",
        _QKVO | {"w1.weight", "w2.weight", "w3.weight"},
        {},
    ),
    "qwen2_moe": Family(
        lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
            )
        ),
        _text,
        "qwen3_moe",
        _QKVO | _GATED,
        {},
    ),
    "qwen3_moe": Family(
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**DECODER, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        _text,
        "qwen3_moe",
        _QKVO | _GATED,
        {},
    ),
    "olmoe": Family(
        lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)),
        _text,
        "qwen3_moe",
        _QKVO | _GATED,
        {},
    ),
    "deepseek_v3": Family(
        lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**DECODER, **_LATENT}, n_shared_experts=1, n_group=2)),
        _text,
        "deepseek_v3",
        {f"self_attn.{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")} | _GATED,
        {},
    ),
    "gpt_oss": Family(
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **DECODER,
                **_EXPERTS,
                head_dim=16,
                sliding_window=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        ),
        _text,
        "gpt_oss",
        _QKVO | {"experts.gate_up_proj", "experts.down_proj"},
        {"experts.gate_up_proj": _HALVES},
    ),
    "llama4": Family(
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **{**DECODER, "intermediate_size": 24},
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=4,
                num_experts_per_tok=1,
                interleave_moe_layer_step=2,
                attention_chunk_size=16,
            )
        ),
        _text,
        "llama4",
        _QKVO | _GATED | {"experts.gate_up_proj", "experts.down_proj"},
        {"experts.gate_up_proj": _HALVES},
    ),
    "granitemoe": Family(
        lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**{**DECODER, "intermediate_size": 24}, **_EXPERTS)),
        _text,
        "granitemoe",
        _QKVO | {"input_linear.weight", "output_linear.weight"},
        {"input_linear.weight": _HALVES},
    ),
    "jamba": Family(
        lambda: hf.JambaForCausalLM(
            hf.JambaConfig(
                **DECODER,
                num_experts=4,
                num_experts_per_tok=2,
                expert_layer_period=2,
                expert_layer_offset=1,
                attn_layer_period=2,
                attn_layer_offset=1,
                mamba_d_state=4,
                mamba_d_conv=3,
                mamba_expand=2,
                mamba_dt_rank=6,
                **({"use_mamba_kernels": False} if OLDER else {}),  # which releases before 5.17 do not find out
            )
        ),
        _text,
        None,
        _QKVO | _GATED | {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"},
        {},
    ),
    "mamba": Family(
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=3, time_step_rank=6, **_SPECIAL
            )
        ),
        _text,
        "mamba",
        {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"},
        {},
    ),
    "UNet": Family(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        _unet,
        "diffusion",
        {*_DIFFUSERS_ATTENTION, *_DIFFUSERS_MLP, *_RESNET, "proj_in.weight", "proj_out.weight", "time_emb_proj.weight"},
        {},
    ),
    "DiT": Family(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=2,
        ),
        _dit,
        "diffusion",
        {*_DIFFUSERS_ATTENTION, *_DIFFUSERS_MLP, "norm1.linear.weight"},
        {},
    ),
    "Flux": Family(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        _flux,
        "diffusion",
        {
            *(f"to_{name}.weight" for name in ("q", "k", "v", "out.0", "add_out")),
            *(f"add_{name}_proj.weight" for name in "qkv"),
            *("net.0.proj.weight", "net.2.weight", "proj_mlp.weight", "proj_out.weight"),
            *("norm.linear.weight", "norm1.linear.weight", "norm1_context.linear.weight"),
        },
        {},
    ),
    "ControlNet": Family(
        _make_controlnet,
        _controlnet,
        "diffusion",
        {*_DIFFUSERS_ATTENTION, *_DIFFUSERS_MLP, *_RESNET, "proj_in.weight", "proj_out.weight", "time_emb_proj.weight"},
        {},
    ),
    "HunyuanVideo": Family(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=24,
            pooled_projection_dim=20,
            rope_axes_dim=(4, 6, 6),
        ),
        _video,
        "diffusion",
        {
            *_DIFFUSERS_ATTENTION,
            *(f"refiner_blocks.0.attn.to_{name}.weight" for name in ("q", "k", "v", "out.0")),
            *(f"add_{name}_proj.weight" for name in "qkv"),
            *("to_add_out.weight", "proj_mlp.weight", "single_transformer_blocks.0.proj_out.weight"),
            *_DIFFUSERS_MLP,
            *("norm.linear.weight", "norm1.linear.weight", "norm1_context.linear.weight"),
            "refiner_blocks.0.norm_out.linear.weight",
        },
        {},
    ),
    "Sana": Family(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=24,
            sample_size=8,
        ),
        _sana,
        "diffusion",
        {*_DIFFUSERS_ATTENTION, "ff.conv_inverted.weight", "ff.conv_point.weight"},
        {},
    ),
    "VAE": Family(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=4,
        ),
        _autoencoder,
        "diffusion",
        {*_DIFFUSERS_ATTENTION, *_RESNET},
        {},
    ),
}
