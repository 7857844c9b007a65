"""How ``surgery resize`` runs: what is on the disk at any moment, where adapters come from, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError, OptionError, OutputError, SourceError, SurgeryError
from surgery.files import file_writer
from surgery.progress import Silent
from surgery.run import result_folder
from tests.commands.test_merge import ADAPTER_FILES, save_lora
from tests.loopback_hub import LoopbackHub
from tests.models import files_of

MODULES = {f"model.layers.{i}.self_attn.{part}_proj": (20, 16) for i in range(3) for part in ("q", "v")}
#: A tensor that is copied, behind the matrices in the file.
SAVED = {"lm_head.modules_to_save.weight": torch.arange(12, dtype=torch.float32).view(3, 4)}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rank 8. Read-only."""
    return save_lora(tmp_path_factory.mktemp("lora") / "a", MODULES, rank=8, more=SAVED, modules_to_save=["lm_head"])


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    tensors = {f"lora_unet_{one}.lora_down.weight": torch.randn(4, 6) for one in "ab"}
    tensors |= {f"lora_unet_{one}.lora_up.weight": torch.randn(5, 4) for one in "ab"}
    (tmp_path / "loras").mkdir()
    save_file(tensors, tmp_path / "loras/style.safetensors")
    return tmp_path / "loras/style.safetensors"


def _run(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(main, ["resize", *map(str, arguments)], env=environment, catch_exceptions=False)


def test_what_is_written_and_what_the_command_says(lora: Path, tmp_path: Path) -> None:
    report = surgery.resize(lora, tmp_path / "a", rank=2)
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(ADAPTER_FILES)
    size = (tmp_path / "a/adapter_model.safetensors").stat().st_size
    assert report.bytes_written == size < report.bytes_before == (lora / "adapter_model.safetensors").stat().st_size
    assert (report.rank_before, report.rank, len(report.modules)) == (8, 2, 6)
    kept = [one.kept for one in report.modules if one.kept is not None]
    assert report.kept_least == min(kept) < report.kept < max(kept)  # type: ignore[operator]
    assert report.kept_least_in in {one.module for one in report.modules if one.kept == report.kept_least}

    done = _run(lora, "--rank", 2, "-o", tmp_path / "b")
    rows, last = done.stdout.splitlines(), done.stderr
    assert rows[0].split() == ["modules", "number", "before", "rank", "kept"]
    assert [row.split()[:4] for row in rows[2:4]] == [[f"model.layers.*.self_attn.{x}_proj", "3", "8", "2"] for x in "qv"]
    assert f"6 modules, rank 8 -> 2, {100 * report.kept:.1f} % of the update kept (least" in last  # type: ignore[operator]
    quiet = _run(lora, "--rank", 2, "-o", tmp_path / "c", "--quiet")
    assert quiet.stdout == quiet.stderr == ""
    told = json.loads(_run(lora, "--rank", 2, "-o", tmp_path / "d", "--json").stdout)
    assert told["modules"][0] == report.as_json()["modules"][0]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c") == files_of(tmp_path / "d")


def test_a_dry_run(lora: Path, tmp_path: Path) -> None:
    done = _run(lora, "--energy", 0.6, "--dry-run", "-o", tmp_path / "o")
    assert done.exit_code == 0
    assert "6 modules, rank 8 -> " in done.stdout
    told = json.loads(_run(lora, "--energy", 0.6, "--dry-run", "--json", "-o", tmp_path / "o").stdout)
    assert not list(tmp_path.iterdir())
    written = surgery.resize(lora, tmp_path / "o", energy=0.6).as_json()
    assert {**told, "seconds": None} == {**written, "seconds": None}


@pytest.mark.parametrize("width", [60, 80, 100])
def test_it_fits_the_terminal(width: int, lora: Path, tmp_path: Path) -> None:
    done = _run(lora, "--rank", 2, "--dry-run", "-o", tmp_path / "o", COLUMNS=str(width))
    assert max(map(len, done.stdout.splitlines())) <= width
    assert done.stdout.count(" 8 ") >= 3


def test_an_earlier_adapter(lora: Path, tmp_path: Path) -> None:
    """It stays until the new one is whole, with what lies beside it."""
    out = tmp_path / "o"
    surgery.resize(lora, out, rank=2)
    (out / "README.md").write_text("mine")
    before = files_of(out)
    with pytest.raises(OutputError, match="is there already"):
        surgery.resize(lora, out, rank=3)
    with pytest.raises(OptionError, match="beyond the range"):
        surgery.resize(save_lora(tmp_path / "huge", MODULES, size=1e20), out, rank=2, dtype="float16", overwrite=True)
    assert files_of(out) == before
    surgery.resize(lora, out, rank=3, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    assert (out / "README.md").read_text() == "mine"


class _FullDisk(file_writer.FileWriter):
    """Has room for the header and a matrix."""

    def append(self, view: memoryview) -> None:
        if self.size > 2000:
            raise OutputError("No space left")
        super().append(view)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk(overwrite: bool, lora: Path, kohya: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is the earlier adapter, or none."""
    before: dict[str, bytes] = {}
    if overwrite:
        surgery.resize(lora, tmp_path / "o", rank=2)
        before = files_of(tmp_path / "o")
    with monkeypatch.context() as patched:
        patched.setattr("surgery.updates.resizing.FileWriter", _FullDisk)
        with pytest.raises(OutputError, match="No space left"):
            surgery.resize(lora, tmp_path / "o", rank=4, overwrite=overwrite)
        assert (files_of(tmp_path / "o") if overwrite else (tmp_path / "o").exists()) == (before or False)
    surgery.resize(lora, tmp_path / "o", rank=4, overwrite=overwrite)
    surgery.resize(lora, tmp_path / "another", rank=4)
    assert files_of(tmp_path / "o") == files_of(tmp_path / "another")


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_when_it_takes_its_place(overwrite: bool, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are weights then, and no config; the same call brings it to its end."""
    out, stopped = tmp_path / "o", Silent()
    if overwrite:
        surgery.resize(lora, out, rank=2)
    synced = result_folder.sync_directory

    def stop(path: Path) -> None:
        if (out / "adapter_model.safetensors").is_file() and not (out / "adapter_config.json").is_file():
            raise KeyboardInterrupt
        synced(path)

    with monkeypatch.context() as patched:
        patched.setattr(result_folder, "sync_directory", stop)
        with pytest.raises(KeyboardInterrupt):
            surgery.resize(lora, out, rank=4, overwrite=overwrite, progress=stopped)
    assert {path.name for path in out.iterdir()} == {"adapter_model.safetensors", ".surgery"}
    assert any("the same command continues" in note for note in stopped.notes)
    surgery.resize(lora, out, rank=4, overwrite=overwrite, progress=Silent())
    surgery.resize(lora, tmp_path / "another", rank=4)
    assert files_of(out) == files_of(tmp_path / "another")


def test_inputs_and_models_are_not_written_to(lora: Path, llama: Path, kohya: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora, tmp_path / "a")
    for out in (adapter, adapter / "sub", tmp_path):
        with pytest.raises(OutputError, match="one lies in the other"):
            surgery.resize(adapter, out, rank=2, overwrite=True)
    with pytest.raises(OutputError, match="is one of the inputs"):
        surgery.resize(kohya, kohya, rank=2, overwrite=True)
    with pytest.raises(OutputError, match="is one of the inputs"):
        surgery.resize(kohya.parent, kohya.parent / "small.safetensors", rank=2)
    with pytest.raises(OutputError, match="there is a model in"):
        surgery.resize(lora, shutil.copytree(llama, tmp_path / "m"), rank=2, overwrite=True)
    with pytest.raises(OutputError, match="is to be a folder"):
        surgery.resize(lora, tmp_path / "x.safetensors", rank=2)
    assert files_of(adapter) == files_of(lora)
    assert [path.name for path in kohya.parent.iterdir()] == ["style.safetensors"]
    surgery.resize(kohya, kohya.with_name("small.safetensors"), rank=2)  # beside it, under another name
    with pytest.raises(OutputError, match="is there already"):
        surgery.resize(kohya, kohya.with_name("small.safetensors"), rank=3)
    surgery.resize(kohya, kohya.with_name("small.safetensors"), rank=3, overwrite=True)
    assert len(load_file(kohya.with_name("small.safetensors"))["lora_unet_a.lora_down.weight"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a rank or an energy says how much"),
        ({"rank": 2, "energy": 0.5}, "a rank or an energy says how much"),
        ({"rank": 0}, "the rank must be at least 1"),
        ({"rank": -3}, "the rank must be at least 1"),
        ({"rank": 2, "max_rank": 3}, "a largest rank goes with an energy"),
        ({"energy": 0.0}, "the energy makes no sense"),
        ({"energy": float("nan")}, "the energy makes no sense"),
        ({"energy": 1.5}, "the energy makes no sense"),
        ({"energy": 0.5, "max_rank": 0}, "the largest rank must be at least 1"),
        ({"rank": 2, "dtype": "int8"}, "dtype"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        surgery.resize(lora, tmp_path / "o", **options)
    assert not list(tmp_path.iterdir())


def _edited(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a: _edited(a, lambda t: t[_A].fill_(torch.nan)), FormatError, "lora_A.weight' holds NaN or infinity"),
        (lambda a: _edited(a, lambda t: t.pop(_A)), FormatError, "lacks a half of its update"),
        (lambda a: _edited(a, lambda t: [t.pop(name) for name in [*t] if "lora_" in name]), OptionError, "no low-rank updates"),
        (lambda a: (a / "adapter_config.json").unlink(), SourceError, "there is no adapter_config.json"),
        (lambda a: (a / "adapter_config.json").write_text('{"peft_type": "LOHA"}'), OptionError, "is no LoRA adapter"),
        (lambda a: _cut(a / "adapter_model.safetensors"), FormatError, "size does not fit its header"),
        (
            lambda a: _edited(a, lambda t: t.update({_A.replace(".lora_", ".base_layer.lora_"): t.pop(_A)})),
            FormatError,
            "lacks a half",
        ),
        (lambda a: _nested(a), OptionError, "an adapter inside another"),
    ],
    ids=range(8),
)
def test_adapters_that_are_refused(
    change: Callable[[Path], object], kind: Any, message: str, lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "a")
    change(adapter)
    with pytest.raises(kind, match=message):
        surgery.resize(adapter, tmp_path / "o", rank=2)
    assert not (tmp_path / "o").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _nested(adapter: Path) -> None:
    _edited(adapter, lambda t: t.update({n.replace(".lora_", ".base_layer.lora_"): t.pop(n) for n in [*t] if "layers.1" in n}))


def test_stacks_of_which_it_is_not_known_which_is_which(tmp_path: Path) -> None:
    """Two parameters of one module, whose ranks or alphas differ: the names in the file are the same but for PEFT's layers."""
    names = ["experts.base_layer", "experts"]
    adapter = save_lora(
        tmp_path / "a",
        dict.fromkeys(names, (6, 4)),
        rank=6,
        target_parameters=["experts.up", "experts.down"],
        target_modules=[],
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 2, "alpha_pattern": {"experts.up": 1}}))
    with pytest.raises(OptionError, match="it cannot be told which parameter of 'experts'"):
        surgery.resize(adapter, tmp_path / "o", rank=1)


@pytest.mark.parametrize(("key", "method"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lora_mid.weight", "LoCon")])
def test_other_methods_are_refused_by_name(key: str, method: str, kohya: Path, tmp_path: Path) -> None:
    save_file({**load_file(kohya), f"lora_unet_a.{key}": torch.ones(4, 4)}, kohya)
    with pytest.raises(OptionError, match=rf"is no part of a LoRA update(.|\n)*{method}"):
        surgery.resize(kohya, tmp_path / "o", rank=2)


class _At(Silent):
    """Does something when a module is worked on."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__()
        self.do: Callable[[], object] | None = do

    def item(self, name: str) -> None:
        if self.do is not None:
            do, self.do = self.do, None
            do()


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_an_adapter_that_changes_meanwhile(name: str, lora: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora, tmp_path / "a")
    progress = _At(lambda: shutil.copyfile(lora / name, adapter / name))
    with pytest.raises(SurgeryError, match="has changed while it was in use"):
        surgery.resize(adapter, tmp_path / "o", rank=2, progress=progress)
    assert progress.do is None
    assert not (tmp_path / "o").exists()


def test_from_the_hub(hub: LoopbackHub, lora: Path, kohya: Path, tmp_path: Path) -> None:
    hub.publish("acme/resize-lora", lora)
    surgery.resize("acme/resize-lora", tmp_path / "o", rank=2)
    surgery.resize(lora, tmp_path / "here", rank=2)
    assert files_of(tmp_path / "o") == files_of(tmp_path / "here")
    hub.publish("acme/resize-style", kohya.parent)
    surgery.resize("acme/resize-style", tmp_path / "style", rank=2)
    surgery.resize(kohya, tmp_path / "small.safetensors", rank=2)
    assert (tmp_path / "style/style.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
