"""Ray, the real one: on a cluster that loses a worker and a machine, and on this machine alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
from tests.models import files_of, save_llama

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow  # Ray takes most of a minute to give a machine up
def test_a_lost_worker_and_a_lost_machine_cost_only_the_shards_in_hand(llama: Path, tmp_path: Path) -> None:
    settings = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8}
    model = save_llama(tmp_path / "m", torch.bfloat16, shard_size="900KB", **settings)
    shards = len(list(model.glob("*.safetensors")))
    broken = shutil.copytree(llama, tmp_path / "broken")
    victim = sorted(broken.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-2] + b"\xff\x7f")  # a NaN in bfloat16
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray_cluster", str(model), str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["factorize"]["killed"] == ["workers", "machine"]
    assert report["fold"]["killed"] == ["machine"]
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    # Of a driver that is killed with its tasks at work; what they still wrote meanwhile does no harm.
    assert any(note.startswith("continuing after") for note in report.pop("stopped"))
    # An error of a task is the one that a user would get without Ray.
    assert report.pop("said") == [7, "said elsewhere"]
    error = report.pop("error")
    assert error.startswith("WeightError")
    assert "holds NaN or infinity" in error
    assert not (tmp_path / "x/config.json").exists()
    for run in report.values():
        # Some were begun again, and no more than those that were in hand: two at a time.
        assert run["attempts"] <= shards + 2 * len(run["killed"])
        assert 0.98 * weights < run["bytes"] <= weights
    assert shards < report["factorize"]["attempts"]
    surgery.factorize(model, tmp_path / "truth f", rank=8, device="cpu")
    assert files_of(tmp_path / "factorize") == files_of(tmp_path / "stopped") == files_of(tmp_path / "truth f")
    manifest = surgery.Manifest.read(tmp_path / "truth f")
    scales = {target.key: torch.full(target.scales_shape, 1.25) for target in manifest.targets}
    surgery.fold(tmp_path / "truth f", scales, tmp_path / "truth", device="cpu")
    assert files_of(tmp_path / "fold") == files_of(tmp_path / "truth")


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def test_on_this_machine_from_the_command_line(llama: Path, tmp_path: Path) -> None:
    """A cluster is started for the run, and gone after it."""
    out = tmp_path / "f"
    done = _command("factorize", str(llama), "-o", str(out), "--rank", "4", "--engine", "ray", "--json", "--profile")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["profile"]["stages"]["worker"]["svd"] > 0
    surgery.factorize(llama, tmp_path / "truth", rank=4, device="cpu")
    assert files_of(out) == files_of(tmp_path / "truth")
    assert not (out / ".surgery").exists()


def test_refusals(llama: Path, tmp_path: Path) -> None:
    done = _command("factorize", str(llama), "-o", str(tmp_path / "f"), "--engine", "ray", "--device", "cuda:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Ray places tasks by itself" in done.stderr
    with (
        pytest.raises(surgery.errors.ClusterError, match="the Ray cluster cannot be reached"),
        pytest.MonkeyPatch.context() as changed,
    ):
        changed.setenv("RAY_ADDRESS", "no address")
        surgery.factorize(llama, tmp_path / "f", engine="ray")
    (tmp_path / "file").touch()
    with (
        pytest.raises(surgery.errors.ClusterError, match="or started on this machine") as failed,
        pytest.MonkeyPatch.context() as changed,
    ):
        changed.setenv("RAY_TMPDIR", str(tmp_path / "file"))  # Ray has no error of its own for what keeps it from starting
        surgery.factorize(llama, tmp_path / "f", engine="ray")
    assert "Not a directory" in str(failed.value)
    with pytest.raises(surgery.errors.OptionError, match="unknown engine"):
        surgery.factorize(llama, tmp_path / "f", engine="slurm")  # type: ignore[arg-type]
