"""Models of more weight files than a process may have files open: every command, with 64 descriptors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.files.pool import _KEPT_OPEN, Pool
from tests.models import realistic

ROOT = Path(__file__).parents[2]
SHARDS = 70
LIMIT = 64

_COMMANDS = """
import resource, sys
from pathlib import Path
import torch
import surgery

folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
on = {"device": "cpu"}

def ones(made, value):
    return {t.key: torch.full(t.scales_shape, value) for t in surgery.Manifest.read(made).targets}

def weights(made):
    return [path.read_bytes() for path in sorted(made.glob("*.safetensors"))]

m, fp8, f, o = folder / "m", folder / "fp8", folder / "f", folder / "o"
surgery.plan(m, rank=2)
surgery.factorize(m, f, rank=2, **on)
surgery.factorize(m, o, rank=2, layout="overlay", **on)
surgery.factorize(fp8, folder / "q", rank=2, **on)
surgery.factorize(m, f, rank=3, overwrite=True, **on)
surgery.Manifest.read(f)
assert surgery.verify(f, **on).ok
assert surgery.verify(o, base=m, **on).ok
assert surgery.verify(folder / "q", base=fp8, **on).ok
surgery.fold(f, ones(f, 1.0), folder / "same", **on)
assert weights(folder / "same") == weights(m)
surgery.fold(f, ones(f, 1.5), folder / "tuned", **on)
surgery.fold(f, ones(f, 1.5), folder / "tuned", **on)
surgery.fold(f, ones(f, 1.25), folder / "tuned", overwrite=True, **on)
surgery.fold(o, ones(o, 1.5), folder / "tuned o", base=m, **on)
surgery.export(f, ones(f, 1.5), folder / "adapter")
surgery.fold(f, ones(f, 1.5), folder / "with lora", lora=folder / "adapter", **on)
surgery.fold(folder / "q", ones(folder / "q", 1.5), folder / "tuned q", base=fp8, **on)
surgery.fold(folder / "q", ones(folder / "q", 1.5), folder / "dense q", base=fp8, dequantize=True, **on)
surgery.project(f, folder / "tuned", folder / "g1", **on)
surgery.extract(m, folder / "tuned", folder / "extracted", rank=2, **on)
surgery.extract(fp8, folder / "tuned q", folder / "extracted q", rank=2, **on)
surgery.project(folder / "q", folder / "tuned q", folder / "g2", base=fp8, **on)
surgery.blend([folder / "g1", folder / "g1"], folder / "g3")
surgery.spectra(m, folder / "tuned", top=2, **on)
surgery.spectra(fp8, folder / "tuned q", top=2, **on)
surgery.recommend(m, folder / "tuned", budget=100, out=folder / "r.toml", max_rank=2, **on)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        blocks = ({"up_proj": torch.nn.Linear(24, 16, bias=False)} for _ in range(int(sys.argv[3])))
        self.layers = torch.nn.ModuleList(map(torch.nn.ModuleDict, blocks))

from safetensors.torch import load_file
model = Model()
model.load_state_dict({name: value for path in sorted(m.glob("*.safetensors")) for name, value in load_file(path).items()})
surgery.attach(model, f)
print("done")
"""


def _saved(folder: Path, shards: list[dict[str, torch.Tensor]], config: dict[str, object]) -> None:
    folder.mkdir()
    place = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_every_command(tmp_path: Path) -> None:
    names = [f"layers.{i}.up_proj.weight" for i in range(SHARDS)]
    matrices = [realistic(16, 24, seed=i) for i in range(SHARDS)]
    _saved(tmp_path / "m", [{name: matrix} for name, matrix in zip(names, matrices, strict=True)], {})
    # Of FP8, with the scales of each weight in the next file.
    quantized = [{name: (matrix * 64).to(torch.float8_e4m3fn)} for name, matrix in zip(names, matrices, strict=True)]
    for i, name in enumerate(names):
        quantized[(i + 1) % SHARDS][f"{name}_scale_inv"] = torch.full((1, 1), 1 / 64)
    _saved(tmp_path / "fp8", quantized, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, str(tmp_path), str(LIMIT), str(SHARDS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


class _File:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log
        self._log.append(f"open {name}")

    def check_unchanged(self) -> None:
        self._log.append(f"check {self.name}")

    def close(self) -> None:
        self._log.append(f"close {self.name}")


def test_a_pool_keeps_open_what_is_used_and_a_few_more() -> None:
    log: list[str] = []
    with Pool(lambda name: _File(name, log)) as pool:
        with pool.of("used") as used:
            for i in range(3 * _KEPT_OPEN):
                with pool.of(f"{i}") as other:
                    assert other.name == f"{i}"
                with pool.of("used") as again:
                    assert again is used
                closed = sum(line.startswith("close") for line in log)
                assert sum(line.startswith("open") for line in log) - closed <= _KEPT_OPEN + 1
            assert "close used" not in log
        with pool.of("0"):
            pool.forget("0")
            assert log.count("close 0") == 1  # of the first time
        pool.forget("0")
        assert log[-2:] == ["check 0", "close 0"]
        with pytest.raises(ZeroDivisionError), pool.of("failing"):
            _ = 1 / 0
    opened = [line.removeprefix("open ") for line in log if line.startswith("open")]
    for name in {*opened}:
        assert log.count(f"open {name}") == log.count(f"check {name}") == log.count(f"close {name}")
