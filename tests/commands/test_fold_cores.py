"""Cores folded into checkpoints of all layouts, against the dense formula in float64; exported and merged they are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.format.manifest_records import TargetRecord
from surgery.format.tensor_view import by_tensor
from surgery.progress import Silent
from tests.kept_layouts import CASES, KEPT, scales_for
from tests.models import files_of, tensors_of


def random_cores(factorized: Path, size: float = 0.3) -> dict[str, torch.Tensor]:
    """Cores of all targets, of stacks all but those of the second matrix; those of the first target are untouched."""
    generator = torch.Generator().manual_seed(0)
    cores = {}
    for number, target in enumerate(surgery.Manifest.read(factorized).targets):
        noise = size * torch.randn(*target.shape_of("core"), generator=generator) * bool(number)
        if target.view == "stack":
            noise[1] = 0
        cores[target.key] = torch.eye(target.rank) + noise
    return cores


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: part for file in (folder / "surgery").glob("factors-*") for name, part in load_file(file).items()}


def _selected(target: TargetRecord, weight: torch.Tensor) -> torch.Tensor:
    """The matrices (B, m, n) of a target in its tensor, copied."""
    matrices = weight if target.view == "stack" else weight.flatten(1)[None]
    if (part := target.slice) is not None:
        phase = torch.arange(matrices.shape[1 + part.axis]) % part.period
        matrices = matrices.index_select(1 + part.axis, torch.nonzero((phase >= part.start) & (phase < part.stop)).flatten())
    return matrices


def _changes(target: TargetRecord, factors: dict[str, torch.Tensor], core: torch.Tensor) -> torch.Tensor:
    """``U diag(sqrt s) (C - I) diag(sqrt s) V^T`` of each matrix, float64 (B, m, n)."""
    U, s, V = (factors[f"{target.key}.{part}"].double() for part in ("U", "s", "V"))
    root = s.sqrt()
    inner = root[..., :, None] * (core.double() - torch.eye(target.rank, dtype=torch.float64)) * root[..., None, :]
    return (U @ inner @ V.mT).view(target.matrices)


def _dense(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float64, and for each of its entries the size of the units that it is counted in."""
    weight, scale = tensors[name], tensors.get(f"{name}_scale_inv")
    if scale is None:
        return weight.double(), torch.ones_like(weight, dtype=torch.float64)
    m, n = weight.shape
    spread = scale.double().repeat_interleave(16, 0)[:m].repeat_interleave(16, 1)[:, :n]
    return weight.double() * spread, spread


@pytest.mark.parametrize("name", CASES)
def test_folded_is_the_dense_formula(name: str, tmp_path: Path) -> None:
    """Rounded once, each number to the nearest one; what is not touched keeps its bytes."""
    case, factorized = CASES[name], KEPT / name
    model = case.save(tmp_path / "model")
    if name == "stacks":  # of which one direction of each matrix is kept
        factorized = tmp_path / "factorized"
        surgery.factorize(model, factorized, rank=3, include=case.options["include"], device="cpu")
    manifest, cores, factors = surgery.Manifest.read(factorized), random_cores(factorized), _factors(factorized)
    options: dict[str, Any] = {"base": model if case.is_overlay else None, "device": "cpu", "rounding": "nearest", **case.fold}

    untouched = {key: torch.eye(len(core[-1])).expand(core.shape) for key, core in cores.items()}
    surgery.fold(factorized, untouched, tmp_path / "untouched", **options)
    ones = {key: core.diagonal(dim1=-2, dim2=-1) for key, core in untouched.items()}
    surgery.fold(factorized, ones, tmp_path / "ones", **options)
    assert files_of(tmp_path / "untouched") == files_of(tmp_path / "ones")
    if name not in ("uncorrected", "dequantized"):
        assert files_of(tmp_path / "untouched") == files_of(model)

    scales = scales_for(factorized)
    surgery.fold(factorized, scales, tmp_path / "scales", **options)
    surgery.fold(factorized, {key: torch.diag_embed(g) for key, g in scales.items()}, tmp_path / "diagonal", **options)
    assert files_of(tmp_path / "scales") == files_of(tmp_path / "diagonal")

    in_columns = {key: core.mT.contiguous().mT for key, core in cores.items()}
    report = surgery.fold(factorized, in_columns, tmp_path / "cores", **options)
    assert (report.targets, report.changed) == (len(manifest.targets), len(manifest.targets) - 1)
    before, after = tensors_of(factorized if name == "uncorrected" else model), tensors_of(tmp_path / "cores")
    shares = {}
    for target in manifest.targets:
        change = _changes(target, factors, cores[target.key])
        for tensor in target.tensors:
            (old, _), (new, unit) = _dense(before, tensor), _dense(after, tensor)
            exact, got, unit = _selected(target, old) + change, _selected(target, new), _selected(target, unit)
            if name == "uncorrected":  # what is stored lacks the kept part
                exact = exact + _changes(target, factors, 2 * torch.eye(target.rank).expand(cores[target.key].shape))
            if after[tensor].dtype == torch.float8_e4m3fn:
                assert bool(((got - exact).abs() <= torch.maximum(exact.abs() * 2**-4, unit * 2**-10) * 1.001).all()), tensor
                continue
            rounded = got.to(after[tensor].dtype)
            for end in (-float("inf"), float("inf")):
                other = torch.nextafter(rounded, torch.full_like(rounded, end)).double()
                assert bool(((got - exact).abs() <= (other - exact).abs() * (1 + 1e-6)).all()), tensor
        if name != "uncorrected" and change.any():
            moved = _selected(target, _dense(after, target.tensor)[0]) - _selected(target, _dense(before, target.tensor)[0])
            shares[target.key] = (moved * change).sum().item(), change.square().sum().item()
    if shares:
        arrived, asked = map(sum, zip(*shares.values(), strict=True))
        assert report.kept == pytest.approx(arrived / asked, abs=2e-3)
        assert report.kept_least == pytest.approx(min(one / of for one, of in shares.values()), abs=2e-3)
    passed_over = before.keys() - {part for t in manifest.targets for one in t.tensors for part in (one, f"{one}_scale_inv")}
    if name not in ("uncorrected", "dequantized"):
        first = manifest.targets[0].tensor
        assert all(torch.equal(before[one].view(torch.uint8), after[one].view(torch.uint8)) for one in (*passed_over, first))


@pytest.mark.parametrize("name", ["residual", "overlay", "slices"])
def test_exported_and_merged_is_folded(name: str, tmp_path: Path) -> None:
    """The adapter has the rank of the directions, those of all slices of a tensor together."""
    case, factorized = CASES[name], KEPT / name
    model = case.save(tmp_path / "model")
    manifest, factors = surgery.Manifest.read(factorized), _factors(factorized)
    cores = random_cores(factorized)
    report = surgery.export(factorized, cores, tmp_path / "adapter", progress=Silent())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    ranks = [sum(slice.rank for slice in slices) for slices in by_tensor(manifest.targets).values()]
    assert report.rank == config["r"] == config["lora_alpha"] == max(ranks)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {half.shape[0 if "lora_A" in key or "embedding_A" in key else 1] for key, half in stored.items()} == {report.rank}
    options: dict[str, Any] = {"device": "cpu", "rounding": "nearest", "progress": Silent()}
    surgery.fold(factorized, cores, tmp_path / "folded", base=model if case.is_overlay else None, **options)
    surgery.merge(model, tmp_path / "adapter", tmp_path / "merged", **options)
    before, folded, merged = (tensors_of(tmp_path / one) for one in ("model", "folded", "merged"))
    assert {one for one in before if not torch.equal(before[one], folded[one])} == {
        one for target in manifest.targets[1:] for one in target.tensors
    }
    for target in manifest.targets:
        change = _changes(target, factors, cores[target.key]).abs().max().item()
        for one in target.tensors:
            # The halves are float32, and few sums are so near to a tie that it tells.
            apart = (folded[one].double() - merged[one].double()).abs()
            unit = torch.finfo(folded[one].dtype).eps * folded[one].double().abs()
            assert bool((apart <= unit + 2.0**-20 * change).all()), one
            if folded[one].dtype != torch.float32:
                assert (apart > 0).double().mean() < 0.01
    # A core that is diagonal makes the adapter of its scales.
    scales = scales_for(factorized)
    for which, values in (("scales", scales), ("diagonal", {key: torch.diag_embed(g) for key, g in scales.items()})):
        surgery.export(factorized, values, tmp_path / which, progress=Silent())
    assert files_of(tmp_path / "scales") == files_of(tmp_path / "diagonal")
