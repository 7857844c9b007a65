"""What ``surgery spectra`` leaves behind when it is stopped, and how it goes on; and that nothing depends on the cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import OutputError, WeightError
from surgery.progress import Silent
from surgery.study.spectra_shard import SpectraMeasure
from tests.measure import run_module
from tests.models import files_of, save_llama

ROOT = Path(__file__).parents[2]
STUDY: dict[str, Any] = {"top": 4, "include": ["*q_proj*", "*down_proj*"], "device": "cpu"}
LAST = "model.layers.1.mlp.down_proj.weight"
FILES = {"spectra.json", "spectra.csv", "index.html"}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model in several files, and a fine-tuned one."""
    model, tuned = save_llama(tmp_path / "m", torch.bfloat16), save_llama(tmp_path / "t", torch.bfloat16)
    for path in tuned.glob("*.safetensors"):
        weights = {name: tensor * 1.01 if tensor.ndim == 2 else tensor for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return model, tuned


class _Stop(Silent):
    """Interrupts a run when it comes to a tensor of this name."""

    def item(self, name: str) -> None:
        if name == LAST:
            raise KeyboardInterrupt


def _interrupted(model: Path, tuned: Path, out: Path, **options: Any) -> str:
    """What is said."""
    stop = _Stop()
    with pytest.raises(KeyboardInterrupt):
        surgery.spectra(model, tuned, out=out, progress=stop, **{**STUDY, **options})
    (said,) = stop.notes
    return said


@pytest.mark.parametrize("earlier", [False, True])
def test_goes_on_after_the_last_finished_shard(
    earlier: bool, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tuned = models
    surgery.spectra(model, tuned, out=tmp_path / "truth", **STUDY)
    out = tmp_path / "o"
    out.mkdir()
    if earlier:
        (out / "spectra.json").write_text("earlier")
    (out / "notes.txt").write_text("mine")
    before = files_of(out)
    said = _interrupted(model, tuned, out, overwrite=earlier)
    assert "the same command continues from there" in said
    assert {name: data for name, data in files_of(out).items() if not name.startswith(".surgery/")} == before
    measured = []
    take = SpectraMeasure.__call__

    def count(self: SpectraMeasure, *arguments: Any) -> dict[str, Any]:
        measured.append(1)
        return take(self, *arguments)

    monkeypatch.setattr(SpectraMeasure, "__call__", count)
    quiet = Silent()
    report = surgery.spectra(model, tuned, out=out, progress=quiet, **STUDY)  # without overwrite: it is the same run
    assert any(note.startswith("continuing after") for note in quiet.notes)
    assert 0 < len(measured) < len(report.targets) == 4
    assert files_of(out) == files_of(tmp_path / "truth") | {"notes.txt": b"mine"}


def test_another_command_does_not_go_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, tuned = models
    out = tmp_path / "o"
    _interrupted(model, tuned, out)
    left = files_of(out)
    for options in ({"top": 5}, {"seed": 1}, {"include": ["*q_proj*"]}):
        with pytest.raises(OutputError, match="unfinished run of another kind"):
            surgery.spectra(model, tuned, out=out, **{**STUDY, **options})
    with pytest.raises(OutputError, match="unfinished run of another kind"):
        surgery.spectra(model, out=out, **STUDY)
    with pytest.raises(OutputError, match="unfinished run of another kind"):
        surgery.factorize(model, out, rank=2)
    assert files_of(out) == left
    surgery.spectra(model, out=out, overwrite=True, **STUDY)
    assert {path.name for path in out.iterdir()} == FILES


def test_what_somebody_else_puts_there_meanwhile_is_not_replaced(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "o"
    _interrupted(*models, out)
    (out / "index.html").write_text("somebody's")
    with pytest.raises(OutputError, match="is there already"):
        surgery.spectra(*models, out=out, **STUDY)
    assert (out / "index.html").read_text() == "somebody's"


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_model_that_has_changed_meanwhile(which: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    """Also with its time set back: what was measured of the file is measured again."""
    model, tuned = models
    _interrupted(model, tuned, tmp_path / "o")
    first = sorted((model if which == "base" else tuned).glob("*.safetensors"))[0]
    times = first.stat()
    name, _ = next(item for item in load_file(first).items() if "q_proj" in item[0] or "embed" in item[0])
    changed = load_file(first)
    changed[name] = changed[name] * 2
    save_file(changed, first, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="unfinished run of another kind"):
        surgery.spectra(model, tuned, out=tmp_path / "o", **STUDY)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    quiet = Silent()
    surgery.spectra(model, tuned, out=tmp_path / "o", progress=quiet, **STUDY)
    surgery.spectra(model, tuned, out=tmp_path / "truth", progress=Silent(), **STUDY)
    assert files_of(tmp_path / "o") == files_of(tmp_path / "truth")


def test_weights_that_cannot_be_measured_leave_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, tuned = models
    path = next(path for path in tuned.glob("*.safetensors") if LAST in load_file(path))
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    with pytest.raises(WeightError):
        surgery.spectra(model, tuned, out=tmp_path / "o", **STUDY)
    assert not (tmp_path / "o").exists()


def test_nothing_depends_on_the_number_of_cores(models: tuple[Path, Path], tmp_path: Path) -> None:
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "surgery", "spectra", *map(str, models), "-o", str(tmp_path / threads), "--top", "4"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_command_goes_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "o"
    _interrupted(*models, out)
    command = ["spectra", *map(str, models), "-o", str(out), "--top", "4", "--device", "cpu"]
    for pattern in STUDY["include"]:
        command += ["--include", pattern]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "continuing after" in result.output
    assert {path.name for path in out.iterdir()} == FILES
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1
    assert "is there already" in again.output
    assert json.loads((out / "spectra.json").read_text())["findings"]["targets"] == 4


def test_a_number_of_thousands_of_digits_is_no_layer(tmp_path: Path) -> None:
    """Python refuses to read an integer of more than 4300 digits."""
    (tmp_path / "m").mkdir()
    names = [f"blocks.{'9' * 5000}.a.weight", "blocks.7.a.weight"]
    save_file({name: torch.randn(4, 3) for name in names}, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text("{}")
    report = surgery.spectra(tmp_path / "m", out=tmp_path / "o", include=["*"], device="cpu")
    assert {target["tensor"]: target["layer"] for target in report.targets} == {names[0]: None, names[1]: 7}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("trials", "names"),
    [(1, ["spectra"]), pytest.param(1000, [], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_stopped_at_any_change(trials: int, names: list[str], models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    said = run_module("tests.faults_of_files", *models, tmp_path / "work", trials, *names)
    assert said.count("stops") == 2 * (len(names) or 5)


def test_without_matplotlib_a_note_says_how_to_have_a_page(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quiet = Silent()
    surgery.spectra(models[0], out=tmp_path / "o", progress=quiet, **STUDY)
    (said,) = quiet.notes
    assert said.startswith("no page: the pictures of a report")
    assert said.endswith("; try pip install 'matplotlib>=3.10.8'")
    assert {path.name for path in (tmp_path / "o").iterdir()} == FILES - {"index.html"}
