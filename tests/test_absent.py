"""Targets that the loaded model does not have: passed over where the config tells, their scales left at 1 where it does not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.errors import OptionError, SurgeryWarning
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import read_scales
from surgery.format.scales.writing import write_scales
from surgery.planning.unloaded import why_unloaded
from surgery.training.ways import Way
from tests.families import DECODER, FAMILIES
from tests.releases import known_classes, needs

# Some targets of the small models are smaller than the rank.
pytestmark = pytest.mark.filterwarnings(r"ignore:rank 4 is larger than \d+ of \d+ targets:surgery.errors.SurgeryWarning")

IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])
SHARED: dict[str, Any] = {
    **DECODER,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 50,
    "sliding_window": 8,
}


def _llama4() -> Any:
    text = {
        **DECODER,
        "intermediate_size": 24,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    }
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    vision = {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, **widths}
    vision |= {"hidden_size": 32, "intermediate_size": 128}
    return hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision))


def _qwen3_5() -> Any:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text = {**DECODER, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], **linear}
    vision = {"hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 48, "patch_size": 8, "out_hidden_size": 32}
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=text, vision_config=vision))


def _gemma3n() -> Any:
    own = {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**SHARED, **own))


def _gemma4() -> Any:
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**SHARED, global_head_dim=8))


_whole = needs("transformers", ">=5.6", "saving this model by itself")


def _save(folder: Path, make: Callable[[], Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with known_classes():
        model = make()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{name: tensor.clone() for name, tensor in tensors.items()}}, path, {"format": "pt"})


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return hf.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def _train(scales: surgery.Scales) -> None:
    generator = torch.Generator().manual_seed(1)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)


def _check_attached_is_folded(model: Any, scales: surgery.Scales, base: Path | None, tmp_path: Path) -> None:
    before = model(IDS).logits
    _train(scales)
    attached = model(IDS).logits
    assert not torch.allclose(attached, before, atol=1e-3)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out", base=base)
    assert torch.allclose(attached, _logits(tmp_path / "out"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["residual", "overlay"])
@pytest.mark.parametrize("make", [pytest.param(_llama4, marks=_whole), _qwen3_5])
def test_the_text_of_a_multimodal_checkpoint(make: Callable[[], Any], layout: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    stored = _save(folder, make)
    original = _logits(folder)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout=layout).manifest
    tower = {target.key for target in manifest.targets if "vi" in target.tensor.split("layers")[0].split("blocks")[0]}
    assert 0 < len(tower) < len(manifest.targets)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "f" if layout == "residual" else folder).eval()
    first = next(target.key for target in manifest.targets if target.key in tower)
    told = f"{len(tower)} of {len(manifest.targets)} targets are not in this model (first: '{first}')"
    with pytest.warns(SurgeryWarning, match=re.escape(told)) as caught:
        scales = surgery.attach(model, tmp_path / "f")
    assert [item.filename for item in caught] == [__file__]
    assert torch.allclose(model(IDS).logits, original, atol=1e-5)
    trained = sum(delta.numel() for delta in scales.parameters())
    assert trained == sum(target.trainable for target in manifest.targets if target.key not in tower)
    assert trained == sum(own.numel() for own in model.parameters() if own.requires_grad)
    _check_attached_is_folded(model, scales, None if layout == "residual" else folder, tmp_path)
    saved = read_scales(tmp_path / "s.safetensors", manifest)
    assert {key for key, value in saved.items() if (value == 1).all()} == tower
    folded = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(folded[target.tensor], stored[target.tensor]) for target in manifest.targets if target.key in tower)


def test_values_of_what_is_absent_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    _save(folder, _qwen3_5)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay").manifest
    given = {target.key: torch.rand(target.scales_shape) + 0.5 for target in manifest.targets}
    write_scales(tmp_path / "given.safetensors", given, manifest.fingerprint)
    with pytest.warns(SurgeryWarning, match="not in this model"):
        scales = surgery.attach(hf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "f")
    assert all((scales.values()[key] == 1).all() for key in given)
    scales.load(tmp_path / "given.safetensors")
    scales.save(tmp_path / "again.safetensors")
    again = read_scales(tmp_path / "again.safetensors", manifest)
    assert all(torch.allclose(again[key], given[key], atol=1e-7) for key in given)


@pytest.mark.filterwarnings("ignore:.*targets are not in this model")
def test_scales_from_an_orthogonal_training_keep_none_of_its_parameters(tmp_path: Path) -> None:
    """Those of targets that are absent, too: only cores can have them."""
    folder = tmp_path / "m"
    _save(folder, _qwen3_5)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay").manifest
    loaders: dict[Way, Any] = {"orthogonal": hf.Qwen3_5ForConditionalGeneration, "scales": hf.AutoModelForCausalLM}
    for train, loader in loaders.items():  # first in a model that has all targets
        scales = surgery.attach(loader.from_pretrained(folder), tmp_path / "f", train=train)
        if train == "scales":
            scales.load(tmp_path / "orthogonal.safetensors")
        scales.save(tmp_path / f"{train}.safetensors")
    saved = read_scales(tmp_path / "scales.safetensors", manifest)
    assert all(torch.equal(saved[target.key], torch.ones(target.scales_shape)) for target in manifest.targets)


def _with_prediction_layer(folder: Path) -> dict[str, torch.Tensor]:
    """DeepSeek-V3 as it lies on the hub: behind the last layer one for multi-token prediction."""
    torch.manual_seed(0)
    stored = load_file(FAMILIES["deepseek_v3"].save(folder) / "model.safetensors")
    layer = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in stored.items() if "layers.1." in name}
    layer |= {
        "model.layers.2.eh_proj.weight": torch.randn(32, 64),
        "model.layers.2.shared_head.head.weight": torch.randn(50, 32),
    }
    layer |= {"model.layers.2.embed_tokens.weight": torch.randn(50, 32), "model.layers.2.enorm.weight": torch.ones(32)}
    _add(folder, layer)
    return layer


def test_a_layer_past_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    layer = _with_prediction_layer(folder)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay").manifest
    assert layer.keys().isdisjoint(target.tensor for target in manifest.targets)
    reasons = {skipped.tensor: skipped.reason for skipped in manifest.skipped}
    assert all("past the 2 layers" in reasons[name] for name, tensor in layer.items() if tensor.ndim > 1)
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    _check_attached_is_folded(model, surgery.attach(model, tmp_path / "f"), folder, tmp_path)


def test_what_is_asked_for_is_a_target_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    _with_prediction_layer(folder)
    asked = ["*layers.2.self_attn.o_proj.weight", "*layers.[01].self_attn.*"]
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay", include=asked).manifest
    key = "model.layers.2.self_attn.o_proj.weight"
    assert key in {target.tensor for target in manifest.targets}
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.warns(SurgeryWarning, match=re.escape(f"1 of 11 targets are not in this model (first: {key!r})")):
        scales = surgery.attach(model, tmp_path / "f")
    _train(scales)
    scales.save(tmp_path / "s.safetensors")
    report = surgery.export(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "adapter")
    assert report.modules == 10
    values = read_scales(tmp_path / "s.safetensors", manifest)
    values[key][0] = 2
    with pytest.raises(OptionError, match=re.escape(f"{key!r} cannot be exported")):
        surgery.export(tmp_path / "f", values, tmp_path / "other")


def test_embeddings_that_come_with_a_layer_past_the_last(tmp_path: Path) -> None:
    """They are those of the model, as DeepSeek-V3 stores them, and yet no parameter of it."""
    folder = tmp_path / "m"
    _with_prediction_layer(folder)
    copied, embedding = "model.layers.2.embed_tokens.weight", "model.embed_tokens.weight"
    _add(folder, {copied: load_file(folder / "model.safetensors")[embedding]})
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay", include=["*embed_tokens*"]).manifest
    assert {target.tensor: target.aliases for target in manifest.targets} == {copied: [], embedding: []}
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.warns(SurgeryWarning, match=re.escape(f"1 of 2 targets are not in this model (first: {copied!r})")):
        scales = surgery.attach(model, tmp_path / "f")
    _check_attached_is_folded(model, scales, folder, tmp_path)


@pytest.mark.parametrize("make", [pytest.param(_gemma3n, marks=_whole), _gemma4])
def test_keys_and_values_of_layers_that_share_them(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    stored = _save(folder, make)
    unused = {
        f"model.layers.{layer}.self_attn.{name}.weight": stored[f"model.layers.{layer - 2}.self_attn.{name}.weight"]
        for layer in (2, 3)
        for name in ("k_proj", "v_proj")
    }
    assert unused.keys().isdisjoint(stored)
    _add(folder, unused)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay").manifest
    reasons = {skipped.tensor: skipped.reason for skipped in manifest.skipped}
    assert all("takes from another one" in reasons[name] for name in unused)
    assert {"model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.q_proj.weight"} <= {
        target.tensor for target in manifest.targets
    }
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    _check_attached_is_folded(model, surgery.attach(model, tmp_path / "f"), folder, tmp_path)


_PREDICTION = [
    "mtp.layers.0.mlp.down_proj.weight",
    "mtp.fc.weight",
    "model.mtp.layers.0.self_attn.q_proj.weight",
    "model.mtp_layers.0.mlp.up_proj.weight",
    "model.mtp_block.0.self_attn.q_proj.weight",
    "model.language_model.mtp.0.q_proj.weight",
    "mtp_dspark.layers.0.wq.weight",
]


@pytest.mark.parametrize(
    ("config", "unloaded", "loaded"),
    [
        ({}, _PREDICTION, ["model.layers.0.smtp.weight", "model.layers.7.mlp.up_proj.weight", "attempt.0.weight"]),
        (
            {"num_hidden_layers": 61},
            ["model.layers.61.mlp.experts.3.up_proj.weight", "layers.61.eh_proj.weight", "model.layers.100.q.weight"],
            ["model.layers.60.mlp.up_proj.weight", "model.decoder.layers.61.fc1.weight", "vision_tower.layers.61.q.weight"],
        ),
        ({"n_layer": 2}, ["transformer.h.2.attn.c_attn.weight", "h.3.mlp.c_fc.weight"], ["h.1.mlp.c_fc.weight"]),
        (
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 9}, "num_hidden_layers": 2},
            ["model.language_model.layers.4.q.weight", "language_model.model.layers.5.q.weight"],
            ["model.language_model.layers.3.q.weight", "model.vision_tower.layers.8.q.weight", "visual.layers.8.q.weight"],
        ),
        (
            {"thinker_config": {"text_config": {"num_hidden_layers": 4}}},
            ["thinker.model.layers.4.q.weight"],
            ["thinker.model.layers.3.q.weight", "talker.model.layers.8.q.weight", "thinker.visual.blocks.9.q.weight"],
        ),
        # A half of its own depth; and what tells nothing.
        ({"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 4}, [], ["model.layers.3.q.weight"]),
        ({"num_hidden_layers": None}, [], ["model.layers.3.q.weight"]),
        ({"num_hidden_layers": "two", "num_kv_shared_layers": 1}, [], ["model.layers.3.self_attn.k_proj.weight"]),
        (
            {"text_config": {"num_hidden_layers": 30, "num_kv_shared_layers": 10}},
            ["model.language_model.layers.20.self_attn.k_proj.weight", "model.layers.29.self_attn.v_proj.weight"],
            [
                "model.language_model.layers.19.self_attn.k_proj.weight",
                "model.language_model.layers.20.self_attn.q_proj.weight",
                "model.vision_tower.layers.25.self_attn.k_proj.weight",
            ],
        ),
    ],
)
def test_what_config_and_names_tell(config: dict[str, Any], unloaded: list[str], loaded: list[str]) -> None:
    assert all(why_unloaded(name, config) for name in unloaded)
    assert not any(why_unloaded(name, config) for name in loaded)


def test_a_model_that_lacks_most_is_refused(llama: Path, factorized: Path) -> None:
    bare = hf.AutoModelForCausalLM.from_pretrained(llama)
    assert len(Manifest.read(factorized).targets) == 14
    for layer in bare.model.layers:
        del layer.mlp.gate_proj, layer.mlp.up_proj
        del layer.self_attn.k_proj, layer.self_attn.v_proj
    with pytest.raises(OptionError, match=r"gate_proj\.weight' is not in this model, nor are 7 others of 14 targets"):
        surgery.attach(bare, factorized)
    # Small ones in number, or few large ones, are not most of a model.
    for make_smaller in (lambda layer: delattr(layer, "self_attn"), lambda layer: delattr(layer, "mlp")):
        some = hf.AutoModelForCausalLM.from_pretrained(llama)
        for layer in some.model.layers:
            make_smaller(layer)
        with pytest.warns(SurgeryWarning, match="of 14 targets are not in this model"):
            surgery.attach(some, factorized)


class _Two(nn.Module):
    def __init__(self, name: str, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24, bias=False)
        self.add_module(name, nn.Linear(width, 24, bias=False))


def test_a_model_of_ones_own_with_a_target_under_another_name_is_refused(tmp_path: Path) -> None:
    """Its weight would be the residual, without a path beside it."""
    torch.manual_seed(0)
    (tmp_path / "m").mkdir()
    stored = _Two("second").state_dict()
    save_file(stored, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text("{}")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, include=["*"])
    renamed = _Two("other")
    renamed.load_state_dict({"first.weight": stored["first.weight"], "other.weight": stored["second.weight"]})
    with pytest.raises(OptionError, match=r"(?s)'second\.weight' is not in this model.*'other\.weight' of the same shape"):
        surgery.attach(renamed, tmp_path / "f")
    without = _Two("head", 7)
    without.first.weight.data = stored["first.weight"]
    with pytest.warns(SurgeryWarning, match=r"1 of 2 targets are not in this model \(first: 'second\.weight'\)"):
        surgery.attach(without, tmp_path / "f")


@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_a_transformers_model_with_a_target_under_another_name_is_refused(layout: Any, llama: Path, tmp_path: Path) -> None:
    """Where its weight is a residual the model computes without the leading directions, which no scales would give back."""
    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name.replace("up_proj", "w3"): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("up_proj", "w3"))
    surgery.factorize(folder, tmp_path / "f", rank=4, layout=layout, include=["*_proj.weight", "*w3.weight"])
    source = tmp_path / "f" if layout == "residual" else folder
    model = hf.AutoModelForCausalLM.from_pretrained(source, key_mapping={r"mlp\.w3": "mlp.up_proj"}, dtype="auto")
    with pytest.raises(
        OptionError, match=r"(?s)'model\.layers\.0\.mlp\.w3\.weight' is in this model.*'model\.layers\.0\.mlp\.up_proj"
    ):
        surgery.attach(model, tmp_path / "f")
    assert all(parameter.requires_grad for parameter in model.parameters())
    renewed = hf.AutoModelForCausalLM.from_pretrained(source, dtype="auto")  # what has no name there has other weights
    with pytest.warns(SurgeryWarning, match=r"2 of 14 targets are not in this model \(first: 'model\.layers\.0\.mlp\.w3"):
        surgery.attach(renewed, tmp_path / "f")


class _ScalesTrainer(surgery.SaveScales, hf.Trainer):
    pass


def test_a_trainer_saves_and_resumes_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    _save(folder, _qwen3_5)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=2).manifest
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4

    def trainer(steps: int) -> _ScalesTrainer:
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "f")
        with pytest.warns(SurgeryWarning, match="not in this model"):
            scales = surgery.attach(model, tmp_path / "f")
        settings: dict[str, Any] = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True}
        arguments = hf.TrainingArguments(str(tmp_path / "out"), max_steps=steps, save_steps=1, learning_rate=0.1, **settings)
        return _ScalesTrainer(model, arguments, train_dataset=data, scales=scales)

    trainer(1).train()
    again = trainer(2)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    saved = read_scales(tmp_path / "out/checkpoint-2/scales.safetensors", manifest)
    assert {("visual" in key) for key, value in saved.items() if (value == 1).all()} == {True}
    assert all((saved[key] == 1).all() for key in saved if "visual" in key)
