"""Adapters of ``surgery.peft`` where scales files are taken: by fold, export, blend, show and verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgery
from surgery.errors import ScalesError
from surgery.peft import SpectralConfig, scales_of
from surgery.training.ways import Way
from tests.models import save_llama, tensors_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # names that PEFT uses
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama (``m``), factorized (``f``, ``other``), and adapters of two trainings for each way. Read-only."""
    folder = tmp_path_factory.mktemp("trained")
    save_llama(folder / "m", torch.float32)
    surgery.factorize(folder / "m", folder / "f", rank=4)
    surgery.factorize(folder / "m", folder / "other", rank=3)
    for way in ("scales", "core", "orthogonal"):
        for seed in (0, 1):
            model = peft.get_peft_model(_load(folder / "m"), SpectralConfig(factorized=str(folder / "f"), train=way))
            scales = surgery.attach(_load(folder / "m"), folder / "f", train=way)
            generator = torch.Generator().manual_seed(seed)
            for one, other in zip(scales_of(model).parameters(), scales.parameters(), strict=True):
                one.data.normal_(std=0.2, generator=generator)
                other.data.copy_(one.data)
            model.save_pretrained(folder / f"{way}-{seed}")
            scales.save(folder / f"{way}-{seed}.safetensors")
    return folder


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _same(one: Path, other: Path) -> bool:
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("way", ["scales", "core", "orthogonal"])
def test_an_adapter_is_taken_for_its_scales(way: Way, made: Path, tmp_path: Path) -> None:
    adapter, file = made / f"{way}-0", made / f"{way}-0.safetensors"
    surgery.fold(made / "f", adapter, tmp_path / "a")
    surgery.fold(made / "f", file, tmp_path / "b")
    assert _same(tmp_path / "a", tmp_path / "b")
    assert not _same(tmp_path / "a", made / "m")
    assert surgery.show_scales(adapter) == surgery.show_scales(file)
    surgery.blend([adapter, made / f"{way}-1"], tmp_path / "a.safetensors")
    surgery.blend([file, made / f"{way}-1.safetensors"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    surgery.export(made / "f", adapter, tmp_path / "lora-a")
    surgery.export(made / "f", file, tmp_path / "lora-b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lora-a" / name).read_bytes() == (tmp_path / "lora-b" / name).read_bytes()
    assert surgery.verify_folded(made / "f", tmp_path / "a", adapter).kept == pytest.approx(1, abs=1e-4)


def test_an_adapter_of_other_factors_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ScalesError, match=r"(?s)was trained with other factors.*fingerprint.*use the factorized folder"):
        surgery.fold(made / "other", made / "scales-0", tmp_path / "o")


def test_adapters_of_other_kinds_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "scales-0", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for kind, hint in (("VERA", "scales file"), ("LORA", "surgery merge"), (None, "scales file")):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps({**config, "peft_type": kind}))
        with pytest.raises(ScalesError, match=rf"(?s)is no adapter of scales or cores.*{hint}"):
            surgery.show_scales(tmp_path / "a")
        if kind != "LORA":
            with pytest.raises(ScalesError, match="is no adapter of scales or cores"):
                surgery.fold(made / "f", tmp_path / "a", tmp_path / "o")


def test_a_folder_of_scales_with_adapters_beside_them(made: Path, tmp_path: Path) -> None:
    """As a Trainer with SaveScales leaves it where a LoRA is trained, too: the scales file is meant."""
    shutil.copytree(made / "scales-0", tmp_path / "a")
    shutil.copy(made / "scales-1.safetensors", tmp_path / "a/scales.safetensors")
    with pytest.warns(surgery.SurgeryWarning, match=r"is a folder: its scales\.safetensors is taken"):
        surgery.fold(made / "f", tmp_path / "a", tmp_path / "o")
    surgery.fold(made / "f", made / "scales-1.safetensors", tmp_path / "b")
    assert _same(tmp_path / "o", tmp_path / "b")
