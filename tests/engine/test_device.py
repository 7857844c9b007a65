"""What happens when a GPU's memory is full, by raising what torch raises then; and whatever the default device is."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.device import as_memory_allows
from surgery.engine.resources import Resources
from surgery.errors import SurgeryWarning
from surgery.format.options import Options
from surgery.format.scales.writing import write_scales
from surgery.linalg import svd
from surgery.planning import plan as planning
from surgery.run import engines
from surgery.shards import factorize_jobs
from surgery.shards import matrices as batch
from surgery.source.open import open_source
from tests.models import files_of, realistic

GPU = torch.device("cuda")


def _room_for(count: int, hopeless: int | None = None) -> tuple[list[tuple[list[int], str]], object]:
    """Work that fails on a GPU for more than ``count`` items at once, or with the hopeless one; and a log of calls."""
    calls: list[tuple[list[int], str]] = []

    def work(items: Sequence[int], device: torch.device) -> list[int]:
        calls.append((list(items), device.type))
        if device.type == "cuda" and (len(items) > count or hopeless in items):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * item for item in items]

    return calls, work


@pytest.mark.parametrize("count", [1, 2, 3, 5, 100])
def test_smaller_batches(count: int) -> None:
    calls, work = _room_for(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_memory_allows(work, range(11), GPU) == [10 * i for i in range(11)]  # type: ignore[arg-type]
    assert {device for _, device in calls} == {"cuda"}
    assert count < 100 or len(calls) == 1


def test_what_does_not_fit_alone_is_done_on_the_cpu() -> None:
    calls, work = _room_for(4, hopeless=6)
    with pytest.warns(SurgeryWarning, match="on the CPU"):
        assert as_memory_allows(work, range(11), GPU) == [10 * i for i in range(11)]  # type: ignore[arg-type]
    assert [items for items, device in calls if device == "cpu"] == [[6]]


def test_other_errors_and_a_full_cpu_are_not_hidden() -> None:
    def full(items: Sequence[int], device: torch.device) -> list[int]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        as_memory_allows(full, [1, 2], torch.device("cpu"))


def test_a_window_of_several_targets_gives_the_same_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: many targets held at a time, those of one shape solved together."""
    sizes = []
    solve = batch.truncated_svds

    def counting(A: torch.Tensor, *args: object, **kwargs: object) -> list[surgery.TruncatedSVD]:
        sizes.append(len(A))
        return solve(A, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "truncated_svds", counting)
    monkeypatch.setattr(engines, "_resources", lambda *_: Resources("cuda", cores=2))
    monkeypatch.setattr(svd, "_in_step", lambda A, k: len(A))
    manifest = surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu").manifest
    assert sizes
    assert min(sizes) > 1
    assert all(target.converged for target in manifest.targets)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", device="cpu")
    assert files_of(tmp_path / "back") == files_of(llama)


def test_the_plan_of_a_gpu_knows_its_memory(llama: Path) -> None:
    source = open_source(llama)
    options = Options(8)
    on_cpu, on_gpu = (planning.make_plan(source, options, resources=Resources(kind)).memory for kind in ("cpu", "cuda"))
    assert on_cpu.device_bytes == 0 < on_gpu.device_bytes
    assert on_cpu.resident_bytes == on_cpu.ring_bytes == 0
    # Windows of whole files lie on the GPU: one that is read, one that is worked on, one that is written.
    largest = max(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert on_gpu.window_bytes > largest
    assert on_gpu.device_bytes >= on_gpu.resident_bytes >= 3 * largest
    assert on_gpu.peak_bytes >= on_gpu.ring_bytes > on_gpu.buffer_bytes == 0


def test_whatever_the_default_device_is(llama: Path, tmp_path: Path) -> None:
    """As after torch.set_default_device("cuda"). A tensor on meta has no values: one made there by mistake shows."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    tokens = torch.arange(10)[None]
    A = torch.randn(3, 80, 100)
    expected, logits = surgery.truncated_svd(A, 4), model(tokens).logits
    fingerprint = surgery.factorize(llama, tmp_path / "truth", rank=4).manifest.fingerprint
    scales, changed = tmp_path / "truth/surgery/scales.safetensors", tmp_path / "changed.safetensors"
    trained = {name: torch.linspace(1.4, 1.6, g.numel()) for name, g in load_file(scales).items()}
    write_scales(changed, trained, fingerprint)
    surgery.fold(tmp_path / "truth", changed, tmp_path / "folded")
    with torch.device("meta"):
        found = surgery.truncated_svd(A, 4)
        assert surgery.energy_svd(A[0], 0.5, max_rank=80).U.device.type == "cpu"
        surgery.factorize(llama, tmp_path / "f", rank=4)
        assert surgery.verify(tmp_path / "f").ok
        surgery.fold(tmp_path / "f", scales, tmp_path / "o")
        surgery.project(tmp_path / "f", tmp_path / "folded", tmp_path / "projected.safetensors")
        surgery.blend([scales, changed], tmp_path / "blended.safetensors")
        surgery.export(tmp_path / "f", changed, tmp_path / "adapter")
        surgery.spectra(llama, tmp_path / "folded")
        attached = surgery.attach(model, tmp_path / "f")
        attached.load(changed)
        model(tokens).logits.sum().backward()
        attached.save(tmp_path / "saved.safetensors")
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.certificate.residual, expected.certificate.residual)
    assert files_of(tmp_path / "f") == files_of(tmp_path / "truth")
    assert all((tmp_path / "o" / path.name).read_bytes() == path.read_bytes() for path in llama.glob("*.safetensors"))
    for file, share in (("projected", 1), ("blended", 0.5), ("saved", 1)):
        for name, g in load_file(tmp_path / f"{file}.safetensors").items():
            torch.testing.assert_close(g, 1 + share * (trained[name] - 1), rtol=0.02, atol=0)
    assert not torch.allclose(model(tokens).logits, logits)
    assert all(g.grad is not None and g.grad.device.type == "cpu" for g in attached.parameters())


def test_what_forks_has_no_gpu() -> None:
    tests = Path(__file__).parents[1]
    forking = [path for path in tests.rglob("*.py") if "os." + "fork(" in path.read_text()]
    assert len(forking) == 3
    assert all("\nimport tests.forks" in path.read_text() for path in forking)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_full_gpu_costs_time_not_the_run() -> None:
    batch = torch.stack([realistic(700, 650, seed=seed) for seed in range(4)])
    expected = surgery.truncated_svd(batch, 8)
    on_gpu = batch.cuda()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(max(0, free - (64 << 20)), dtype=torch.uint8, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        result = surgery.truncated_svd(on_gpu, 8)
    del hog
    assert torch.allclose(result.s.cpu(), expected.s, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_cuda() -> None:
    batch = torch.stack([realistic(700, 650, seed=seed) for seed in range(5)])
    result, expected = surgery.truncated_svd(batch.cuda(), 16), surgery.truncated_svd(batch, 16)
    assert bool(result.certificate.converged.all())
    assert torch.allclose(result.s.cpu(), expected.s, rtol=1e-5)


def test_several_devices_take_a_shard_each(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with several GPUs: a lane for each device, here of the CPU."""
    surgery.factorize(llama, tmp_path / "one", rank=4, device="cpu")
    monkeypatch.setattr(engines, "choose_devices", lambda _: [torch.device("cpu")] * 3)
    lanes, all_three = set(), threading.Barrier(3)
    run = factorize_jobs.run_job

    def noting(job: object, lane: object, *rest: object) -> object:
        lanes.add(lane)
        all_three.wait(60)  # a quick lane does not take the shard of a slow one
        return run(job, lane, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(factorize_jobs, "run_job", noting)
    surgery.factorize(llama, tmp_path / "three", rank=4)
    assert len(lanes) == 3
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")
    surgery.fold(tmp_path / "three", tmp_path / "three/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(llama)
