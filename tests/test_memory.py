"""Peak memory is set by the largest target, not by the model."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.linalg.proof import proof_bytes
from surgery.planning.memory import need_to_factorize
from tests.measure import measured_peak


def _model(folder: Path, layers: int) -> Path:
    """Layers of weights of some 25 MB each, and an embedding that grows with their number."""
    folder.mkdir()
    torch.manual_seed(0)
    weight = torch.randn(1536, 8) @ torch.randn(8, 4200) + 0.01 * torch.randn(1536, 4200)
    tensors = {f"layers.{i}.mlp.up.weight": weight * (i + 1) for i in range(layers)}
    tensors["embed.weight"] = torch.ones(4000 * layers, 1024)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _peaks(models: list[Path]) -> list[tuple[int, int]]:
    """Of factorize and fold of each model, which are given back byte for byte. Side by side: a peak is a process's own."""

    def one(model: Path) -> tuple[int, int]:
        factorized, folded = model.with_name(f"{model.name} factorized"), model.with_name(f"{model.name} folded")
        peak = measured_peak(f"surgery.factorize({str(model)!r}, {str(factorized)!r}, rank=4, device='cpu')", threads=1)
        assert peak <= surgery.plan(model, rank=4).memory.peak_bytes
        scales = factorized / "surgery/scales.safetensors"
        fold_peak = measured_peak(f"surgery.fold({str(factorized)!r}, {str(scales)!r}, {str(folded)!r})", threads=1)
        assert (folded / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        return peak, fold_peak

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, models))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_more_experts_in_a_stack_the_same_peak(tmp_path: Path) -> None:
    """The experts of a layer are one tensor, which need not fit into memory."""
    models = [tmp_path / f"{experts}" for experts in (8, 24)]
    for model in models:
        model.mkdir()
        weight = torch.randn(1024, 8) @ torch.randn(8, 2048) + 0.01 * torch.randn(1024, 2048)
        stack = torch.stack([weight * (i + 1) for i in range(int(model.name))])
        save_file({"layers.0.experts.up": stack}, model / "model.safetensors")
    # 16 more of 8 MB each.
    assert all(large < small + 35e6 for small, large in zip(*_peaks(models), strict=True))


@pytest.mark.slow  # the peaks of factorize and fold are in the suite
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extracting_twice_the_layers_takes_no_more(tmp_path: Path) -> None:
    """Of two models with weights of 25 MB each, and within the plan's estimate."""

    def peak(layers: int) -> int:
        base = _model(tmp_path / f"{layers}", layers)
        tuned, tensors = tmp_path / f"{layers} tuned", load_file(base / "model.safetensors")
        tuned.mkdir()
        change = torch.randn(1536, 4) @ torch.randn(4, 4200)
        changed = {name: tensor + (change if "up" in name else 1) for name, tensor in tensors.items()}
        save_file(changed, tuned / "model.safetensors")
        call = f"surgery.extract({str(base)!r}, {str(tuned)!r}, {str(tmp_path / 'out') + str(layers)!r}, rank=4, device='cpu'"
        found = measured_peak(f"{call}, progress=surgery.Silent())", threads=1)
        assert found <= surgery.plan_extract(base, tuned, rank=4, device="cpu", progress=surgery.Silent()).peak_memory_bytes
        return found

    with ThreadPoolExecutor(2) as pool:
        small, large = pool.map(peak, (2, 4))
    assert large < small + 35e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twice_the_layers_the_same_peak(tmp_path: Path) -> None:
    models = [_model(tmp_path / f"{layers}", layers) for layers in (4, 8)]
    few, many = ((model / "model.safetensors").stat().st_size for model in models)
    for small, large in zip(*_peaks(models), strict=True):
        # One matrix more or less may be in flight, as the threads happen to meet.
        assert large < small + 35e6 < small + 0.25 * (many - few)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_proof_takes_what_is_planned_for_it(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    weight = torch.randn(2400, 8) @ torch.randn(8, 2400) + 0.01 * torch.randn(2400, 2400)
    save_file({"layers.0.mlp.up.weight": weight}, model / "model.safetensors")

    def peak(prove: bool) -> int:
        out = tmp_path / f"{prove}"
        return measured_peak(f"surgery.factorize({str(model)!r}, {str(out)!r}, rank=4, device='cpu', prove={prove})", threads=1)

    with ThreadPoolExecutor(2) as pool:
        plain, proven = pool.map(peak, (False, True))
    assert surgery.Manifest.read(tmp_path / "True").targets[0].top_k[0].verdict == "proven"
    gram = 8 * 2400**2
    assert plain + gram < proven < plain + proof_bytes(2400, 2400)
    needs = [need_to_factorize(surgery.plan(model, rank=4).targets[0], prove=prove).working for prove in (False, True)]
    assert needs[1] >= needs[0] + proof_bytes(2400, 2400)
