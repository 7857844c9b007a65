"""Scales attached to models of many families: what is attached is what is folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

import surgery
from surgery.errors import OptionError
from surgery.format.manifest import Manifest
from surgery.names import TRAINS
from surgery.training.lowrank import LowRankPath
from surgery.training.ways import Way
from tests.families import ENCODER, FAMILIES, Family
from tests.models import files_of
from tests.releases import has, known_classes, needs


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, None) for name in FAMILIES), *((name, True) for name, family in FAMILIES.items() if family.fused)],
)
def test_attached_is_folded(name: str, split: bool | None, tmp_path: Path) -> None:
    """Untouched, not a bit changes; with random scales or cores the output is the folded model's, and all get a gradient."""
    _check(FAMILIES[name], split, tmp_path)


@needs("transformers", ">=5.15", "DBRX with experts of another size than the model")
def test_experts_whose_weights_another_module_reads(tmp_path: Path) -> None:
    """DBRX's modules of experts hold the weights, and their parent computes with them."""
    blocks = {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    }
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 50}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def make() -> Any:
        return hf.DbrxForCausalLM(hf.DbrxConfig(**sizes, **special, **blocks))

    _check(Family(make, FAMILIES["llama"].run, None, set(), {}), None, tmp_path)
    # They lie one below the other in a matrix; each is one of its own.
    found = {
        target.slice.name for target in Manifest.read(tmp_path / "f").targets if "experts" in target.tensor and target.slice
    }
    assert found == {f"expert_{i}" for i in range(4)}


_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_GROUPED: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


def _first_output(**inputs: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    return lambda model: model(**inputs)[0]


_TEXT_RUN = _first_output(input_ids=torch.tensor([[3, 5, 7, 9, 11, 13]]))
_IMAGE_RUN = _first_output(pixel_values=_IMAGE)

#: Families of which transformers cuts a fused weight, and what is fused.
CUT: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor], set[str]]] = {
    "nomic_bert": (lambda: hf.NomicBertForMaskedLM(hf.NomicBertConfig(**ENCODER)), _TEXT_RUN, {"Wqkv.weight"}),
    "gte": (lambda: hf.GteModel(hf.GteConfig(**ENCODER)), _TEXT_RUN, {"qkv_proj.weight", "up_gate_proj.weight"}),
    "jina": (lambda: hf.JinaEmbeddingsV3ForMaskedLM(hf.JinaEmbeddingsV3Config(**ENCODER)), _TEXT_RUN, {"Wqkv.weight"}),
    "dinov2, giant": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_VISION, use_swiglu_ffn=True, num_labels=5)),
        _IMAGE_RUN,
        {"weights_in.weight"},
    ),
    "dinov2, registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**_VISION, use_swiglu_ffn=True)),
        _IMAGE_RUN,
        {"weights_in.weight"},
    ),
    "hrm_text": (
        lambda: hf.HrmTextForCausalLM(hf.HrmTextConfig(**ENCODER, num_key_value_heads=4)),
        _TEXT_RUN,
        {"gqkv_proj.weight", "gate_up_proj.weight"},
    ),
    "radio": (lambda: hf.RadioModel(hf.RadioConfig(**_VISION, max_img_size=64)), _IMAGE_RUN, {"qkv.weight"}),
    "molmo2": (
        lambda: hf.Molmo2TextModel(hf.Molmo2TextConfig(**_GROUPED, head_dim=8)),
        _TEXT_RUN,
        {"att_proj.weight", "ff_proj.weight"},
    ),
    "tipsv2": (
        lambda: hf.Tipsv2VisionModel(hf.Tipsv2VisionConfig(**_VISION, use_swiglu_ffn=True)),
        _IMAGE_RUN,
        {"qkv.weight", "w12.weight"},
    ),
    "sapiens2": (lambda: hf.Sapiens2Model(hf.Sapiens2Config(**_VISION)), _IMAGE_RUN, {"w12.weight"}),
}


@pytest.mark.parametrize("name", CUT)
def test_fused_weights_that_are_cut(name: str, tmp_path: Path) -> None:
    make, run, fused = CUT[name]
    _check(Family(make, run, None, set(), {}), None, tmp_path, tolerance=1e-5)
    targets = Manifest.read(tmp_path / "f").targets
    assert {ending for ending in fused for target in targets if target.tensor.endswith(ending)} == fused


def _seq2seq(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(24)[None] % 20 + 3, decoder_input_ids=torch.tensor([[3, 5, 7, 9, 11, 13]])).logits


_T5: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}

#: Families with layers of other kinds, what is fused in them, and where layers are that their recipes do not name.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor], dict[str, tuple[str, ...]], set[str]]] = {
    "deberta, head by head": (
        lambda: hf.DebertaModel(hf.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])),
        _TEXT_RUN,
        {"attention.self.in_proj.weight": ("q", "k", "v")},
        {"attention.self.pos_proj.weight", "attention.self.pos_q_proj.weight"},
    ),
    "jetmoe, experts of attention": (
        lambda: hf.JetMoeForCausalLM(
            hf.JetMoeConfig(**{**_GROUPED, "num_hidden_layers": 2}, kv_channels=8, num_local_experts=3, num_experts_per_tok=2)
        ),
        _TEXT_RUN,
        {"mlp.input_linear.weight": ("gate", "up")},
        {"self_attention.experts.input_linear.weight", "self_attention.kv_proj.weight"},
    ),
    "longt5, local attention": (
        lambda: hf.LongT5ForConditionalGeneration(hf.LongT5Config(**_T5, local_radius=4)),
        _seq2seq,
        {},
        {"LocalSelfAttention.q.weight"},
    ),
    "minimax, linear attention": (
        lambda: hf.MiniMaxForCausalLM(
            hf.MiniMaxConfig(
                **_GROUPED,
                head_dim=8,
                num_local_experts=3,
                num_experts_per_tok=2,
                block_size=4,
                layer_types=["linear_attention", "full_attention"],
            )
        ),
        _TEXT_RUN,
        {},
        {"self_attn.qkv_proj.weight", "self_attn.output_gate.weight", "self_attn.out_proj.weight"},
    ),
    "switch, dense layers": (
        lambda: hf.SwitchTransformersForConditionalGeneration(
            hf.SwitchTransformersConfig(**_T5, num_decoder_layers=2, num_experts=2, expert_capacity=24)
        ),
        _seq2seq,
        {},
        {"mlp.wi.weight", "mlp.wo.weight"},
    ),
    "tipsv2, text": (
        lambda: hf.Tipsv2TextModel(hf.Tipsv2TextConfig(**ENCODER)),
        _TEXT_RUN,
        {"in_proj_weight": ("q", "k", "v")},
        {"out_proj.weight"},
    ),
}


_DEBERTA = needs("transformers", ">=5.23", "DeBERTa without torch.jit.script, of which torch warns,")


@pytest.mark.parametrize("name", [pytest.param(name, marks=_DEBERTA) if "deberta" in name else name for name in KINDS])
def test_layers_that_no_recipe_names(name: str, tmp_path: Path) -> None:
    make, run, fused, layers = KINDS[name]
    _check(Family(make, run, None, set(), {}), True if fused else None, tmp_path)
    targets = Manifest.read(tmp_path / "f").targets
    assert {ending for ending in layers for target in targets if target.tensor.endswith(ending)} == layers
    parts = {
        ending: tuple(dict.fromkeys(t.slice.name for t in targets if t.slice and t.tensor.endswith(ending))) for ending in fused
    }
    assert parts == fused
    surgery.factorize(tmp_path / "model", tmp_path / "r", rank=4)
    surgery.fold(tmp_path / "r", tmp_path / "r/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "model")


def _kimi() -> Any:
    text = {**FAMILIES["deepseek_v3"].make().config.to_dict(), "model_type": "deepseek_v3"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
    return hf.Kimi_K25ForConditionalGeneration(
        hf.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=32)
    )


def _rf_detr() -> Any:
    heads = dict.fromkeys(("decoder_self_attention_heads", "decoder_cross_attention_heads"), 4)
    backbone = {
        "model_type": "rf_detr_dinov2",
        "image_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "window_block_indices": [0],
        "out_indices": [1, 2],
    }
    sizes = {"d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "num_queries": 5, "group_detr": 2}
    return hf.RfDetrForObjectDetection(hf.RfDetrConfig(backbone_config=backbone, **sizes, **heads))


def _ernie() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 12, 8]}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [24, 12]}
    text = {**_GROUPED, **experts, "head_dim": 64, "rope_parameters": rope, "mlp_layer_types": ["dense", "sparse"]}
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48, "patch_size": 8}
    return hf.Ernie4_5_VLMoeForConditionalGeneration(hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision))


def _qwen3_vl() -> Any:
    text = {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    return hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


class Interleaved(hf.LlamaForCausalLM):
    """A Llama whose checkpoints have gate and up in one weight, row by row."""


def _interleaved() -> Any:
    from transformers.core_model_loading import Interleave

    halves = WeightConverter(
        ["mlp.w13.weight"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Interleave(dim=0), Chunk(dim=0)]
    )
    register_checkpoint_conversion_mapping("Interleaved", [halves], overwrite=True)
    return Interleaved(hf.LlamaConfig(**_GROUPED))


class Turned(hf.Qwen3MoeForCausalLM):
    """A Qwen3-MoE whose checkpoints have stacks of experts and a linear weight transposed."""


def _turned() -> Any:
    experts = [
        WeightConverter([f"experts.turned_{part}"], [f"experts.{part}_proj"], operations=[Transpose(1, 2)])
        for part in ("gate_up", "down")
    ]
    linear = WeightConverter(["self_attn.turned"], ["self_attn.o_proj.weight"], operations=[Transpose(0, 1)])
    register_checkpoint_conversion_mapping("Turned", [*experts, linear], overwrite=True)
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Turned(hf.Qwen3MoeConfig(**_GROUPED, **sizes))


@pytest.mark.parametrize("train", ["scales", "core", "orthogonal"])
@pytest.mark.parametrize(
    ("make", "include", "cut"),
    [
        (_kimi, ["*wqkv*", "*fc*"], "wqkv"),
        (_rf_detr, ["*in_proj_weight"], "in_proj"),
        (_ernie, ["*experts*", "*qkv*"], "experts"),
        (_qwen3_vl, ["*experts*", "*qkv*"], "experts"),
        pytest.param(_turned, ["*turned*"], "turned", marks=needs("transformers", ">=5.10", "a conversion of a class")),
        pytest.param(_interleaved, ["*w13*", "*down*"], "w13", marks=has("transformers.core_model_loading", "Interleave")),
    ],
    ids=["kimi, in heads for RoPE", "rf_detr", "ernie, text and image", "qwen3_vl, transposed", "turned", "interleaved"],
)
def test_every_weight_is_what_fold_makes_of_it(
    make: Callable[[], Any], include: list[str], cut: str, train: Way, tmp_path: Path
) -> None:
    """Also in towers that no input reaches: the low-rank path beside each parameter, and the parameter of the folded model."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    with known_classes():
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay", include=include).manifest
    assert any(cut in target.tensor for target in manifest.targets)
    model = type(model).from_pretrained(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scales = surgery.attach(model, tmp_path / "f", train=train)
    generator = torch.Generator().manual_seed(1)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out", base=folder)
    folded = dict(type(model).from_pretrained(tmp_path / "out").named_parameters())
    paths: dict[str, LowRankPath] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankPath):
            owner, _, own = name.rpartition(".")
            paths[f"{owner}.{own.removeprefix('surgery_scale').removeprefix('_') or 'weight'}"] = module
    if make is _turned and train != "scales":
        assert all(path.turned is not None for path in paths.values())
    assert paths.keys() == {name for name, value in before.items() if not torch.equal(value, folded[name])}
    for name, path in paths.items():
        change = path.inner().after(path.left) @ path.right.mT
        assert torch.allclose(before[name] + change.reshape(before[name].shape), folded[name], atol=1e-6), name


class Joined(hf.Qwen3MoeForCausalLM):
    """A Qwen3-MoE whose checkpoints have each half of the experts' gate_up_proj in a tensor of its own."""


@needs("transformers", ">=5.10", "a conversion that is registered for a class")
@pytest.mark.parametrize("dim", [0, 1])
def test_halves_that_are_not_seen_in_the_same_way_are_refused(dim: int, tmp_path: Path) -> None:
    register_checkpoint_conversion_mapping(
        "Joined",
        [
            WeightConverter(
                ["experts.a.weight", "experts.b.weight"], ["experts.gate_up_proj"], operations=[Concatenate(dim=dim)]
            )
        ],
        overwrite=True,
    )
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    model = Joined(hf.Qwen3MoeConfig(**_GROUPED, **sizes))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        halves = tensors.pop(name).chunk(2, dim)
        tensors |= {
            name.replace("gate_up_proj", f"{part}.weight"): half.clone() for part, half in zip("ab", halves, strict=True)
        }
    model.config.save_pretrained(tmp_path / "m")
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    rules = [
        f'[[rules]]\nmatch = "*.{part}.weight"\nview = "{view}"\n' for part, view in (("a", "stack"), ("b", "convolution"))
    ]
    (tmp_path / "r.toml").write_text("\n".join(rules))
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2, layout="overlay", recipe=str(tmp_path / "r.toml"))
    loaded = Joined.from_pretrained(tmp_path / "m")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(OptionError, match="factors do not fit" if dim == 0 else "in a way that scales cannot follow"):
        surgery.attach(loaded, tmp_path / "f")


def _check(family: Family, split: bool | None, tmp_path: Path, tolerance: float = 1e-4) -> None:
    folder = family.save(tmp_path / "model")
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay", split=split).manifest
    model = family.load(folder)
    with torch.no_grad():
        before = family.run(model)
    for train in TRAINS:
        scales = surgery.attach(model, tmp_path / "f", train=train)
        trainable = {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.requires_grad}
        assert sum(trainable.values()) == sum(target.numbers_of(train) for target in manifest.targets)
        untouched = family.run(model)
        assert torch.equal(untouched, before)

        generator = torch.Generator().manual_seed(1)
        for delta in scales.parameters():
            delta.data = 0.5 * torch.randn(delta.shape, generator=generator)
        attached = family.run(model)
        attached.float().square().mean().backward()
        unused = {key for key, delta in zip(scales.values(), scales.parameters(), strict=True) if delta.grad is None}
        assert unused == set()
        scales.save(tmp_path / "s.safetensors")
        surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / train, base=folder)
        folded = family.output(tmp_path / train)
        assert not torch.allclose(folded, before, rtol=1e-3, atol=1e-4)
        assert torch.allclose(attached, folded, rtol=10 * tolerance, atol=tolerance * folded.abs().max().item())
        scales.detach()
