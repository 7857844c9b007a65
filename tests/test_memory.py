"""Peak memory is set by the largest target, not by the model."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery

ROOT = Path(__file__).parent.parent
#: Prints the peak resident memory in bytes. VmHWM, since ru_maxrss is inherited from the
#: process that starts this one; with every large block of the C library a mapping of its own, so that it measures what
#: is in use and not how the library keeps what is free.
MEASURE = """
import re, torch, surgery
from surgery.operations import factorize, fold
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.set_num_threads(1)
{call}
print(peak())
"""


def _model(folder: Path, layers: int) -> Path:
    """Layers of weights of some 25 MB each, and an embedding that grows with their number."""
    folder.mkdir()
    torch.manual_seed(0)
    weight = torch.randn(1536, 8) @ torch.randn(8, 4200) + 0.01 * torch.randn(1536, 4200)
    tensors = {f"layers.{i}.mlp.up.weight": weight * (i + 1) for i in range(layers)}
    tensors["embed.weight"] = torch.ones(4000 * layers, 1024)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _peak(call: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(call=call)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    return int(done.stdout)


def _peaks(models: list[Path]) -> list[tuple[int, int]]:
    """Of factorize and fold of each model, which are given back byte for byte. Side by side: a peak is a process's own."""

    def one(model: Path) -> tuple[int, int]:
        factorized, folded = model.with_name(f"{model.name} factorized"), model.with_name(f"{model.name} folded")
        peak = _peak(f"surgery.factorize({str(model)!r}, {str(factorized)!r}, rank=4, device='cpu')")
        assert peak <= surgery.plan(model, rank=4).memory.peak_bytes
        scales = factorized / "surgery/scales.safetensors"
        fold_peak = _peak(f"surgery.fold({str(factorized)!r}, {str(scales)!r}, {str(folded)!r})")
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twice_the_layers_the_same_peak(tmp_path: Path) -> None:
    models = [_model(tmp_path / f"{layers}", layers) for layers in (4, 8)]
    few, many = ((model / "model.safetensors").stat().st_size for model in models)
    for small, large in zip(*_peaks(models), strict=True):
        # One matrix more or less may be in flight, as the threads happen to meet.
        assert large < small + 35e6 < small + 0.25 * (many - few)
