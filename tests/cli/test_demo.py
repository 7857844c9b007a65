"""The built-in model and the demonstration."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.demo.run import MODEL, run_demo
from surgery.errors import OutputError
from surgery.progress import Silent


def test_the_model_is_what_the_package_promises() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 3_000_000
    assert len(list(MODEL.glob("*.safetensors"))) == 2
    assert (MODEL / "model.safetensors.index.json").exists()
    config = json.loads((MODEL / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = "def f(x):\n\treturn 'é♥'  # any bytes"  # more of it in tests/serving
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_model_has_learned_python() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self."
    ids = torch.tensor([list(prompt.encode())])
    assert model(input_ids=ids, labels=ids).loss.item() < 1.5  # 5.5 for a model that knows nothing


def test_demo_learns_and_what_it_folds_is_what_it_trained(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "demo", rank=8, steps=4)
    assert report.untouched_fold_identical
    assert report.trainable == 42 * 8
    assert report.loss_attached < report.loss_before
    assert abs(report.loss_folded - report.loss_attached) < 2e-3  # the folded weights are rounded to bfloat16
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"factorized", "scales.safetensors", "folded"}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "demo/folded")


@pytest.mark.parametrize("moment", ["training", "folding"])
def test_a_demo_that_was_stopped_is_gone_on_with(moment: str, tmp_path: Path) -> None:
    phases: list[str] = []

    class Stop(Silent):
        def start(self, label: str, total_bytes: int) -> None:
            phases.append(label)
            if label == moment and (moment == "training" or phases.count(label) == 2):  # the first one folds untouched scales
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, rank=2, steps=1, progress=Stop())
    with pytest.raises(OutputError, match="another run"):
        run_demo(tmp_path, rank=3, steps=1, progress=Silent())
    run_demo(tmp_path, rank=2, steps=1, progress=Silent())
    assert {path.name for path in tmp_path.iterdir()} == {"factorized", "scales.safetensors", "folded"}
    with pytest.raises(OutputError, match="factorized is there already"):
        run_demo(tmp_path, rank=2, steps=1, progress=Silent())


def test_demo_command_prints_one_table() -> None:
    done = CliRunner().invoke(main, ["demo", "--steps", "1", "--rank", "2"], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["numbers", "on", "disk", "loss", "seconds"]
    assert [line.split()[0] for line in lines[2:6]] == ["original", "factorized", "scales,", "folded"]
    assert "byte for byte" in done.stdout
    assert "llama.cpp" not in done.stderr  # nothing is kept


def test_demo_command_says_how_llama_cpp_gets_what_it_keeps(tmp_path: Path) -> None:
    out = tmp_path / "my demo"
    done = CliRunner().invoke(main, ["demo", "--steps", "1", "--rank", "2", "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    command = shlex.split(done.stderr.splitlines()[-1].rpartition(": ")[2])
    assert command[:3] == ["python", "llama.cpp/convert_hf_to_gguf.py", str(out / "folded")]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (out / "folded" / name).read_bytes() == (MODEL / name).read_bytes()
