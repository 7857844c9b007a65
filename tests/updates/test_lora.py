"""Scales together with a LoRA update: trained together, folded together, and exported as one."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, MissingExtra, OptionError, OutputError, SourceError, SurgeryError, SurgeryWarning
from surgery.names import TRAINS, Train
from surgery.progress import Silent
from surgery.updates.adapters.patterns import ByModule
from tests.families import FAMILIES
from tests.models import files_of, save_llama, tensors_of
from tests.releases import needs

# PEFT asks transformers for an attribute that has a new name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # With fused experts it sets ranks for modules that are parameters now, and finds them there all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


loads_experts = needs("peft", ">=0.20", "loading adapters of single experts")

_O = "model.layers.0.self_attn.o_proj.weight"


def _with_lora(model: Any, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    return adapted


def _random_scales(scales: surgery.Scales) -> None:
    generator = torch.Generator().manual_seed(1)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "split", "targets"),
    [
        ("llama", None, ["q_proj", "down_proj", "lm_head"]),
        ("gpt2", True, ["c_attn", "c_proj"]),
        ("phi3", True, ["qkv_proj", "down_proj"]),
        ("bert", None, ["query", "dense"]),
        pytest.param("vit", None, ["q_proj", "fc1"], marks=needs("transformers", ">=5.10", "ViT with these names")),
        ("mixtral", None, ["q_proj"]),
    ],
)
@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_trained_together_and_folded_together(
    name: str, split: bool | None, targets: list[str], layout: Any, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, split=split, layout=layout)
    model = _with_lora(family.load(folder), targets, fan_in_fan_out=name == "gpt2")
    for train in TRAINS:
        scales = surgery.attach(model, tmp_path / "f", train=train)
        model.eval()
        model.zero_grad()
        before = family.run(model)
        before.square().mean().backward()
        trained = {id(p) for p in model.parameters() if p.grad is not None}
        lora = {id(p) for n, p in model.named_parameters() if "lora_" in n}
        assert trained == lora | {id(p) for p in scales.parameters()}
        _random_scales(scales)
        with torch.no_grad():
            attached = family.run(model)
        scales.save(tmp_path / "s.safetensors")
        model.save_pretrained(tmp_path / "lora")
        report = surgery.fold(
            tmp_path / "f",
            tmp_path / "s.safetensors",
            tmp_path / train,
            lora=tmp_path / "lora",
            base=folder if layout == "overlay" else None,
        )
        assert report.adapted > 0
        folded = family.output(tmp_path / train)
        largest = folded.abs().max().item()
        assert torch.allclose(attached, folded, rtol=1e-3, atol=1e-4 * largest)
        assert not torch.allclose(folded, before, rtol=1e-3, atol=2e-3 * largest)
        scales.detach()


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_one_rounding(layout: Any, train: Train, llama: Path, tmp_path: Path) -> None:
    """In bfloat16: W, scaled or turned directions and PEFT's own update, summed in float64 and rounded once."""
    surgery.factorize(llama, tmp_path / "f", rank=4, layout=layout)
    options = {"use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 5}, "alpha_pattern": {"up_proj": 7}}
    model = _with_lora(
        transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        ["q_proj", "up_proj", "lm_head"],
        **options,
    )
    model.save_pretrained(tmp_path / "lora")
    scales = load_file(tmp_path / "f/surgery/scales.safetensors")
    generator = torch.Generator().manual_seed(0)
    if train == "core":
        scales = {key: torch.diag(value) for key, value in scales.items()}
    scales = {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in scales.items()}
    surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=tmp_path / "lora", base=llama if layout == "overlay" else None)
    factors: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "f/surgery").glob("factors-*"):
        factors |= load_file(path)
    original, folded = tensors_of(llama), tensors_of(tmp_path / "o")
    layers = {
        name.removeprefix("base_model.model."): layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")
    }
    assert len(layers) == 5
    for name, weight in original.items():
        expected = weight.double()
        if name in scales:
            U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
            core = scales[name] if train == "core" else torch.diag(scales[name])
            expected = expected + (U * s.sqrt()) @ (core.double() - torch.eye(4)) @ (V * s.sqrt()).T
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            expected = expected + layer.scaling["default"] * (B @ A)
        assert torch.equal(folded[name], _nearest(expected, weight.dtype)), name


def _nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers to float64 ones. A plain ``to`` goes through float32, and rounds twice."""
    near = x.to(dtype)
    around = torch.stack([near, *(torch.nextafter(near, torch.full_like(near, end)) for end in (-math.inf, math.inf))])
    return around.gather(0, (around.double() - x).abs().argmin(0)[None])[0]


@pytest.mark.parametrize("layout", ["residual", "overlay"])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapted_embedding_beside_its_scales(targets: list[str], layout: Any, tmp_path: Path) -> None:
    """PEFT saves the embedding with its adapter, and the scales that are in it."""
    folder = FAMILIES["llama"].save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, layout=layout, include=["*embed_tokens*", "*proj*"])
    model = _with_lora(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), targets).eval()
    scales = surgery.attach(model, tmp_path / "f")
    _random_scales(scales)
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        attached = model(ids).logits
    scales.save(tmp_path / "s.safetensors")
    model.save_pretrained(tmp_path / "lora")
    assert any("surgery_scale" in name for name in load_file(tmp_path / "lora/adapter_model.safetensors"))
    base = folder if layout == "overlay" else None
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "o", lora=tmp_path / "lora", base=base)
    with torch.no_grad():
        folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(attached, folded, rtol=1e-4, atol=1e-5)


def test_a_class_derived_from_pefts_wrapper(llama: Path, tmp_path: Path) -> None:
    class Own(peft.PeftModelForCausalLM):
        pass

    surgery.factorize(llama, tmp_path / "f", rank=4)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = Own(transformers.AutoModelForCausalLM.from_pretrained(llama), config)
    scales = surgery.attach(adapted, tmp_path / "f")
    lora = [value for name, value in adapted.named_parameters() if "lora_" in name]
    trained = {id(value) for value in adapted.parameters() if value.requires_grad}
    assert trained == {id(value) for value in [*lora, *scales.parameters()]}


def test_an_adapter_alone_changes_nothing_else(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    _with_lora(transformers.AutoModelForCausalLM.from_pretrained(llama), ["o_proj"]).save_pretrained(tmp_path / "lora")
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "o", lora=tmp_path / "lora")
    before, after = tensors_of(llama), tensors_of(tmp_path / "o")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}


def test_adapters_that_cannot_be_folded(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    scales = tmp_path / "f/surgery/scales.safetensors"
    fresh = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(SourceError, match=r"there is no adapter_config\.json"):
        surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=llama)
    for given, what, hint in (
        (llama / "config.json", r"there is no adapter_config\.json", str(llama)),
        ("owner/adapter", "there is no folder owner/adapter", "hf download ID --local-dir"),
    ):
        with pytest.raises(SourceError, match=what) as caught:
            surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=given)
        assert hint in str(caught.value.hint)
    _with_lora(fresh, ["o_proj"]).save_pretrained(tmp_path / "old")
    (tmp_path / "old/adapter_model.safetensors").rename(tmp_path / "old/adapter_model.bin")  # as PEFT did until 2023
    with pytest.raises(SourceError, match=r"there is no adapter_model\.safetensors") as caught:
        surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=tmp_path / "old")
    assert "save it again" in str(caught.value.hint)
    adapter = tmp_path / "lora"
    fresh = transformers.AutoModelForCausalLM.from_pretrained(llama)
    _with_lora(fresh, ["o_proj"]).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, error, message in (
        ({"modules_to_save": ["lm_head"]}, FormatError, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, OptionError, "init_lora_weights"),
        ({"peft_type": "IA3"}, OptionError, "is no LoRA adapter"),
        ({"r": 4}, FormatError, "contradicts its config"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=message):
            surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=adapter)
    other = FAMILIES["gpt2"].save(tmp_path / "gpt2")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    surgery.factorize(other, tmp_path / "g", rank=4)
    with pytest.raises(OptionError, match=r"the adapter changes 'model\.layers\.0\.self_attn\.o_proj', which is no module"):
        surgery.fold(tmp_path / "g", tmp_path / "g/surgery/scales.safetensors", tmp_path / "o", lora=adapter)
    assert not (tmp_path / "o/config.json").exists()


def test_ways_to_begin_that_leave_the_weights_alone(llama: Path, tmp_path: Path) -> None:
    """Those are folded as PEFT merges them; the others, which change the weights under the adapter, are refused."""
    surgery.factorize(llama, tmp_path / "f", rank=4)
    scales, adapter = tmp_path / "f/surgery/scales.safetensors", tmp_path / "lora"
    fresh = transformers.AutoModelForCausalLM.from_pretrained(llama)
    _with_lora(fresh, ["o_proj"], init_lora_weights=False).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config.pop("init_lora_weights") is False
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(llama), adapter)
    merged = model.merge_and_unload().state_dict()
    ways = [{}, *({"init_lora_weights": way} for way in (False, None, True, "gaussian", "orthogonal", "eva"))]
    for i, way in enumerate(ways):
        (adapter / "adapter_config.json").write_text(json.dumps(config | way))
        surgery.fold(tmp_path / "f", scales, tmp_path / f"o{i}", lora=adapter)
        for name, tensor in tensors_of(tmp_path / f"o{i}").items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(tensors_of(llama)[_O], merged[_O])
    for way in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "something new", 2, ["gaussian"]):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": way}))
        with pytest.raises(OptionError, match="a LoRA adapter with init_lora_weights cannot be merged onto the original model"):
            surgery.fold(tmp_path / "f", scales, tmp_path / "refused", lora=adapter)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, None) for name in ("llama", "gpt2", "phi3", "gpt_neox", "bert", "vit", "t5", "UNet")),
        *(pytest.param(name, None, marks=loads_experts) for name in ("mixtral", "qwen3_moe", "olmoe")),
        ("phi3", True),
        ("gpt2", True),
    ],
)
def test_exported_merged_and_folded_are_one(name: str, split: bool | None, tmp_path: Path) -> None:
    """The adapter on the original model, as it is and merged, gives what the attached and the folded model give."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, split=split)
    model = family.load(folder)
    with torch.no_grad():
        before = family.run(model)
    for train in TRAINS:
        scales = surgery.attach(model, tmp_path / "f", train=train)
        with torch.no_grad():
            _random_scales(scales)
            attached = family.run(model)
        scales.save(tmp_path / "s.safetensors")
        scales.detach()
        report = surgery.export(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / f"lora-{train}")
        surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / f"folded-{train}")
        folded = family.output(tmp_path / f"folded-{train}")
        adapted = peft.PeftModel.from_pretrained(family.load(folder), tmp_path / f"lora-{train}")
        stored = load_file(tmp_path / f"lora-{train}/adapter_model.safetensors")
        assert {value.shape[0 if "lora_A" in key else 1] for key, value in stored.items()} == {report.rank}
        assert len(stored) == 2 * report.modules
        largest = folded.abs().max().item()
        with torch.no_grad():
            unmerged = family.run(adapted)
            merged = family.run(adapted.merge_and_unload())
        for output in (attached, unmerged, merged):
            assert torch.allclose(output, folded, rtol=1e-3, atol=1e-4 * largest)
        assert not torch.allclose(folded, before, rtol=1e-3, atol=2e-3 * largest)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek_v3", "experts of deepseek_v3, which PEFT does not load as they are"),
        ("qwen2_moe", "experts of qwen2_moe"),
        ("granitemoe", r"a weight of GraniteMoe\w*Experts"),
        ("gpt_oss", "a weight of GptOssExperts"),
        ("mamba", "a weight of Linear"),
    ],
)
def test_what_an_adapter_cannot_say_is_refused(name: str, message: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    surgery.factorize(family.save(tmp_path / "m"), tmp_path / "f", rank=4)
    with pytest.raises(OptionError, match=f"cannot be exported as LoRA\n  got: +({message})(.|\n)*surgery fold"):
        surgery.export(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "lora")
    assert not (tmp_path / "lora/adapter_config.json").exists()


@pytest.mark.parametrize(("version", "said"), [("0.18.1", True), ("0.19.1", True), ("0.20.0", False), ("1.0.dev0", False)])
def test_an_older_peft_that_loads_experts_wrongly_is_told(
    version: str, said: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = []

    class Progress(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    surgery.factorize(FAMILIES["mixtral"].save(tmp_path / "m"), tmp_path / "f", rank=2)
    read = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "peft" else read(name))
    surgery.export(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "lora", progress=Progress())
    assert [f"from 0.20 on, and here is {version}" in note for note in notes] == [True] * said


def test_attention_of_a_mixture_is_exported(tmp_path: Path) -> None:
    family = FAMILIES["deepseek_v3"]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, recipe="attention")
    scales = load_file(tmp_path / "f/surgery/scales.safetensors")
    scales = {key: value * 1.5 for key, value in scales.items()}
    surgery.export(tmp_path / "f", scales, tmp_path / "lora")
    surgery.fold(tmp_path / "f", scales, tmp_path / "o")
    with torch.no_grad():
        merged = family.run(peft.PeftModel.from_pretrained(family.load(folder), tmp_path / "lora").merge_and_unload())
    assert torch.allclose(merged, family.output(tmp_path / "o"), atol=1e-4)


def test_another_adapter_is_not_replaced_unasked(factorized: Path, tmp_path: Path) -> None:
    out, untouched = tmp_path / "lora", factorized / "surgery/scales.safetensors"
    trained = {key: value * 1.5 for key, value in load_file(untouched).items()}
    first = surgery.export(factorized, trained, out)
    before, modified = files_of(out), (out / "adapter_model.safetensors").stat().st_mtime_ns
    progress = Silent()
    assert surgery.export(factorized, trained, out, progress=progress) == first
    assert progress.notes == [f"{out} is already complete: nothing to do"]
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == modified
    with pytest.raises(OutputError, match="is there already"):
        surgery.export(factorized, untouched, out)
    assert files_of(out) == before
    surgery.export(factorized, untouched, out, overwrite=True)
    assert files_of(out) != before

    # Stopped just before the end.
    surgery.export(factorized, trained, out, overwrite=True)
    (out / "adapter_config.json").unlink()
    with pytest.warns(SurgeryWarning, match="is already complete: nothing to do"):
        surgery.export(factorized, trained, out)
    assert files_of(out) == before

    # Cut short, or more than it should be: not the same.
    surgery.export(factorized, trained, out, overwrite=True)
    for damaged in (before["adapter_model.safetensors"][:-1], before["adapter_model.safetensors"] + b"x"):
        (out / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(OutputError, match="is there already"):
            surgery.export(factorized, trained, out)


@pytest.mark.parametrize(("name", "targets"), [("gpt2", ["c_attn", "c_fc"]), ("llama", ["embed_tokens"])])
def test_transposed_weights_in_half_precision(name: str, targets: list[str], tmp_path: Path) -> None:
    """Against the sum in float64, rounded once."""
    family = FAMILIES[name]
    family.make().to(torch.bfloat16).save_pretrained(tmp_path / "m")  # type: ignore[operator]
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4)
    model = _with_lora(family.load(tmp_path / "m"), targets, fan_in_fan_out=name == "gpt2")
    model.save_pretrained(tmp_path / "lora")
    scales = tmp_path / "f/surgery/scales.safetensors"
    surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=tmp_path / "lora")
    before, after = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "o")
    changed = 0
    for module, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        embedding = "default" in layer.lora_embedding_A
        A, B = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if embedding
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        update = layer.scaling["default"] * (B.double() @ A.double()).T
        name = f"{module}.weight"
        assert torch.equal(after[name], (before[name].double() + update).to(torch.bfloat16))
        changed += 1
    assert changed >= 1


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # PEFT 0.18
def test_adapters_that_would_be_folded_wrongly(llama: Path, tmp_path: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    surgery.factorize(llama, tmp_path / "f", rank=4)
    scales = tmp_path / "f/surgery/scales.safetensors"

    def refused(adapter: Path, match: str, folder: str = "f") -> None:
        own = tmp_path / folder / "surgery/scales.safetensors"
        with pytest.raises(SurgeryError, match=match):
            surgery.fold(tmp_path / folder, own, tmp_path / "o", lora=adapter)

    tied = save_llama(tmp_path / "tied", torch.float32, tie_word_embeddings=True)
    surgery.factorize(tied, tmp_path / "ft", rank=4)
    _with_lora(load(tied), ["embed_tokens"]).save_pretrained(tmp_path / "shared")
    refused(tmp_path / "shared", "whose weight several modules share", "ft")

    grown = load(llama)
    grown.resize_token_embeddings(103)
    _with_lora(grown, ["lm_head"]).save_pretrained(tmp_path / "grown", save_embedding_layers=False)
    refused(tmp_path / "grown", r"'lm_head' does not fit its weight\n  got: +\[103, 48\]")

    _with_lora(load(llama), ["o_proj"]).save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    for change, match in (
        ({"rank_pattern": ["a"]}, "cannot be looked up"),
        ({"alpha_pattern": {"(": 3}}, "cannot be looked up"),
        ({"lora_alpha": 10**400}, "contradicts its config"),
        ({"lora_alpha": True}, "contradicts its config"),
    ):
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config | change))
        refused(tmp_path / "lora", match)
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    halves = load_file(tmp_path / "lora/adapter_model.safetensors")
    one = "base_model.model.model.layers.0.self_attn.o_proj.lora"
    for broken, match in (
        ({}, "changes nothing"),
        ({f"{one}_A.weight": torch.ones(3, 49), f"{one}_B.weight": torch.ones(50, 3)}, "does not fit its weight"),
        ({f"{one}_A.weight": torch.ones(3, 2, 24), f"{one}_B.weight": torch.ones(48, 3)}, "does not fit its weight"),
        ({f"{one}_embedding_A": torch.ones(3, 48), f"{one}_embedding_B": torch.ones(48, 3)}, "of another kind"),
        ({f"{one}_A.weight": halves[f"{one}_A.weight"]}, "lacks a half"),
        (halves | {key.replace("model.model.model.", "model.model."): value.clone() for key, value in halves.items()}, "twice"),
    ):
        save_file(broken, tmp_path / "lora/adapter_model.safetensors")
        refused(tmp_path / "lora", match)
    assert scales.is_file()


@pytest.mark.parametrize("change", [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"architectures": ["Nonsense"]}])
def test_configs_that_make_no_model(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    path = tmp_path / "f/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=r"transformers (cannot make a|has no model)"):
        surgery.export(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "lora")


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (None, "which is not installed"),
        ("raise ImportError('huggingface-hub>=1.3.0,<2.0 is required')", r"cannot be imported\n  got: +huggingface-hub.*<2\.0"),
        ("import no_such_backend", r"cannot be imported\n  got: +No module named 'no_such_backend'"),
    ],
)
def test_transformers_that_cannot_be_imported(
    module: str | None, told: str, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    if module is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        (tmp_path / "packages/transformers").mkdir(parents=True)
        (tmp_path / "packages/transformers/__init__.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(MissingExtra, match=told):
        surgery.export(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "lora")


def test_a_config_that_names_no_class(tmp_path: Path) -> None:
    """Its family is known all the same, and with it that GPT-2 stores its weights transposed; but not the names of modules."""
    family = FAMILIES["gpt2"]
    folder = family.save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    surgery.factorize(folder, tmp_path / "f", rank=4)
    scales = tmp_path / "f/surgery/scales.safetensors"
    with pytest.raises(SourceError, match="does not say what class the model is"):
        surgery.export(tmp_path / "f", scales, tmp_path / "no")
    model = _with_lora(family.load(folder), ["attn.c_proj"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "lora")
    surgery.fold(tmp_path / "f", scales, tmp_path / "o", lora=tmp_path / "lora")
    with torch.no_grad():
        assert torch.allclose(family.run(model.eval()), family.output(tmp_path / "o"), atol=1e-4)


def test_an_adapter_does_not_come_into_a_model(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    scales = tmp_path / "f/surgery/scales.safetensors"
    for out, match in ((tmp_path / "f", "there is a model"), (tmp_path / "f/surgery", "lies in one"), (llama, "a model")):
        with pytest.raises(OutputError, match=match):
            surgery.export(tmp_path / "f", scales, out)
    with pytest.raises(OutputError, match="is no folder"):
        surgery.export(tmp_path / "f", scales, scales)


@pytest.mark.parametrize("source", ["m", "f"])
@pytest.mark.parametrize(
    "option",
    [{"modules_to_save": ["up_proj"]}, {"trainable_token_indices": {"embed_tokens": [3, 5]}}],
    ids=lambda one: next(iter(one)),
)
def test_adapters_that_keep_a_weight_under_another_name(option: dict[str, Any], source: str, tmp_path: Path) -> None:
    """It would be left without scales, and as a residual without its leading directions."""
    FAMILIES["llama"].save(tmp_path / "m")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, include=["*embed_tokens*", "*proj*"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.float32)
    with pytest.raises(OptionError, match="is in this model under a name that the checkpoint does not have"):
        surgery.attach(_with_lora(model, ["q_proj"], **option), tmp_path / "f")


def test_adapters_that_cannot_go_with_scales(llama: Path, tmp_path: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    surgery.factorize(llama, tmp_path / "f", rank=4)
    with pytest.raises(OptionError, match="looks at the weight that it changes"):
        surgery.attach(_with_lora(load(llama), ["o_proj"], use_dora=True), tmp_path / "f")
    prompts = peft.get_peft_model(load(llama), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    scales = surgery.attach(prompts, tmp_path / "f")
    trained = {name for name, parameter in prompts.named_parameters() if parameter.requires_grad and "delta" not in name}
    assert trained == {"prompt_encoder.default.embedding.weight"}
    scales.detach()
    plain = load(llama)
    scales = surgery.attach(plain, tmp_path / "f")
    _with_lora(plain, ["o_proj"])
    with pytest.warns(SurgeryWarning, match="and of 13 other targets are frozen: .* comes before attach"):
        scales.save(tmp_path / "s.safetensors")


_PARTS = ("model", "layers", "1", "11", "q_proj", "up", "a", "x-y", "q1proj")
_PATTERNS = (
    *(
        "q_proj",
        "q.proj",
        "layers.1",
        "layers.1.",
        ".",
        "",
        "1.q_proj",
        "a",
        "up.a",
        "(a",
        "a)|(b",
        "[a-z._0-9]+",
        "a+",
        "(?i:A)",
    ),
    *(r"layers\.(1|11)\..*q_proj", r"\d+", ".*", "^model", "^a$", "q_proj$", "(q|k)_proj", "[qk]_proj", "a|up", r"\bq_proj"),
)


def test_patterns_are_looked_up_as_peft_does() -> None:
    chance = random.Random(0)
    answers = 0
    for _ in range(1500):
        modules = [".".join(chance.choices(_PARTS, k=chance.randrange(1, 6))) for _ in range(5)]
        patterns = {}
        for value in range(chance.randrange(1, 4)):
            pattern = chance.choice((chance.choice(modules)[chance.randrange(5) :], "".join(chance.choices(_PATTERNS, k=2))))
            patterns[chance.choice((pattern, chance.choice(_PATTERNS)))] = value
        try:
            found = ByModule({"rank_pattern": patterns, "r": 99}, "rank_pattern", "r", modules, Path("adapter"))
        except FormatError:
            continue
        for module in modules:
            key = get_pattern_key(list(patterns), module)
            assert found.of(module) == patterns.get(key, 99), (patterns, module)
            answers += 1
    assert answers > 3000


def _many(count: int) -> list[str]:
    return [f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(count)]


@pytest.mark.parametrize(
    ("patterns", "modules", "is_answered"),
    [
        ({"([a-z._0-9]+)+X": 2}, _many(2000), True),
        (dict.fromkeys(_many(10_000), 2), _many(10_000), True),
        ({f"{module}+": 2 for module in _many(10_000)}, _many(10_000), False),
        ({f"{'.' * i}{'a' * (40 - i)}{'b.' * j}": 2 for i in range(40) for j in range(200)}, _many(10_000), False),
        ({"a" * 30_000_000: 2}, _many(100), True),
        ({"." * 30_000_000: 2}, _many(100), True),
        ({"a+" * 15_000_000: 2}, _many(100), False),
        ({f"{i}{'b.' * 450}": 2 for i in range(20_000)}, _many(100), False),
        ({f"(a{{1000}}){{9}}{i}": 2 for i in range(1000)}, _many(100), False),
        ({"(.*a.{40}b|.*b.{30}c)+x.*": 2}, ["".join(random.Random(i).choices("abc.", k=999)) for i in range(99)], False),
        ({"q_proj": 2}, ["a." * 5_000_000], False),
    ],
    ids=range(11),
)
def test_patterns_are_looked_up_in_bounded_time(patterns: dict[str, int], modules: list[str], is_answered: bool) -> None:
    started = time.perf_counter()
    refused = None
    try:
        found = ByModule({"rank_pattern": patterns, "r": 1}, "rank_pattern", "r", modules, Path("adapter"))
        assert {found.of(module) for module in modules} in ({1}, {2})
    except FormatError as error:
        refused = str(error)
    assert time.perf_counter() - started < 10
    assert (refused is None) == is_answered
    assert is_answered or len(str(refused)) < 1000


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factorized Llama, and an adapter for it."""
    folder = tmp_path_factory.mktemp("adapted")
    model = save_llama(folder / "m", torch.bfloat16)
    surgery.factorize(model, folder / "f", rank=2, include=["*q_proj*"])
    _with_lora(transformers.AutoModelForCausalLM.from_pretrained(model), ["o_proj"]).save_pretrained(folder / "lora")
    return folder


def _fold(adapted: Path, adapter: Path, out: Path) -> None:
    surgery.fold(adapted / "f", adapted / "f/surgery/scales.safetensors", out, lora=adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"([a-z._0-9]+)+X": 2}}, None),  # fits no module
        ({"rank_pattern": {"a{99999999999999999999}": 2}}, "rank_pattern cannot be looked up"),
        ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 2}}, "alpha_pattern cannot be looked up"),
        ({"alpha_pattern": {"(?=x)o_proj": 2}}, "alpha_pattern cannot be looked up"),
        ({"rank_pattern": ["o_proj"]}, "rank_pattern cannot be looked up"),
        ({"rank_pattern": {"o_proj": None}}, "contradicts its config"),
        ({"alpha_pattern": {"o_proj": "5"}}, "contradicts its config"),
        ({"r": 3.0}, "contradicts its config"),
        ({"r": "3"}, "contradicts its config"),
        ({"r": 10**400}, "contradicts its config"),
        ({"r": -3}, "contradicts its config"),
        ({"lora_alpha": 10**400}, "contradicts its config"),
        ({"lora_alpha": float("nan")}, "contradicts its config"),
        ({"lora_alpha": float("-inf")}, "contradicts its config"),
        ({"lora_alpha": True}, "contradicts its config"),
        ({"lora_alpha": [5]}, "contradicts its config"),
        ({"use_rslora": "false"}, "use_rslora makes no sense"),
        ({"use_rslora": 1}, "use_rslora makes no sense"),
        ({"use_rslora": None}, None),
        ({"peft_type": [["LORA"] * 9] * 9}, "is no LoRA adapter"),
        ({"bias": list(range(100_000))}, "a LoRA adapter with bias"),
    ],
    ids=range(21),
)
def test_configs_of_strangers(change: dict[str, Any], message: str | None, adapted: Path, tmp_path: Path) -> None:
    """What is wrong is an error that says so in a few lines; the rest is as PEFT takes it."""
    adapter = shutil.copytree(adapted / "lora", tmp_path / "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    if message is None:
        _fold(adapted, adapter, tmp_path / "o")
        as_before = tensors_of(tmp_path / "o")
        _fold(adapted, adapted / "lora", tmp_path / "p")
        assert as_before.keys() == tensors_of(tmp_path / "p").keys()
        assert all(torch.equal(tensor, as_before[name]) for name, tensor in tensors_of(tmp_path / "p").items())
        return
    with pytest.raises(SurgeryError, match=message) as caught:
        _fold(adapted, adapter, tmp_path / "o")
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda A, B: {"lora_A.weight": A[:0], "lora_B.weight": B[:, :0]}, "do not fit"),
        (lambda A, B: {"lora_A.weight": A[:, :0], "lora_B.weight": B}, "does not fit its weight"),
        (lambda A, B: {"lora_A.weight": A, "lora_B.weight": B[:0]}, "does not fit its weight"),
        (lambda A, B: {"lora_A.weight": A, "lora_B.weight": B[:, :2]}, "do not fit"),
        (lambda A, B: {"lora_A.weight": A.double(), "lora_B.weight": B}, "is no part of a LoRA update"),
        (lambda A, B: {"lora_A.weight": A.int(), "lora_B.weight": B}, "is no part of a LoRA update"),
        (lambda A, B: {"lora_A.weight": A[0], "lora_B.weight": B}, "do not fit"),
        (lambda A, B: {"lora_A.weight": A, "lora_B.weight": B / 0}, "holds NaN or infinity"),
        (lambda A, B: {"lora_A.weight": A}, "lacks a half"),
        (lambda A, B: {"lora_A": A, "lora_A.weight": 2 * A, "lora_B.weight": B}, "is no part of a LoRA update"),
        (lambda A, B: {"lora_A": A, "lora_B": B}, "is no part of a LoRA update"),  # PEFT leaves them out
        (lambda A, B: {"lora_A.weight": A, "lora_B.weight": B, "\x1b[2J\n.lora_A.weight": A}, "is no part of a LoRA update"),
        (lambda A, B: {"lora_embedding_A": A, "lora_embedding_B": B}, "is of another kind than the module"),
    ],
    ids=range(13),
)
def test_weights_of_strangers(change: Any, message: str, adapted: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    parts = change(torch.randn(3, 48), torch.randn(48, 3))
    save_file({f"{module}.{name}": part.clone() for name, part in parts.items()}, adapter / "adapter_model.safetensors")
    rank = parts[next(iter(parts))].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 5}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SurgeryError, match=message):
        _fold(adapted, adapter, tmp_path / "o")
    assert not (tmp_path / "o").exists()
