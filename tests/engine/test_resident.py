"""Windows that lie on a GPU: how pieces get there and back, in how much memory, and that no bit depends on when."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.engine import ring as rings
from surgery.engine import sharing
from surgery.engine.lane import Lane
from surgery.engine.resources import Memory, Resources
from surgery.engine.ring import Ring
from surgery.engine.sharing import Need, Windows, share_out
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import OptionError, SurgeryWarning
from surgery.format.options import Options
from surgery.format.safetensors import ShardReader
from surgery.planning.plan import make_plan
from surgery.run.engines import LocalEngine
from surgery.shards import matrices
from surgery.shards.batches import planned_batches
from surgery.source.open import open_source
from tests.gpus import Gpu, only_pretended
from tests.late_gpu import Event, Race, Stream, late_gpu
from tests.models import files_of, realistic
from tests.pretend_gpu import GPU, pretend_gpu

pytestmark = only_pretended

KB = 1 << 10
#: A ring of 64 kB has slots of 8.
RING = 64 * KB


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A weight file with three targets, bytes before, between and after them."""
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(150, 120, generator=numbers) for name in "bdf"}
    tensors |= {f"{name}.bias": torch.randn(40_000, generator=numbers) for name in "aceg"}
    save_file(tensors, tmp_path / "shard.safetensors")
    return tmp_path / "shard.safetensors"


def there_and_back(shard: Path, memory: Memory) -> tuple[bytes, str]:
    """A weight file by way of the GPU, where 1 is added to its targets; and its sha256 as it was read."""
    come = bytearray()
    with ShardReader(shard) as reader, Lane(GPU, memory) as lane:
        targets = {name: None for name in reader.entries if name.endswith("weight")}

        def compute(window: Sequence[Piece]) -> None:
            for piece in window:
                assert piece.buffer.device == GPU
                if isinstance(piece, TargetPiece):
                    piece.tensor.add_(1)

        def finish(window: Sequence[Piece], _: None) -> None:
            for piece in window:
                for part in lane.buffers.parts(piece.buffer):
                    assert len(part) <= memory.ring_bytes // 8
                    come.extend(part)

        with ShardWalk(reader, targets, lane.buffers) as walk:
            lane.flow(walk, memory.window_bytes, compute, finish, lambda: None)
        lane.buffers.take(memory.resident_bytes)  # would wait for ever for what has not come back
        return bytes(come), walk.sha256


def expected(shard: Path) -> tuple[bytes, str]:
    with ShardReader(shard) as reader:
        parts = [
            reader.read(entry) + 1 if entry.name.endswith("weight") else reader.read(entry) for entry in reader.header.tensors
        ]
    return b"".join(part.numpy().tobytes() for part in parts), hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize("window", [1, 200 * KB, 1 << 30])
def test_a_weight_file_goes_to_the_gpu_and_back(window: int, shard: Path) -> None:
    memory = Memory(2, window, 0, resident_bytes=2 << 20, ring_bytes=RING)
    with late_gpu() as log:
        assert there_and_back(shard, memory) == expected(shard)
        assert log["pinned"] == RING


def _slots_are_filled_too_early(patch: pytest.MonkeyPatch) -> None:
    give = Ring._give
    patch.setattr(Ring, "_give", lambda ring, slot, copied: give(ring, slot, None))


def _parts_are_read_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Event, "synchronize", lambda event: None)


def _weights_are_used_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "wait_stream", lambda stream, other: None)


@pytest.mark.parametrize("fault", [_slots_are_filled_too_early, _parts_are_read_too_early, _weights_are_used_too_early])
def test_what_would_be_a_race_is_one(fault: Callable[[pytest.MonkeyPatch], None], shard: Path) -> None:
    """The tests here see each of the waits, on a device whose work is done late."""
    memory = Memory(2, 200 * KB, 0, resident_bytes=2 << 20, ring_bytes=RING)
    with pytest.raises((Race, AssertionError)), late_gpu(), pytest.MonkeyPatch.context() as patch:
        fault(patch)
        assert there_and_back(shard, memory) == expected(shard)


def test_without_page_locked_memory_or_streams_it_is_slower_but_right(shard: Path) -> None:
    full = False

    def fault(kind: str) -> BaseException | None:
        return RuntimeError("CUDA error: out of memory") if full and kind in ("pin", "stream") else None

    memory = Memory(1, 200 * KB, 0, resident_bytes=2 << 20, ring_bytes=RING)
    with late_gpu(fault=fault) as log:
        torch.cuda.default_stream(GPU)  # which is there before anything else
        full = True
        with pytest.warns(SurgeryWarning, match="no page-locked memory"):
            found = there_and_back(shard, memory)
        assert found == expected(shard)
        assert log["pinned"] == 0


# Whole runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three weight files with matrices of two shapes and a stack of experts."""
    folder = tmp_path_factory.mktemp("resident") / "model"
    folder.mkdir()
    place: dict[str, str] = {}
    for i in range(3):
        layers = range(4 * i, 4 * i + 4)
        tensors = {f"layers.{j}.mlp.up.weight": realistic(60, 48, seed=j).bfloat16() for j in layers}
        tensors |= {f"layers.{j}.mlp.down.weight": realistic(48, 60, seed=50 + j).bfloat16() for j in layers}
        tensors[f"layers.{4 * i}.experts.up"] = torch.stack([realistic(40, 48, seed=100 + j) for j in layers]).half()
        tensors |= {f"layers.{j}.norm.weight": torch.randn(48).bfloat16() for j in layers}
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file(tensors, folder / file)
        place.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are a part of such a weight file, and a ring through which its tensors go in parts."""
    monkeypatch.setattr(sharing, "RESIDENT_WINDOW_BYTES", 40 * KB)
    monkeypatch.setattr(sharing, "CPU_WINDOW_BYTES", KB)
    for name in ("RING_BYTES", "LEAST_RING_BYTES"):
        monkeypatch.setattr(sharing, name, 16 * KB)


def factorized(model: Path, out: Path, **options: Any) -> dict[str, bytes]:
    surgery.factorize(model, out, rank=4, device="cuda:0", **options)
    return {name: data for name, data in files_of(out).items() if name.endswith(".safetensors")}


def test_the_batches_of_a_run_are_the_planned_ones(
    model: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, solve = [], matrices.truncated_svds

    def counting(A: torch.Tensor, *args: Any, **kwargs: Any) -> list[surgery.TruncatedSVD]:
        sizes.append(tuple(A.shape))
        return solve(A, *args, **kwargs)

    monkeypatch.setattr(matrices, "truncated_svds", counting)
    with pretend_gpu():
        resources = LocalEngine("cuda:0").resources
        plan = make_plan(open_source(model), Options(4), resources=resources)
        factorized(model, tmp_path / "f")
    planned = [batch for shard in plan.shards for batch in planned_batches(shard, plan.memory.window_bytes, "cuda")]
    assert sorted((len(batch), *batch[0].weight.shape) for batch in planned if len(batch) > 1) == sorted(sizes)
    assert sum(map(len, planned)) == sum(target.matrices[0] for target in plan.targets)
    assert max(map(len, planned)) > 2


def test_no_bit_depends_on_who_reads_or_works_when(
    model: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for cores, ring in ((1, 16), (16, 16), (16, 1 << 10)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(sharing, "RING_BYTES", ring * KB)
        with pretend_gpu():
            made.append(factorized(model, tmp_path / f"{cores} {ring}"))
    assert made[0] == made[1] == made[2]
    surgery.fold(tmp_path / "1 16", tmp_path / "1 16/surgery/scales.safetensors", tmp_path / "back", device="cpu")
    assert files_of(tmp_path / "back") == files_of(model)


@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_several_shards_at_a_time(
    layout: str, model: Path, tmp_path: Path, gpu: Gpu, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    with gpu() as log:
        factorized(model, tmp_path / "f", layout=layout)
        assert log["pinned"] == 16 * KB
    base = {"base": model} if layout == "overlay" else {}
    assert surgery.verify(tmp_path / "f", device="cpu", **base).ok


@pytest.mark.parametrize(
    ("kind", "last"),
    [("aten::empty.memory_format", 9), ("aten::stack", 9), ("aten::stack", 1 << 30), ("aten::nonzero", 9), ("aten::cat", 9)],
)
def test_a_gpu_that_is_full_in_the_middle(kind: str, last: int, model: Path, tmp_path: Path, small: None) -> None:
    """From the fifth of these on there is no memory, for a while or for good. The run ends with the same model."""
    asked = 0

    def fault(name: str) -> BaseException | None:
        nonlocal asked
        asked += name == kind
        return torch.OutOfMemoryError("CUDA out of memory") if name == kind and 5 <= asked <= last else None

    with late_gpu(fault=fault), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SurgeryWarning)
        factorized(model, tmp_path / "f")
    assert asked >= 5
    assert last == 9 or any("done on the CPU" in str(warning.message) for warning in said)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", device="cpu")
    assert files_of(tmp_path / "back") == files_of(model)


@pytest.mark.parametrize("lost", ["residual", "all"])
def test_lost_files_are_made_again_to_the_same_bytes(lost: str, model: Path, tmp_path: Path, gpu: Gpu, small: None) -> None:
    with gpu():
        made = factorized(model, tmp_path / "f")
        for name in made:
            if "00002" in name and (lost == "all" or "factors" not in name):
                (tmp_path / "f" / name).unlink()
        report = surgery.verify(tmp_path / "f", base=model, repair=True, device="cuda:0")
    assert report.ok
    assert len(report.repaired) == (2 if lost == "all" else 1)
    assert {name: (tmp_path / "f" / name).read_bytes() for name in made} == made


# What is planned.


def needs(count: int = 8, size: int = 100 << 20) -> list[Need]:
    return [Need(f"w{i}", [1], "file", size, 2 * size, size, 1, size) for i in range(count)]


def test_what_is_free_decides_how_much_is_done_at_a_time_and_not_the_window() -> None:
    total = 64 << 30
    alone, free = (
        share_out(needs(), Resources("cuda", cores=16, device_memory=total, device_free=free), windows="resident")
        for free in (total, 24 << 30)
    )
    assert alone.window_bytes == free.window_bytes
    assert (alone.workers, alone.readers) > (free.workers, free.readers)
    assert free.device_bytes <= 24 << 30 < alone.device_bytes <= total
    small = share_out(needs(), Resources("cuda", cores=16, device_memory=16 << 30), windows="resident")
    assert small.window_bytes < alone.window_bytes
    assert small.device_bytes <= 16 << 30


def test_what_is_allowed_of_the_host_is_kept_to() -> None:
    """All that a device has of the host's memory is counted: the ring, and what waits to be encoded."""
    for allowed in (4 << 30, 3 << 30, 2 << 30):
        resources = Resources("cuda", cores=16, memory=allowed, strict=True, device_memory=64 << 30)
        memory = share_out(needs(), resources, windows="resident")
        assert memory.ring_bytes >= rings.LEAST_RING_BYTES
        assert memory.ring_bytes < memory.peak_bytes <= allowed
        assert memory.buffer_bytes == 0 < memory.resident_bytes <= memory.device_bytes
    with pytest.raises(OptionError, match="too small"):
        share_out(needs(), Resources("cuda", memory=1 << 28, strict=True), windows="resident")


@pytest.mark.parametrize("windows", ["alone", "together", "resident"])
def test_readers_never_wait_for_each_other(windows: Windows) -> None:
    """Each may have a window that is not full, and the largest piece to come."""
    memory = share_out(needs(), Resources("cuda", cores=32, memory=1 << 36, device_memory=1 << 37), windows=windows)
    assert memory.readers > 1
    largest = 100 << 20
    assert (memory.resident_bytes or memory.buffer_bytes) >= memory.readers * (memory.window_bytes + largest) + largest


def test_the_limit_of_a_gpu_is_put_back_to_what_it_was(model: Path, tmp_path: Path) -> None:
    with pretend_gpu():
        torch.cuda.set_per_process_memory_fraction(0.7, 0)
        factorized(model, tmp_path / "f", max_device_memory=8 << 30)
        assert torch.cuda.get_per_process_memory_fraction(0) == 0.7
