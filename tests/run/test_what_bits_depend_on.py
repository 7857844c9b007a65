"""Which device and processor a run was begun on, as its last bits depend on them; and that folds depend on neither."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
from surgery.device import on_its_own_terms
from surgery.engine import ray
from surgery.errors import ClusterError, OutputError, SurgeryWarning
from surgery.run import engines
from surgery.run.engines import LocalEngine
from surgery.solvers.processor import processor
from tests.gpus import only_pretended
from tests.models import files_of
from tests.pretend_gpu import pretend_gpu

ROOT = Path(__file__).parents[2]
#: Make the libraries take other routines than they would: torch itself, MKL, oneDNN.
OTHER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def said_by(code: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout


def test_the_processor_is_known_by_its_bits() -> None:
    known = processor()
    assert known.partition(" ")[0] == torch.backends.cpu.get_cpu_capability()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert processor.__wrapped__() == known
    finally:
        torch.set_num_threads(before)
    code = "from surgery.solvers.processor import processor; print(processor(), end='')"
    assert said_by(code) == known
    others = {said_by(code, ATEN_CPU_CAPABILITY="default"), said_by(code, ONEDNN_MAX_CPU_ISA="SSE41")}
    assert len(others) == 2
    assert known not in others


FOLD = """
import torch, surgery
for train in ("scales", "core"):
    for rounding in ("nearest", "directions"):
        trained = {}
        for target in surgery.Manifest.read(folder).targets:
            k = target.scales_shape[-1]
            g = 1 + (torch.arange(k) % 5 - 2) / 256
            one = g if train == "scales" else torch.diag(g) + 2**-9
            trained[target.key] = one.expand(*target.scales_shape[:-1], *one.shape).contiguous()
        surgery.fold(folder, trained, f"{out}/{train}-{rounding}", rounding=rounding, device="cpu")
"""


def test_a_fold_does_not_depend_on_the_processor(factorized: Path, tmp_path: Path) -> None:
    said_by(f"folder, out = {str(factorized)!r}, {str(tmp_path / 'there')!r}" + FOLD, **OTHER)
    exec(FOLD, {"folder": factorized, "out": tmp_path / "here"})
    here = files_of(tmp_path / "here")
    assert here == files_of(tmp_path / "there")
    assert len({data for name, data in here.items() if name.endswith("00001.safetensors") or "-00001-" in name}) > 1


class _Stops(surgery.Silent):
    def item(self, name: str) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt


def test_a_run_is_not_taken_up_on_another_processor(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu", progress=_Stops())
    with monkeypatch.context() as patch:
        patch.setattr(engines, "processor", lambda: "AVX512 01234567")
        with pytest.raises(OutputError, match="unfinished run of another kind") as raised:
            surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu")
    assert f'device: "cpu, {processor()}" then, "cpu, AVX512 01234567" now' in str(raised.value)
    told = surgery.Silent()
    manifest = surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu", progress=told).manifest
    assert told.notes == ["continuing after 1 of 3 shards"]
    assert manifest.device == f"cpu, {processor()}"


@only_pretended
def test_unlike_gpus_are_told_and_all_recorded() -> None:
    with pretend_gpu(cards=("B", "A")), pytest.warns(SurgeryWarning, match="not alike: cuda .A . B."):
        told = on_its_own_terms(lambda: LocalEngine("all").device_and_processor)()
    assert told == f"cuda (A + B), {processor()}"
    with pretend_gpu(cards=("A", "A")):
        assert LocalEngine("all").device_name == "cuda (A)"


def test_machines_of_a_cluster_that_are_not_alike() -> None:
    cluster = ray.Cluster("cpu", "cpu", "AVX512 01234567", 1, None, None, None)
    ray._check_alike(cluster, "cpu", "AVX512 01234567")
    with pytest.raises(ClusterError, match="not alike"):
        ray._check_alike(cluster, "cpu", "AVX2 89abcdef")
    with pytest.raises(ClusterError, match="not alike"):
        ray._check_alike(dataclasses.replace(cluster, device="cuda", device_name="cuda (A)"), "cuda (B)", cluster.processor)
