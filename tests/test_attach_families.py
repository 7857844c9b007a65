"""Scales attached to models of many families: what is attached is what is folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from tests.families import FAMILIES


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, None) for name in FAMILIES), *((name, True) for name, family in FAMILIES.items() if family.fused)],
)
def test_attached_is_folded(name: str, split: bool | None, tmp_path: Path) -> None:
    """Untouched, not a bit changes; with random scales the output is that of the folded model, and all get a gradient."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "model")
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay", split=split)
    model = family.load(folder)
    with torch.no_grad():
        before = family.run(model)
    scales = surgery.attach(model, tmp_path / "f")
    trainable = {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.requires_grad}
    assert sum(trainable.values()) == sum(target.trainable for target in manifest.targets)
    untouched = family.run(model)
    assert torch.equal(untouched, before)

    generator = torch.Generator().manual_seed(1)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)
    attached = family.run(model)
    attached.float().square().mean().backward()
    unused = {key for key, delta in zip(scales.values(), scales.parameters(), strict=True) if delta.grad is None}
    assert unused == set()
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out", base=folder)
    folded = family.output(tmp_path / "out")
    assert not torch.allclose(folded, before, rtol=1e-3, atol=1e-4)
    assert torch.allclose(attached, folded, rtol=1e-3, atol=1e-4 * folded.abs().max().item())
