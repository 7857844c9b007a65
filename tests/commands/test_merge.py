"""How ``surgery merge`` runs: what is on the disk at any moment, where models and adapters come from, what is refused."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.commands.adapters.merge import MergeReport, merge, plan_merge
from surgery.errors import OptionError, OutputError, SourceError, SurgeryError
from surgery.files import file_writer
from surgery.progress import Silent
from surgery.publish import upload
from tests.loopback_hub import WRITING_TOKEN, LoopbackHub
from tests.models import files_of, tensors_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What is said of a run that was begun before or of an upload, where a test does not listen.
    pytest.mark.filterwarnings("ignore:continuing after|.* is already complete|uploaded to:surgery.errors.SurgeryWarning"),
    # The client sends a file in a way that its HTTP library would have otherwise.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (48, 48), DOWN: (48, 80)}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_lora(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    rank: int = 3,
    seed: int = 5,
    size: float = 0.03,
    more: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter as PEFT saves it, of modules with weights of these shapes, and ``more`` tensors in its file."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, inputs) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * size
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in (more or {}).items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))
    return folder


def delta(adapter: Path, module: str) -> torch.Tensor:
    """float64: what a plain adapter adds to a module's weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    A, B = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
    change: torch.Tensor = config["lora_alpha"] / config["r"] * (B @ A)
    return change


def share(before: torch.Tensor, after: torch.Tensor, update: torch.Tensor) -> float:
    """How much of an update arrived."""
    return (((after.double() - before.double()) * update).sum() / update.square().sum()).item()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of modules in the first and the last weight file of ``llama``. Read-only."""
    return save_lora(tmp_path_factory.mktemp("lora") / "a", SHAPES)


@pytest.fixture(scope="module")
def truth(llama: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MergeReport]:
    """An undisturbed result, and its report. Read-only."""
    out = tmp_path_factory.mktemp("truth") / "o"
    return out, merge(llama, lora, out, progress=Silent())


class _Stop(Silent):
    """Interrupts a run when it comes to a tensor of this name."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def item(self, name: str) -> None:
        if name == self.at:
            raise KeyboardInterrupt


class _FullDisk(io.FileIO):
    """Takes so many bytes in all."""

    left = 0

    def write(self, data: Any) -> int:
        if _FullDisk.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(len(data), _FullDisk.left, 10_000)
        _FullDisk.left -= taken
        return super().write(data[:taken]) or 0


def _without_place(report: MergeReport) -> dict[str, Any]:
    return {**json.loads(json.dumps(report.as_json())), "out": None}


# -- what is written ------------------------------------------------------------------------------------------------------


def test_what_is_written(llama: Path, lora: Path, truth: tuple[Path, MergeReport]) -> None:
    """The update arrives, and all else is the source's: tensors, whole files, config, index, tokenizer."""
    out, report = truth
    before, after = tensors_of(llama), tensors_of(out)
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        if module in SHAPES:
            assert share(before[name], tensor, delta(lora, module)) >= 0.99
        else:
            assert torch.equal(tensor, before[name]), name
    place = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    changed = {place[f"{module}.weight"] for module in SHAPES}
    assert len(changed) == 2
    assert {path.name for path in llama.glob("*.safetensors")} - changed
    for path in llama.rglob("*"):
        if path.is_file() and path.name not in changed:
            assert sha256(out / path.relative_to(llama)) == sha256(path), path
    assert {one.tensor for one in report.tensors} == {f"{module}.weight" for module in SHAPES}
    for one in report.tensors:
        update = delta(lora, one.tensor.removesuffix(".weight"))
        assert one.size == pytest.approx((update.norm() / before[one.tensor].double().norm()).item(), rel=1e-3)
        assert one.kept == pytest.approx(share(before[one.tensor], after[one.tensor], update), abs=1e-4)
        assert (one.shard, one.rank) == (place[one.tensor], 3)
    for record in report.files:
        assert (record.size, record.sha256) == ((out / record.file).stat().st_size, sha256(out / record.file))
    assert (report.shards, report.restored) == (len({*place.values()}), len({*place.values()}) - 2)
    assert not (out / ".surgery").exists()


def test_a_dry_run(llama: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing, and says of every tensor of the adapter where it would go."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["merge", str(llama), str(lora), "--dry-run", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    (account,) = told["accounts"]
    stored = load_file(lora / "adapter_model.safetensors")
    assert account == {name: [f"{name.split('.lora_')[0].removeprefix('base_model.model.')}.weight"] for name in stored}
    assert [one["tensor"] for one in told["tensors"]] == sorted(f"{module}.weight" for module in SHAPES)
    assert (told["changed_shards"], told["shards"]) == (2, len(list(llama.glob("*.safetensors"))))
    assert told["bytes_written"] == sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    plain = CliRunner().invoke(main, ["merge", str(llama), str(lora), "--dry-run"], catch_exceptions=False)
    assert "2 tensors would change, in 2 of" in plain.stdout
    assert not list(tmp_path.iterdir())


def test_what_the_command_says(llama: Path, lora: Path, truth: tuple[Path, MergeReport], tmp_path: Path) -> None:
    arguments = ["merge", str(llama), str(lora), "-o"]
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "a"), "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert {key: told[key] for key in ("kept", "kept_least", "kept_least_in", "restored", "bytes_written")} == {
        key: getattr(truth[1], key) for key in ("kept", "kept_least", "kept_least_in", "restored", "bytes_written")
    }
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "b")], catch_exceptions=False)
    assert "2 tensors changed" in done.stderr.splitlines()[-1]
    assert "of the update kept" in done.stderr.splitlines()[-1]
    quiet = CliRunner().invoke(main, [*arguments, str(tmp_path / "c"), "--quiet"], catch_exceptions=False)
    assert quiet.output == ""
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c") == files_of(truth[0])


# -- stopped, killed, again -----------------------------------------------------------------------------------------------


def test_stopped_and_gone_on(llama: Path, lora: Path, truth: tuple[Path, MergeReport], tmp_path: Path) -> None:
    """The same bytes, and the report of a run that was never stopped."""
    out, stop = tmp_path / "o", _Stop(f"{DOWN}.weight")
    with pytest.raises(KeyboardInterrupt):
        merge(llama, lora, out, progress=stop)
    assert stop.notes[-1].endswith("the same command continues from there")
    assert not (out / "config.json").exists()
    again = Silent()
    report = merge(llama, lora, out, progress=again)
    assert again.notes[0].startswith("continuing after")
    assert files_of(out) == files_of(truth[0])
    assert _without_place(report) == _without_place(truth[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment(llama: Path, tmp_path: Path, lora: Path) -> None:
    """A child that is killed at its n-th change of the disk leaves nothing that looks whole and is not."""
    code = f"""
import sys
from pathlib import Path
import torch
from surgery.commands.adapters.merge import merge
from surgery.progress import Silent
from tests.faults import run, trial
from tests.models import files_of
torch.set_num_threads(1)
folder = Path({str(tmp_path)!r})
def call(out):
    merge(Path({str(llama)!r}), Path({str(lora)!r}), out, overwrite=(out / "earlier").exists(), progress=Silent())
ended, changes = run(call, folder / "truth")
assert ended
truth = files_of(folder / "truth")
kills = 0
for at in range(1, changes + 1, max(1, changes // 6)):
    kills += trial(call, folder / "o", None, truth, "config.json", [{{"kill_at": at}}, {{"kill_at": max(1, at // 2)}}])
print(kills)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 10


def test_the_same_again_and_another(llama: Path, lora: Path, truth: tuple[Path, MergeReport], tmp_path: Path) -> None:
    out = shutil.copytree(truth[0], tmp_path / "o")
    said = Silent()
    report = merge(llama, lora, out, progress=said)
    assert said.notes == [f"{out} is already complete: nothing to do"]
    assert _without_place(report) == _without_place(truth[1])
    other = save_lora(tmp_path / "other", SHAPES, seed=6)
    for adapters, options in (([other], {}), ([lora], {"weights": [0.5]}), ([lora, other], {}), ([lora], {"dtype": "float32"})):
        with pytest.raises(OutputError, match="holds files already"):
            merge(llama, adapters, out, progress=Silent(), **options)
        assert files_of(out) == files_of(truth[0])
    merge(llama, other, out, overwrite=True, progress=Silent())
    merge(llama, other, tmp_path / "alone", progress=Silent())
    assert files_of(out) == files_of(tmp_path / "alone") != files_of(truth[0])


def test_another_adapter_after_one_that_was_stopped(llama: Path, lora: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "o", save_lora(tmp_path / "other", SHAPES, seed=6)
    with pytest.raises(KeyboardInterrupt):
        merge(llama, lora, out, progress=_Stop(f"{DOWN}.weight"))
    for adapters, options in (([other], {}), ([lora], {"weights": [0.5]}), ([lora], {"rounding": "nearest"})):
        with pytest.raises(OutputError, match="another"):
            merge(llama, adapters, out, progress=Silent(), **options)
    merge(llama, other, out, overwrite=True, progress=Silent())
    merge(llama, other, tmp_path / "alone", progress=Silent())
    assert files_of(out) == files_of(tmp_path / "alone")


def test_a_full_disk(llama: Path, lora: Path, truth: tuple[Path, MergeReport], tmp_path: Path) -> None:
    """Named; nothing looks whole then, and the same call goes on."""
    out, total = tmp_path / "o", sum(len(data) for data in files_of(truth[0]).values())

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        return _FullDisk(path, mode.replace("b", "")) if "x" in mode else open(path, mode, buffering)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(file_writer, "open", opened, raising=False)
        for share_of_it in (0.1, 0.5):
            _FullDisk.left = int(share_of_it * total)
            with pytest.raises(OutputError, match="No space left"):
                merge(llama, lora, out, progress=Silent())
            assert not (out / "config.json").exists()
            assert not list(out.rglob("*.partial"))
    merge(llama, lora, out, progress=Silent())
    assert files_of(tmp_path / "o") == files_of(truth[0])


@pytest.mark.skipif(sys.platform != "linux", reason="Ray")
def test_on_ray(llama: Path, tmp_path: Path) -> None:
    """What is added goes to the tasks, what replaces is read there."""
    saved = torch.randn(97, 48, generator=torch.Generator().manual_seed(1))
    more = {"lm_head.modules_to_save.weight": saved, "model.embed_tokens.trainable_tokens_delta": saved[:2].clone()}
    options: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5, 96]}}
    adapter = save_lora(tmp_path / "a", SHAPES, more=more, **options)
    report = merge(llama, adapter, tmp_path / "truth", progress=Silent())
    command = [sys.executable, str(ROOT / "cli.py"), "merge", str(llama), str(adapter), "-o", str(tmp_path / "o")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--engine", "ray", "--json"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "o") == files_of(tmp_path / "truth")
    assert json.loads(done.stdout)["kept"] == report.kept
    after = tensors_of(tmp_path / "o")
    assert torch.equal(after["lm_head.weight"], saved.to(torch.bfloat16))
    assert torch.equal(after["model.embed_tokens.weight"][[5, 96]], saved[:2].to(torch.bfloat16))


# -- from and to the hub --------------------------------------------------------------------------------------------------


def test_streamed_from_the_hub(
    hub: LoopbackHub, llama: Path, lora: Path, truth: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    hub.publish("acme/merge-model", llama)
    hub.publish("acme/merge-lora", lora)
    merge("acme/merge-model", "acme/merge-lora", tmp_path / "o", stream=True, progress=Silent())
    assert files_of(tmp_path / "o") == files_of(truth[0])
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--acme--merge-model"
    assert not list(cache.rglob("*.safetensors"))
    merge("acme/merge-model", "acme/merge-lora", tmp_path / "o2", progress=Silent())
    assert files_of(tmp_path / "o2") == files_of(truth[0])


def test_an_adapter_of_the_hub_and_its_cache(
    hub: LoopbackHub, llama: Path, lora: Path, truth: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    """Once fetched it is there without the hub, and that is told."""
    hub.publish("acme/merge-offline", lora)
    merge(llama, "acme/merge-offline", tmp_path / "o", progress=Silent())
    assert files_of(tmp_path / "o") == files_of(truth[0])
    hub.refuse("acme/merge-offline", 503, "")
    said = Silent()
    merge(llama, "acme/merge-offline", tmp_path / "away", progress=said)
    assert any("from the local cache" in note for note in said.notes)
    assert files_of(tmp_path / "away") == files_of(truth[0])
    for away in ("acme/merge-never", "acme/merge-offline-never"):
        command = [sys.executable, str(ROOT / "cli.py"), "merge", str(llama), away, "-o", str(tmp_path / "x")]
        done = subprocess.run(
            command, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert away in done.stderr
    command = [sys.executable, str(ROOT / "cli.py"), "merge", str(llama), "acme/merge-offline", "-o", str(tmp_path / "offline")]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "offline") == files_of(truth[0])


def test_pushed_to_the_hub(
    hub: LoopbackHub,
    llama: Path,
    lora: Path,
    truth: tuple[Path, MergeReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITING_TOKEN)
    monkeypatch.setattr(upload, "_SECONDS_TO_SETTLE", 0.1)
    monkeypatch.setattr(upload, "_SECONDS_BETWEEN_COMMITS", 0.0)
    merge(llama, lora, tmp_path / "o", push_to_hub="acme/merged", progress=Silent())
    repo = hub.repos["acme/merged"]
    there = {name: data for name, data in files_of(repo.folder).items() if name not in ("README.md", ".gitattributes")}
    assert there == files_of(truth[0])
    assert "config.json" not in repo.history[0].files or len(repo.history) == 1
    card = (repo.folder / "README.md").read_text()
    assert "surgery" in card
    shutil.rmtree(repo.folder / "x", ignore_errors=True)
    # What is complete here is uploaded by the same command.
    merge(llama, lora, tmp_path / "o", push_to_hub="acme/merged-again", progress=Silent())
    assert files_of(truth[0]).items() <= files_of(hub.repos["acme/merged-again"].folder).items()


def test_a_damaged_adapter_in_the_cache(
    hub: LoopbackHub, llama: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, with the hub and without it."""
    commit = hub.publish("acme/merge-damaged", lora).commit
    plan_merge(llama, "acme/merge-damaged")
    cache = Path(os.environ["HF_HOME"]) / "hub/models--acme--merge-damaged/snapshots"
    blob = (cache / commit / "adapter_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SourceError, match="is not the file that the hub has"):
        merge(llama, "acme/merge-damaged", tmp_path / "o", progress=Silent())
    hub.refuse("acme/merge-damaged", 503, "")
    with pytest.raises(SourceError, match="is not the file that the hub has"):
        merge(llama, "acme/merge-damaged", tmp_path / "o", progress=Silent())
    assert not (tmp_path / "o/config.json").exists()


def test_what_is_fetched_of_a_repository(hub: LoopbackHub, llama: Path, lora: Path, tmp_path: Path) -> None:
    """Of a model that was pushed together with its adapter, the adapter alone; of a model that is none, nothing."""
    both = shutil.copytree(llama, tmp_path / "both")
    for name in ADAPTER_FILES:
        shutil.copy(lora / name, both / name)
    hub.publish("acme/merge-both", both)
    assert len(plan_merge(llama, "acme/merge-both").tensors) == 2
    address = f"{hub.url}/acme/merge-both/blob/main/adapter_model.safetensors".replace(hub.url, "https://huggingface.co")
    assert len(plan_merge(llama, address).tensors) == 2
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/acme/merge-both/resolve/" in path}
    assert fetched == {*ADAPTER_FILES}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/adapter_config.json").write_text("{}")
    (tmp_path / "old/adapter_model.bin").write_bytes(b"")
    for name, folder, message in (
        ("acme/merge-no-adapter", llama, "holds no adapter"),
        ("acme/merge-old", tmp_path / "old", "PEFT reads adapter_model.bin: load it there"),
    ):
        hub.publish(name, folder)
        before = len(hub.requests)
        with pytest.raises(SourceError, match=message):
            plan_merge(llama, name)
        assert not [path for _, path, _ in hub.requests[before:] if "/resolve/" in path]


# -- adapters as nobody would make them -----------------------------------------------------------------------------------


def _edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **options: Any) -> Path:
    """An adapter whose tensors have been changed."""
    path = save_lora(folder, SHAPES, **options) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("name", ["", ".", "_orig_mod", "_orig_mod._orig_mod", "module", "base_model.model.", "\x1b[31mred\nx"])
def test_odd_names(name: str, llama: Path, tmp_path: Path) -> None:
    adapter = _edited(tmp_path / "a", lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    with pytest.raises(OptionError, match="the adapter changes ") as caught:
        merge(llama, adapter, tmp_path / "o", progress=Silent())
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("rounding", ["nearest", "directions"])
@pytest.mark.parametrize("rank", [60, 130])
def test_a_rank_above_the_sides_of_a_matrix(rank: int, rounding: Any, llama: Path, tmp_path: Path) -> None:
    """As that of a convolution with few channels, or of several adapters together."""
    adapter = save_lora(tmp_path / "a", SHAPES, rank=rank, size=0.003)
    merge(llama, adapter, tmp_path / "o", rounding=rounding, progress=Silent())
    before, after = tensors_of(llama), tensors_of(tmp_path / "o")
    for module in SHAPES:
        update = delta(adapter, module)
        assert share(before[f"{module}.weight"], after[f"{module}.weight"], update) == pytest.approx(1, abs=0.01)
        error = (after[f"{module}.weight"].double() - before[f"{module}.weight"].double() - update).norm()
        assert error <= 2**-7 * after[f"{module}.weight"].double().norm()


def test_what_adds_zeros_changes_nothing(llama: Path, tmp_path: Path) -> None:
    """A module that was never trained keeps its file, and is accounted for."""
    adapter = _edited(tmp_path / "a", lambda tensors: tensors[f"base_model.model.{Q}.lora_B.weight"].zero_())
    plan = plan_merge(llama, adapter)
    assert plan.accounts[0][f"base_model.model.{Q}.lora_B.weight"] == (f"{Q}.weight",)
    assert [one.tensor for one in plan.tensors] == [f"{DOWN}.weight"]
    report = merge(llama, adapter, tmp_path / "o", progress=Silent())
    assert (report.restored, [one.tensor for one in report.tensors]) == (report.shards - 1, [f"{DOWN}.weight"])
    place = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    assert sha256(tmp_path / "o" / place[f"{Q}.weight"]) == sha256(llama / place[f"{Q}.weight"])


@pytest.mark.parametrize(
    ("weight", "alpha", "message"),
    [
        (1e308, 6, "beyond the range of all dtypes"),
        (1e30, 6, "so large"),
        (1.0, 1e29, "so large"),
        (math.nan, 6, "makes no sense"),
        (0.0, 6, "makes no sense"),
        (1.0, math.inf, "contradicts"),
        (1.0, 0, "changes nothing"),
    ],
)
def test_numbers_beyond_all_sense(weight: float, alpha: float, message: str, llama: Path, tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "a", SHAPES, lora_alpha=alpha)
    with pytest.raises(SurgeryError, match=message):
        merge(llama, adapter, tmp_path / "o", weights=[weight], progress=Silent())
    assert not (tmp_path / "o/config.json").exists()


def test_a_row_of_zeros_with_dora(llama: Path, tmp_path: Path) -> None:
    """PEFT makes NaN of it; here it is named."""
    model = shutil.copytree(llama, tmp_path / "m")
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{Q}.weight" in tensors:
            tensors[f"{Q}.weight"][3] = 0
            save_file(tensors, path, metadata={"format": "pt"})
    more = {f"{Q}.lora_magnitude_vector": torch.ones(48)}
    adapter = save_lora(tmp_path / "a", {Q: SHAPES[Q]}, use_dora=True, more=more)
    merge(model, adapter, tmp_path / "o", progress=Silent())  # with what is added it is none
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q}.lora_B.weight"][3] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(SurgeryError, match=f"'{Q}.weight' has a row of zeros"):
        merge(model, adapter, tmp_path / "x", progress=Silent())
    assert not (tmp_path / "x/config.json").exists()


def test_one_adapter_twice(llama: Path, lora: Path, tmp_path: Path) -> None:
    """Summed, and told."""
    said = Silent()
    merge(llama, [lora, lora], tmp_path / "o", progress=said)
    assert said.notes == [f"these adapters are given more than once, and each time is counted: {lora}"]
    before, after = tensors_of(llama), tensors_of(tmp_path / "o")
    for module in SHAPES:
        assert share(before[f"{module}.weight"], after[f"{module}.weight"], 2 * delta(lora, module)) == pytest.approx(
            1, abs=0.01
        )


def test_folders_that_are_something_else(llama: Path, lora: Path, factorized: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    surgery.factorize(llama, overlay, rank=2, layout="overlay", progress=Silent())
    for model, adapter, message in (
        (lora, lora, "holds an adapter"),
        (llama, llama, "there is no adapter_config.json"),
        (llama, tmp_path / "nothing", "there is no folder"),
        (llama, lora / "adapter_model.safetensors", "there is no adapter_config.json"),
    ):
        with pytest.raises(SourceError, match=message):
            merge(model, adapter, tmp_path / "o", progress=Silent())
        assert not (tmp_path / "o").exists()
    for model, message in ((factorized, "did not begin with the factors of this checkpoint"), (overlay, "holds no residual")):
        with pytest.raises(SurgeryError, match=message):
            merge(model, lora, tmp_path / "o", progress=Silent())
        assert not (tmp_path / "o").exists()


def test_a_model_and_adapters_in_another_order(llama: Path, lora: Path, factorized: Path, tmp_path: Path) -> None:
    """The hint is the command that works."""
    named = shutil.copytree(lora, tmp_path / "named")
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "acme/base"}))
    for call in (merge, plan_merge):
        for given, right in (
            ((lora, llama), (llama, lora)),
            ((lora, factorized), (factorized, lora)),
            ((lora, [named, llama]), (llama, lora, named)),
            ((lora, named), ("MODEL", lora, named)),
            ((named, lora), ("acme/base", named, lora)),
        ):
            with pytest.raises(SourceError, match="holds an adapter and no safetensors weights") as caught:
                call(*given)
            assert str(caught.value.hint).endswith(f"the adapters: surgery merge {' '.join(map(str, right))}")
    with pytest.raises(SourceError, match=r"(?s)no adapter_config\.json.*this is the folder of a model: .*the model first"):
        merge(llama, llama, tmp_path / "o")


def test_an_adapter_whose_tensors_are_the_models_own(llama: Path, lora: Path, tmp_path: Path) -> None:
    """It may be meant, as a checkpoint in which nothing has moved yet: a note says that nothing has changed."""
    norm = "model.norm.weight"

    def saved(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors[f"base_model.model.{norm}"] = tensors_of(llama)[norm].float() + moved

    for moved in (0.0, 0.5):
        adapter = _edited(tmp_path / f"a{moved}", saved)
        said = Silent()
        report = merge(llama, adapter, tmp_path / f"o{moved}", progress=said)
        are_same = [sha256(tmp_path / f"o{moved}" / file.file) == sha256(llama / file.file) for file in report.files]
        assert (report.restored, all(are_same)) == (sum(are_same), moved == 0)
        assert any("all weight files have the bytes of the source's: the adapter replaces" in one for one in said.notes) == (
            moved == 0
        )
    tiny = _edited(tmp_path / "tiny", lambda tensors: [tensor.mul_(1e-6) for tensor in tensors.values()])
    said = Silent()
    assert merge(llama, tiny, tmp_path / "o", rounding="nearest", progress=said).restored == len(report.files)
    assert any(one.endswith("the bytes of the source's: rounding undid the update") for one in said.notes)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_is_no_input(overwrite: bool, llama: Path, lora: Path, tmp_path: Path) -> None:
    model, adapter = shutil.copytree(llama, tmp_path / "m"), shutil.copytree(lora, tmp_path / "a")
    inside = shutil.copytree(lora, tmp_path / "o/inside")
    outs = [(adapter, out) for out in (model, model / "sub", adapter, adapter / "sub")]
    for one, out in [*outs, (inside, tmp_path / "o")]:
        with pytest.raises(OutputError, match="one lies in the other"):
            merge(model, one, out, overwrite=overwrite, progress=Silent())
    assert files_of(model) == files_of(llama)
    assert files_of(adapter) == files_of(inside) == files_of(lora)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["inside"]


class _Do(Silent):
    """Does something, once, when a run comes to a tensor of this name."""

    def __init__(self, at: str, do: Callable[[], object]) -> None:
        super().__init__()
        self.at, self.do, self.done = at, do, False

    def item(self, name: str) -> None:
        if name == self.at and not self.done:
            self.done = True
            self.do()


@pytest.mark.parametrize("way", ["written again", "put in its place", "removed"])
def test_an_adapter_that_changes_meanwhile(way: str, llama: Path, tmp_path: Path) -> None:
    """Nothing is made of one half of it and of the other's half: what is read late is of the file that was read first."""
    saved = {"lm_head.modules_to_save.weight": torch.randn(97, 48, generator=torch.Generator().manual_seed(1))}
    adapter = save_lora(tmp_path / "a", SHAPES, more=saved, modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    doubled = {name: 2 * tensor for name, tensor in load_file(path).items()}

    def change() -> None:
        if way == "removed":
            shutil.rmtree(adapter)
        elif way == "written again":
            save_file(doubled, path, metadata={"format": "pt"})
        else:
            save_file(doubled, tmp_path / "new", metadata={"format": "pt"})
            (tmp_path / "new").replace(path)

    # The first weight file is finished before the one with lm_head.
    progress = _Do("model.safetensors.index.json", change)
    with pytest.raises(SurgeryError, match=r"has changed since|cannot be read"):
        merge(llama, adapter, tmp_path / "o", progress=progress)
    assert progress.done
    assert not (tmp_path / "o/config.json").exists()


@pytest.mark.parametrize("victim", ["weights", "config.json", "tokenizer.json"])
def test_a_model_that_changes_meanwhile(victim: str, llama: Path, lora: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "m")
    files = sorted(model.glob("*.safetensors")) if victim == "weights" else [model / victim]

    def change() -> None:
        for path in files:
            path.write_bytes(path.read_bytes()[:-1] + b" ")

    progress = _Do(f"{Q}.weight", change)
    with pytest.raises(SurgeryError, match="has changed while it was in use"):
        merge(model, lora, tmp_path / "o", progress=progress)
    assert progress.done
    assert not (tmp_path / "o/config.json").exists()
