"""Quantized models from the hub's layouts to folded ones: planned, factorized, attached to as trainers load them, folded."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgery
from surgery.names import Train
from tests.models import files_of, planned, tensors_of
from tests.quantized.hub_models import LAYOUTS, dequantized, save_dense
from tests.quantized.served import RANK, Made
from tests.releases import needs

IDS = (torch.arange(24) * 7 % 90)[None]

needs_compressed = needs("compressed-tensors", ">=0.20", "loading its models")
#: Loaded right by transformers. It has no quantizer for modelopt's, leaves out the global scales of experts in NVFP4, and does
#: not load FP8 blocks that do not divide a weight.
LOADED = [
    pytest.param(name, marks=needs_compressed if layout.described.get("quant_method") == "compressed-tensors" else ())
    for name, layout in LAYOUTS.items()
    if not re.search("modelopt|ragged|nvfp4_mixture", name)
]
#: How far a weight may be from what it should be, relative, by what it is stored in; in four bits it is more.
COARSE = {torch.bfloat16: 0.01, torch.int8: 0.03, torch.float8_e4m3fn: 0.1}


each = pytest.mark.parametrize("made", LAYOUTS, indirect=True)
each_loaded = pytest.mark.parametrize("made", LOADED, indirect=True)
pytestmark = [
    needs("transformers", ">=5.23", "loading these formats dequantized on a CPU"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # a name that PEFT uses
]


def loaded(made: Made, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """As a trainer on a CPU loads it. What is not quantized stays in bfloat16 there, whatever dtype is asked for."""
    method = made.layout.described.get("quant_method")
    kinds = {
        "fp8": transformers.FineGrainedFP8Config,
        "mxfp4": transformers.Mxfp4Config,
        "compressed-tensors": transformers.CompressedTensorsConfig,
    }
    options = {"quantization_config": kinds[method](dequantize=True)} if _is_quantized(folder or made.model) else {}
    kind = type(made.layout.model())
    return kind.from_pretrained(folder or made.model, dtype=dtype, **options).to(dtype)


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def exact(made: Made, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    """The model with these weights, in float64."""
    save_dense(folder, made.model, tensors)
    # Grouped products of experts are there for fewer digits only.
    kind = type(made.layout.model())
    return kind.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far apart, relative, in Frobenius norms."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-12))


@each
def test_all_linear_layers_of_blocks_are_reached(made: Made) -> None:
    plan = planned(made.model, rank=RANK)
    targets = {target.tensor for target in plan.targets}
    assert plan.reached == 1
    layer = re.compile(
        r"(.*\.)?layers\.[01]\..*(self_attn\.\w+_proj(_with_mqa)?|mlp\.\w+_proj|experts\.(\d+\.)?\w+_proj)(\.weight)?"
        r"|vision_tower\.encoder\.blocks\..*(wo|wqkv|fc\d)\.weight"
    )
    assert targets == {name for name, one in made.numbers.items() if layer.fullmatch(name) and one.ndim > 1}
    # Every tensor of the files is there once: as it is, or by the weight that its numbers are of.
    ends = "_(packed|blocks)$"
    named = [re.sub(ends, "", name) for name in tensors_of(made.model)]
    assert sorted(named) == sorted([*targets, *(skipped.tensor for skipped in plan.skipped)])
    assert surgery.verify(made.factorized, base=made.model).ok


@each
def test_untouched_scales_fold_to_the_bytes_of_the_source(made: Made) -> None:
    out = made.folder / "untouched"
    surgery.fold(made.factorized, made.factorized / "surgery/scales.safetensors", out, base=made.model)
    before = files_of(made.model)
    assert {name: one for name, one in files_of(out).items() if name in before} == before


@each_loaded
def test_scales_on_the_model_as_it_is_loaded(made: Made, tmp_path: Path) -> None:
    model = loaded(made)
    before = logits(model)
    # compressed-tensors' numbers are rounded to bfloat16 when they are unpacked.
    tolerance = 1e-2 if made.layout.described["quant_method"] == "compressed-tensors" else 1e-5
    assert off(before, logits(exact(made, made.numbers, tmp_path / "numbers"))) < tolerance
    scales = surgery.attach(model, made.factorized)
    assert set(scales.values()) == set(made.scales)
    assert torch.equal(logits(model), before)
    scales.load(made.saved)
    expected = logits(exact(made, made.wanted, tmp_path / "wanted"))
    assert off(logits(model), expected) < tolerance
    assert off(before, expected) > 0.05


@pytest.mark.parametrize("excluded", ["*experts.1.*", "*experts.0.up_proj*"])
@pytest.mark.parametrize("made", ["kimi_k2"], indirect=True)
def test_scales_on_some_of_the_experts(made: Made, excluded: str, tmp_path: Path) -> None:
    """Others that lie packed in the checkpoint keep their places in the stacks that a model has of them."""
    surgery.factorize(made.model, tmp_path / "f", rank=RANK, exclude=(excluded,), layout="overlay")
    some = Made(made.name, tmp_path)
    (tmp_path / "m").symlink_to(made.model)
    assert 0 < len(some.updates) < len(made.updates)
    model = loaded(made)
    surgery.attach(model, some.factorized).load(some.saved)
    assert off(logits(model), logits(exact(made, some.wanted, tmp_path / "wanted"))) < 1e-2


@each
def test_folded_weights_hold_what_was_trained_as_their_format_can(made: Made) -> None:
    out, report = made.folded("folded")
    before, after = tensors_of(made.model), tensors_of(out)
    assert {name: (one.dtype, one.shape) for name, one in after.items()} == {
        name: (one.dtype, one.shape) for name, one in before.items()
    }
    for name, one in before.items():
        if not any(name.startswith(target.removesuffix(".weight")) for target in made.updates):
            assert torch.equal(one.view(torch.uint8), after[name].view(torch.uint8)), name
    numbers = dequantized(out)
    arrived = asked = 0.0
    for name, update in made.updates.items():
        most = COARSE.get(before[name].dtype, 0.2) if name in before else 0.2
        assert off(numbers[name], made.wanted[name]) < most, name
        arrived += float(((numbers[name] - made.numbers[name]) * update).sum())
        asked += float(update.square().sum())
    assert report.kept == pytest.approx(arrived / asked, abs=1e-3)
    assert report.kept > 0.97
    assert _is_quantized(out) == bool(made.layout.described)


@each_loaded
def test_a_folded_model_is_loaded_as_what_it_holds(made: Made, tmp_path: Path) -> None:
    out, _ = made.folded("folded")
    tolerance = 1e-2 if made.layout.described["quant_method"] == "compressed-tensors" else 1e-5
    found = logits(loaded(made, out))
    assert off(found, logits(exact(made, dequantized(out), tmp_path / "numbers"))) < tolerance
    # Nearer to what was trained than the model was before.
    trained = logits(exact(made, made.wanted, tmp_path / "wanted"))
    assert off(found, trained) < off(logits(loaded(made)), trained)


@each
def test_a_dequantized_fold_is_what_was_trained(made: Made, tmp_path: Path) -> None:
    out, _ = made.folded("dense", dequantize=True)
    assert not _is_quantized(out)
    tensors = tensors_of(out)
    for name, wanted in made.wanted.items():
        assert tensors[name].dtype == torch.bfloat16
        # Rounding in the directions of an update moves small numbers by more than one step of theirs.
        step = 2**-7 * float(wanted.abs().max())
        assert torch.allclose(tensors[name].double(), wanted, rtol=2**-6, atol=step), name
        assert off(tensors[name], wanted) < 2**-8, name
    left = tensors.keys() - made.wanted.keys()
    assert all(re.search(r"\.[kv]_scale$", name) for name in left), left
    kind = type(made.layout.model())
    model = kind.from_pretrained(out, dtype=torch.float32)
    assert off(logits(model), logits(exact(made, made.wanted, tmp_path / "wanted"))) < 0.02


@pytest.mark.parametrize("made", [pytest.param("nvfp4_mixture", marks=needs_compressed), "fp8_llama_modelopt"], indirect=True)
def test_what_transformers_loads_wrongly_is_not_trained(made: Made, tmp_path: Path) -> None:
    """It leaves out the global scales of experts, or all of modelopt's. What surgery dequantizes can be trained instead."""
    with pytest.raises(surgery.SourceError, match="neither the original weight nor its residual"):
        surgery.attach(loaded(made), made.factorized)
    surgery.fold(
        made.factorized, made.factorized / "surgery/scales.safetensors", tmp_path / "d", base=made.model, dequantize=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32)
    scales = surgery.attach(model, made.factorized)
    scales.load(made.saved)
    assert off(logits(model), logits(exact(made, made.wanted, tmp_path / "wanted"))) < 1e-2


@needs_compressed
@pytest.mark.parametrize("made", ["nvfp4_llama"], indirect=True)
def test_a_model_that_is_still_packed_is_unpacked_as_its_first_run_does(made: Made) -> None:
    """compressed-tensors keeps layers packed until the model is run."""
    config = transformers.CompressedTensorsConfig(dequantize=False)
    fresh, run = (
        transformers.AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.bfloat16, quantization_config=config)
        for _ in range(2)
    )
    before = logits(run)
    names = {name for name, _ in fresh.named_parameters()}
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    scales = surgery.attach(fresh, made.factorized)
    assert torch.equal(logits(fresh), before)
    scales.load(made.saved)
    again = surgery.attach(run, made.factorized)
    again.load(made.saved)
    assert torch.equal(logits(fresh), logits(run))
    assert off(logits(fresh), before) > 0.05


@pytest.mark.parametrize("train", ["scales", "core"])
@pytest.mark.parametrize("made", ["gpt_oss"], indirect=True)
def test_trained_for_some_steps_and_folded(made: Made, train: Train, tmp_path: Path) -> None:
    model = loaded(made)
    scales = surgery.attach(model, made.factorized, train=train)
    before = model(IDS, labels=IDS).loss.item()
    optimizer = torch.optim.Adam(scales.parameters(), lr=0.1 if train == "scales" else 0.02)
    for _ in range(15):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = model(IDS, labels=IDS).loss.item()
    scales.save(tmp_path / "scales.safetensors")
    gained = before - trained
    assert gained > 0.1
    for folder, dequantize, share in (("folded", False, 0.8), ("dense", True, 0.98)):
        surgery.fold(
            made.factorized,
            tmp_path / "scales.safetensors",
            tmp_path / folder,
            base=made.model,
            dequantize=dequantize,
            progress=surgery.Silent(),
        )
        folded = loaded(made, tmp_path / folder)
        assert before - folded(IDS, labels=IDS).loss.item() > share * gained


@each_loaded
def test_an_exported_adapter_on_the_served_model(made: Made, tmp_path: Path) -> None:
    factorized, scales = made.factorized, made.scales
    if any("experts" in name for name in made.updates):
        with pytest.raises(surgery.OptionError, match=r"experts.*cannot be exported as LoRA"):
            surgery.export(factorized, scales, tmp_path / "a")
        factorized = tmp_path / "f"
        surgery.factorize(made.model, factorized, rank=RANK, exclude=("*.experts.*",), layout="overlay")
        kept = {target.key for target in surgery.Manifest.read(factorized).targets}
        scales = {key: one for key, one in scales.items() if key in kept}
    surgery.export(factorized, scales, tmp_path / "a")
    surgery.write_scales(tmp_path / "scales", scales, surgery.inspect(factorized).fingerprint)
    model = loaded(made)
    attached = surgery.attach(model, factorized)
    attached.load(tmp_path / "scales")
    expected = logits(model)
    attached.detach()
    assert off(logits(model), expected) > 0.02
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    assert off(logits(adapted), expected) < 1e-5


def _random_lora(made: Made, folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA as PEFT saves it, of attention and perhaps of the stacks of experts; what its layers add to their weights."""
    attention = ["o_proj"]
    experts = any("experts" in name for name in made.updates)
    stacks = ["experts.gate_up_proj", "experts.down_proj"] if experts else None
    config = peft.LoraConfig(r=2, target_modules=attention, target_parameters=stacks, init_lora_weights=False, lora_alpha=0.2)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(loaded(made), config)
    before = {
        name: one.detach().double().clone() for name, one in adapted.get_base_model().state_dict().items() if "lora" not in name
    }
    adapted.save_pretrained(str(folder))
    merged: Any = adapted.merge_and_unload()
    after = merged.state_dict()
    added: dict[str, torch.Tensor] = {}
    for name, one in before.items():
        name = name.replace(".base_layer", "")
        delta = after[name].double() - one
        if bool(delta.any()):
            added |= _as_stored(name, delta, made.numbers)
    return added


def _as_stored(name: str, delta: torch.Tensor, known: Container[str]) -> dict[str, torch.Tensor]:
    """What is added to the tensors of a checkpoint, which may have its experts one by one."""
    name = name.replace("model.language_model.", "language_model.model.")
    if name in known:
        return {name: delta}
    stem, _, last = name.rpartition(".")
    halves = {"gate_proj": delta.chunk(2, 1)[0], "up_proj": delta.chunk(2, 1)[1]} if last == "gate_up_proj" else {last: delta}
    return {f"{stem}.{i}.{key}.weight": one[i] for key, one in halves.items() for i in range(len(one))}


@each_loaded
def test_a_lora_is_merged_into_the_quantized_checkpoint(made: Made, tmp_path: Path) -> None:
    added = _random_lora(made, tmp_path / "a")
    assert added
    for out, dequantize in (("kept", False), ("dense", True)):
        report = surgery.merge(made.model, tmp_path / "a", tmp_path / out, dequantize=dequantize, progress=surgery.Silent())
        numbers = dequantized(tmp_path / out)
        arrived = asked = 0.0
        for name, one in made.numbers.items():
            delta = added.get(name)
            if delta is None:
                assert off(numbers[name], one) < (2**-8 if dequantize else 1e-12), name
                continue
            arrived += float(((numbers[name] - one) * delta).sum())
            asked += float(delta.square().sum())
            if dequantize:
                assert off(numbers[name], one + delta) < 2**-8, name
        assert added.keys() <= numbers.keys()
        assert report.kept == pytest.approx(arrived / asked, abs=2e-3)
        assert report.kept > 0.97
