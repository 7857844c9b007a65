"""What surgery exports for stock PEFT to train: PEFT computes what attach does, and what it has trained is folded rightly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError, ScalesError
from surgery.names import TRAINS, Train
from surgery.progress import Silent
from tests.families import FAMILIES
from tests.models import save_llama, tensors_of
from tests.releases import needs
from tests.trl_runs import preferences, settings_of, tokenizer

IDS = (torch.arange(8 * 24).reshape(8, 24) * 7 + torch.arange(8)[:, None]) % 97
EXAMPLES = [{"input_ids": row, "labels": row} for row in IDS]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # names that PEFT and TRL use
]
has_tinylora = needs("peft", ">=0.20", "TinyLoRA")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama in float32 (``m``) and in bfloat16 (``b``), factorized (``f``, ``fb``). Read-only."""
    folder = tmp_path_factory.mktemp("carriers")
    save_llama(folder / "m", torch.float32, vocab_size=257, hidden_size=64, intermediate_size=128)
    save_llama(folder / "b", torch.bfloat16, vocab_size=257, hidden_size=64, intermediate_size=128)
    surgery.factorize(folder / "m", folder / "f", rank=6)
    surgery.factorize(folder / "b", folder / "fb", rank=6)
    return folder


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _continued(model: Any, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _touch(parameters: list[torch.nn.Parameter], scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that PEFT merges an adapter to."""
    merged = model.merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


@has_tinylora
@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize(
    ("name", "split"), [("llama", None), ("gpt2", True), ("gpt2", None), ("phi3", True), ("gpt_neox", True), ("bert", None)]
)
def test_tinylora_computes_what_is_folded(name: str, split: bool | None, train: Train, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, split=split)
    report = surgery.export(tmp_path / "f", None, tmp_path / "a", to="peft-trainable", train=train)
    targets = surgery.inspect(tmp_path / "f").targets
    assert report.trainable == sum(one.rank if train == "scales" else one.rank**2 for one in targets)
    model = family.load(folder)
    with torch.no_grad():
        original = family.run(model.eval())
        adapted = _continued(model, tmp_path / "a").eval()
        assert torch.equal(family.run(adapted), original)
        _touch(_trained(adapted))
        expected = family.run(adapted)
    assert (expected - original).abs().max() > 1e-3 * original.abs().max()
    adapted.save_pretrained(tmp_path / "t")
    surgery.fold(tmp_path / "f", tmp_path / "t", tmp_path / "o")
    torch.testing.assert_close(family.output(tmp_path / "o"), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@has_tinylora
@pytest.mark.parametrize("train", TRAINS)
def test_the_numbers_of_tinylora_are_the_scales_or_cores(train: Train, made: Path, tmp_path: Path) -> None:
    surgery.export(made / "f", None, tmp_path / "a", to="peft-trainable", train=train)
    model = _continued(_load(made / "m"), tmp_path / "a")
    _touch(_trained(model))
    model.save_pretrained(tmp_path / "t")
    found = surgery.show_scales(tmp_path / "t", factorized=made / "f", top=10**6)
    assert (found.train, found.changed) == (train, sum(one.numel() for one in _trained(model)))
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "tinylora_A")}
    surgery.blend([tmp_path / "t"], tmp_path / "s.safetensors", factorized=made / "f")
    values = surgery.read_scales(tmp_path / "s.safetensors").values
    assert len(values) == len(layers) == 14
    for key, value in values.items():
        layer = layers[f"base_model.model.{key.removesuffix('.weight')}"]
        inner = layer._compute_R("default").detach()
        assert torch.equal(value if train == "core" else torch.diag(value), torch.eye(6) + inner)
    surgery.fold(made / "f", tmp_path / "s.safetensors", tmp_path / "o")
    folded, merged = tensors_of(tmp_path / "o"), _weights(model)
    for key in values:
        torch.testing.assert_close(folded[key], merged[key], rtol=1e-5, atol=1e-6)
    # And on from there: what was trained is exported again, to be trained further or as a LoRA.
    surgery.export(made / "f", tmp_path / "t", tmp_path / "again", to="peft-trainable")
    files = [load_file(tmp_path / of / "adapter_model.safetensors") for of in ("again", "t")]
    assert files[0].keys() == files[1].keys()
    again = _weights(_continued(_load(made / "m"), tmp_path / "again"))
    for name, value in merged.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-6)
    surgery.export(made / "f", tmp_path / "t", tmp_path / "lora")
    as_lora = _weights(peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path / "lora"))
    for key in values:
        torch.testing.assert_close(as_lora[key], merged[key], rtol=1e-5, atol=1e-6)


@has_tinylora
def test_in_half_precision_the_factors_are_rounded_and_known_again(made: Path, tmp_path: Path) -> None:
    """PEFT holds all of it in float32, unless it is told to take the dtype of the weights."""
    surgery.export(made / "fb", None, tmp_path / "a", to="peft-trainable", train="core")
    for kept in (True, False):
        model = transformers.AutoModelForCausalLM.from_pretrained(made / "b", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "a", is_trainable=True, autocast_adapter_dtype=kept)
        _touch(_trained(model))
        model.save_pretrained(tmp_path / "t")
        dtypes = {value.dtype for value in load_file(tmp_path / "t/adapter_model.safetensors").values()}
        assert (dtypes == {torch.float32}) is kept
        with pytest.warns(surgery.SurgeryWarning, match="half precision") if not kept else nullcontext():
            surgery.fold(made / "fb", tmp_path / "t", tmp_path / "o", overwrite=True)


def _arguments(out: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 1,
        **options,
    }
    return transformers.TrainingArguments(**given)


@has_tinylora
@pytest.mark.parametrize("train", TRAINS)
def test_the_stock_trainer_trains_what_attach_does_and_resumes(train: Train, made: Path, tmp_path: Path) -> None:
    surgery.export(made / "f", None, tmp_path / "a", to="peft-trainable", train=train)

    def run(out: Path, resume: bool = False, **options: Any) -> None:
        trainer = transformers.Trainer(
            _continued(_load(made / "m"), tmp_path / "a"), _arguments(out, **options), train_dataset=EXAMPLES
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(out / "last"))

    run(tmp_path / "r")
    model = _load(made / "m")
    scales = surgery.attach(model, made / "f", train=train)
    optimizer = torch.optim.AdamW(scales.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    surgery.blend([tmp_path / "r/last"], tmp_path / "s.safetensors", factorized=made / "f")
    trained = surgery.read_scales(tmp_path / "s.safetensors").values
    expected = scales.values()
    for key, value in expected.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=2e-4)
        assert (value - trained[key]).norm() < 0.01 * (value - (1 if train == "scales" else torch.eye(6))).norm()
    run(tmp_path / "k", max_steps=2)  # as far as a killed run came
    run(tmp_path / "k", resume=True)
    once, resumed = (load_file(tmp_path / of / "last/adapter_model.safetensors") for of in ("r", "k"))
    assert once.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in once.items())


@has_tinylora
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_dpo_starts_at_ln_2(made: Path, tmp_path: Path) -> None:
    """With the adapter off for its reference, as for any adapter of PEFT."""
    import trl

    surgery.export(made / "f", None, tmp_path / "a", to="peft-trainable")
    trainer = trl.DPOTrainer(
        _continued(_load(made / "m"), tmp_path / "a"),
        args=settings_of(trl.DPOConfig, tmp_path / "o"),
        train_dataset=preferences("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
    )
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_lora_that_was_trained_on_the_residual(name: str, tmp_path: Path) -> None:
    """The residual with the LoRA is the original model where training begins; what is merged is what was trained."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, split=name != "llama" or None)
    surgery.export(tmp_path / "f", None, tmp_path / "a", to="peft-pissa")
    with torch.no_grad():
        original = family.run(family.load(folder).eval())
        adapted = _continued(family.load(tmp_path / "f"), tmp_path / "a").eval()
        torch.testing.assert_close(family.run(adapted), original, rtol=1e-4, atol=1e-5 * original.abs().max().item())
        adapted.save_pretrained(tmp_path / "untrained")
        _touch(_trained(adapted)[:1], 0.02)
        adapted.save_pretrained(tmp_path / "one")
        _touch(_trained(adapted), 0.02)
        expected = family.run(adapted)
    adapted.save_pretrained(tmp_path / "t")
    said = Silent()
    report = surgery.merge(tmp_path / "f", tmp_path / "untrained", tmp_path / "same", progress=said)
    assert (report.tensors, report.restored) == ((), report.shards)
    assert any(note.endswith("the bytes of the source's: nothing of the adapter has been trained") for note in said.notes)
    assert {file.name: file.read_bytes() for file in (tmp_path / "same").glob("*.safetensors")} == {
        file.name: file.read_bytes() for file in folder.glob("*.safetensors")
    }
    (changed,) = {one.tensor for one in surgery.merge(tmp_path / "f", tmp_path / "one", tmp_path / "o1").tensors}
    before, after = tensors_of(folder), tensors_of(tmp_path / "o1")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [changed]
    report = surgery.merge(tmp_path / "f", tmp_path / "t", tmp_path / "o")
    close: Callable[..., None] = torch.testing.assert_close
    close(family.output(tmp_path / "o"), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert {one.tensor for one in report.tensors} == {one.tensor for one in surgery.inspect(tmp_path / "f").targets}
    surgery.fold(tmp_path / "f", tmp_path / "t", tmp_path / "folded")
    assert tensors_of(tmp_path / "folded").keys() == tensors_of(tmp_path / "o").keys()
    # As a LoRA of the original model, of twice the rank.
    assert (
        surgery.export(tmp_path / "f", tmp_path / "t", tmp_path / "lora").rank
        == 2 * surgery.export(tmp_path / "f", None, tmp_path / "a2", to="peft-pissa").rank
    )
    with torch.no_grad():
        served = peft.PeftModel.from_pretrained(family.load(folder), tmp_path / "lora").eval()
        close(family.run(served), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_trained_scales_go_on_as_a_lora_on_the_residual(made: Path, tmp_path: Path) -> None:
    keys = [one.key for one in surgery.inspect(made / "f").targets]
    generator = torch.Generator().manual_seed(1)
    for shape in ((6,), (6, 6)):
        start = torch.ones(6) if shape == (6,) else torch.eye(6)
        values = {key: start + 0.2 * torch.randn(shape, generator=generator) for key in keys}
        surgery.export(made / "f", values, tmp_path / "a", to="peft-pissa", overwrite=True)
        merged = _weights(_continued(_load(made / "f"), tmp_path / "a"))
        surgery.fold(made / "f", values, tmp_path / "o", overwrite=True)
        folded = tensors_of(tmp_path / "o")
        for key in keys:
            torch.testing.assert_close(merged[key], folded[key], rtol=1e-4, atol=1e-5)


def test_a_lora_of_a_residual_is_merged_nowhere_else(made: Path, tmp_path: Path) -> None:
    surgery.export(made / "f", None, tmp_path / "a", to="peft-pissa")
    model = _continued(_load(made / "f"), tmp_path / "a")
    _touch(_trained(model), 0.02)
    model.save_pretrained(tmp_path / "t")
    config = json.loads((tmp_path / "t/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made / "f")
    for refused in (
        lambda: surgery.merge(made / "m", tmp_path / "t", tmp_path / "o"),
        lambda: surgery.fold(made / "f", made / "f/surgery/scales.safetensors", tmp_path / "o", lora=tmp_path / "t"),
        lambda: surgery.resize(tmp_path / "t", tmp_path / "o", rank=2),
    ):
        with pytest.raises(OptionError, match=r"was trained on the residual(.|\n)*surgery merge FACTORIZED"):
            refused()
    surgery.factorize(made / "m", tmp_path / "other", rank=5)
    with pytest.raises(OptionError, match="no adapter of another one"):
        surgery.merge(tmp_path / "other", tmp_path / "t", tmp_path / "o")
    # A trainer may have written the config anew: the numbers still tell.
    config["alpha_pattern"] = {}
    (tmp_path / "t/adapter_config.json").write_text(json.dumps(config))
    surgery.merge(made / "f", tmp_path / "t", tmp_path / "o")
    with pytest.raises(ScalesError, match="did not begin with the factors"):
        surgery.merge(tmp_path / "other", tmp_path / "t", tmp_path / "o2")
    lora = peft.get_peft_model(_load(made / "m"), peft.LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(made / "m")
    lora.save_pretrained(tmp_path / "plain")
    with pytest.raises(ScalesError, match=r"(?s)a LoRA of the original.*differ from these factors by [1-9]") as caught:
        surgery.merge(made / "f", tmp_path / "plain", tmp_path / "o3")
    assert str(caught.value.hint).startswith(f"surgery merge {made / 'm'} {tmp_path / 'plain'}; beside scales")
    surgery.merge(made / "m", tmp_path / "plain", tmp_path / "works")
    for options in ({"dtype": "float32"}, {"weights": [0.5]}):
        with pytest.raises(OptionError, match="is a factorized checkpoint"):
            surgery.merge(made / "f", tmp_path / "t", tmp_path / "o4", **options)
    with pytest.raises(OptionError, match="only a LoRA that was trained on its residual can be merged"):
        surgery.merge(made / "f", made / "f/surgery", tmp_path / "o4")


def _edited(adapter: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return out


def test_a_tinylora_that_is_not_of_these_factors_is_refused(made: Path, tmp_path: Path) -> None:
    surgery.export(made / "f", None, tmp_path / "a", to="peft-trainable")
    with pytest.raises(OptionError, match=r"is no LoRA adapter(.|\n)*surgery fold FACTORIZED"):
        surgery.merge(made / "m", tmp_path / "a", tmp_path / "o")
    first = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_"
    numbers = "base_model.tinylora_v.3"

    def turned(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()})

    cases: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], type[Exception], str]] = [
        ("A", turned(f"{first}A"), ScalesError, "tinylora_A' is not of these factors"),
        ("B", turned(f"{first}B"), ScalesError, "tinylora_B' is not of these factors"),
        ("P", turned(f"{first}P"), ScalesError, "tinylora_P' is not of these factors"),
        ("nan", lambda t: t.update({numbers: t[numbers] * math.nan}), ScalesError, "holds NaN or infinity"),
        ("short", lambda t: t.update({numbers: t[numbers][:-1].clone()}), FormatError, "misshapen"),
        ("missing", lambda t: t.pop(numbers), ScalesError, "lacks 'base_model.tinylora_v.3'"),
        ("more", lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), ScalesError, "holds more than scales"),
        ("integers", lambda t: t.update({numbers: t[numbers].int()}), FormatError, "misshapen"),
    ]
    for name, change, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            surgery.fold(made / "f", _edited(tmp_path / "a", tmp_path / name, change), tmp_path / "o")
    surgery.factorize(made / "m", tmp_path / "other", rank=5)
    with pytest.raises(
        ScalesError, match=r"(?s)not been made of these factors.*r and u \[6, 6\].*\[5, 5\] for scales, or \[5, 25\]"
    ):
        surgery.fold(tmp_path / "other", tmp_path / "a", tmp_path / "o")
    surgery.factorize(made / "b", tmp_path / "alike", rank=6)
    with pytest.raises(ScalesError, match="is not of these factors"):
        surgery.fold(tmp_path / "alike", tmp_path / "a", tmp_path / "o")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for key, value in (("weight_tying", 0.5), ("bias", "all"), ("modules_to_save", ["lm_head"])):
        folder = _edited(tmp_path / "a", tmp_path / key, lambda tensors: None)
        (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(OptionError, match=f"an adapter with {key} is none"):
            surgery.fold(made / "f", folder, tmp_path / "o")


def test_what_cannot_be_trained_so_is_refused(made: Path, tmp_path: Path) -> None:
    surgery.factorize(made / "m", tmp_path / "overlay", rank=4, layout="overlay")
    with pytest.raises(OptionError, match="holds no residual"):
        surgery.export(tmp_path / "overlay", None, tmp_path / "a", to="peft-pissa")
    with pytest.raises(OptionError, match=r"(?s)holds what scales change.*no scales"):
        surgery.export(made / "f", None, tmp_path / "a")
    with pytest.raises(OptionError, match="has one form"):
        surgery.export(made / "f", None, tmp_path / "a", to="peft-pissa", train="core")
    keys = [one.key for one in surgery.inspect(made / "f").targets]
    turning = {key: torch.eye(6) + 0.1 * torch.ones(6, 6).triu(1) for key in keys}
    with pytest.raises(OptionError, match="turns directions"):
        surgery.export(made / "f", turning, tmp_path / "a", to="peft-trainable", train="scales")
    scaling = {key: torch.diag(torch.arange(1.0, 7.0)) for key in keys}
    surgery.export(made / "f", scaling, tmp_path / "a", to="peft-trainable", train="scales")
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert torch.equal(stored["base_model.tinylora_v.0"], torch.arange(6.0))
    for name in ("mixtral", "t5"):
        FAMILIES[name].save(tmp_path / name)
        include = ["*experts*"] if name == "mixtral" else ["shared.weight"]
        surgery.factorize(tmp_path / name, tmp_path / f"{name}-f", rank=4, include=include)
        for to in ("peft-trainable", "peft-pissa"):
            with pytest.raises(OptionError, match="cannot be exported as LoRA"):
                surgery.export(tmp_path / f"{name}-f", None, tmp_path / "b", to=to)
    FAMILIES["llama"].save(tmp_path / "wide")
    surgery.factorize(tmp_path / "wide", tmp_path / "embedded", rank=4, include=["*embed_tokens*"])
    with pytest.raises(OptionError, match="cannot be exported as LoRA"):
        surgery.export(tmp_path / "embedded", None, tmp_path / "b", to="peft-trainable")


def test_the_model_that_an_adapter_names(made: Path, tmp_path: Path) -> None:
    def named(**options: Any) -> Any:
        surgery.export(made / "f", None, tmp_path / "a", overwrite=True, **{"to": "peft-trainable", **options})
        return json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"]

    assert named() is None
    assert named(base_model="acme/one") == "acme/one"
    assert named(to="peft-pissa") == str((made / "f").resolve())
    assert named(to="peft-pissa", base_model="acme/residual") == "acme/residual"
    with pytest.raises(OptionError, match="the name of the model is empty"):
        named(base_model=" ")
    with pytest.raises(OptionError, match="would name a folder of this machine"):
        named(to="peft-pissa", push_to_hub="acme/adapter")
    save_llama(tmp_path / "m", torch.float32)
    (tmp_path / "m/README.md").write_text("---\nbase_model: acme/older\nmodel_name: acme/own\n---\n# A model\n")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2)
    scales = tmp_path / "f/surgery/scales.safetensors"
    surgery.export(tmp_path / "f", scales, tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["base_model_name_or_path"] == "acme/own"
