"""The built-in model and the demonstration."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import surgery
from surgery.cli.demo.text import bars, marked
from surgery.cli.main import main
from surgery.demo.run import MODEL, DemoReport, mean_loss, prose, run_demo
from surgery.demo.sentence import WordLoss
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


KEPT = {"original", "factorized", "scales.safetensors", "folded", "report", "README.md"}
STEPS, RANK = 4, 8


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoReport, Result]:
    """The folder that a demo left, in a path that a shell and Python must have in quotes, its report, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / 'my "own" demo\'s'
    with pytest.MonkeyPatch.context() as patch:
        reports: list[DemoReport] = []
        patch.setattr("surgery.demo.run.run_demo", lambda *args, **kw: reports.append(run_demo(*args, **kw)) or reports[0])
        patch.setenv("COLUMNS", "80")
        done = CliRunner().invoke(main, ["demo", f"--steps={STEPS}", f"--rank={RANK}", "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return out, reports[0], done


def _model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_demo_learns_and_what_it_folds_is_what_it_trained(left: tuple[Path, DemoReport, Result]) -> None:
    out, report, _ = left
    assert report.untouched_fold_identical
    assert report.trainable == 42 * RANK
    assert report.loss_attached < report.loss_before
    assert abs(report.loss_folded - report.loss_attached) < 2e-3  # the folded weights are rounded to bfloat16
    assert {path.name for path in out.iterdir()} == KEPT
    assert {path.name: path.read_bytes() for path in (out / "original").iterdir()} == {
        path.name: path.read_bytes() for path in MODEL.iterdir()
    }
    assert report.seconds_report is not None


def test_the_sentences_are_held_out_text_with_the_losses_that_transformers_gives(left: tuple[Path, DemoReport, Result]) -> None:
    out, report, _ = left
    train, held_out = (bytes(text.tolist()) for text in prose())
    models = [_model(out / name) for name in ("original", "folded")]
    for sentence in report.sentences:
        words = rb"\s+".join(re.escape(word.text.encode()) for word in sentence.words)
        assert sentence.text == " ".join(word.text for word in sentence.words)
        assert not re.search(words, train)
        found = re.search(words, held_out)
        assert found is not None
        ids = torch.tensor([list(held_out[: found.end()][-256:])])
        labels = ids.clone()
        labels[:, : -len(found.group())] = -100  # what comes before the sentence counts as context only
        losses = [model(input_ids=ids, labels=labels).loss.item() for model in models]
        assert losses == pytest.approx([sentence.loss_before, sentence.loss_folded], abs=1e-4)
        for i, field in enumerate(("nats_before", "nats_folded")):
            nats = sum(getattr(word, field) for word in sentence.words)
            assert nats == pytest.approx(losses[i] * len(found.group()), abs=2e-2)
    most, median = report.sentences
    assert most.gain > median.gain
    assert (median.gain > 0) == (report.sentences_gained > report.sentences_measured // 2)


def test_the_losses_are_of_paragraphs_that_were_not_trained_on(left: tuple[Path, DemoReport, Result]) -> None:
    out, report, _ = left
    train, held_out = prose()
    trained_on = " ".join(bytes(train.tolist()).decode().split())
    paragraphs = re.split(r"\n\s*\n", bytes(held_out.tolist()).decode())
    assert len(paragraphs) > 100
    assert not [one for one in paragraphs if " ".join(one.split()) in trained_on]
    for folder, loss in (("original", report.loss_before), ("folded", report.loss_folded)):
        assert mean_loss(_model(out / folder), held_out) == pytest.approx(loss, abs=1e-5)


def test_the_changes_are_those_of_the_scales_file(left: tuple[Path, DemoReport, Result]) -> None:
    out, report, _ = left
    scales = load_file(out / "scales.safetensors")
    for part, changes, count in (("_proj", report.changed_by_projection, 7), ("layer", report.changed_by_layer, 6)):
        assert len(changes) == count, part
    for key, change in report.changed_by_projection.items():
        some = torch.cat([g for name, g in scales.items() if f".{key}." in name])
        assert len(some) == 6 * RANK
        assert change == pytest.approx((some - 1).abs().mean().item(), rel=1e-5)
    for key, change in report.changed_by_layer.items():
        some = torch.cat([g for name, g in scales.items() if f".layers.{key}." in name])
        assert len(some) == 7 * RANK
        assert change == pytest.approx((some - 1).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("moment", ["training", "folding", "drawing"])
def test_a_demo_that_was_stopped_is_gone_on_with(moment: str, tmp_path: Path) -> None:
    phases: list[str] = []

    class Stop(Silent):
        def start(self, label: str, total_bytes: int) -> None:
            phases.append(label)
            if label == moment and (moment != "folding" or phases.count(label) == 2):  # the first one folds untouched scales
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, rank=2, steps=1, progress=Stop())
    with pytest.raises(OutputError, match="another run"):
        run_demo(tmp_path, rank=3, steps=1, progress=Silent())
    run_demo(tmp_path, rank=2, steps=1, progress=Silent())
    assert {path.name for path in tmp_path.iterdir()} == KEPT
    with pytest.raises(OutputError, match="factorized is there already"):
        run_demo(tmp_path, rank=2, steps=1, progress=Silent())


def test_a_demo_is_replaced_only_by_overwrite(left: tuple[Path, DemoReport, Result], tmp_path: Path) -> None:
    out = shutil.copytree(left[0], tmp_path / "demo")
    report = run_demo(out, rank=2, steps=1, overwrite=True, progress=Silent())
    assert report.trainable == 42 * 2
    assert {path.name for path in out.iterdir()} == KEPT
    assert len(load_file(out / "scales.safetensors")["model.layers.0.mlp.up_proj.weight"]) == 2


@pytest.mark.parametrize("name", ["README.md", "original/config.json"])
def test_a_demo_never_replaces_files_of_others(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"{path.name} is there already"):
            run_demo(tmp_path, rank=2, steps=1, overwrite=overwrite, progress=Silent())
    assert path.read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == len(path.relative_to(tmp_path).parts)


def test_demo_command_tells_what_changed(left: tuple[Path, DemoReport, Result]) -> None:
    _, report, done = left
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["numbers", "on", "disk", "loss", "seconds"]
    assert [line.split()[0] for line in lines[2:6]] == ["original", "factorized", "scales,", "folded"]
    assert "byte for byte" in " ".join(lines)
    for sentence in report.sentences:
        assert f"{sentence.loss_before:.3f} -> {sentence.loss_folded:.3f} nats per byte:" in " ".join(lines)
    drawn = {line.rpartition("  ")[0].strip(): line.count("█") for line in lines if "█" in line}
    assert len(drawn) == 7 + 6
    longest = max(report.changed_by_projection, key=report.changed_by_projection.__getitem__)
    assert max(drawn.values()) in (drawn[next(name for name in drawn if name.startswith(longest))], *list(drawn.values())[7:])


def test_marks_count_doublings_and_halvings_under_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    nats = math.log(2)
    words = tuple(
        WordLoss(text, 9.0, 9.0 - doublings * nats)
        for text, doublings in [("Some", 2.1), ("of", -5), ("these", 0.9), ("words", -1.1), ("fit", 3.0001)]
    )
    monkeypatch.setenv("COLUMNS", "17")
    assert marked(words).splitlines() == ["  Some of these", "  ++   --", "  words fit", "  -     +++"]
    monkeypatch.setenv("COLUMNS", "200")
    assert marked(words).splitlines() == ["  Some of these words fit", "  ++   --       -     +++"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars_fit_and_have_one_scale(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (20, 60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        lines = bars({"long name": 0.5, "b": 0.25}, {"c": 0.0}).splitlines()
        full = "█" if encoding == "utf-8" else "#"
        assert len(lines[0]) == min(columns, 80)
        assert [line.count(full) for line in lines] == [n := lines[0].count(full), round(n / 2), 0, 0]
        assert [line.split(full)[0].split() for line in lines] == [["long", "name", "50.0"], ["b", "25.0"], [], ["c", "0.0"]]


def test_without_a_folder_nothing_is_kept_and_json_is_all_that_is_printed() -> None:
    done = CliRunner().invoke(main, ["demo", "--steps", "1", "--rank", "2"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stderr.splitlines()[-1].endswith("surgery demo -o demo")
    assert "llama.cpp" not in done.stderr
    done = CliRunner().invoke(main, ["demo", "--steps", "1", "--rank", "2", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (found["out"], found["seconds_report"]) == (None, None)
    assert "A small Llama" not in done.stderr
    texts = [word["text"] for word in found["sentences"][0]["words"]]
    assert " ".join(texts) == found["sentences"][0]["text"]


def _run(command: str, folder: Path) -> str:
    """Run a line as a shell would, with our own Python and surgery."""
    programs = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\nsurgery() {{ python -m surgery "$@"; }}\nset -e\n'
    root = str(Path(surgery.__file__).parent.parent)
    done = subprocess.run(
        ["bash", "-c", programs + command], cwd=folder, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_the_printed_commands_work(left: tuple[Path, DemoReport, Result], tmp_path: Path) -> None:
    out, _, done = left
    told = done.stderr.replace("\n  ", " ").splitlines()
    commands = {line.partition(": ")[0]: line.partition(": ")[2] for line in told[told.index("") + 1 :] if ": " in line}
    assert Path(commands["the singular values before and after"]) == out / "report/index.html"
    assert Path(commands["what is kept, and more to try"]) == out / "README.md"
    assert (out / "report/index.html").is_file()
    convert = shlex.split(commands["converted for llama-server"])
    assert convert[:3] == ["python", "llama.cpp/convert_hf_to_gguf.py", str(out / "folded")]
    assert shlex.split(commands["vLLM serves the folded model"]) == ["vllm", "serve", str(out / "folded")]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (out / "folded" / name).read_bytes() == (MODEL / name).read_bytes()
    assert "A list" in _run(commands["transformers writes with the folded model"], tmp_path)
    _run(commands["the same as an adapter of the original"], tmp_path)
    assert (out / "adapter/adapter_model.safetensors").is_file()
    shutil.rmtree(out / "adapter")


def test_the_commands_of_the_readme_work(left: tuple[Path, DemoReport, Result], tmp_path: Path) -> None:
    """All but those of servers and the browser, and those that the command prints too."""
    out = shutil.copytree(left[0], tmp_path / "demo")
    text = (out / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    others = re.compile(r"vllm|python llama\.cpp|python -m webbrowser|python -c|surgery export")
    lines = [line for block in blocks for line in block.splitlines() if not others.match(line)]
    printed = _run("\n".join(lines), out)
    losses = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if re.match("(original|folded) ", line)}
    assert losses.keys() == {"original", "folded"}
    for name in re.findall(r"^\| `([^`]+)` ", text, re.MULTILINE):
        assert (out / name).exists()
    weights = load_file(out / "half/model-00001-of-00002.safetensors")
    assert weights.keys() == load_file(out / "untouched/model-00001-of-00002.safetensors").keys()
    assert "--max-lora-rank 8 " in text
