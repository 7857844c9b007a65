"""The examples run as they are written, lower the loss, and save scales that the command they print folds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from surgery.cli.main import main

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = Path(surgery.__file__).parent / "demo" / "model"
# The package of this checkout, on one thread as is best for a tiny model.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NAMES = ["plain_loop", "hf_trainer", "sft_trainer", "peft_trainer"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, subprocess.Popen[str]]]]:
    """Each example's folder and process. They run side by side, as most of what they do is to import."""
    made = tmp_path_factory.mktemp("examples") / "made"
    surgery.factorize(DEMO, made, rank=16)
    processes: dict[str, tuple[Path, subprocess.Popen[str]]] = {}
    try:
        for name in NAMES:
            folder = tmp_path_factory.mktemp(name)
            chosen = [] if name == "plain_loop" else [DEMO, made, "out"]  # the first makes what it needs by itself
            with open(folder / "errors.txt", "w") as errors:
                process = subprocess.Popen(
                    [sys.executable, EXAMPLES / f"{name}.py", *chosen, "--steps", "6"],
                    cwd=folder,
                    env=ENVIRONMENT,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            processes[name] = folder, process
        yield processes
    finally:
        for _, process in processes.values():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, started: dict[str, tuple[Path, subprocess.Popen[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, process = started[name]
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, (folder / "errors.txt").read_text()
    losses = re.search(r"held-out loss: (\S+) before, (\S+) after", output)
    assert losses is not None
    assert float(losses[2]) < float(losses[1])
    command, *arguments = shlex.split(output.splitlines()[-1])
    assert command == "surgery"
    monkeypatch.chdir(folder)
    main(arguments, standalone_mode=False)
    assert (folder / "folded" / "config.json").is_file()
    scales = surgery.read_scales(folder / arguments[2]).values.values()
    assert {int((g != 1).sum()) for g in scales} == {8 if name in ("plain_loop", "hf_trainer") else 16}  # these two choose


def test_adapter_example(started: dict[str, tuple[Path, subprocess.Popen[str]]]) -> None:
    """On what the plain loop has trained."""
    folder, process = started["plain_loop"]
    assert process.wait(timeout=280) == 0
    command = [sys.executable, EXAMPLES / "peft_adapter.py", "trained/scales.safetensors"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    change = re.search(r"largest change of a logit: (\S+)\nmerged against unmerged: +(\S+)", done.stdout)
    assert change is not None
    assert float(change[1]) > 1e-2
    assert float(change[2]) < 1e-3
    assert done.stdout.splitlines()[-1].endswith("--enable-lora --max-lora-rank 16 --lora-modules tuned=adapter")
