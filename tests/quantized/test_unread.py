"""Models that hold weights which are not read: what is passed over, what is refused and how, and what goes on beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError, SourceError
from tests.models import planned, save_llama, tensors_of
from tests.quantized.packed import PACKINGS, Packing, Tensors, save_packed


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
    assert any(f"{packing.called}, copied as it is: 6 of 14" in note for note in plan.notes)


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
    assert _UP in caught.value.what
    assert packing.called in str(caught.value)
    assert "some-lab/Model-7B" in str(caught.value.hint)
    assert not (tmp_path / "no").exists()
    manifest = surgery.factorize(folder, tmp_path / "f", rank=2, progress=silent).manifest
    ones = {one.key: torch.ones(one.scales_shape) for one in manifest.targets}
    surgery.fold(tmp_path / "f", ones, tmp_path / "folded", lora=fine, rounding="nearest", progress=silent)
    assert _bytes(tmp_path / "folded") == after
    with pytest.raises(OptionError) as caught:
        surgery.fold(tmp_path / "f", ones, tmp_path / "no", lora=bad, progress=silent)
    assert _UP in caught.value.what
    assert packing.called in str(caught.value)


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
        assert f"the original, which is {original} by its card; " in hint
    else:
        assert f"the original, which by its name seems to be {original}; " in hint


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
