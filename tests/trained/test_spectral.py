"""Adapters of scales and cores are read as they were trained, and damaged ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import ScalesError, SourceError, SurgeryError
from surgery.trained.spectral import is_spectral, key_of_part, part_of_key, read_spectral

FINGERPRINT = "ab" * 32
K = "base_model.model.layer.surgery_scale"


def _save(folder: Path, train: str = "scales", **config: Any) -> dict[str, torch.Tensor]:
    """An adapter of a matrix ``a.weight`` of rank 3, and a stack of two, ``b/c.weight``, of rank 2; ``d`` is absent."""
    numbers = {"scales": (3, 4), "core": (9, 8), "orthogonal": (9, 10)}[train]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{K}.spectral_delta.A/WEIGHT": 0.1 * torch.randn(numbers[0], generator=generator),
        f"{K}.spectral_delta.B%2fC/WEIGHT": 0.1 * torch.randn(numbers[1], generator=generator),
        f"{K}.spectral_fingerprint": torch.zeros(32, dtype=torch.uint8),
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    shapes = {"a.weight": [3], "b/c.weight": [2, 2], "d": [4]}
    said = {"peft_type": "SPECTRAL", "train": train, "fingerprint": FINGERPRINT, "absent": ["d"], "shapes": shapes, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return tensors


@pytest.mark.parametrize("key", ["a.b/c%d.weight[q]", "x%2Fy", "spectral_norm.SPECTRAL_x", "Ünï.ß", "%73"])
def test_keys_come_back(key: str) -> None:
    assert key_of_part(part_of_key(key)) == key
    assert "." not in part_of_key(key)
    assert "spectral_" not in part_of_key(key)


def test_scales_and_cores(tmp_path: Path) -> None:
    tensors = _save(tmp_path / "scales")
    read = read_spectral(tmp_path / "scales")
    assert is_spectral(tmp_path / "scales")
    assert (read.fingerprint, read.train, read.absent, read.factorized, read.beside) == (
        FINGERPRINT,
        "scales",
        ("d",),
        None,
        {},
    )
    a, b = (tensors[f"{K}.spectral_delta.{name}/WEIGHT"] for name in ("A", "B%2fC"))
    assert torch.equal(read.values["a.weight"], 1 + a)
    assert torch.equal(read.values["b/c.weight"], 1 + b.view(2, 2))
    tensors = _save(tmp_path / "core", "core")
    read = read_spectral(tmp_path / "core")
    assert read.train == "core"
    b = tensors[f"{K}.spectral_delta.B%2fC/WEIGHT"]
    assert torch.equal(read.values["b/c.weight"], torch.eye(2) + b.view(2, 2, 2))


def test_orthogonal_cores(tmp_path: Path) -> None:
    tensors = _save(tmp_path / "a", "orthogonal")
    read = read_spectral(tmp_path / "a")
    assert read.train == "core"
    p = tensors[f"{K}.spectral_delta.A/WEIGHT"].double()
    A = torch.zeros(3, 3, dtype=torch.float64)
    A[1, 0], A[2, 0], A[2, 1] = p[:3]
    A = A - A.T
    I = torch.eye(3, dtype=torch.float64)  # noqa: E741
    right = (I + p[3:6].diag()) @ torch.linalg.inv(I - A) @ (I + A) @ (I + p[6:].diag())
    assert torch.allclose(read.values["a.weight"].double(), right, atol=1e-7)
    assert torch.equal(read.beside["orthogonal"]["a.weight"].double(), p)
    assert read.beside["orthogonal"]["b/c.weight"].shape == (2, 5)


def test_chosen_directions(tmp_path: Path) -> None:
    tensors = _save(tmp_path / "a", "core")
    masks = {"A/WEIGHT": torch.tensor([1, 0, 1]), "B%2fC/WEIGHT": torch.tensor([[0, 1], [1, 0]])}
    tensors |= {f"{K}.spectral_chosen.{name}": mask.to(torch.uint8) for name, mask in masks.items()}
    tensors[f"{K}.spectral_delta.A/WEIGHT"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    tensors[f"{K}.spectral_delta.B%2fC/WEIGHT"] = torch.tensor([5.0, 6.0])
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    read = read_spectral(tmp_path / "a")
    assert read.values["a.weight"].tolist() == [[2, 0, 2], [0, 1, 0], [3, 0, 5]]
    assert read.values["b/c.weight"].tolist() == [[[1, 0], [0, 6]], [[7, 0], [0, 1]]]
    assert read.beside["chosen"]["a.weight"].tolist() == [1, 0, 1]


def _tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors.pop(f"{K}.{name}", None)
        if value is not None:
            tensors[f"{K}.{name}"] = value
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def _said(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (_said(peft_type="LORA"), SourceError, "no adapter that was trained with surgery.peft"),
        (_said(modules_to_save=["score"]), SurgeryError, "whole modules were trained"),
        (_said(train="all"), ScalesError, "train makes no sense"),
        (_said(fingerprint="ab"), ScalesError, "fingerprint makes no sense"),
        (_said(fingerprint=None), ScalesError, "fingerprint makes no sense"),
        (_said(absent="d"), ScalesError, "absent makes no sense"),
        (_said(factorized=1), ScalesError, "factorized makes no sense"),
        (_said(shapes={"a.weight": [0]}), ScalesError, "shapes makes no sense"),
        (_said(shapes={"a.weight": [True]}), ScalesError, "shapes makes no sense"),
        (_said(absent=[]), ScalesError, "what was trained of 'd' is missing"),
        (_tensor("spectral_delta.A/WEIGHT", None), ScalesError, "what was trained of 'a.weight' is missing"),
        (_tensor("spectral_delta.E", torch.ones(3)), ScalesError, "no target that the config knows"),
        (_tensor("lora_A.weight", torch.ones(3)), ScalesError, "no target that the config knows"),
        (_tensor("other.spectral_delta.A/WEIGHT", torch.ones(3)), ScalesError, "two tensors are of 'a.weight'"),
        (_tensor("spectral_delta.A/WEIGHT", torch.ones(4)), ScalesError, "does not fit its target"),
        (_tensor("spectral_delta.A/WEIGHT", torch.ones(3).half()), ScalesError, "does not fit its target"),
        (_tensor("spectral_delta.A/WEIGHT", torch.tensor([1, torch.nan, 1])), ScalesError, "NaN or infinity"),
        (_tensor("spectral_chosen.A/WEIGHT", torch.ones(3).byte()), ScalesError, "chosen of some targets and not of others"),
        (_tensor("spectral_chosen.A/WEIGHT", torch.ones(2).byte()), ScalesError, "is no choice of directions"),
        (_tensor("spectral_chosen.A/WEIGHT", 2 * torch.ones(3).byte()), ScalesError, "is no choice of directions"),
        (_tensor("spectral_chosen.A/WEIGHT", torch.zeros(3).byte()), ScalesError, "is no choice of directions"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), SourceError, "there is no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{"), SurgeryError, "adapter_model.safetensors"),
    ],
)
def test_damaged_adapters(change: Callable[[Path], None], kind: type[SurgeryError], match: str, tmp_path: Path) -> None:
    _save(tmp_path / "a")
    read_spectral(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(kind, match=match):
        read_spectral(tmp_path / "a")


def test_what_is_none(tmp_path: Path) -> None:
    assert not is_spectral(tmp_path)
    assert not is_spectral(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("[")
    assert not is_spectral(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert not is_spectral(tmp_path)
