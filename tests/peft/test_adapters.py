"""Scales and cores as adapters of PEFT: what they compute and train is what ``attach`` does, and what is saved comes back."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

import surgery
import surgery.peft
from surgery.errors import OptionError, ScalesError, SurgeryWarning
from surgery.peft import SpectralConfig, scales_of
from surgery.peft.layer import SpectralLayer
from surgery.trained.spectral import read_spectral
from surgery.training.ways import Way
from tests.families import FAMILIES, Family
from tests.models import save_llama, tensors_of
from tests.releases import checkpoint_activations, needs
from tests.training.test_attach_families import CUT

IDS = (torch.arange(2 * 20).reshape(2, 20) * 7) % 97
WAYS: list[Way] = ["scales", "core", "orthogonal"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # names that PEFT uses
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama (``m``), factorized (``f``), also with another rank (``other``), and as an overlay. Read-only."""
    folder = tmp_path_factory.mktemp("peft")
    save_llama(folder / "m", torch.float32, vocab_size=128, hidden_size=64, intermediate_size=128)
    surgery.factorize(folder / "m", folder / "f", rank=6)
    surgery.factorize(folder / "m", folder / "other", rank=4)
    surgery.factorize(folder / "m", folder / "overlay", rank=6, layout="overlay")
    return folder


def _load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def _adapted(made: Path, source: str = "m", **options: Any) -> Any:
    config = SpectralConfig(**{"factorized": str(made / "f"), "task_type": "CAUSAL_LM", **options})
    return peft.get_peft_model(_load(made / source), config)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _train(model: Any, parameters: list[torch.nn.Parameter], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _touch(model: Any, adapter: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for delta in scales_of(model, adapter).parameters():
        delta.data = 0.3 * torch.randn(delta.shape, generator=generator)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("source", ["m", "f"])
@pytest.mark.parametrize("train", WAYS)
def test_steps_are_those_of_attach_and_come_back(train: Way, source: str, made: Path, tmp_path: Path) -> None:
    model = _adapted(made, source, train=train)
    original = _logits(_load(made / "m"))
    attached = _load(made / source)
    scales = surgery.attach(attached, made / "f", train=train)
    assert torch.equal(_logits(model), _logits(attached))
    assert torch.equal(_logits(model), original) if source == "m" else torch.allclose(_logits(model), original, atol=1e-5)
    assert {id(one) for one in _trainable(model)} == {id(one) for one in scales_of(model).parameters()}
    assert all(parameter.dtype == torch.float32 for parameter in _trainable(model))

    _train(attached, list(scales.parameters()))
    _train(model, _trainable(model))
    trained = _logits(model)
    assert (trained - original).abs().max() > 0.05
    assert _same(scales_of(model).values(), scales.values())
    assert torch.equal(trained, _logits(attached))
    with model.disable_adapter():
        assert torch.allclose(_logits(model), original, atol=0 if source == "m" else 1e-5, rtol=0)

    model.save_pretrained(tmp_path / "a")
    assert sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) < 100_000
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again = peft.PeftModel.from_pretrained(_load(made / source), tmp_path / "a", **options)
        assert torch.equal(_logits(again), trained)
        assert len(_trainable(again)) == (14 if "is_trainable" in options else 0)
    assert torch.equal(_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")), trained)
    bare = _load(made / source)
    bare.load_adapter(str(tmp_path / "a"))
    assert torch.equal(_logits(bare), trained)
    bare.disable_adapters()
    assert torch.allclose(_logits(bare), original, atol=0 if source == "m" else 1e-5, rtol=0)

    scales.save(tmp_path / "scales.safetensors")
    surgery.fold(made / "f", tmp_path / "scales.safetensors", tmp_path / "folded")
    merged = again.merge_and_unload()
    assert type(merged) is transformers.LlamaForCausalLM
    assert not any(isinstance(module, SpectralLayer) for module in merged.modules())
    for name, weight in tensors_of(tmp_path / "folded").items():
        assert torch.allclose(merged.get_parameter(name), weight, atol=2e-7, rtol=2e-7), name


def test_the_file_is_as_peft_and_its_readers_know_it(made: Path, tmp_path: Path) -> None:
    model = _adapted(made)
    _touch(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn.q_proj.surgery_scale"
    delta = dict(zip(scales_of(model).values(), scales_of(model).parameters(), strict=True))[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    saved = tensors[f"{layer}.spectral_delta.MODEL/LAYERS/0/SELF_ATTN/Q_PROJ/WEIGHT"]
    assert torch.equal(saved, delta.detach())
    assert len(tensors) == 14 + 1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    manifest = surgery.Manifest.read(made / "f")
    assert (config["peft_type"], config["train"], config["absent"]) == ("SPECTRAL", "scales", [])
    assert (config["factorized"], config["fingerprint"]) == (str(made / "f"), manifest.fingerprint)
    (said,) = (tensor for name, tensor in tensors.items() if name.endswith(".surgery_scale.spectral_fingerprint"))
    assert bytes(said.tolist()).hex() == manifest.fingerprint


def test_merge_says_what_to_do_instead(made: Path, tmp_path: Path) -> None:
    _adapted(made).save_pretrained(tmp_path / "a")
    with pytest.raises(OptionError, match=rf"(?s)holds scales or cores.*surgery fold {made / 'f'} {tmp_path / 'a'} -o OUT"):
        surgery.merge(made / "m", tmp_path / "a", tmp_path / "out")


# Several adapters


@pytest.mark.parametrize("source", ["m", "f"])
def test_two_adapters(source: str, made: Path, tmp_path: Path) -> None:
    original = _logits(_load(made / "m"))
    outputs, changes = {}, {}
    for name, seed, train in (("one", 1, "scales"), ("two", 2, "core")):
        model = _adapted(made, source, train=train)
        _touch(model, seed=seed)
        model.save_pretrained(tmp_path / name)
        outputs[name] = _logits(model)
        merged = _load(made / "m").double()
        attached = _load(made / "m")
        scales = surgery.attach(attached, made / "f", train=train)  # type: ignore[arg-type]
        for delta, value in zip(scales.parameters(), scales_of(model).parameters(), strict=True):
            delta.data.copy_(value.detach())
        scales.save(tmp_path / f"{name}.safetensors")
        surgery.fold(made / "f", tmp_path / f"{name}.safetensors", tmp_path / f"folded-{name}")
        changes[name] = {
            key: weight.double() - merged.get_parameter(key) for key, weight in tensors_of(tmp_path / f"folded-{name}").items()
        }
    model = peft.PeftModel.from_pretrained(_load(made / source), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two", is_trainable=True)
    assert torch.equal(_logits(model), outputs["one"])
    model.set_adapter("two")
    assert torch.equal(_logits(model), outputs["two"])
    assert {id(one) for one in _trainable(model)} == {id(one) for one in scales_of(model, "two").parameters()}
    model.base_model.set_adapter(["one", "two"])
    truth = _load(made / "m").double()
    with torch.no_grad():
        for key, weight in truth.named_parameters():
            weight += changes["one"][key] + changes["two"][key]
    assert torch.allclose(_logits(model).double(), _logits(truth), atol=1e-4)
    with model.disable_adapter():
        assert torch.allclose(_logits(model), original, atol=1e-5)
    both = _logits(model)
    model.merge_adapter()
    assert torch.allclose(_logits(model), both, atol=1e-4)
    with pytest.raises(OptionError, match="merged into the model"):
        model.add_adapter("three", SpectralConfig(factorized=str(made / "f")))
    model.unmerge_adapter()
    assert torch.equal(_logits(model), both)

    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(_logits(model), outputs["two"])
    with pytest.raises(OptionError, match="no adapter 'one'"):
        scales_of(model, "one")
    model.delete_adapter("two")
    assert torch.allclose(_logits(model.base_model), original, atol=1e-5)
    unloaded = model.unload()
    assert torch.allclose(_logits(unloaded), original, atol=1e-5)
    assert type(unloaded) is transformers.LlamaForCausalLM


def test_what_is_unloaded_is_the_original_model(made: Path) -> None:
    model = _adapted(made, "f")
    _touch(model)
    assert torch.allclose(_logits(model.unload()), _logits(_load(made / "m")), atol=1e-5)


@pytest.mark.parametrize("source", ["m", "f"])
def test_without_adapters_a_merged_model_is_the_original(source: str, made: Path) -> None:
    """As with PEFT's own methods, which trainers rely on for their references."""
    original = _logits(_load(made / "m"))
    model = _adapted(made, source)
    _touch(model)
    trained = _logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), original, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_logits(model), trained, rtol=1e-4, atol=1e-4)
    assert (trained - original).abs().max() > 1e-2


def test_a_copy_of_the_model_has_scales_of_its_own(made: Path) -> None:
    model = _adapted(made)
    other = copy.deepcopy(model)
    _touch(model)
    assert torch.equal(_logits(other), _logits(_load(made / "m")))
    _touch(other, seed=1)
    assert not torch.equal(_logits(other), _logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(_logits(other), _logits(model))


# dtypes and what trains


def test_parameters_stay_float32(made: Path, tmp_path: Path) -> None:
    model = _adapted(made)
    _touch(model)
    before = scales_of(model).values()
    half = model.to(torch.bfloat16)
    assert half.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in scales_of(half).parameters())
    assert _same(scales_of(half).values(), before)
    model = _adapted(made)
    model.save_pretrained(tmp_path)
    for parameter in scales_of(model).parameters():  # what TRL does where the model is quantized
        parameter.data = parameter.data.to(torch.bfloat16)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(parameter.dtype == torch.float32 for parameter in scales_of(model).parameters())


def _gradients(model: Any, scales: surgery.Scales) -> list[torch.Tensor | None]:
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = [delta.grad for delta in scales.parameters()]
    for delta in scales.parameters():
        delta.grad = None
    return gradients


def test_gradients_are_those_of_attach(made: Path) -> None:
    gradients: dict[str, list[list[torch.Tensor | None]]] = {"autocast": [], "checkpointing": []}
    for model in (_load(made / "f"), _adapted(made, "f", train="core")):
        scales = scales_of(model) if isinstance(model, peft.PeftModel) else surgery.attach(model, made / "f", train="core")
        for i, delta in enumerate(scales.parameters()):
            delta.data = 0.1 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(i))
        with torch.autocast("cpu", torch.bfloat16):
            gradients["autocast"].append(_gradients(model, scales))
        model.train()
        model.enable_input_require_grads()
        checkpoint_activations(model, use_reentrant=False)
        gradients["checkpointing"].append(_gradients(model, scales))
    for one, other in gradients.values():
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)
        assert all(gradient is not None for gradient in (*one, *other))


def test_compiled(made: Path) -> None:
    model = _adapted(made, "f")
    _touch(model)
    layer = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        output = run(x)
        output.square().sum().backward()
        deltas = [delta for delta in scales_of(model).parameters() if delta.grad is not None]
        assert len(deltas) == 3
        found.append([output, *(delta.grad for delta in deltas)])
        for delta in deltas:
            delta.grad = None
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


# Other models: stacks of experts, slices of fused weights, Conv1D, and what transformers renames


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("mixtral", None),
        ("gpt2", True),
        ("phi3", True),
        ("UNet", None),
        ("nomic_bert", None),
    ],
)
def test_other_models(name: str, split: bool | None, tmp_path: Path) -> None:
    """Stacks of experts, slices of fused weights, Conv1D, convolutions, and targets that transformers cuts."""
    family = FAMILIES[name] if name in FAMILIES else Family(*CUT[name][:2], None, set(), {})
    model = family.save(tmp_path / "m")
    surgery.factorize(model, tmp_path / "f", rank=3, split=split)
    outputs = []
    for attach in (True, False):
        loaded = family.load(tmp_path / "m")
        with torch.no_grad():
            original = family.run(loaded)
        if attach:
            scales = surgery.attach(loaded, tmp_path / "f")
        else:
            loaded = peft.get_peft_model(loaded, SpectralConfig(factorized=str(tmp_path / "f"))).eval()
            scales = scales_of(loaded)
            with torch.no_grad():
                assert torch.equal(family.run(loaded), original)
        for i, delta in enumerate(scales.parameters()):
            delta.data = 0.3 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            outputs.append(family.run(loaded))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], original, atol=1e-4)
    loaded.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(family.load(tmp_path / "m"), tmp_path / "a")
    bare = family.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(family.run(again), outputs[0])
        # transformers 5.0 loads nothing into a GPT-2, and changes how PEFT takes stacks of experts from there on.
        if isinstance(bare, transformers.PreTrainedModel) and Version(transformers.__version__) >= Version("5.16"):
            bare.load_adapter(str(tmp_path / "a"))
            assert torch.equal(family.run(bare.eval()), outputs[0])
        assert torch.allclose(family.run(again.merge_and_unload()), outputs[0], atol=1e-4)


@needs("bitsandbytes", ">=0.50.2", "a quantized base")
def test_a_quantized_base(made: Path, tmp_path: Path) -> None:
    def quantized() -> Any:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True)
        return _load(made / "m", quantization_config=config, device_map="cpu").train()

    model = peft.get_peft_model(quantized(), SpectralConfig(factorized=str(made / "overlay"), task_type="CAUSAL_LM"))
    attached = quantized()
    scales = surgery.attach(attached, made / "overlay")
    _train(attached, list(scales.parameters()))
    _train(model, _trainable(model))
    assert _same(scales_of(model).values(), scales.values())
    with pytest.raises(OptionError, match="quantized"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path, is_trainable=True)
    assert _same(scales_of(again).values(), scales.values())
    again.load_adapter(tmp_path, "second")  # while the first has a part in what layers compute
    assert _same(scales_of(again, "second").values(), scales.values())


# What belongs together


def test_other_factors_are_refused(made: Path, tmp_path: Path) -> None:
    _adapted(made).save_pretrained(tmp_path / "a")
    own, other = (surgery.Manifest.read(made / name).fingerprint for name in ("f", "other"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "factorized": str(made / "other")}))
    with pytest.raises(OptionError, match=rf"(?s)belongs to other factors.*{own}.*{other}"):
        peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path / "a")
    with pytest.raises(OptionError, match=rf"(?s)belongs to other factors.*{own}.*{other}"):
        peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path / "a", config=SpectralConfig(factorized=str(made / "other")))
    with pytest.raises(ScalesError, match=r"(?s)trained in another way.*train='core'"):
        peft.PeftModel.from_pretrained(
            _load(made / "m"), tmp_path / "a", config=SpectralConfig(factorized=str(made / "f"), train="core")
        )


def test_a_factorized_folder_that_is_elsewhere(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "f", tmp_path / "f")
    model = peft.get_peft_model(_load(made / "m"), SpectralConfig(factorized=str(tmp_path / "f")))
    _touch(model)
    model.save_pretrained(tmp_path / "a")
    shutil.move(tmp_path / "f", tmp_path / "moved")
    with pytest.raises(OptionError, match=r'(?s)no factorized checkpoint in .*"factorized" into adapter_config.json.*config='):
        peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path / "a")
    with pytest.raises(OptionError, match=r"(?s)no factorized checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    config = SpectralConfig(factorized=str(tmp_path / "moved"))
    again = peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path / "a", config=config)
    assert torch.equal(_logits(again), _logits(model))
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "factorized": str(tmp_path / "moved")}))
    assert torch.equal(_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")), _logits(model))


def test_targets_that_the_model_lacks_are_listed(made: Path, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=3)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=1)
    with pytest.warns(SurgeryWarning, match="7 of 14 targets are not in this model"):
        adapted = peft.get_peft_model(model, SpectralConfig(factorized=str(tmp_path / "f")))
    _touch(adapted)
    adapted.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert len(config["absent"]) == 7
    assert all(key.startswith("model.layers.1.") for key in config["absent"])
    again = transformers.LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=1)
    peft.PeftModel.from_pretrained(again, tmp_path / "a")  # without a warning


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train": "all"}, "train makes no sense"),
        ({"choose": 0}, "choose must be 1 or more"),
        ({"choose": 2, "choose_steps": 0}, "choose_steps must be 1 or more"),
    ],
)
def test_configs_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        SpectralConfig(factorized="f", **options)


def test_a_config_without_a_folder(made: Path) -> None:
    with pytest.raises(OptionError, match="needs a factorized checkpoint"):
        peft.get_peft_model(_load(made / "m"), SpectralConfig())


def test_modules_that_are_trained_whole(made: Path, tmp_path: Path) -> None:
    model = _adapted(made, modules_to_save=["lm_head"])
    assert any(
        name.endswith("lm_head.modules_to_save.default.weight") for name, p in model.named_parameters() if p.requires_grad
    )
    _train(model, _trainable(model))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path)
    assert torch.equal(_logits(again), _logits(model))
    with pytest.raises(OptionError, match=r"(?s)whole modules were trained.*merge_and_unload"):
        read_spectral(tmp_path)
    with pytest.raises(OptionError, match="trained whole, and has scales"):
        _adapted(made, modules_to_save=["q_proj"])


def test_what_is_attached_and_what_is_adapted_exclude_each_other(made: Path) -> None:
    with pytest.raises(OptionError, match="attached to this model already"):
        surgery.attach(_adapted(made), made / "f")
    with pytest.raises(OptionError, match="attached to this model already"):
        model = _load(made / "m")
        surgery.attach(model, made / "f")
        peft.get_peft_model(model, SpectralConfig(factorized=str(made / "f")))
    with pytest.raises(OptionError, match="cannot be detached alone"):
        scales_of(_adapted(made)).detach()


def test_an_output_head_that_is_read_past_its_forward_is_refused(made: Path, tmp_path: Path) -> None:
    surgery.factorize(made / "m", tmp_path / "f", rank=3, include=["lm_head.weight"])
    model = peft.get_peft_model(_load(made / "m"), SpectralConfig(factorized=str(tmp_path / "f"), task_type="CAUSAL_LM"))
    base = model.get_base_model()
    _logits(model)
    base.forward = lambda input_ids, **_: base.model(input_ids)[0] @ base.lm_head.weight.T
    with pytest.raises(OptionError, match=r"(?s)output head has scales and was not run"):
        model(input_ids=IDS)


def test_the_method_is_registered_once() -> None:
    from surgery.peft.tuner import register

    register()
    assert peft.PeftType("SPECTRAL") is peft.PeftType.SPECTRAL  # type: ignore[attr-defined]
    assert [kind.name for kind in peft.PeftType].count("SPECTRAL") == 1
    loop = subprocess.run(
        [sys.executable, "-c", "import sys, surgery; assert 'peft' not in sys.modules and 'transformers' not in sys.modules"],
        check=False,
        timeout=100,
    )
    assert loop.returncode == 0
