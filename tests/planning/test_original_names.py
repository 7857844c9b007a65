"""Checkpoints as their authors' repositories name them, which no class of transformers or diffusers has, without a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.planning.recipes import find_recipe
from surgery.planning.targets import Model, Target, choose
from surgery.quantized.recognize import Quantization
from tests.models import files_of

Module = Callable[[], nn.Module]

BLOCK = "a target"
OUTSIDE = "outside the transformer blocks"
EMBEDDING = "an embedding"
HEAD = "an output head"
ROUTER = "a router"
NORM = "a vector (norm, bias)"
CONVOLUTION = "a convolution"
DEPTHWISE = "a depthwise convolution"
RAW = "no weight of a linear layer"


def _linear(inputs: int, outputs: int) -> Module:
    return lambda: nn.Linear(inputs, outputs, bias=False)


def _convolution(inputs: int, outputs: int, *kernel: int) -> Module:
    return lambda: (nn.Conv2d if len(kernel) == 2 else nn.Conv3d)(inputs, outputs, kernel, bias=False)  # type: ignore[arg-type]


def _depthwise(channels: int, size: int) -> Module:
    return lambda: nn.Conv2d(channels, channels, size, groups=channels, bias=False)


def _embedding(count: int, width: int) -> Module:
    return lambda: nn.Embedding(count, width)


def _attention(width: int) -> Module:
    return lambda: nn.MultiheadAttention(width, 8, bias=False)


def _norm(width: int) -> Module:
    return lambda: nn.LayerNorm(width, bias=False)


class _Raw(nn.Module):
    """A module with a parameter of its own."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))


def _raw(name: str, *shape: int) -> Module:
    return lambda: _Raw(name, *shape)


D = 768
_SQUARE, _UP, _DOWN, _QKV, _SIX = _linear(D, D), _linear(D, 4 * D), _linear(4 * D, D), _linear(D, 3 * D), _linear(D, 6 * D)

#: Layout -> module -> what it is, and what becomes of all its weights.
LAYOUTS: dict[str, dict[str, tuple[Module, str]]] = {
    "open_clip": {
        "visual.conv1": (_convolution(3, D, 16, 16), CONVOLUTION),
        "visual.ln_pre": (_norm(D), NORM),
        "visual.transformer.resblocks.0.attn": (_attention(D), BLOCK),
        "visual.transformer.resblocks.0.mlp.c_fc": (_UP, BLOCK),
        "visual.transformer.resblocks.0.mlp.c_proj": (_DOWN, BLOCK),
        "visual.attn_pool.attn": (_attention(D), OUTSIDE),
        "visual": (_raw("proj", D, 512), RAW),
        "transformer.resblocks.11.attn": (_attention(512), BLOCK),
        "transformer.resblocks.11.mlp.c_fc": (_linear(512, 2048), BLOCK),
        "token_embedding": (_embedding(49408, 512), EMBEDDING),
        "text_decoder.cross_attn.3.attn": (_attention(512), BLOCK),
        "text.transformer.encoder.layer.0.attention.self.query": (_SQUARE, BLOCK),
        "text.transformer.embeddings.word_embeddings": (_embedding(30522, D), EMBEDDING),
        "text.proj.0": (_SQUARE, OUTSIDE),
    },
    "open_clip with a tower of timm": {
        "visual.trunk.patch_embed.proj": (_convolution(3, D, 16, 16), EMBEDDING),
        "visual.trunk.blocks.0.attn.qkv": (_QKV, BLOCK),
        "visual.trunk.blocks.0.attn.q_proj": (_SQUARE, BLOCK),
        "visual.trunk.blocks.0.mlp.fc1_g": (_UP, BLOCK),
        "visual.trunk.stages.2.blocks.8.conv_dw": (_depthwise(D, 7), DEPTHWISE),
        "visual.trunk.stages.2.blocks.8.mlp.fc1": (_UP, BLOCK),
        "visual.head.proj": (_SQUARE, HEAD),
    },
    "timm": {
        "patch_embed.proj": (_convolution(3, D, 16, 16), EMBEDDING),
        "blocks.0.norm1": (_norm(D), NORM),
        "blocks.0.attn.qkv": (_QKV, BLOCK),
        "blocks.0.attn.proj": (_SQUARE, BLOCK),
        "blocks.0.mlp.fc1": (_UP, BLOCK),
        "blocks.0.mlp_tokens.fc1": (_linear(196, 384), BLOCK),
        "blocks_token_only.0.attn.q": (_SQUARE, BLOCK),
        "cls_attn_blocks.1.attn.qkv": (_QKV, BLOCK),
        "layers.1.downsample.reduction": (_linear(4 * D, 2 * D), BLOCK),
        "layers.1.blocks.0.attn": (_raw("relative_position_bias_table", 169, 24), RAW),
        "stages.0.blocks.0.attn_block.attn.qkv": (_QKV, BLOCK),
        "stages.0.blocks.0.conv.conv2_kxk": (_depthwise(D, 3), DEPTHWISE),
        "layer1.0.conv1": (_convolution(64, 64, 3, 3), CONVOLUTION),
        "attn_pool.mlp.fc1": (_UP, OUTSIDE),
        "head": (_linear(D, 1000), HEAD),
        "head_dist": (_linear(D, 1000), OUTSIDE),
    },
    "DINOv2, blocks in chunks": {
        "blocks.0.3.attn.qkv": (_QKV, BLOCK),
        "blocks.0.3.mlp.w12": (_UP, BLOCK),
        "blocks.0.3.ls1": (_raw("gamma", D), NORM),
        "dino_head.mlp.0": (_SQUARE, HEAD),
    },
    "SAM": {
        "image_encoder.patch_embed.proj": (_convolution(3, D, 16, 16), EMBEDDING),
        "image_encoder.blocks.0.attn.qkv": (_QKV, BLOCK),
        "image_encoder.blocks.0.attn": (_raw("rel_pos_h", 27, 64), RAW),
        "image_encoder.blocks.0.mlp.lin1": (_UP, BLOCK),
        "image_encoder.neck.0": (_convolution(D, 256, 1, 1), CONVOLUTION),
        "prompt_encoder.point_embeddings.0": (_embedding(1, 256), EMBEDDING),
        "mask_decoder.transformer.layers.0.self_attn.q_proj": (_linear(256, 256), BLOCK),
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.out_proj": (_linear(128, 256), BLOCK),
        "mask_decoder.transformer.layers.0.mlp.lin2": (_linear(2048, 256), BLOCK),
        "mask_decoder.transformer.final_attn_token_to_image.q_proj": (_linear(256, 128), OUTSIDE),
        "mask_decoder.output_hypernetworks_mlps.0.layers.0": (_linear(256, 256), HEAD),
        "mask_decoder.iou_prediction_head.layers.0": (_linear(256, 256), HEAD),
    },
    "torch.nn.Transformer": {
        "encoder.layers.0.self_attn": (_attention(D), BLOCK),
        "encoder.layers.0.linear1": (_UP, BLOCK),
        "decoder.layers.0.multihead_attn": (_attention(D), BLOCK),
        "decoder.layers.0.norm3": (_norm(D), NORM),
    },
    "Stable Diffusion": {
        "model.diffusion_model.time_embed.0": (_linear(320, 1280), EMBEDDING),
        "model.diffusion_model.label_emb.0.0": (_linear(2816, 1280), EMBEDDING),
        "model.diffusion_model.input_blocks.0.0": (_convolution(4, 320, 3, 3), CONVOLUTION),
        "model.diffusion_model.input_blocks.1.0.in_layers.2": (_convolution(320, 320, 3, 3), CONVOLUTION),
        "model.diffusion_model.input_blocks.1.0.emb_layers.1": (_linear(1280, 320), BLOCK),
        "model.diffusion_model.input_blocks.1.1.proj_in": (_convolution(320, 320, 1, 1), CONVOLUTION),
        "model.diffusion_model.input_blocks.4.1.proj_in": (_linear(640, 640), BLOCK),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (_linear(320, 320), BLOCK),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj": (_linear(1280, 10240), BLOCK),
        "model.diffusion_model.output_blocks.0.0.skip_connection": (_convolution(2560, 1280, 1, 1), CONVOLUTION),
        "model.diffusion_model.out.2": (_convolution(320, 4, 3, 3), CONVOLUTION),
        "first_stage_model.decoder.up.0.block.0.conv1": (_convolution(256, 128, 3, 3), CONVOLUTION),
        "first_stage_model.decoder.mid.attn_1.q": (_convolution(512, 512, 1, 1), CONVOLUTION),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj": (_SQUARE, BLOCK),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1": (_UP, BLOCK),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding": (_embedding(49408, D), EMBEDDING),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn": (_attention(1280), BLOCK),
        "control_model.input_hint_block.2": (_convolution(16, 16, 3, 3), CONVOLUTION),
        "control_model.zero_convs.1.0": (_convolution(320, 320, 1, 1), CONVOLUTION),
        "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k": (_linear(D, 320), BLOCK),
    },
    "Stable Diffusion 3": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv": (_QKV, BLOCK),
        "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1": (_UP, BLOCK),
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1": (_SIX, BLOCK),
        "model.diffusion_model.context_embedder": (_linear(4096, D), EMBEDDING),
        "model.diffusion_model.y_embedder.mlp.0": (_linear(2048, D), EMBEDDING),
        "model.diffusion_model.x_embedder.proj": (_convolution(16, D, 2, 2), EMBEDDING),
        "model.diffusion_model.final_layer.linear": (_linear(D, 64), OUTSIDE),
        "model.diffusion_model.final_layer.adaLN_modulation.1": (_linear(D, 2 * D), OUTSIDE),
    },
    "Flux": {
        "img_in": (_linear(64, D), OUTSIDE),
        "txt_in": (_linear(4096, D), OUTSIDE),
        "time_in.in_layer": (_linear(256, D), OUTSIDE),
        "double_blocks.0.img_attn.qkv": (_QKV, BLOCK),
        "double_blocks.0.txt_attn.proj": (_SQUARE, BLOCK),
        "double_blocks.0.img_attn.norm.query_norm": (_raw("scale", 128), NORM),
        "double_blocks.0.img_mlp.0": (_UP, BLOCK),
        "double_blocks.0.txt_mlp.2": (_DOWN, BLOCK),
        "double_blocks.0.img_mod.lin": (_SIX, BLOCK),
        "single_blocks.0.linear1": (_linear(D, 7 * D), BLOCK),
        "single_blocks.0.modulation.lin": (_QKV, BLOCK),
        "final_layer.linear": (_linear(D, 64), OUTSIDE),
        "final_layer.adaLN_modulation.1": (_linear(D, 2 * D), OUTSIDE),
        "distilled_guidance_layer.layers.0.in_layer": (_SQUARE, BLOCK),
    },
    "Wan": {
        "patch_embedding": (_convolution(16, D, 1, 2, 2), EMBEDDING),
        "text_embedding.0": (_linear(4096, D), EMBEDDING),
        "time_embedding.2": (_SQUARE, EMBEDDING),
        "time_projection.1": (_SIX, OUTSIDE),
        "img_emb.proj.1": (_linear(1280, 1280), EMBEDDING),
        "blocks.0.self_attn.q": (_SQUARE, BLOCK),
        "blocks.0.cross_attn.k_img": (_SQUARE, BLOCK),
        "blocks.0.ffn.0": (_UP, BLOCK),
        "blocks.0": (_raw("modulation", 1, 6, D), RAW),
        "vace_blocks.0.before_proj": (_SQUARE, BLOCK),
        "head.head": (_linear(D, 64), HEAD),
    },
    "HunyuanVideo": {
        "img_in.proj": (_convolution(16, D, 1, 2, 2), CONVOLUTION),
        "txt_in.input_embedder": (_linear(4096, D), EMBEDDING),
        "txt_in.t_embedder.mlp.0": (_linear(256, D), EMBEDDING),
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (_QKV, BLOCK),
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1": (_linear(D, 2 * D), BLOCK),
        "time_in.mlp.0": (_linear(256, D), OUTSIDE),
        "double_blocks.0.img_attn_qkv": (_QKV, BLOCK),
        "double_blocks.0.txt_mlp.fc2": (_DOWN, BLOCK),
        "double_blocks.0.img_mod.linear": (_SIX, BLOCK),
        "single_blocks.0.linear2": (_linear(5 * D, D), BLOCK),
    },
    "PixArt, DiT": {
        "x_embedder.proj": (_convolution(4, D, 2, 2), EMBEDDING),
        "y_embedder.y_proj.fc1": (_linear(4096, D), EMBEDDING),
        "y_embedder.embedding_table": (_embedding(1001, D), EMBEDDING),
        "t_block.1": (_SIX, OUTSIDE),
        "blocks.0.attn.qkv": (_QKV, BLOCK),
        "blocks.0.cross_attn.kv_linear": (_linear(D, 2 * D), BLOCK),
        "blocks.0.adaLN_modulation.1": (_SIX, BLOCK),
        "blocks.0": (_raw("scale_shift_table", 6, D), RAW),
    },
    "CogVideoX": {
        "model.diffusion_model.transformer.layers.0.attention.query_key_value": (_QKV, BLOCK),
        "model.diffusion_model.transformer.layers.0.mlp.dense_h_to_4h": (_UP, BLOCK),
        "model.diffusion_model.mixins.adaln_layer.adaLN_modulations.0.1": (_linear(512, 12 * D), BLOCK),
        "model.diffusion_model.mixins.patch_embed.text_proj": (_linear(4096, D), EMBEDDING),
        "model.diffusion_model.mixins.final_layer.linear": (_linear(D, 64), OUTSIDE),
    },
    "Mochi, AuraFlow, Lumina": {
        "blocks.0.attn.qkv_x": (_QKV, BLOCK),
        "blocks.0.mod_x": (_linear(D, 4 * D), BLOCK),
        "blocks.0.mlp_x.w1": (_UP, BLOCK),
        "t5_y_embedder.to_kv": (_linear(4096, 2 * 4096), EMBEDDING),
        "double_layers.0.attn.w1q": (_SQUARE, BLOCK),
        "double_layers.0.mlpX.c_fc1": (_UP, BLOCK),
        "double_layers.0.modC.1": (_SIX, BLOCK),
        "cond_seq_linear": (_linear(2048, D), OUTSIDE),
        "modF.1": (_linear(D, 2 * D), OUTSIDE),
        "noise_refiner.0.attention.qkv": (_QKV, BLOCK),
        "layers.0.feed_forward.w1": (_UP, BLOCK),
        "cap_embedder.1": (_linear(2304, D), EMBEDDING),
    },
    "Cosmos": {
        "net.x_embedder.proj.1": (_linear(68, D), EMBEDDING),
        "net.t_embedder.1.linear_1": (_SQUARE, EMBEDDING),
        "net.blocks.block0.blocks.0.block.attn.to_q.0": (_SQUARE, BLOCK),
        "net.blocks.block0.blocks.0.adaLN_modulation.1": (_linear(D, 256), BLOCK),
        "net.final_layer.adaLN_modulation.1": (_linear(D, 256), OUTSIDE),
    },
    "Moshi": {
        "transformer.layers.0.self_attn": (_attention(D), BLOCK),
        "transformer.layers.0.gating.linear_in": (_UP, BLOCK),
        "transformer.layers.0.gating.linear_out": (_DOWN, BLOCK),
        "depformer.layers.0.gating.3.linear_out": (_DOWN, BLOCK),
        "depformer.layers.0.self_attn.in_projs.0": (_QKV, BLOCK),
        "depformer_in.0": (_SQUARE, OUTSIDE),
        "text_linear": (_linear(D, 32000), OUTSIDE),
    },
    "Medusa": {
        "medusa_head.0.0.linear": (_SQUARE, HEAD),
        "medusa_head.0.1": (_linear(D, 32000), HEAD),
    },
    "language models and Whisper": {
        "tok_embeddings": (_embedding(32000, D), EMBEDDING),
        "layers.0.attention.wq": (_SQUARE, BLOCK),
        "layers.0.feed_forward.w2": (_DOWN, BLOCK),
        "output": (_linear(D, 32000), OUTSIDE),
        "layers.3.ffn.gate": (_linear(D, 8), ROUTER),
        "layers.3.ffn.experts.7.w1": (_UP, BLOCK),
        "layers.3.ffn.experts": (_raw("router_weight", D, 8), ROUTER),
        "layers.3.ffn.shared_experts.w2": (_DOWN, BLOCK),
        "encoder.conv2": (lambda: nn.Conv1d(D, D, 3, bias=False), CONVOLUTION),
        "encoder.blocks.0.attn.query": (_SQUARE, BLOCK),
        "encoder.blocks.0.mlp.0": (_UP, BLOCK),
        "decoder.blocks.0.cross_attn.key": (_SQUARE, BLOCK),
        "decoder.token_embedding": (_embedding(51865, D), EMBEDDING),
    },
}
#: Convolutions of "Stable Diffusion" that are numbered as blocks are, and are those before and after them.
OUTER = ("input_blocks.0.0", "zero_convs.1.0")


def _fates(name: str, shape: tuple[int, ...], recipe: str | None = None) -> set[str]:
    model = Model({}, find_recipe(recipe) if recipe else None, Quantization())
    fates = choose(TensorEntry(name, "F16", shape, 0, 0), "", Options(rank=2), model)
    return {BLOCK if isinstance(fate, Target) else fate.reason for fate in fates}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_by_name_alone(layout: str) -> None:
    wrong = {}
    for path, (make, expected) in LAYOUTS[layout].items():
        with torch.device("meta"):
            module = make()
        # The table itself is held against the module: what is a target is a linear layer, what has another reason is not.
        assert isinstance(module, nn.Linear | nn.MultiheadAttention) or expected != BLOCK
        assert isinstance(module, nn.modules.conv._ConvNd) or expected not in (CONVOLUTION, DEPTHWISE)
        for name, parameter in module.named_parameters(path):
            if (found := _fates(name, tuple(parameter.shape))) != {expected}:
                wrong[name] = found
    assert not wrong


def test_the_recipe_takes_convolutions_of_blocks_by_original_names() -> None:
    for path, (make, expected) in LAYOUTS["Stable Diffusion"].items():
        with torch.device("meta"):
            module = make()
        for name, parameter in module.named_parameters(path):
            inside = any(part.isdecimal() for part in path.split(".")[:-1]) and not path.endswith(OUTER)
            taken = expected == BLOCK or (expected == CONVOLUTION and inside)
            assert (_fates(name, tuple(parameter.shape), "diffusion") == {BLOCK}) == taken, name


def test_one_file_of_several_models_there_and_back(tmp_path: Path) -> None:
    """As single-file checkpoints are: UNet, autoencoder and text encoder in one, with no config."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (12, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (12, 8, 3, 3),
        "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (12, 16),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (12, 12),
        "model.diffusion_model.time_embed.0.weight": (16, 8),
        "first_stage_model.decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    }
    (tmp_path / "m").mkdir()
    tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    attention = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    linear = {name for name in shapes if ".emb_layers." in name or ".attn1." in name}
    assert {target.key for target in surgery.plan(tmp_path / "m", rank=2).targets} == {
        *linear,
        *(f"{attention}[{part}]" for part in "qkv"),
    }
    outside = {"model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.time_embed.0.weight"}
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2, recipe="diffusion").manifest
    assert {target.tensor for target in manifest.targets} == shapes.keys() - outside
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "m")


class _Decoder(nn.Module):
    """Blocks as those of vocoders: a transposed convolution, which stores its weight as [in, out, kernel], and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        block = {"up": nn.ConvTranspose1d(6, 8, 4, 2, 1), "conv": nn.Conv1d(8, 6, 3, padding=1)}
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (block,) = self.blocks
        return block["conv"](torch.tanh(block["up"](x)))  # type: ignore[index]


def test_a_transposed_convolution_is_attached_as_it_is_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Decoder()
    (tmp_path / "m").mkdir()
    save_file(model.state_dict(), tmp_path / "m/model.safetensors")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2, recipe="diffusion", layout="overlay")
    x = torch.randn(1, 6, 5)
    before = model(x).detach()
    scales = surgery.attach(model, tmp_path / "f")
    assert set(scales.values()) == {"blocks.0.up.weight", "blocks.0.conv.weight"}
    assert torch.equal(model(x), before)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "o", base=tmp_path / "m")
    folded = _Decoder()
    folded.load_state_dict(load_file(tmp_path / "o/model.safetensors"))
    assert not torch.allclose(folded(x), before, rtol=1e-2, atol=1e-2)
    assert torch.allclose(model(x), folded(x), rtol=1e-4, atol=1e-5)
