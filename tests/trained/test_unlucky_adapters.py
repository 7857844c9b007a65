"""Adapters that were trained, as users and trainers leave them: renamed, rounded, one folder too high, over one another."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError, OutputError, ScalesError, SourceError
from surgery.progress import Silent
from tests.families import FAMILIES
from tests.loopback_hub import WRITING_TOKEN, LoopbackHub
from tests.models import files_of, save_llama, tensors_of
from tests.releases import needs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # names that PEFT uses
]
has_tinylora = needs("peft", ">=0.20", "TinyLoRA")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama (``m``), factorized (``f``), and a LoRA that was trained on the residual (``lora``). Read-only."""
    folder = tmp_path_factory.mktemp("unlucky")
    save_llama(folder / "m", torch.float32)
    surgery.factorize(folder / "m", folder / "f", rank=4)
    surgery.export(folder / "f", None, folder / "a", to="peft-pissa")
    model = _continued(folder / "f", folder / "a")
    _touch(model, 0.02)
    model.save_pretrained(folder / "lora")
    return folder


def _continued(model: Path, adapter: Path, **options: Any) -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(loaded, adapter, is_trainable=True, **options)


def _touch(model: Any, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def _edited(adapter: Path, out: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Path:
    shutil.copytree(adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(change(name, value) for name, value in tensors.items()), out / "adapter_model.safetensors")
    return out


@has_tinylora
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_tinylora_of_the_output_head(made: Path, tmp_path: Path) -> None:
    """PEFT saves the weight under such an adapter along with it."""
    surgery.factorize(made / "m", tmp_path / "f", rank=4, include=["lm_head.weight", "*q_proj*"])
    surgery.export(tmp_path / "f", None, tmp_path / "a", to="peft-trainable")
    model = _continued(made / "m", tmp_path / "a")
    _touch(model)
    model.save_pretrained(tmp_path / "t")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "t/adapter_model.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "t", tmp_path / "o")
    folded, merged = tensors_of(tmp_path / "o"), model.merge_and_unload().state_dict()
    for name, value in folded.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(folded["lm_head.weight"], tensors_of(made / "m")["lm_head.weight"])


@has_tinylora
def test_names_of_wrappers(made: Path, tmp_path: Path) -> None:
    surgery.export(made / "f", None, tmp_path / "a", to="peft-trainable")
    model = _continued(made / "m", tmp_path / "a")
    _touch(model)
    model.save_pretrained(tmp_path / "t")
    surgery.fold(made / "f", tmp_path / "t", tmp_path / "o")
    for i, wrapped in enumerate(
        [
            lambda name: f"module.{name}",
            lambda name: f"_orig_mod.{name}",
            lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        ]
    ):
        named = _edited(tmp_path / "t", tmp_path / f"t{i}", lambda name, value, wrapped=wrapped: (wrapped(name), value))
        surgery.fold(made / "f", named, tmp_path / f"o{i}")
        assert files_of(tmp_path / f"o{i}") == files_of(tmp_path / "o")


def test_a_folder_above_the_adapters(made: Path, tmp_path: Path) -> None:
    """As a trainer leaves checkpoints; the last of them is named."""
    for step in (2, 10):
        shutil.copytree(made / "lora", tmp_path / f"run/checkpoint-{step}")
    last = rf"such as {re.escape(str(tmp_path / 'run/checkpoint-10'))}"
    for call in (
        lambda: surgery.fold(made / "f", tmp_path / "run", tmp_path / "o"),
        lambda: surgery.export(made / "f", tmp_path / "run", tmp_path / "o"),
        lambda: surgery.show_scales(tmp_path / "run"),
        lambda: surgery.blend([tmp_path / "run"], tmp_path / "s.safetensors"),
        lambda: surgery.verify_folded(made / "f", made / "m", tmp_path / "run"),
    ):
        with pytest.raises(ScalesError, match=f"(?s)holds no scales, but folders of adapters.*{last}"):
            call()
    with pytest.raises(OptionError, match=f"(?s){last}"):
        surgery.merge(made / "f", tmp_path / "run", tmp_path / "o")
    with pytest.raises(SourceError, match=f"(?s){last}"):
        surgery.merge(made / "m", tmp_path / "run", tmp_path / "o")


@has_tinylora
def test_the_weights_in_an_adapter_stand_for_its_folder(made: Path, tmp_path: Path) -> None:
    scales = {one.key: torch.arange(1.0, 5.0) for one in surgery.inspect(made / "f").targets}
    surgery.export(made / "f", scales, tmp_path / "a", to="peft-trainable")
    surgery.fold(made / "f", tmp_path / "a/adapter_model.safetensors", tmp_path / "o")
    surgery.fold(made / "f", scales, tmp_path / "expected")
    assert files_of(tmp_path / "o") == files_of(tmp_path / "expected")


def test_an_adapter_of_a_residual_that_was_rounded(made: Path, tmp_path: Path) -> None:
    """Its factors have been rounded as well, which the merged weights have: somebody has to say so."""
    rounded = _edited(made / "a", tmp_path / "t", lambda name, value: (name, value.bfloat16()))
    with pytest.warns(surgery.SurgeryWarning, match=r"28 in all\) have been saved in half precision"):
        surgery.merge(made / "f", rounded, tmp_path / "o")
    merged = _continued(made / "f", rounded).merge_and_unload().state_dict()
    for name, value in tensors_of(tmp_path / "o").items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_lacks_a_module(made: Path, tmp_path: Path) -> None:
    lacking = _edited(
        made / "lora", tmp_path / "t", lambda name, value: (name.replace("layers.1.mlp.up", "layers.1.mlp.x"), value)
    )
    with pytest.raises(ScalesError, match=r"(?s)got: +lm|model.*expected: +'model.layers.1.mlp.up_proj' among them"):
        surgery.merge(made / "f", lacking, tmp_path / "o")


def test_an_export_never_replaces_what_it_reads(made: Path, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(made / "lora", tmp_path / "t"))
    with pytest.raises(OutputError, match="is one of the inputs"):
        surgery.export(made / "f", trained, trained, overwrite=True)
    assert files_of(trained) == files_of(made / "lora")
    surgery.export(made / "f", trained, tmp_path / "t/lora")  # beside it is free


def test_two_layouts_in_one_folder(made: Path, tmp_path: Path) -> None:
    FAMILIES["UNet"].save(tmp_path / "unet")
    surgery.factorize(tmp_path / "unet", tmp_path / "u", rank=2, include=["*attn*to_q*"])
    scales = {one.key: torch.full((one.rank,), 1.5) for one in surgery.inspect(tmp_path / "u").targets}
    for to in ("diffusers", "kohya", "peft"):
        surgery.export(tmp_path / "u", scales, tmp_path / to, to=to)
    before = {to: files_of(tmp_path / to) for to in ("diffusers", "kohya", "peft")}
    for there, to in (("diffusers", "kohya"), ("kohya", "peft"), ("peft", "diffusers")):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="holds an adapter in another layout"):
                surgery.export(tmp_path / "u", scales, tmp_path / there, to=to, overwrite=overwrite)
        assert files_of(tmp_path / there) == before[there]


@has_tinylora
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_cards_tell_what_the_adapter_is(hub: LoopbackHub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITING_TOKEN)

    def card(scales: Path | None, **options: Any) -> str:
        name = f"acme/a{len(hub.repos)}"
        surgery.export(made / "f", scales, tmp_path / name[5:], push_to_hub=name, progress=Silent(), **options)
        return (hub.repos[name].folder / "README.md").read_text()

    text = card(None, to="peft-trainable", train="core")
    assert "The cores between the top singular directions of" in text
    assert "- Trainable numbers in cores: 224" in text
    for text in (card(None, to="peft-pissa", base_model="acme/f"), card(made / "lora")):
        assert "Trainable scales" not in text
        assert "the residual" in text.replace("\n", " ")
    assert "A = Vᵀ" not in text
    assert "of rank 8 for 14 modules" in text


def test_kinds_and_files_that_are_not_read(made: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig.from_pretrained(str(made / "a"))
    config.use_dora, config.inference_mode = True, False
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "f", dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(OptionError, match=r"(?s)a plain LoRA only.*DoRA"):
        surgery.merge(made / "f", tmp_path / "dora", tmp_path / "o")
    surgery.export(made / "f", None, tmp_path / "t", to="peft-trainable")
    (tmp_path / "t/adapter_model.safetensors").rename(tmp_path / "t/adapter_model.bin")
    with pytest.raises(
        SourceError, match=r"(?s)no adapter_model.safetensors.*load it with PEFT, which reads adapter_model.bin"
    ):
        surgery.fold(made / "f", tmp_path / "t", tmp_path / "o")


@pytest.mark.parametrize("most", [0.1, 0.5, 1.0])
def test_what_is_for_the_original_model_is_not_taken_for_one_of_the_residual(most: float, made: Path, tmp_path: Path) -> None:
    """A LoRA that was exported from the same factors has their directions, and would be taken off them."""
    generator = torch.Generator().manual_seed(0)
    scales = {one.key: 1 + most * torch.rand(4, generator=generator) for one in surgery.inspect(made / "f").targets}
    surgery.export(made / "f", scales, tmp_path / "a")
    for call in (
        lambda: surgery.fold(made / "f", tmp_path / "a", tmp_path / "o"),
        lambda: surgery.merge(made / "f", tmp_path / "a", tmp_path / "o"),
        lambda: surgery.export(made / "f", tmp_path / "a", tmp_path / "o"),
    ):
        with pytest.raises(ScalesError, match=r"(?s)did not begin with the factors.*--lora"):
            call()
    assert not (tmp_path / "o").exists()
