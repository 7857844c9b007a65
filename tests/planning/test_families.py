"""Models of many families, as transformers and diffusers save them: which tensors are targets, and all the way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.commands.verify import verify
from surgery.format.manifest_records import TargetRecord
from tests.families import FAMILIES
from tests.models import files_of, tensors_of


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_is_complete(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "model")
    steps = surgery.plan(folder, rank=4)
    tensors = tensors_of(folder)
    targets = {target.tensor: target for target in steps.targets}
    assert steps.recipe == family.recipe
    assert not steps.notes
    # Every tensor is accounted for, once.
    assert sorted([*targets, *(item.tensor for item in steps.skipped)]) == sorted(tensors)
    assert all(item.reason for item in steps.skipped)
    assert not [item for item in steps.skipped if item.wanted or "loaders leave" in item.reason]
    # Exactly the layers one would expect are targets, and each of those that are is one that the model has.
    found = {layer for tensor in targets for layer in family.layers if tensor.endswith(layer)}
    assert found == family.layers
    assert not [tensor for tensor in targets if not tensor.endswith(tuple(family.layers))]
    for tensor, target in targets.items():
        assert target.shape == tuple(tensors[tensor].shape)


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, None) for name in FAMILIES), *((name, True) for name, family in FAMILIES.items() if family.fused)],
)
def test_there_and_back(name: str, split: bool | None, tmp_path: Path) -> None:
    """Untouched scales give the files back; random ones the output of the model with the formula applied to it."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "model")
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, split=split).manifest
    if split:
        slices: dict[str, set[str]] = {}
        for target in manifest.targets:
            if target.slice is not None:
                ending = next(ending for ending in family.fused if target.tensor.endswith(ending))
                slices.setdefault(ending, set()).add(target.slice.name)
        assert slices == {ending: set(names) for ending, names in family.fused.items()}
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)
    assert verify(tmp_path / "f").ok

    generator = torch.Generator().manual_seed(1)
    scales = {
        target.key: 1 + 0.5 * torch.randn(target.scales_shape, generator=generator, dtype=torch.float32)
        for target in manifest.targets
    }
    surgery.fold(tmp_path / "f", scales, tmp_path / "folded")
    _apply_formula(folder, tmp_path / "f", manifest.targets, scales, tmp_path / "expected")
    expected, found = family.output(tmp_path / "expected"), family.output(tmp_path / "folded")
    assert torch.isfinite(expected).all()
    change = (expected - family.output(folder)).abs().max().item()
    assert change > 1e-5
    assert (found - expected).abs().max().item() < 1e-3 * change


def _apply_formula(
    model: Path, factorized: Path, targets: list[TargetRecord], scales: dict[str, torch.Tensor], out: Path
) -> None:
    """W + U diag(s (g - 1)) V^T in float64, the views worked out from the manifest by index lists."""
    for file, data in files_of(model).items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(data)
    factors: dict[str, torch.Tensor] = {}
    for file in (factorized / "surgery").glob("factors-*"):
        factors.update(load_file(file))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for target in targets:
            if target.tensor not in tensors:
                continue
            weight = tensors[target.tensor]
            U, s, V = (factors[f"{target.key}.{part}"].double() for part in ("U", "s", "V"))
            g = scales[target.key].double()
            # Batches of matrices also where there is one.
            U, s, V, g = (x if target.view == "stack" else x[None] for x in (U, s, V, g))
            update = torch.einsum("bik,bk,bjk->bij", U, s * (g - 1), V)
            matrices = weight.double().reshape(len(U), -1, weight.shape[-1] if target.view != "convolution" else V.shape[1])
            indices = [list(range(matrices.shape[1])), list(range(matrices.shape[2]))]
            if target.slice is not None:
                part = target.slice
                indices[part.axis] = [i for i in indices[part.axis] if part.start <= i % part.period < part.stop]
            matrices[:, torch.tensor(indices[0])[:, None], torch.tensor(indices[1])] += update
            tensors[target.tensor] = matrices.reshape(weight.shape).to(weight.dtype).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})


def test_slices_are_where_the_modelling_code_has_them(tmp_path: Path) -> None:
    """Rows of q, k and v of fused weights, as the models of transformers lay them out."""

    def rows(name: str, ending: str) -> dict[str, list[int]]:
        folder = FAMILIES[name].save(tmp_path / name)
        found = {}
        for target in surgery.plan(folder, rank=2, split=True).targets:
            part = target.view.slice
            if part is not None and target.tensor.endswith(ending) and ".0." in target.tensor:
                length = target.shape[1 + part.axis if target.view.kind == "stack" else part.axis]
                found[part.name] = [i for i in range(length) if part.start <= i % part.period < part.stop]
        return found

    head = 8
    # Side by side, with two key-value heads for four query heads.
    assert rows("phi3", "qkv_proj.weight") == {"q": [*range(32)], "k": [*range(32, 48)], "v": [*range(48, 64)]}
    assert rows("gpt2", "c_attn.weight") == {"q": [*range(32)], "k": [*range(32, 64)], "v": [*range(64, 96)]}
    # Head by head.
    for name in ("gpt_neox", "bloom"):
        expected = {
            part: [3 * head * h + head * j + i for h in range(4) for i in range(head)] for j, part in enumerate(("q", "k", "v"))
        }
        assert rows(name, "query_key_value.weight") == expected
    # Two groups of two query heads, a key head and a value head.
    grouped = rows("falcon, grouped", "query_key_value.weight")
    assert grouped == {
        "q": [*range(16), *range(32, 48)],
        "k": [*range(16, 24), *range(48, 56)],
        "v": [*range(24, 32), *range(56, 64)],
    }
    single = rows("falcon, one key head", "query_key_value.weight")
    assert single == {"q": [*range(32)], "k": [*range(32, 40)], "v": [*range(40, 48)]}
    # gpt-oss: even columns are the gate's; llama 4: the first half.
    assert rows("gpt_oss", "gate_up_proj") == {"gate": [*range(0, 96, 2)], "up": [*range(1, 96, 2)]}
    llama4 = FAMILIES["llama4"].save(tmp_path / "llama4 again")
    (gate,) = [t for t in surgery.plan(llama4, rank=2, split=True).targets if t.key.endswith("gate_up_proj[gate]")]
    assert gate.matrices == (4, 32, 24)


def test_pipeline_of_several_models(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    unet = FAMILIES["UNet"].save(pipeline / "unet")
    FAMILIES["clip"].save(pipeline / "text_encoder")
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(surgery.SurgeryError, match="in its subfolders") as caught:
        surgery.plan(pipeline)
    assert "--subfolder unet" in str(caught.value)
    with pytest.raises(surgery.SurgeryError, match="has no subfolder 'vae'") as caught:
        surgery.plan(pipeline, subfolder="vae")
    assert "text_encoder, unet" in str(caught.value)
    with pytest.raises(surgery.SurgeryError, match="leaves its folder"):
        surgery.plan(pipeline, subfolder="../elsewhere")
    manifest = surgery.factorize(pipeline, tmp_path / "f", subfolder="unet", rank=4).manifest
    assert manifest.source.subfolder == "unet"
    assert {target.view for target in manifest.targets} == {"matrix", "convolution"}
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(unet)
    # A pipeline's other models are not to be written over; its parts can be found again from the whole.
    with pytest.raises(surgery.SurgeryError, match="one lies in the other"):
        surgery.factorize(pipeline, pipeline / "text_encoder", subfolder="unet", rank=4, overwrite=True)
    surgery.factorize(pipeline, tmp_path / "overlay", subfolder="unet", rank=4, layout="overlay")
    for i, base in enumerate((pipeline, unet)):
        surgery.fold(tmp_path / "overlay", tmp_path / "overlay/surgery/scales.safetensors", tmp_path / f"o{i}", base=base)
        assert files_of(tmp_path / f"o{i}") == files_of(unet)
        assert verify(tmp_path / "overlay", base=base).ok
