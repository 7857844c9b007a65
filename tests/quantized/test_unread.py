"""Models that hold weights which are not read: what is passed over, what is refused and how, and what goes on beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.report import plan_text
from surgery.errors import FormatError, OptionError, SourceError, WeightError
from surgery.format.header import TensorEntry
from surgery.quantized.cast import as_cast
from tests.loopback_hub import LoopbackHub
from tests.models import planned, save_llama, tensors_of
from tests.quantized.layouts import LAYOUTS
from tests.quantized.packed import PACKINGS, Packing, Tensors, save_packed
from tests.quantized.test_formats import save as save_layout
from tests.releases import needs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, dict[str, Any]]:
    """A tiny Llama in bfloat16, whose MLP has sides that all ways of packing divide."""
    folder = save_llama(tmp_path_factory.mktemp("llama") / "m", torch.bfloat16, hidden_size=64, intermediate_size=96)
    return tensors_of(folder), json.loads((folder / "config.json").read_text())


def _is_mlp(name: str) -> bool:
    return ".mlp." in name


def _is_linear(name: str) -> bool:
    return "layers" in name and name.endswith("_proj.weight")


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_partly_packed(packing: Packing, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """What is in 16 bits is taken, in the residual layout; the rest is told, weight by weight and as a share."""
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, packing, _is_mlp)
    plan = planned(folder, rank=4)
    attention = {name for name in tensors if ".self_attn." in name}
    assert {target.tensor for target in plan.targets} == attention
    assert plan.layout == "residual"
    of_mlp = {name for name in tensors_of(folder) if ".mlp." in name}
    skipped = {item.tensor: item for item in plan.skipped if item.tensor in of_mlp}
    assert skipped.keys() == of_mlp
    wanted = [item for item in skipped.values() if item.wanted]
    assert len(wanted) == sum(map(_is_mlp, tensors))
    assert {item.reason for item in wanted} == {f"{packing.called}, copied as it is"}
    assert {item.reason for item in skipped.values()} - {f"{packing.called}, copied as it is"} == {
        f"belongs to a weight that is {packing.called}"
    }
    there = sum(tensors[name].numel() for name in attention)
    passed = sum(tensor.numel() for name, tensor in tensors.items() if _is_mlp(name))
    assert plan.reached == pytest.approx(there / (there + passed), rel=1e-12)
    assert any(note.startswith("6 of 14") and f"{packing.called}, copied as it is" in note for note in plan.notes)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_all_packed(packing: Packing, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Nothing is left: the error names method and tensors, and the original that the card names."""
    tensors, config = model
    card = "license: mit\nbase_model:\n  - some-lab/Model-7B\nbase_model_relation: quantized"
    folder = save_packed(tmp_path / "m", tensors, config, packing, _is_linear, card=card)
    with pytest.raises(SourceError) as caught:
        surgery.plan(folder)
    assert packing.called in caught.value.what
    assert "model.layers.0.mlp.down_proj." in str(caught.value.got)
    assert "some-lab/Model-7B" in str(caught.value.hint)
    assert "surgery export" in str(caught.value.hint)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_packed_without_a_word_in_the_config(packing: Packing, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """The names and dtypes of the tensors tell."""
    tensors, config = model
    silent = Packing(packing.called, packing.tensors, {}, packing.alone)
    folder = save_packed(tmp_path / "m-4bit", tensors, config, silent, _is_linear)
    with pytest.raises(SourceError) as caught:
        surgery.plan(folder)
    assert (packing.alone or packing.called) in caught.value.what
    plan = planned(save_packed(tmp_path / "partly", tensors, config, silent, _is_mlp), rank=2)
    assert {target.tensor for target in plan.targets} == {name for name in tensors if ".self_attn." in name}


def _random(manifest: surgery.Manifest) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {one.key: 1 + 0.5 * torch.randn(one.scales_shape, generator=generator) for one in manifest.targets}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) for name, tensor in tensors_of(folder).items()}


@pytest.mark.parametrize("layout", ["residual", "overlay"])
@pytest.mark.parametrize("way", ["gptq", "nf4", "int8", "mlx"])
def test_there_and_back(way: str, layout: Any, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Of a fold with untouched scales every byte is the source's; with others only the targets change."""
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS[way], _is_mlp)
    silent = surgery.Silent()
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout=layout, progress=silent).manifest
    assert manifest.layout == layout
    base = {"base": folder} if layout == "overlay" else {}
    untouched = {one.key: torch.ones(one.scales_shape) for one in manifest.targets}
    surgery.fold(tmp_path / "f", untouched, tmp_path / "same", progress=silent, **base)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "same/config.json").read_bytes() == (folder / "config.json").read_bytes()
    surgery.fold(tmp_path / "f", _random(manifest), tmp_path / "changed", progress=silent, **base)
    before, after = _bytes(folder), _bytes(tmp_path / "changed")
    assert {name for name in before if before[name] != after[name]} == {target.tensor for target in manifest.targets}
    surgery.verify(tmp_path / "f", progress=silent, **base)


def _save_lora(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    """A LoRA adapter as PEFT saves it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for module, (m, n) in modules.items():
        pairs[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, n, generator=generator)
        pairs[f"base_model.model.{module}.lora_B.weight"] = torch.randn(m, 2, generator=generator)
    save_file(pairs, folder / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in modules})
    described = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": names,
        "bias": "none",
        "peft_version": "0.19.1",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


_Q, _UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("way", ["gptq", "nf4", "int8", "mlx", "hqq"])
def test_adapters(way: str, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """One that changes what is read is merged and folded; one that changes what is not is refused by its module's name."""
    tensors, config = model
    packing, silent = PACKINGS[way], surgery.Silent()
    folder = save_packed(tmp_path / "m", tensors, config, packing, _is_mlp, card="base_model: some-lab/Model-7B")
    fine = _save_lora(tmp_path / "fine", {_Q: (64, 64)})
    bad = _save_lora(tmp_path / "bad", {_Q: (64, 64), _UP: (96, 64)})
    surgery.merge(folder, fine, tmp_path / "merged", rounding="nearest", progress=silent)
    before, after = _bytes(folder), _bytes(tmp_path / "merged")
    assert {name for name in before if before[name] != after[name]} == {f"{_Q}.weight"}
    pairs = load_file(fine / "adapter_model.safetensors")
    A, B = (pairs[f"base_model.model.{_Q}.lora_{which}.weight"].double() for which in "AB")
    expected = (tensors[f"{_Q}.weight"].double() + B @ A).to(torch.bfloat16)
    assert torch.equal(tensors_of(tmp_path / "merged")[f"{_Q}.weight"], expected)
    with pytest.raises(OptionError) as caught:
        surgery.merge(folder, bad, tmp_path / "no", progress=silent)
    assert caught.value.what == f"the adapter changes {_UP!r}, whose weight is in {packing.called}, which is not read"
    assert "some-lab/Model-7B" in str(caught.value.hint)
    assert not (tmp_path / "no").exists()
    manifest = surgery.factorize(folder, tmp_path / "f", rank=2, progress=silent).manifest
    ones = {one.key: torch.ones(one.scales_shape) for one in manifest.targets}
    surgery.fold(tmp_path / "f", ones, tmp_path / "folded", lora=fine, rounding="nearest", progress=silent)
    assert _bytes(tmp_path / "folded") == after
    with pytest.raises(OptionError) as caught:
        surgery.fold(tmp_path / "f", ones, tmp_path / "no", lora=bad, progress=silent)
    assert caught.value.what == f"the adapter changes {_UP!r}, whose weight is in {packing.called}, which is not read"


def _tuned(tensors: Tensors) -> Tensors:
    """Fine-tuned by LoRA in the attention."""
    generator = torch.Generator().manual_seed(9)

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        m, n = tensor.shape
        return tensor + 0.1 * (torch.randn(m, 1, generator=generator) @ torch.randn(1, n, generator=generator)).bfloat16()

    return {name: changed(tensor) if ".self_attn." in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("way", ["gptq", "nf4", "int8", "mlx"])
def test_two_models(way: str, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Of two that are partly packed the rest is compared, extracted and projected, as of the same models in 16 bits."""
    tensors, config = model
    silent, folders = surgery.Silent(), {}
    for which, some in (("base", tensors), ("tuned", _tuned(tensors))):
        folders[which] = save_packed(tmp_path / which, some, config, PACKINGS[way], _is_mlp)
        plain = Packing("", PACKINGS[way].tensors, {})
        folders[f"plain {which}"] = save_packed(tmp_path / f"plain {which}", some, config, plain, lambda name: False)
    surgery.extract(folders["base"], folders["tuned"], tmp_path / "lora", rank=1, progress=silent)
    attention = ["*self_attn*"]
    surgery.extract(
        folders["plain base"], folders["plain tuned"], tmp_path / "plain lora", rank=1, include=attention, progress=silent
    )
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "plain lora"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    surgery.factorize(folders["base"], tmp_path / "f", rank=4, progress=silent)
    # The whole of it in 16 bits holds the targets as well.
    reports = [
        surgery.project(tmp_path / "f", folders[which], tmp_path / f"{which}.safetensors", progress=silent)
        for which in ("tuned", "plain tuned")
    ]
    assert reports[0].targets == reports[1].targets
    studied = surgery.spectra(folders["base"], folders["tuned"], top=2, progress=silent)
    assert {target["key"] for target in studied.targets} == {name for name in tensors if ".self_attn." in name}


def test_tuned_model_that_is_packed(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """What is compared is not read there: an error names the method, whatever the names of its tensors."""
    tensors, config = model
    plain = save_packed(tmp_path / "base", tensors, config, PACKINGS["gptq"], lambda name: False)
    for way in ("gptq", "nf4", "int8", "mlx"):
        folder = save_packed(tmp_path / way, tensors, config, PACKINGS[way], _is_mlp)
        with pytest.raises(SourceError, match=f"in {PACKINGS[way].called}, which is not read"):
            surgery.extract(plain, folder, tmp_path / "lora", rank=1, progress=surgery.Silent())


def test_full_of_what_is_packed(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS["gptq"], _is_mlp)
    with pytest.raises(SourceError, match="what --full names is in GPTQ"):
        surgery.extract(folder, folder, tmp_path / "lora", rank=1, full=["*up_proj*"], progress=surgery.Silent())


@pytest.mark.parametrize(
    ("name", "card", "original"),
    [
        ("Llama-3-8B-GPTQ-Int4", "", "Llama-3-8B"),
        ("Mistral-7B-Instruct-v0.3-AWQ", "", "Mistral-7B-Instruct-v0.3"),
        ("Qwen2.5-7B-Instruct-bnb-4bit", "", "Qwen2.5-7B-Instruct"),
        ("Qwen3-30B-A3B-4bit", "", "Qwen3-30B-A3B"),
        ("Qwen3-8B-4bit-DWQ", "", "Qwen3-8B"),
        ("gemma-3-27b-it-qat-4bit", "", "gemma-3-27b-it"),
        ("Mixtral-8x7B-exl2-4.0bpw", "", "Mixtral-8x7B"),
        ("Mixtral-8x7B-4.0bpw-h6-exl2", "", "Mixtral-8x7B"),
        ("Llama-3.1-8B-Instruct-quantized.w4a16", "", "Llama-3.1-8B-Instruct"),
        ("Phi-3-mini-4k-instruct-unsloth-bnb-4bit", "", "Phi-3-mini-4k-instruct"),
        ("Llama-2-7b-AQLM-2Bit-1x16-hf", "", "Llama-2-7b"),
        ("Qwen2-7B-int8wo-hqq", "", "Qwen2-7B"),
        ("my-model", "base_model: meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("my-model", 'license: mit\nbase_model: "meta-llama/Llama-3.1-8B"\ntags: [x]', "meta-llama/Llama-3.1-8B"),
        ("my-model", "base_model:\n- meta-llama/Llama-3.1-8B\nbase_model_relation: quantized", "meta-llama/Llama-3.1-8B"),
        ("my-model", "base_model: [meta-llama/Llama-3.1-8B]", "meta-llama/Llama-3.1-8B"),
        # Several were merged: none of them is the original.
        ("Model-GPTQ", "base_model:\n- a/b\n- c/d", "Model"),
        ("my-model", "base_model: not a name; rm -rf", None),
        ("my-model", "", None),
        ("GPTQ", "", None),
    ],
)
def test_the_original(
    name: str, card: str, original: str | None, model: tuple[Tensors, dict[str, Any]], tmp_path: Path
) -> None:
    """By the card, else by what the name is without the method."""
    tensors, config = model
    folder = save_packed(tmp_path / name, tensors, config, PACKINGS["gptq"], _is_linear, card=card)
    with pytest.raises(SourceError) as caught:
        surgery.plan(folder)
    hint = str(caught.value.hint)
    if original is None:
        assert hint.startswith("surgery factorize the original model, before it was quantized; ")
    elif card and "/" in original:
        assert hint.startswith(f"surgery factorize {original} (the original, by its card); ")
    else:
        assert hint.startswith(f"surgery factorize {original} (which seems to be the original, by the name of this one); ")


@pytest.mark.parametrize("card", [b"---\nbase_model: \xff\xfe\n---\n", b"no front matter", b"---\nbase_model: a/b\n", b""])
def test_card_that_cannot_be_read(card: bytes, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS["gptq"], _is_linear)
    (folder / "README.md").write_bytes(card)
    with pytest.raises(SourceError, match="GPTQ") as caught:
        surgery.plan(folder)
    assert "the original model, before it was quantized" in str(caught.value.hint)


@pytest.mark.parametrize("which", [_is_mlp, lambda name: False], ids=["partly", "none"])
def test_method_that_is_not_known(which: Any, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """It may mean anything, also by what looks like weights of 16 bits."""
    tensors, config = model
    packing = Packing("", PACKINGS["gptq"].tensors, {"quantization_config": {"quant_method": "ZipQuant"}})
    folder = save_packed(tmp_path / "m", tensors, config, packing, which)
    for include in ([], ["*self_attn*"]):
        with pytest.raises(SourceError, match="quantized with 'zipquant', a method that is not known"):
            surgery.plan(folder, include=include)
    adapter = _save_lora(tmp_path / "lora", {_Q: (64, 64)})
    with pytest.raises(SourceError, match="'zipquant'"):
        surgery.merge(folder, adapter, tmp_path / "merged", progress=surgery.Silent())


def test_integers_that_nothing_describes(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    tensors, config = model
    ways: dict[str, Any] = {
        "weight": lambda m, n: {"weight": torch.ones(m, n // 4, dtype=torch.uint8)},
        "packed": lambda m, n: {"packed": torch.ones(m, n // 8, dtype=torch.int32), "step": torch.ones(m)},
        "planes": lambda m, n: {"planes": torch.ones(4, m, n // 32, dtype=torch.int32)},
    }
    for name, way in ways.items():
        folder = save_packed(tmp_path / name, tensors, config, Packing("", way, {}), _is_mlp)
        with pytest.raises(SourceError, match="packed in a way that is not known") as caught:
            surgery.plan(folder)
        assert "model.layers.0.mlp.down_proj." in str(caught.value.got)


def test_integers_that_models_have(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Masks, positions and tables of indices are no packed weights."""
    tensors, config = model
    more = {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8),
        "model.layers.0.self_attn.mask": torch.ones(16, 16, dtype=torch.bool),
        "model.layers.0.self_attn.relative_position_index": torch.ones(16, 16, dtype=torch.int64),
        "model.layers.0.mlp.gate.tid2eid": torch.ones(16, 4, dtype=torch.int32),
        "model.embeddings.position_ids": torch.arange(16)[None],
        "model.layers.0.mlp.up_proj.steps": torch.tensor(3),
    }
    plain = Packing("", PACKINGS["gptq"].tensors, {})
    plan = planned(save_packed(tmp_path / "m", {**tensors, **more}, config, plain, lambda name: False), rank=2)
    assert {target.tensor for target in plan.targets} == set(filter(_is_linear, tensors))
    assert plan.reached == 1
    assert plan.notes == ()


@pytest.mark.parametrize("way", ["nf4", "gptq", "torchao", "bitnet", "hqq", "sparse"])
def test_method_by_which_nothing_is_quantized(way: str, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """As in models that were merged after training on a quantized one: what is stored is what is meant. A note tells."""
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS[way], lambda name: False)
    plan = planned(folder, rank=2)
    assert {target.tensor for target in plan.targets} == set(filter(_is_linear, tensors))
    (note,) = plan.notes
    assert f"config.json names {PACKINGS[way].called}, and no weight is quantized" in note


_CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _save_cast(folder: Path, tensors: Tensors, config: dict[str, Any], dtype: torch.dtype, **more: torch.Tensor) -> Path:
    """A copy whose linear layers were cast to FP8; their numbers as large as those of a model are not."""
    folder.mkdir()
    cast = {name: (16 * tensor).to(dtype) if _is_linear(name) else tensor for name, tensor in tensors.items()}
    save_file({**cast, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _updates(folder: Path, scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What scales add to each target, in float64."""
    factors = {name: one for file in (folder / "surgery").glob("factors-*") for name, one in load_file(file).items()}
    found = {}
    for key, g in scales.items():
        U, s, V = (factors[f"{key}.{part}"].double() for part in ("U", "s", "V"))
        found[key] = (U * (s * (g.double() - 1))) @ V.T
    return found


@pytest.mark.parametrize("dtype", _CASTS.values(), ids=_CASTS)
def test_cast(dtype: torch.dtype, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """FP8 without scales is what it is: kept byte for byte, and rounded to its dtype where it changes."""
    tensors, config = model
    folder = _save_cast(tmp_path / "m", tensors, config, dtype)
    plan = planned(folder, rank=4)
    assert plan.layout == "overlay"
    assert any("14 FP8 weights have no scales, and are read as plain numbers" in note for note in plan.notes)
    silent = surgery.Silent()
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, progress=silent).manifest
    surgery.verify(tmp_path / "f", base=folder, progress=silent)
    ones = {one.key: torch.ones(one.scales_shape) for one in manifest.targets}
    surgery.fold(tmp_path / "f", ones, tmp_path / "same", base=folder, progress=silent)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    scales, before = _random(manifest), tensors_of(folder)
    updates = _updates(tmp_path / "f", scales)
    surgery.fold(tmp_path / "f", scales, tmp_path / "changed", base=folder, rounding="nearest", progress=silent)
    after = tensors_of(tmp_path / "changed")
    assert updates.keys() == set(filter(_is_linear, tensors))
    for name, update in updates.items():
        expected = (before[name].double() + update).float().to(dtype)
        assert torch.equal(after[name].float(), expected.float()), name
    surgery.fold(tmp_path / "f", ones, tmp_path / "dense", base=folder, dequantize=True, progress=silent)
    dense = tensors_of(tmp_path / "dense")
    assert all(dense[name].dtype == torch.bfloat16 for name in updates)
    assert all(torch.equal(dense[name].float(), before[name].float()) for name in updates)


@pytest.mark.parametrize("dtype", _CASTS.values(), ids=_CASTS)
def test_cast_whose_update_is_too_large(dtype: torch.dtype, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    tensors, config = model
    folder = _save_cast(tmp_path / "m", tensors, config, dtype)
    adapter = _save_lora(tmp_path / "lora", {_Q: (64, 64)})
    pairs = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 300 * one for name, one in pairs.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(WeightError, match=f"{_Q}.*too large for FP8 without scales"):
        surgery.merge(folder, adapter, tmp_path / "merged", progress=surgery.Silent())
    surgery.merge(folder, adapter, tmp_path / "dense", dequantize=True, progress=surgery.Silent())


@pytest.mark.parametrize("dtype", _CASTS.values(), ids=_CASTS)
def test_every_number_of_a_cast(dtype: torch.dtype) -> None:
    """All codes, the numbers between two of them, and those beyond the largest, as torch rounds."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    between = torch.cat([codes, *((codes[:-1] * (8 - i) + codes[1:] * i) / 8 for i in range(1, 8))])[None]
    name = "F8_E4M3" if dtype == torch.float8_e4m3fn else "F8_E5M2"
    codec = as_cast(TensorEntry("x.weight", name, tuple(between.shape), 0, between.numel()), "a").codec
    expected = between.to(dtype)
    assert torch.equal(codec.quantize(between, {}).view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(codec.grid({}, (1, len(between[0]))).nearest(between.clone(), slice(0, 1)), expected.float())
    assert torch.equal(codec.dequantize(expected, {}, tuple(between.shape)), expected.float())


def test_fp8_with_scales_of_another_kind(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """It is no cast: its scales may mean anything."""
    tensors, config = model
    scales = {f"{name.removesuffix('weight')}w_scales": torch.ones(3) for name in tensors if _is_mlp(name)}
    folder = _save_cast(tmp_path / "m", tensors, config, torch.float8_e4m3fn, **scales)
    plan = planned(folder, rank=2)
    assert {target.tensor for target in plan.targets} == {name for name in tensors if ".self_attn." in name}
    reasons = {item.reason for item in plan.skipped if item.tensor.endswith("up_proj.weight")}
    assert reasons == {"FP8 with scales of a kind that is not known, copied as it is"}
    everywhere = {f"{name.removesuffix('weight')}w_scales": torch.ones(3) for name in tensors if _is_linear(name)}
    folder = _save_cast(tmp_path / "all", tensors, config, torch.float8_e4m3fn, **everywhere)
    with pytest.raises(SourceError, match="FP8 with scales of a kind that is not known"):
        surgery.plan(folder)


def test_fp8_of_which_some_scales_are_missing(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """A cast has none at all."""
    tensors, config = model
    scales = {f"{name}_scale_inv": torch.ones(()) for name in tensors if _is_linear(name) and name != f"{_Q}.weight"}
    folder = _save_cast(tmp_path / "m", tensors, config, torch.float8_e4m3fn, **scales)
    with pytest.raises(FormatError, match=f"{_Q}.weight.*its scales are missing"):
        surgery.plan(folder)


def test_scaled_as_comfyui_does(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """``scale_weight`` multiplies, as in ComfyUI's layers."""
    tensors, config = model
    scales = {f"{name.removesuffix('weight')}scale_weight": torch.tensor(0.03) for name in tensors if _is_linear(name)}
    marker = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    folder = _save_cast(tmp_path / "m", tensors, config, torch.float8_e4m3fn, **scales, **marker)
    silent = surgery.Silent()
    surgery.factorize(folder, tmp_path / "f", rank=2, progress=silent)
    scales_file = tmp_path / "f/surgery/scales.safetensors"
    surgery.fold(tmp_path / "f", scales_file, tmp_path / "dense", base=folder, dequantize=True, progress=silent)
    before, dense = tensors_of(folder), tensors_of(tmp_path / "dense")
    for name in filter(_is_linear, tensors):
        assert torch.equal(dense[name], (before[name].float() * torch.tensor(0.03)).bfloat16())


def test_dequantizing_what_is_not_read(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Refused before any work, also where other weights could be dequantized."""
    tensors, config = model
    packed = save_packed(tmp_path / "packed", tensors, config, PACKINGS["gptq"], _is_mlp, card="base_model: some-lab/Model-7B")
    written = tensors_of(packed)
    cast = {name: tensor.to(torch.float8_e4m3fn) if ".self_attn." in name else tensor for name, tensor in written.items()}
    save_file(cast, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config))
    silent = surgery.Silent()
    adapter = _save_lora(tmp_path / "lora", {_Q: (64, 64)})
    with pytest.raises(SourceError, match="cannot be dequantized: it holds weights in GPTQ") as caught:
        surgery.merge(packed, adapter, tmp_path / "merged", dequantize=True, progress=silent)
    assert "some-lab/Model-7B" in str(caught.value.hint)
    surgery.factorize(packed, tmp_path / "f", rank=2, progress=silent)
    scales = tmp_path / "f/surgery/scales.safetensors"
    with pytest.raises(SourceError, match="cannot be dequantized: it holds weights in GPTQ"):
        surgery.fold(tmp_path / "f", scales, tmp_path / "folded", base=packed, dequantize=True, progress=silent)
    assert not any((tmp_path / name).exists() for name in ("merged", "folded"))


_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}


@pytest.mark.parametrize("verb", ["fold", "merge"])
def test_dequantized_no_file_tells_of_a_quantization(verb: str, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """ModelOpt's file is read where the config is silent, and is not left beside weights of 16 bits."""
    tensors, config = model
    scales = {f"{name}_scale": torch.tensor(0.05) for name in tensors if _is_linear(name)}
    folder = _save_cast(tmp_path / "m", tensors, config, torch.float8_e4m3fn, **scales)
    (folder / "hf_quant_config.json").write_text(json.dumps(_MODELOPT))
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"quantization_config": {"quant_method": "fp8"}}}))
    silent = surgery.Silent()
    if verb == "fold":
        surgery.factorize(folder, tmp_path / "f", rank=2, progress=silent)
        ones = tmp_path / "f/surgery/scales.safetensors"
        for name, dense in (("same", False), ("dense", True)):
            surgery.fold(tmp_path / "f", ones, tmp_path / name, base=folder, dequantize=dense, progress=silent)
    else:
        adapter = _save_lora(tmp_path / "lora", {_Q: (64, 64)})
        for name, dense in (("same", False), ("dense", True)):
            surgery.merge(folder, adapter, tmp_path / name, dequantize=dense, progress=silent)
    assert (tmp_path / "same/hf_quant_config.json").is_file()
    assert not (tmp_path / "dense/hf_quant_config.json").exists()
    assert "quantization" not in (tmp_path / "dense/config.json").read_text()
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "dense").values()} == {torch.bfloat16}


def test_modelopt_without_a_word_in_the_config(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Its file tells that FP8 without scales is no cast."""
    tensors, config = model
    folder = _save_cast(tmp_path / "m", tensors, config, torch.float8_e4m3fn)
    (folder / "hf_quant_config.json").write_text(json.dumps(_MODELOPT))
    with pytest.raises(FormatError, match="its scales are missing"):
        surgery.plan(folder)
    # Of keys and values alone it says nothing of weights.
    only_cache = {**_MODELOPT, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(only_cache))
    assert planned(folder, rank=2).targets


def test_residual_layout_beside_weights_that_have_none(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """FP8 in the MLP, as MXFP4 in gpt-oss: asked for, the rest has a residual. An adapter may change what is passed over."""
    tensors, config = model
    cast = {name: (16 * tensor).to(torch.float8_e4m3fn) if _is_mlp(name) else tensor for name, tensor in tensors.items()}
    folder = _save_cast(tmp_path / "m", tensors, config, torch.float8_e4m3fn)
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    silent = surgery.Silent()
    assert planned(folder, rank=2).layout == "overlay"
    assert planned(folder, rank=2, include=["*self_attn*"]).layout == "residual"
    plan = planned(folder, rank=2, layout="residual")
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if _is_linear(name)}
    there = sum(size for name, size in sizes.items() if not _is_mlp(name))
    assert plan.reached == pytest.approx(there / sum(sizes.values()), rel=1e-12)
    manifest = surgery.factorize(folder, tmp_path / "f", rank=2, layout="residual", progress=silent).manifest
    ones = {one.key: torch.ones(one.scales_shape) for one in manifest.targets}
    surgery.fold(tmp_path / "f", ones, tmp_path / "same", progress=silent)
    assert _bytes(tmp_path / "same") == _bytes(folder)
    adapter = _save_lora(tmp_path / "lora", {_Q: (64, 64), _UP: (96, 64)})
    surgery.fold(tmp_path / "f", ones, tmp_path / "folded", lora=adapter, rounding="nearest", progress=silent)
    surgery.merge(folder, adapter, tmp_path / "merged", rounding="nearest", progress=silent)
    assert _bytes(tmp_path / "folded") == _bytes(tmp_path / "merged")
    surgery.fold(tmp_path / "f", ones, tmp_path / "dense", dequantize=True, progress=silent)
    dense = tensors_of(tmp_path / "dense")
    assert all(torch.equal(dense[name].float(), one.float()) for name, one in cast.items())


def test_gguf(tmp_path: Path) -> None:
    """The card names the original; else the name of the folder does."""
    for name, card, original in (
        ("a", "base_model: some-lab/Model-7B", "some-lab/Model-7B"),
        ("Model-7B-GGUF", "", "Model-7B"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
        with pytest.raises(SourceError, match="only GGUF") as caught:
            surgery.plan(folder)
        assert original in str(caught.value.hint)


def test_spectra_tell_what_is_passed_over(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS["gptq"], _is_mlp)
    with pytest.warns(surgery.SurgeryWarning) as told:
        surgery.spectra(folder, top=2)
    assert any(re.match("6 of 14 .*: GPTQ, copied as it is", str(one.message)) for one in told)


@pytest.mark.parametrize("layout", ["gpt-oss", "int4", "int8", "modelopt nvfp4"])
def test_spectra_of_packed_weights(layout: str, tmp_path: Path) -> None:
    """As those of the numbers that they stand for."""
    stored = LAYOUTS[layout]()
    folder = save_layout(stored, tmp_path / "m")
    report = surgery.spectra(folder, folder, top=2, include=[stored.name], progress=surgery.Silent())
    weights = torch.from_numpy(stored.read(stored.tensors).weight.copy()).double()
    expected = torch.linalg.svdvals(weights)[..., 0].flatten()
    found = torch.tensor([target["singular_values"][0] for target in report.targets], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_modelopt_int4_awq(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """What its layers compute with is another weight than the one that is stored: named, and not read as integers."""
    tensors, config = model

    def packed(m: int, n: int) -> Tensors:
        numbers = torch.ones(m // 2, n, dtype=torch.uint8)
        return {"weight": numbers, "weight_scale": torch.ones(m, n // 16), "pre_quant_scale": torch.ones(n)}

    described = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}}
    folder = save_packed(tmp_path / "m", tensors, config, Packing("ModelOpt (W4A16_AWQ)", packed, described), _is_mlp)
    plan = planned(folder, rank=2)
    reasons = {item.reason for item in plan.skipped if ".mlp." in item.tensor}
    assert reasons == {"ModelOpt (W4A16_AWQ), copied as it is", "belongs to a weight that is ModelOpt (W4A16_AWQ)"}


def test_plan_tells_the_share(model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """In the table's totals, in a note, and in the JSON."""
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS["gptq"], _is_mlp)
    plan = planned(folder, rank=2)
    share = sum(one.entries for one in plan.targets) / sum(one.numel() for name, one in tensors.items() if _is_linear(name))
    assert f"{100 * share:.3g} % of the weights that would be targets" in plan_text(plan, 1.0, every=False).replace("\n  ", " ")
    assert any(
        f"6 of 14 tensors that would be targets are passed over, {100 - 100 * share:.3g} % of their weights" in one
        for one in plan.notes
    )
    assert plan.as_json()["reached"] == pytest.approx(share)


@pytest.mark.parametrize("card", ["base_model: some-lab/Model-7B", ""])
def test_of_the_hub(card: str, hub: LoopbackHub, model: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    """Of a repository headers are fetched, and its card for the error."""
    tensors, config = model
    folder = save_packed(tmp_path / "m", tensors, config, PACKINGS["awq"], _is_linear, card=card)
    repo = "acme/Model-7B-AWQ" + ("-carded" if card else "")
    hub.publish(repo, folder)
    with pytest.raises(SourceError, match="AWQ") as caught:
        surgery.plan(repo)
    original = "some-lab/Model-7B (the original, by its card)" if card else "Model-7B (which seems to be the original, "
    assert str(caught.value.hint).startswith(f"surgery factorize {original}")


@needs("bitsandbytes", ">=0.50.2", "a quantized base")
def test_packed_by_bitsandbytes_itself() -> None:
    """What stands here for its checkpoints has the names, dtypes and shapes that it saves."""
    import bitsandbytes

    nn, weight = bitsandbytes.nn, torch.randn(96, 64)
    made: dict[str, Any] = {kind: nn.Linear4bit(64, 96, bias=False, quant_type=kind) for kind in ("nf4", "fp4")}
    made["int8"] = nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    for kind, layer in made.items():
        layer.load_state_dict({"weight": weight})
        saved, here = layer.to("cpu").state_dict(), PACKINGS[kind].tensors(96, 64)
        assert saved.keys() == here.keys()
        for name in saved:
            assert saved[name].dtype == here[name].dtype
            assert saved[name].shape == here[name].shape or ".quant_state." in name
