"""All that runs on a GPU: on the real one where there is one, else on one that does all as late as it may."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.device import device_name
from surgery.errors import SurgeryWarning
from tests.fp8_models import quantize_model
from tests.gpus import Gpu, only_pretended
from tests.late_gpu import late_gpu
from tests.linalg.test_svd import MATRICES, check
from tests.models import files_of, realistic, save_llama, tensors_of
from tests.pretend_gpu import GPU, OnGpu, pretend_gpu


def on_cpu(result: surgery.TruncatedSVD) -> surgery.TruncatedSVD:
    return dataclasses.replace(result, U=result.U.cpu(), s=result.s.cpu(), V=result.V.cpu())


@only_pretended
@pytest.mark.parametrize("pretended", [pretend_gpu, late_gpu])
def test_the_device_refuses_what_a_real_one_does(pretended: Gpu) -> None:
    with pretended():
        refuses_what_a_real_one_does()


def refuses_what_a_real_one_does() -> None:
    here, there = torch.ones(3), torch.ones(3).to(GPU)
    assert isinstance(there, OnGpu)
    assert (there.device, (there + 1).device, there[1:].device) == (GPU, GPU, GPU)
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)  # a number may lie anywhere
    for mix in (lambda: here + there, lambda: there.add_(here), lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    there[0] = 5.0
    assert there.tolist() == [5.0, 1.0, 1.0]
    assert here.copy_(there).tolist() == [5.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["power law", "wide", "rank 5", "staircase of 33", "geometric", "scaled rows", "small"])
def test_hard_matrices(name: str, on_gpu: dict[str, int]) -> None:
    A = MATRICES[name]
    k = min(16, *A.shape)
    result = surgery.truncated_svd(A.to(GPU), k)
    assert {result.U.device, result.s.device, result.V.device} == {GPU}
    assert {result.norm.device.type, result.certificate.residual.device.type, result.certificate.gap.device.type} == {"cpu"}
    check(A, on_cpu(result), k)


@pytest.mark.parametrize(("shape", "k"), [((60, 50), 8), ((300, 400), 12), ((620, 560), 16), ((300, 200), 150)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_batches(shape: tuple[int, int], k: int, dtype: torch.dtype, on_gpu: dict[str, int]) -> None:
    batch = torch.stack([realistic(*shape, seed=seed) for seed in range(3)]).to(dtype)
    result = surgery.truncated_svd(batch.to(GPU), k)
    assert bool(result.certificate.converged.all())
    truth = torch.linalg.svdvals(batch.double())[:, :k]
    assert ((result.s.cpu().double() - truth).abs() <= 1e-6 * truth[:, :1]).all()
    found = surgery.energy_svd(batch[0].to(GPU), 0.5, max_rank=k)
    assert found.s.device == GPU


@only_pretended
@pytest.mark.parametrize("room", [8, 2, 0.5])
def test_a_full_device(room: float) -> None:
    """With room for so many of the matrices, in float32, in an allocation: all at once, one by one, none."""
    batch = torch.stack([realistic(600, 550, seed=seed) for seed in range(4)])
    with late_gpu() as log, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SurgeryWarning)
        there = batch.to(GPU).bfloat16()
        log["largest"] = int(room * 4 * 600 * 550)
        result = surgery.truncated_svd(there, 8)
        assert result.U.device == GPU
    assert any("done on the CPU" in str(warning.message) for warning in said) == (room < 1)
    truth = torch.linalg.svdvals(batch.bfloat16().double())[:, :8]
    assert ((result.s.cpu().double() - truth).abs() <= 1e-6 * truth[:, :1]).all()


def there_and_back(gpu: Gpu, model: Path, folder: Path, **options: Any) -> surgery.Manifest:
    """Factorized, verified and folded on the device; what comes is what the CPU makes of the same factors."""
    with gpu() as log:
        manifest = surgery.factorize(model, folder / "f", rank=4, device="cuda:0", **options).manifest
        assert manifest.device == device_name(GPU)
        assert all(target.converged for target in manifest.targets)
        assert surgery.verify(folder / "f", base=model if manifest.layout == "overlay" else None, device="cuda:0").ok
        base = {"base": model} if manifest.layout == "overlay" else {}
        before = log["calls"]
        surgery.fold(folder / "f", folder / "f/surgery/scales.safetensors", folder / "same", device="cuda:0", **base)
        scales = {target.key: torch.full(target.scales_shape, 1.25) for target in manifest.targets}
        surgery.fold(folder / "f", scales, folder / "changed", device="cuda:0", **base)
        assert log["calls"] > before
    assert files_of(folder / "same") == files_of(model)
    assert surgery.verify(folder / "f", base=model if manifest.layout == "overlay" else None, device="cpu").ok
    surgery.fold(folder / "f", scales, folder / "truth", device="cpu", **base)
    assert files_of(folder / "changed") == files_of(folder / "truth")
    return manifest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back(dtype: torch.dtype, gpu: Gpu, tmp_path: Path) -> None:
    there_and_back(gpu, save_llama(tmp_path / "m", dtype), tmp_path)


def test_stacks_and_windows(mixed: Path, gpu: Gpu, tmp_path: Path) -> None:
    there_and_back(gpu, mixed, tmp_path)


def test_without_a_correction(llama: Path, gpu: Gpu, tmp_path: Path) -> None:
    scales = "f/surgery/scales.safetensors"
    with gpu():
        manifest = surgery.factorize(llama, tmp_path / "f", rank=4, device="cuda:0", correction=False).manifest
        surgery.fold(tmp_path / "f", tmp_path / scales, tmp_path / "there", device="cuda:0")
    surgery.fold(tmp_path / "f", tmp_path / scales, tmp_path / "here", device="cpu")
    assert not manifest.lossless
    assert files_of(tmp_path / "there").keys() == files_of(llama).keys()
    truth = tensors_of(tmp_path / "here")
    for name, tensor in tensors_of(tmp_path / "there").items():
        assert torch.allclose(tensor.double(), truth[name].double(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("quantized", [False, True])
def test_overlays(quantized: bool, llama: Path, gpu: Gpu, tmp_path: Path) -> None:
    model = quantize_model(llama, tmp_path / "m") if quantized else llama
    there_and_back(gpu, model, tmp_path, layout="overlay")


def test_studies(gpu: Gpu, tmp_path: Path) -> None:
    there_and_back(gpu, save_llama(tmp_path / "m", torch.bfloat16), tmp_path)
    found = {}
    for device in ("cpu", "cuda:0"):
        with gpu() as log:
            report = surgery.spectra(tmp_path / "m", tmp_path / "changed", device=device).as_json()
            scales = tmp_path / f"{device[:3]}.safetensors"
            surgery.project(tmp_path / "f", tmp_path / "changed", scales, device=device)
            assert (log["calls"] > 0) == (device != "cpu")
        found[device] = [target["singular_values"] for target in report["targets"]], load_file(scales)
    for on_cpu, on_gpu in zip(found["cpu"][0], found["cuda:0"][0], strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=1e-5)
    for key, values in found["cpu"][1].items():
        assert torch.allclose(values, found["cuda:0"][1][key], atol=1e-4)
