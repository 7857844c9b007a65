"""The command line: what goes to stdout, to stderr, and as exit code; and that the docs say the same as --help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from tests.models import files_of

ROOT = Path(__file__).parents[2]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_factorize_fold_inspect(llama: Path, tmp_path: Path) -> None:
    done = _run("factorize", llama, "--rank", 4, "-o", tmp_path / "f")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "14 matrices at rank 4, 56 trainable scales" in done.stderr

    done = _run("inspect", tmp_path / "f")
    assert (done.exit_code, done.stderr) == (0, "")
    heading, _, *rows = done.stdout.splitlines()
    assert heading.split() == [
        "target",
        "shape",
        "dtype",
        "rank",
        "energy",
        "s_1",
        "s_k",
        "residual",
        "converged",
        "undetermined",
        "largest",
    ]
    assert [row.split()[:4] for row in rows if "q_proj" in row] == [
        [f"model.layers.{i}.self_attn.q_proj.weight", "48x48", "BF16", "4"] for i in range(2)
    ]

    done = _run("fold", tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", "-o", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "the original weights, byte for byte" in done.stderr
    assert files_of(tmp_path / "out") == files_of(llama)


def test_json_is_all_there_is_on_stdout(llama: Path, tmp_path: Path) -> None:
    plan = json.loads(_run("factorize", llama, "--rank", 4, "--dry-run", "--json").stdout)
    assert plan["schema_version"] == 1
    assert plan["targets"][0].keys() == {
        "tensor",
        "slice",
        "shard",
        "dtype",
        "shape",
        "view",
        "matrices",
        "rank",
        "energy",
        "aliases",
    }
    assert plan["skipped"][0].keys() == {"tensor", "shard", "reason"}
    assert plan["trainable"] == 56
    assert {"bytes_read", "bytes_written", "peak_memory_bytes"} <= plan.keys()

    done = _run("factorize", llama, "--rank", 4, "--json", "-o", tmp_path / "f")
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert (report["targets"], report["trainable"], report["converged"]) == (14, 56, True)
    assert report["bytes_written"] <= plan["bytes_written"]

    found = json.loads(_run("inspect", tmp_path / "f", "--json").stdout)
    assert [target["tensor"] for target in found["targets"]] == [target["tensor"] for target in plan["targets"]]
    assert found["skipped"] == plan["skipped"]

    scales = load_file(tmp_path / "f/surgery/scales.safetensors")
    next(iter(scales.values()))[0] = 2
    save_file(scales, tmp_path / "s.safetensors")
    done = _run("fold", tmp_path / "f", tmp_path / "s.safetensors", "--json", "-o", tmp_path / "out")
    assert json.loads(done.stdout)["changed"] == 1
    assert done.stderr.startswith("note: ")  # the scales lost their metadata
    assert done.stderr.count("\n") == 1


def test_dry_run_prints_every_tensor_and_writes_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = _run("factorize", llama, "--dry-run")
    assert done.exit_code == 0
    assert re.search(r"^1 +lm_head\.weight +an output head$", done.stdout, re.MULTILINE)
    assert re.search(r"^2 +model\.layers\.\*\.mlp\.up_proj\.weight +80x48 +matrix +BF16 +16$", done.stdout, re.MULTILINE)
    # The same as surgery plan prints but for the time, which is measured.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("takes about")]
    plan = _run("plan", llama)
    assert [line for line in plan.stdout.splitlines() if not line.startswith("takes about")] == lines
    counted = sum(int(line.split()[0]) for line in lines if re.match(r"\d+ +\S+\.", line))
    steps = surgery.plan(llama)
    assert counted == len(steps.targets) + len(steps.skipped)
    every = _run("plan", llama, "--all").stdout
    assert all(name in every for name in [t.tensor for t in steps.targets] + [item.tensor for item in steps.skipped])
    assert list(tmp_path.iterdir()) == []


def test_plan_with_options(llama: Path, tmp_path: Path) -> None:
    plan = json.loads(_run("plan", llama, "--rank", 4, "--recipe", "attention", "--layout", "overlay", "--json").stdout)
    assert (plan["layout"], plan["recipe"], len(plan["targets"]), plan["trainable"]) == ("overlay", "attention", 8, 32)
    assert 0 < plan["seconds"] < 60
    assert "14 targets, at most 140 trainable scales" in _run("plan", llama, "--energy", 0.5, "--max-rank", 10).stdout
    done = _run("plan", llama, "--rank", 4, "--energy", 0.5)
    assert done.exit_code == 1
    assert "contradict" in done.stderr
    for options in (["--max-rank", 4], ["--rank", 4, "--no-correction", "--layout", "overlay"]):
        done = _run("plan", llama, *options)
        assert (done.exit_code, done.stdout) == (1, "")


def test_recipes_are_listed() -> None:
    done = _run("recipes")
    assert done.exit_code == 0
    assert re.search(r"^llama: every linear layer", done.stdout, re.MULTILINE)
    assert "not *.mlp.router.weight: a router" in done.stdout
    listed = json.loads(_run("recipes", "--json").stdout)
    assert listed["schema_version"] == 1
    assert {recipe["name"] for recipe in listed["recipes"]} >= {"llama", "attention", "mlp", "gpt_oss", "diffusion"}


def test_quiet_says_nothing(llama: Path, tmp_path: Path) -> None:
    done = _run("factorize", llama, "--rank", 32, "-q", "-o", tmp_path / "f")
    assert (done.exit_code, done.output) == (0, "")
    loud = _run("factorize", llama, "--rank", 32, "-o", tmp_path / "g")
    assert "note: rank 32 is larger than 4 of 14 targets" in loud.stderr


def test_a_failure_is_one_message_and_exit_code_1(llama: Path, tmp_path: Path) -> None:
    done = _run("factorize", llama, "--include", "*qproj*", "-o", tmp_path / "f")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: --include '*qproj*' matches no tensor\n  expected: ")
    done = _run("fold", tmp_path / "nothing", tmp_path / "s")
    assert (done.exit_code, done.stdout) == (1, "")
    done = _run("inspect", tmp_path)
    assert done.exit_code == 1
    assert "try:" in done.stderr


def test_usage_errors_are_exit_code_2(llama: Path) -> None:
    assert _run("factorize").exit_code == 2
    assert _run("factorize", llama, "--rank", "many").exit_code == 2
    assert _run("factorize", llama, "--layout", "spread").exit_code == 2
    assert _run("amputate").exit_code == 2


def _python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_help_does_not_import_torch() -> None:
    done = _python("-X", "importtime", "cli.py", "factorize", "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert not re.search(r"\| +(torch|transformers|huggingface_hub)$", done.stderr, re.MULTILINE)


def test_launcher_and_pipes(llama: Path, tmp_path: Path) -> None:
    """In a pipe there is no bar: stderr holds the summary alone."""
    done = _python(str(ROOT / "cli.py"), "factorize", str(llama), "--rank", "4", cwd=tmp_path)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 3
    assert "\r" not in done.stderr
    assert (tmp_path / "factorized/surgery/manifest.json").exists()


def test_public_names() -> None:
    assert sorted(surgery.__all__) == surgery.__all__
    assert {name for name in surgery.__all__ if getattr(surgery, name, None) is None} == set()
    with pytest.raises(AttributeError):
        _ = surgery.nonsense


def _commands() -> dict[str, click.Command]:
    """Those of groups as well, by their full names."""
    found = dict(main.commands)
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": part for inner, part in command.commands.items()}
    return found


@pytest.mark.parametrize("name", sorted(_commands()))
def test_docs_have_every_command_and_option(name: str) -> None:
    """docs/cli.md shows the help of each command as it is printed."""
    help_text = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=100, prog_name="surgery").stdout.strip()
    assert f"## surgery {name}\n\n```text\n{help_text}\n```" in (ROOT / "docs/cli.md").read_text()


def test_inspect_tells_when_the_smallest_value_is_hardly_known(tmp_path: Path) -> None:
    """s_2 from half of s_1 down to what float32 cannot tell, and a matrix of zeros."""
    (tmp_path / "m").mkdir()
    left, right = (torch.linalg.qr(torch.randn(96, 2, generator=torch.Generator().manual_seed(i)).double())[0] for i in (0, 1))
    values = {"a": 0.5, "b": 1e-4, "c": 1e-6, "d": 1e-8}
    weights = {name: ((left * torch.tensor([1, second])) @ right.T).float() for name, second in values.items()}
    weights = {
        f"model.layers.0.mlp.{name}_proj.weight": weight for name, weight in {**weights, "e": torch.zeros(96, 96)}.items()
    }
    save_file(weights, tmp_path / "m/model.safetensors")
    assert _run("factorize", tmp_path / "m", "--rank", 2, "-o", tmp_path / "f").exit_code == 0

    found = {row["tensor"][19]: row for row in json.loads(_run("inspect", tmp_path / "f", "--json").stdout)["targets"]}
    for name, second in values.items():
        true = torch.linalg.svdvals(weights[f"model.layers.0.mlp.{name}_proj.weight"].double())[1].item()
        assert true == pytest.approx(second, rel=0.01, abs=1e-8)
        error = found[name]["s_last_error"]
        assert error == 1 or abs(found[name]["s_last"] - true) <= error * found[name]["s_last"]
    assert found["a"]["s_last_error"] < found["b"]["s_last_error"] < 0.01 < found["c"]["s_last_error"] < 0.2
    assert (found["d"]["s_last_error"], found["e"]["s_last_error"]) == (1, 0)

    rows = [re.split(r"\s{2,}", line) for line in _run("inspect", tmp_path / "f").stdout.splitlines()]
    shown = {row[0][19]: row[6] for row in rows if row[0].startswith("model.")}
    assert [name for name, line in shown.items() if "+-" in line] == ["c"]
    assert [name for name, line in shown.items() if "unknown" in line] == ["d"]
