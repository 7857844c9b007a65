"""How ``surgery extract`` runs: what is on the disk at any moment, where models come from, what is refused."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
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

from surgery.cli.main import main
from surgery.commands.adapters.extract import extract, plan_extract
from surgery.errors import FormatError, OptionError, OutputError, SourceError, SurgeryError, WeightError
from surgery.extraction.told import ExtractReport
from surgery.files import file_writer
from surgery.names import STREAM_DIR, TUNED_STREAM_DIR
from surgery.progress import Silent
from tests.loopback_hub import LoopbackHub
from tests.models import files_of, realistic, save_llama, tensors_of
from tests.sealing import seal
from tests.source.test_stream import most_at_a_time

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FIRST, LAST = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
RESULT = {"adapter_config.json", "adapter_model.safetensors", "extraction.json"}
#: Those of the undisturbed result: a norm is saved whole.
OPTIONS: dict[str, Any] = {"rank": 4, "full": [NORM]}


def save_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int, config: Path) -> Path:
    """A model in so many weight files, in the order of names, with an index."""
    folder.mkdir()
    place, names = {}, sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    shutil.copy(config, folder / "config.json")
    return folder


def changed(model: Path, *, rank: int = 3, seed: int = 5, size: float = 0.05) -> dict[str, torch.Tensor]:
    """The tensors of a model with a change of low rank to each projection, and a norm and rows of the embedding changed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = tensors_of(model)
    for name in sorted(tensors):
        if "_proj" in name:
            m, n = tensors[name].shape
            update = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
            weight = tensors[name].float()
            tensors[name] = (weight + size * weight.norm() * update / update.norm()).to(tensors[name].dtype)
    tensors[NORM] = tensors[NORM] * 1.5
    tensors["model.embed_tokens.weight"][:5] *= 1.25
    return tensors


@pytest.fixture(scope="module")
def tuned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama``, fine-tuned, in other weight files. Read-only."""
    return save_sharded(tmp_path_factory.mktemp("tuned") / "t", changed(llama), 2, llama / "config.json")


@pytest.fixture(scope="module")
def truth(llama: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExtractReport]:
    """An undisturbed result, and its report. Read-only."""
    out = tmp_path_factory.mktemp("truth") / "o"
    return out, extract(llama, tuned, out, **OPTIONS, progress=Silent())


class _Stop(Silent):
    """Interrupts a run when it comes to a tensor or file of this name."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def item(self, name: str) -> None:
        if name == self.at:
            raise KeyboardInterrupt


class _Items(Silent):
    """Remembers what a run tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[str] = []

    def item(self, name: str) -> None:
        self.items.append(name)


class _FullDisk(io.FileIO):
    """Takes so many bytes in all."""

    left = 0

    def write(self, data: Any) -> int:
        if _FullDisk.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(len(data), _FullDisk.left, 10_000)
        _FullDisk.left -= taken
        return super().write(data[:taken]) or 0


def _without_place(report: ExtractReport) -> dict[str, Any]:
    return {**json.loads(json.dumps(report.as_json())), "out": None}


def _result(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files without those of the journal."""
    return {name: data for name, data in files.items() if not name.startswith(".surgery/")}


# -- what is written ------------------------------------------------------------------------------------------------------


def test_what_is_written(llama: Path, tuned: Path, truth: tuple[Path, ExtractReport]) -> None:
    """The best approximations by float64 LAPACK, nearly; the saved norm; and a report of files and tensors as they are."""
    out, report = truth
    assert files_of(out).keys() == RESULT
    before, after, adapter = tensors_of(llama), tensors_of(tuned), load_file(out / "adapter_model.safetensors")
    place = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    assert {one.tensor for one in report.targets} == {name for name in before if "_proj" in name}
    for one in report.targets:
        module = f"base_model.model.{one.tensor.removesuffix('.weight')}"
        A, B = (adapter[f"{module}.lora_{half}.weight"].double() for half in "AB")
        change = after[one.tensor].double() - before[one.tensor].double()
        best = torch.linalg.svdvals(change)[4:].norm()
        assert best - 1e-12 <= (change - B @ A).norm() <= best * 1.01 + 1e-6 * change.norm()
        assert one.error == pytest.approx(((change - B @ A).norm() / change.norm()).item(), rel=1e-3)
        assert one.change == pytest.approx((change.norm() / before[one.tensor].double().norm()).item(), rel=1e-4)
        assert (one.shard, one.rank) == (place[one.tensor], 4)
    assert torch.equal(adapter[f"base_model.model.{NORM}"], after[NORM])
    fates = {one.tensor: one.fate for one in report.others}
    assert fates.pop(NORM) == "saved"
    assert fates.pop("model.embed_tokens.weight") == "changed"
    assert {*fates.values()} == {"same"}
    assert before.keys() == {*fates, NORM, "model.embed_tokens.weight", *(one.tensor for one in report.targets)}
    for record in report.files:
        data = (out / record.file).read_bytes()
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert {record.file for record in report.files} == RESULT - {"extraction.json"}


def test_a_dry_run(llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path) -> None:
    """It writes nothing, and says what the run then does."""
    arguments = ["extract", str(llama), str(tuned), "-o", str(tmp_path / "o"), "--rank", "4", "--full", NORM, "--dry-run"]
    done = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert [(one["tensor"], one["rank"]) for one in told["targets"]] == [(one.tensor, 4) for one in truth[1].targets]
    assert told["saved"] == [NORM]
    assert told["compared"] == len(truth[1].others) - 1
    assert told["gone"] == told["further"] == []
    sizes = [path.stat().st_size for model in (llama, tuned) for path in model.glob("*.safetensors")]
    assert told["bytes_read"] == sum(sizes)
    assert told["bytes_written"] >= sum(record.size for record in truth[1].files)
    plain = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert f"{len(truth[1].targets)} weights, 1 tensors whole if they have changed" in plain.stdout.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_what_the_command_says(llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path) -> None:
    arguments = ["extract", str(llama), str(tuned), "--rank", "4", "--full", NORM, "-o"]
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "a"), "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert {**told, "out": None}.items() >= _without_place(truth[1]).items()
    runs = {
        width: CliRunner().invoke(main, [*arguments, str(tmp_path / f"w{width}")], env={"COLUMNS": str(width)})
        for width in (60, 80, 100)
    }
    for width, run in runs.items():
        assert run.exit_code == 0, run.output
        assert all(len(line) <= width for line in run.stdout.splitlines())
        assert run.stdout.split().count("4-4") == 0
        assert f"{len(truth[1].targets)} modules of rank 4" in " ".join(run.stderr.split())
        assert "1 tensors whole" in " ".join(run.stderr.split())
        assert files_of(tmp_path / f"w{width}") == files_of(truth[0])
    # The same numbers at each width.
    assert len({tuple(sorted(word for word in run.stdout.split() if word[0].isdigit())) for run in runs.values()}) == 1
    quiet = CliRunner().invoke(main, [*arguments, str(tmp_path / "c"), "--quiet"], catch_exceptions=False)
    assert quiet.output == ""
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c") == files_of(truth[0])


def test_the_command_says_to_which_rank_all_are_padded(llama: Path, tmp_path: Path) -> None:
    """The rank that the file has of all pairs; the table has those of the matrices, which differ."""
    one, three = changed(llama, rank=1), changed(llama, rank=3)
    tensors = {name: (three if "q_proj" in name else one)[name] for name in one}
    tuned = save_sharded(tmp_path / "t", tensors, 2, llama / "config.json")
    arguments = ["extract", str(llama), str(tuned), "--energy", "0.9", "--uniform", "-o", str(tmp_path / "o")]
    run = CliRunner().invoke(main, arguments, catch_exceptions=False)
    pairs = load_file(tmp_path / "o/adapter_model.safetensors")
    (rank,) = {len(tensor) for key, tensor in pairs.items() if "lora_A" in key}
    told = json.loads((tmp_path / "o/extraction.json").read_text())["targets"]
    assert {each["rank"] for each in told} == {1, rank}
    assert f"{len(told)} modules padded with zeros to rank {rank}, " in " ".join(run.stderr.split())


# -- stopped, killed, again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [FIRST, "model.layers.1.self_attn.k_proj.weight", LAST, "model.layers.1.mlp.up_proj"])
def test_stopped_and_gone_on(at: str, llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path) -> None:
    """The same bytes and the same report, and what was finished is not done again; the last is a module that is written."""
    out, stop = tmp_path / "o", _Stop(at)
    with pytest.raises(KeyboardInterrupt):
        extract(llama, tuned, out, **OPTIONS, progress=stop)
    left = files_of(out) if out.exists() else {}
    records = sum(name.startswith(".surgery/0") for name in left)
    assert not {"adapter_config.json", "extraction.json"} & left.keys()
    if records:
        assert stop.notes[-1].endswith("the same command continues from there")
    again = _Items()
    report = extract(llama, tuned, out, **OPTIONS, progress=again)
    assert [note for note in again.notes if note.startswith("continuing")] == [f"continuing after {records} of 3 shards"] * (
        records > 0
    )
    done = set(again.items) & {one.tensor for one in report.targets}
    place = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({place[tensor] for tensor in done}) == 3 - records
    assert files_of(out) == files_of(truth[0])
    assert _without_place(report) == _without_place(truth[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A child that is killed at its n-th change of the disk leaves nothing that looks whole and is not, and what is recorded is
    not done again; also where it replaces an earlier result, which is there until the new one can take its place."""
    code = f"""
import json, shutil
from pathlib import Path
import torch
from safetensors.torch import save_file
from surgery.commands.adapters.extract import extract
from surgery.progress import Silent
from tests.faults import run
from tests.models import files_of, realistic

class Told(Silent):
    def __init__(self, recorded):
        super().__init__()
        self.recorded, self.label = recorded, ""

    def start(self, label, total_bytes):
        self.label = label

    def item(self, name):
        if self.label == "extracting" and name.startswith("layers."):
            assert int(name[7]) not in self.recorded, f"{{name}} had been done"

def call(out, rank=4, overwrite=False):
    goes_on = (out / ".surgery/run.json").exists()
    # Shards may be finished in another order than they were begun.
    recorded = {{int(path.stem) - 1 for path in (out / ".surgery").glob("0*.json")}} if goes_on else set()
    extract(folder / "m", folder / "t", out, rank=rank, overwrite=overwrite, progress=Told(recorded))

def earlier(out):
    call(out, 2)

def anew(out):
    call(out, overwrite=True)

folder = Path({str(tmp_path)!r})
names = [f"layers.{{i}}.up_proj.weight" for i in range(3)]
for model, more in (("m", 0.0), ("t", 0.05)):
    (folder / model).mkdir()
    for i, name in enumerate(names):
        weight = realistic(24, 16, seed=i) + more * torch.randn(24, 16, generator=torch.Generator().manual_seed(i))
        save_file({{name: weight}}, folder / model / f"model-{{i + 1:05d}}-of-00003.safetensors")
    place = {{name: f"model-{{i + 1:05d}}-of-00003.safetensors" for i, name in enumerate(names)}}
    (folder / model / "model.safetensors.index.json").write_text(json.dumps({{"metadata": {{}}, "weight_map": place}}))
assert run(earlier, folder / "earlier")[0]
before, kills, out = files_of(folder / "earlier"), 0, folder / "o"
for what, is_anew, late in ((call, False, 8), (anew, True, 20)):
    begun = folder / f"truth {{is_anew}}"
    if is_anew:
        shutil.copytree(folder / "earlier", begun)
    _, changes = run(what, begun)
    truth = files_of(begun)
    for at in sorted({{*range(1, changes + 1, 18), *range(changes - late, changes + 1)}}):
        shutil.rmtree(out, ignore_errors=True)
        if is_anew:
            shutil.copytree(folder / "earlier", out)
        assert not run(what, out, kill_at=at)[0]
        kills += 1
        left = files_of(out) if out.exists() else {{}}
        mine = [name for name in left if not name.startswith(".surgery/") and not name.endswith(".partial")]
        result = {{name: left[name] for name in mine}}
        if "extraction.json" in result:
            assert result in (truth, before), f"{{at}}: {{sorted(result)}} is not as it looks"
        elif "adapter_config.json" in result:
            is_one = any(result.items() <= whole.items() for whole in (truth, before))
            assert is_one and len(result) == 2, f"{{at}}: {{sorted(result)}} is not as it looks"
        else:
            assert not is_anew or ".surgery/run.json" in left, f"{{at}}: the earlier result is gone"
        assert run(what, out)[0]
        assert files_of(out) == truth, f"{{at}}: {{sorted(files_of(out))}}"
print(kills)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 30


def test_the_same_again_and_another(llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path) -> None:
    out = shutil.copytree(truth[0], tmp_path / "o")
    said = Silent()
    report = extract(llama, tuned, out, **OPTIONS, progress=said)
    assert said.notes[0] == f"{out} is already complete: nothing to do"
    assert [note.partition(" has changed")[0] for note in said.notes[1:]] == ["model.embed_tokens.weight"]
    assert report == ExtractReport(**{name: getattr(truth[1], name) for name in ExtractReport.__slots__} | {"out": out})
    other = save_sharded(tmp_path / "other", changed(llama, seed=6), 1, llama / "config.json")
    for models, options in (
        ((llama, tuned), {"rank": 3}),
        ((llama, tuned), {"full": []}),
        ((llama, tuned), {"dtype": "bfloat16"}),
        ((llama, tuned), {"seed": 1}),
        ((llama, tuned), {"exclude": ("*mlp*",)}),
        ((llama, other), {}),
        ((other, tuned), {}),
    ):
        with pytest.raises(OutputError, match="holds the complete result of another run") as caught:
            extract(*models, out, **{**OPTIONS, **options}, progress=Silent())
        assert not re.search("targets|[0-9a-f]{32}", str(caught.value.got))
        assert files_of(out) == files_of(truth[0])
    extract(llama, other, out, **OPTIONS, overwrite=True, progress=Silent())
    extract(llama, other, tmp_path / "alone", **OPTIONS, progress=Silent())
    assert files_of(out) == files_of(tmp_path / "alone") != files_of(truth[0])


def test_another_run_after_one_that_was_stopped(llama: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    other = save_sharded(tmp_path / "other", changed(llama, seed=6), 1, llama / "config.json")
    with pytest.raises(KeyboardInterrupt):
        extract(llama, tuned, out, **OPTIONS, progress=_Stop(LAST))
    left = files_of(out)
    for models, options in (((llama, other), {}), ((llama, tuned), {"rank": 3}), ((llama, tuned), {"uniform": True})):
        with pytest.raises(OutputError, match="holds an unfinished run of another kind"):
            extract(*models, out, **{**OPTIONS, **options}, progress=Silent())
        assert files_of(out) == left
    extract(llama, other, out, **OPTIONS, overwrite=True, progress=Silent())
    extract(llama, other, tmp_path / "alone", **OPTIONS, progress=Silent())
    assert files_of(out) == files_of(tmp_path / "alone")


def test_an_earlier_result_stays_until_the_new_one_is_whole(
    llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """Also while a run that would replace it is stopped, and after one that cannot succeed; other files stay."""
    out = tmp_path / "o"
    extract(llama, tuned, out, rank=2, progress=Silent())
    (out / "notes.txt").write_text("mine")
    before = files_of(out)
    with pytest.raises(KeyboardInterrupt):
        extract(llama, tuned, out, **OPTIONS, overwrite=True, progress=_Stop(LAST))
    left = files_of(out)
    assert _result(left) == before
    assert left.keys() != before.keys()
    # What is complete is told to be, and what was begun beside it is not lost by an attempt without --overwrite.
    with pytest.raises(OutputError, match="holds the complete result of another run"):
        extract(llama, tuned, out, **OPTIONS, progress=Silent())
    assert files_of(out) == left
    said = Silent()
    extract(llama, tuned, out, **OPTIONS, overwrite=True, progress=said)
    assert "continuing after 2 of 3 shards" in said.notes
    assert f"{out} keeps files that are no part of a model: notes.txt" in said.notes
    assert files_of(out) == {**files_of(truth[0]), "notes.txt": b"mine"}
    same = save_sharded(tmp_path / "same", tensors_of(llama), 1, llama / "config.json")
    with pytest.raises(OptionError, match="nothing to extract"):
        extract(llama, same, out, rank=4, overwrite=True, progress=Silent())
    assert files_of(out) == {**files_of(truth[0]), "notes.txt": b"mine"}


def test_a_full_disk(llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path) -> None:
    """Named; nothing looks whole then, and the same call goes on."""
    out, total = tmp_path / "o", sum(len(data) for data in files_of(truth[0]).values())

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        return _FullDisk(path, mode.replace("b", "")) if "x" in mode else open(path, mode, buffering)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(file_writer, "open", opened, raising=False)
        for share_of_it in (0.1, 0.6, 1.1):
            _FullDisk.left = int(share_of_it * total)
            with pytest.raises(OutputError, match="No space left"):
                extract(llama, tuned, out, **OPTIONS, progress=Silent())
            assert not (out / "adapter_config.json").exists()
            assert not (out / "extraction.json").exists()
            assert not list(out.rglob("*.partial"))
    extract(llama, tuned, out, **OPTIONS, progress=Silent())
    assert files_of(out) == files_of(truth[0])


@pytest.mark.slow  # what merge does on Ray is in the suite
@pytest.mark.skipif(sys.platform != "linux", reason="Ray")
def test_on_ray(llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = [sys.executable, str(ROOT / "cli.py"), "extract", str(llama), str(tuned), "-o", str(out)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--rank", "4", "--full", NORM, "--engine", "ray", "--json"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert files_of(out) == files_of(truth[0])
    assert {**json.loads(done.stdout), "out": None}.items() >= _without_place(truth[1]).items()


# -- from the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_many_files(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The models of ``truth`` in twelve and in nine files, of which each holds parts of several of the other's."""
    base = save_sharded(tmp_path / "base", tensors_of(llama), 12, llama / "config.json")
    return base, save_sharded(tmp_path / "tuned", changed(llama), 9, llama / "config.json")


def test_streamed_from_the_hub(
    hub: LoopbackHub, in_many_files: tuple[Path, Path], truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """Of both models few files are on the disk at a time, and each is fetched once."""
    names = ("acme/extract-base", "acme/extract-tuned")
    for name, model in zip(names, in_many_files, strict=True):
        hub.publish(name, model)
    out, before = tmp_path / "o", len(hub.requests)
    with most_at_a_time(out / STREAM_DIR) as of_base, most_at_a_time(out / TUNED_STREAM_DIR) as of_tuned:
        report = extract(*names, out, **OPTIONS, stream=True, progress=Silent())
    assert files_of(out).keys() == RESULT
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (truth[0] / adapter).read_bytes()
    assert (report.kept, report.merged_error) == (truth[1].kept, truth[1].merged_error)
    config = json.loads((out / "adapter_config.json").read_text())
    repo = hub.repos["acme/extract-base"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/extract-base", repo.commit)
    assert 1 <= of_base[0] <= 2
    assert 1 <= of_tuned[0] <= 4
    asked = [path for method, path, _ in hub.requests[before:] if method == "GET" and path.endswith(".safetensors")]
    # Once for the header, and once for the file.
    assert {path: asked.count(path) for path in asked} == dict.fromkeys(asked, 2)
    assert len({*asked}) == 12 + 9
    cache = Path(os.environ["HF_HOME"]) / "hub"
    assert not [path for name in names for path in cache.glob(f"models--{name.replace('/', '--')}/**/*.safetensors")]
    extract(*names, tmp_path / "kept", **OPTIONS, progress=Silent())
    assert files_of(tmp_path / "kept") == files_of(out)


@pytest.mark.parametrize("which", [0, 1], ids=["base", "tuned"])
def test_one_model_from_the_hub(
    which: int, hub: LoopbackHub, llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """The other one is read where it is; of two folders there is nothing to stream."""
    models: list[str | Path] = [llama, tuned]
    name = f"acme/extract-one-{which}"
    hub.publish(name, Path(models[which]))
    models[which] = name
    extract(*models, tmp_path / "o", **OPTIONS, stream=True, progress=Silent())
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "o" / adapter).read_bytes() == (truth[0] / adapter).read_bytes()
    with pytest.raises(SourceError, match="there is nothing to stream"):
        extract(llama, tuned, tmp_path / "x", **OPTIONS, stream=True, progress=Silent())
    assert not (tmp_path / "x").exists()


def test_stopped_while_it_streams(
    hub: LoopbackHub, in_many_files: tuple[Path, Path], truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """What is finished is not fetched again, but for tuned files that other jobs need too."""
    names = ("acme/extract-stopped-base", "acme/extract-stopped-tuned")
    for name, model in zip(names, in_many_files, strict=True):
        hub.publish(name, model)
    out = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        extract(*names, out, **OPTIONS, stream=True, progress=_Stop("model.layers.1.mlp.gate_proj.weight"))
    done, before = len(list((out / ".surgery").glob("0*.json"))), len(hub.requests)
    assert done > 3
    said = Silent()
    extract(*names, out, **OPTIONS, stream=True, progress=said)
    assert f"continuing after {done} of 12 shards" in said.notes
    fetched = [path for method, path, _ in hub.requests[before:] if method == "GET" and path.endswith("-of-00012.safetensors")]
    assert len(fetched) <= 12 + 12 - done
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (truth[0] / adapter).read_bytes()
    assert files_of(out).keys() == RESULT


def test_a_revision_of_the_tuned_model(
    hub: LoopbackHub, llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """Each model has its own; another commit is another model, also where the first has been extracted already."""
    repo = hub.publish("acme/extract-revised", shutil.copytree(tuned, tmp_path / "t"))
    repo.branches["v1"] = first = repo.commit
    arguments, out = (llama, "acme/extract-revised"), tmp_path / "o"
    extract(*arguments, out, tuned_revision="v1", **OPTIONS, progress=Silent())
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (truth[0] / adapter).read_bytes()
    said = Silent()
    extract(*arguments, out, tuned_revision=first, **OPTIONS, progress=said)
    assert said.notes[0] == f"{out} is already complete: nothing to do"
    repo.apply("another", {"notes.txt": b"x"})
    with pytest.raises(OutputError, match="the complete result of another run") as caught:
        extract(*arguments, out, **OPTIONS, progress=Silent())
    assert first in str(caught.value)
    with pytest.raises(SourceError, match="acme/extract-revised has no such revision"):
        extract(*arguments, tmp_path / "x", tuned_revision="nowhere", **OPTIONS, progress=Silent())
    with pytest.raises(SurgeryError, match="revision"):
        extract(llama, tuned, tmp_path / "x", tuned_revision="v1", **OPTIONS, progress=Silent())
    assert not (tmp_path / "x").exists()


# -- what is not as it should be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_is_no_input(overwrite: bool, llama: Path, tuned: Path, tmp_path: Path) -> None:
    base, other = shutil.copytree(llama, tmp_path / "m"), shutil.copytree(tuned, tmp_path / "o/inside")
    for out in (base, base / "sub", other, other / "sub", tmp_path / "o"):
        with pytest.raises(OutputError, match="one lies in the other"):
            extract(base, other, out, **OPTIONS, overwrite=overwrite, progress=Silent())
    assert files_of(base) == files_of(llama)
    assert files_of(other) == files_of(tuned)
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


@pytest.mark.parametrize("victim", ["base", "tuned", "base/config.json", "tuned/config.json"])
@pytest.mark.parametrize("way", ["in place", "with its time"])
def test_a_model_that_changes_meanwhile(way: str, victim: str, llama: Path, tuned: Path, tmp_path: Path) -> None:
    """No adapter is made of one half of it and of the other's half."""
    models = {"base": shutil.copytree(llama, tmp_path / "base"), "tuned": shutil.copytree(tuned, tmp_path / "tuned")}
    which, _, name = victim.partition("/")
    files = [models[which] / name] if name else sorted(models[which].glob("*.safetensors"))

    def change() -> None:
        for path in files:
            before = path.stat()
            path.write_bytes(path.read_bytes()[:-1] + b" ")
            if way == "with its time":
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    progress = _Do(FIRST, change)
    with pytest.raises(SurgeryError, match="has changed while it was in use"):
        extract(*models.values(), tmp_path / "o", **OPTIONS, progress=progress)
    assert progress.done
    assert not {"adapter_config.json", "extraction.json"} & files_of(tmp_path / "o").keys()
    if way == "with its time":  # it looks like the same run, which takes nothing of what was read before
        extract(*models.values(), tmp_path / "o", **OPTIONS, progress=Silent())
        extract(*models.values(), tmp_path / "alone", **OPTIONS, progress=Silent())
        assert files_of(tmp_path / "o") == files_of(tmp_path / "alone")


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_model_that_changed_between_two_starts(which: str, llama: Path, tuned: Path, tmp_path: Path) -> None:
    """Also where its times are set back: what has been finished of the file that it was is not relied on."""
    models = {"base": shutil.copytree(llama, tmp_path / "base"), "tuned": shutil.copytree(tuned, tmp_path / "tuned")}
    out = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        extract(*models.values(), out, **OPTIONS, progress=_Stop(LAST))
    index = json.loads((models[which] / "model.safetensors.index.json").read_text())["weight_map"]
    path = models[which] / index[FIRST]
    before, tensors = path.stat(), load_file(path)
    tensors[FIRST] = tensors[FIRST].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="holds an unfinished run of another kind"):
        extract(*models.values(), out, **OPTIONS, progress=Silent())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    extract(*models.values(), out, **OPTIONS, progress=Silent())
    extract(*models.values(), tmp_path / "alone", **OPTIONS, progress=Silent())
    assert files_of(out) == files_of(tmp_path / "alone")


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("tensor", [LAST, NORM, "model.embed_tokens.weight"])
def test_not_a_number(tensor: str, which: str, llama: Path, tuned: Path, tmp_path: Path) -> None:
    """Of either model: names the tensor and its file, or the model that it is of."""
    folder = tmp_path / which
    shutil.copytree({"base": llama, "tuned": tuned}[which], folder)
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]
    tensors = load_file(folder / file)
    tensors[tensor].view(-1)[7] = float("nan")
    save_file(tensors, folder / file, metadata={"format": "pt"})
    models = (folder, tuned) if which == "base" else (llama, folder)
    with pytest.raises(WeightError, match=tensor) as caught:
        extract(*models, tmp_path / "o", **OPTIONS, progress=Silent())
    assert file in str(caught.value) or str(folder) in str(caught.value)
    assert not {"adapter_config.json", "extraction.json"} & files_of(tmp_path / "o").keys()


def test_tensors_that_are_no_matrices(tmp_path: Path) -> None:
    """Empty ones, numbers, integers, and buffers with infinity or, in both models, NaN are compared like all others."""
    tensors = {f"layers.{i}.up_proj.weight": realistic(24, 16, seed=i) for i in range(2)}
    more = {
        "empty": torch.zeros(4, 0),
        "empty rows": torch.zeros(0, 4),
        "scale": torch.tensor(2.0),
        "step": torch.tensor(7),
        "ids": torch.arange(6).reshape(2, 3),
        "mask": torch.full((2, 2), -torch.inf),
        "unused": torch.full((3,), torch.nan),
        "bias": torch.ones(3),
    }
    base, other = tmp_path / "m", tmp_path / "t"
    for folder in (base, other):
        folder.mkdir()
    save_file({**tensors, **more}, base / "model.safetensors")
    new = {**more, "scale": torch.tensor(3.0), "ids": more["ids"] + 1, "bias": 2 * more["bias"], "new": torch.ones(2)}
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()} | new, other / "model.safetensors")
    said = Silent()
    report = extract(base, other, tmp_path / "o", rank=1, progress=said)
    fates = {one.tensor: (one.fate, one.change) for one in report.others}
    assert fates == {
        "empty": ("same", None),
        "empty rows": ("same", None),
        "scale": ("changed", 0.5),
        "step": ("same", None),
        "ids": ("changed", None),
        "mask": ("same", None),
        "unused": ("same", None),
        "bias": ("changed", 1.0),
    }
    assert report.further == ("new",)
    assert report.kept == pytest.approx(1)


def test_equal_models(llama: Path, tmp_path: Path) -> None:
    same = save_sharded(tmp_path / "same", tensors_of(llama), 2, llama / "config.json")
    for options in (OPTIONS, {"rank": "auto"}, {"energy": 0.9}, {"budget": 10_000}):
        with pytest.raises(OptionError, match="there is nothing to extract: the two models have the same weights"):
            extract(llama, same, tmp_path / "o", **options, progress=Silent())
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("full", [[], ["*norm*"]])
def test_nothing_but_norms_has_changed(full: list[str], llama: Path, tmp_path: Path) -> None:
    """The models are not called equal; PEFT has no LoRA adapter without a pair, and no option makes one of a norm."""
    tensors = {name: one * 1.5 if name == NORM else one for name, one in tensors_of(llama).items()}
    tuned = save_sharded(tmp_path / "tuned", tensors, 2, llama / "config.json")
    with pytest.raises(OptionError, match="none of the weights that would become pairs has changed") as error:
        extract(llama, tuned, tmp_path / "o", rank=4, full=full, progress=Silent())
    assert str(error.value.got).endswith(f"changed: {NORM}")
    assert "needs at least one pair" in str(error.value.hint)
    assert "--" not in str(error.value.hint)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_but_an_embedding_has_changed(tied: bool, tmp_path: Path) -> None:
    """The advice is to make a pair of it, which then works; but not where no adapter can have that pair."""
    name = "model.embed_tokens.weight"
    base = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=tied)
    old = tensors_of(base)
    tuned = save_sharded(tmp_path / "t", old | {name: old[name] * 1.5}, 2, base / "config.json")
    with pytest.raises(OptionError, match="none of the weights that would become pairs has changed") as error:
        extract(base, tuned, tmp_path / "o", rank=4, progress=Silent())
    assert (f"--include {name}" in str(error.value.hint)) is not tied
    if not tied:
        report = extract(base, tuned, tmp_path / "o", rank=4, include=[name], progress=Silent())
        assert [one.rank for one in report.targets] == [4]


def test_what_has_changed_was_excluded(llama: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="none of the weights that would become pairs has changed") as error:
        extract(llama, tuned, tmp_path / "o", include=["lm_head*"], exclude=["*_proj*"], progress=Silent())
    assert "--include 'model.layers.*.mlp.gate_proj.weight'" in str(error.value.hint)
    assert "neither --exclude nor --full may match" in str(error.value.hint)


def test_only_one_of_the_models_has_more(llama: Path, tmp_path: Path) -> None:
    """Equal in all that both have: that is not called the same weights."""
    more = save_sharded(tmp_path / "t", tensors_of(llama) | {"new.weight": torch.ones(3)}, 2, llama / "config.json")
    for models in ((llama, more), (more, llama)):
        with pytest.raises(OptionError, match="all that both models have is the same") as error:
            extract(*models, tmp_path / "o", rank=4, progress=Silent())
        assert "only one of the models has new.weight" in str(error.value.got)


def test_everything_is_to_be_whole(llama: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="takes no tensor") as error:
        extract(llama, tuned, tmp_path / "o", full=["*"], progress=Silent())
    assert "matched by --full" in str(error.value.got)
    assert "--full" in str(error.value.hint)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_tensor_in_two_files_of_the_tuned_model(has_index: bool, llama: Path, tuned: Path, tmp_path: Path) -> None:
    """Copies that are equal are one; nothing tells which of two others is meant."""
    twice = save_sharded(tmp_path / "twice", tensors_of(tuned), 2, llama / "config.json")
    if not has_index:
        (twice / "model.safetensors.index.json").unlink()
    first, second = (twice / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name = min(load_file(first))
    for added in (0, 1):
        save_file(load_file(second) | {name: load_file(first)[name] + added}, second, metadata={"format": "pt"})
        if not added:
            extract(llama, twice, tmp_path / "o", rank=4, progress=Silent())
    with pytest.raises(FormatError, match=f"{name}' is in two shards, and not the same in both"):
        extract(llama, twice, tmp_path / "o2", rank=4, progress=Silent())


def test_two_models_that_have_nothing_in_common(llama: Path, tmp_path: Path) -> None:
    """An adapter is written, and a note says that the one is no fine-tuned version of the other."""
    tensors = {
        name: realistic(*tensor.shape, seed=90 + number).bfloat16() if tensor.ndim == 2 else tensor
        for number, (name, tensor) in enumerate(sorted(tensors_of(llama).items()))
    }
    other = save_sharded(tmp_path / "other", tensors, 2, llama / "config.json")
    said = Silent()
    extract(llama, other, tmp_path / "o", rank=4, progress=said)
    assert any("has hardly anything in common with the original in 14 of 14 matrices" in note for note in said.notes)
    assert files_of(tmp_path / "o").keys() == RESULT


def test_an_adapter_in_the_place_of_a_model(llama: Path, tmp_path: Path) -> None:
    """The hint has the command that makes a model of it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for config, base in (({}, llama), ({"base_model_name_or_path": "acme/base"}, "acme/base")):
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(SourceError, match="holds an adapter") as caught:
            extract(llama, adapter, tmp_path / "o")
        assert str(caught.value.hint).startswith("TUNED must be a model")
        assert f"surgery merge {base} {adapter} -o merged" in str(caught.value.hint)
    with pytest.raises(SourceError, match="holds an adapter") as caught:
        extract(adapter, llama, tmp_path / "o")
    assert f"surgery merge acme/base {adapter} -o merged" in str(caught.value.hint)


def test_a_model_of_another_size(llama: Path, tmp_path: Path) -> None:
    wide = save_llama(tmp_path / "wide", torch.bfloat16, hidden_size=64)
    deep = save_llama(tmp_path / "deep", torch.bfloat16, num_hidden_layers=1)
    for base, other, message in ((llama, wide, "has another shape"), (llama, deep, "has no tensor")):
        with pytest.raises(SourceError, match=message):
            extract(base, other, tmp_path / "o", rank=4, progress=Silent())
        assert not (tmp_path / "o").exists()
    said = Silent()
    extract(deep, llama, tmp_path / "o", rank=4, overwrite=True, progress=said)
    assert any("looks like a model of another size" in note for note in said.notes)


def _edited(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    """Sealed anew, as somebody would who means it."""

    def change(path: Path) -> None:
        record = json.loads(path.read_text())
        del record["sha256"]
        edit(record["value"])
        path.write_bytes(seal(json.dumps(record)))

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 100),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"3", 1)),
    "a copy of another's": lambda path: path.write_bytes((path.parent / "00002.json").read_bytes()),
    "nothing": _edited(lambda value: value.clear()),
    "a number": _edited(lambda value: value.update(result=5)),
    "another part": _edited(lambda value: value["result"]["file"].update(file=".surgery/parts/00002-of-00003.safetensors")),
    "a part elsewhere": _edited(lambda value: value["result"]["file"].update(file="../../etc/passwd")),
    "no part": _edited(lambda value: value["result"].update(file=None)),
    "another size": _edited(lambda value: value["result"]["file"].update(size=3)),
    "a target less": _edited(lambda value: value["result"]["targets"].pop()),
    "another target": _edited(lambda value: value["result"]["targets"][0].update(tensor="x")),
    "no ranks": _edited(lambda value: [one.pop("rank") for one in value["result"]["targets"]]),
    "another rank": _edited(lambda value: value["result"]["targets"][0].update(rank=9)),
    "fewer matrices": _edited(lambda value: value["result"]["targets"][0]["matrices"].clear()),
    "fewer values": _edited(lambda value: value["result"]["targets"][0]["matrices"][0]["values"].pop()),
    "no norms": _edited(lambda value: value["result"]["targets"][0]["matrices"][0].update(change=None)),
    "other tensors": _edited(lambda value: value["result"]["others"].clear()),
    "an unknown fate": _edited(lambda value: value["result"]["others"][0].update(fate="lost")),
    "another rule": _edited(lambda value: value["result"]["targets"][0]["matrices"][0].update(rule="luck")),
}


@pytest.fixture(scope="module")
def half(llama: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two of three weight files. Read-only."""
    out = tmp_path_factory.mktemp("half") / "o"
    with pytest.raises(KeyboardInterrupt):
        extract(llama, tuned, out, **OPTIONS, progress=_Stop(LAST))
    return out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record(
    damage: str, half: Path, llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """Whatever it is, its job is done again: to the same bytes."""
    out = shutil.copytree(half, tmp_path / "o")
    DAMAGES[damage](out / ".surgery/00001.json")
    said = Silent()
    report = extract(llama, tuned, out, **OPTIONS, progress=said)
    assert "continuing after 1 of 3 shards" in said.notes
    assert files_of(out) == files_of(truth[0])
    assert _without_place(report) == _without_place(truth[1])


@pytest.mark.parametrize("damage", ["gone", "changed", "cut off"])
def test_a_damaged_part(
    damage: str, half: Path, llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """What a finished job has left is checked before the adapter is made of it."""
    out = shutil.copytree(half, tmp_path / "o")
    path = out / ".surgery/parts/00001-of-00003.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    else:
        os.truncate(path, 100)
    said = Silent()
    extract(llama, tuned, out, **OPTIONS, progress=said)
    assert "continuing after 1 of 3 shards" in said.notes
    assert files_of(out) == files_of(truth[0])


@pytest.mark.parametrize("damage", ["edited", "truncated", "a file lost", "a file changed", "config lost"])
def test_a_result_that_has_changed_since(
    damage: str, llama: Path, tuned: Path, truth: tuple[Path, ExtractReport], tmp_path: Path
) -> None:
    """It is not called complete; with --overwrite it is made anew."""
    out = shutil.copytree(truth[0], tmp_path / "o")
    if damage == "edited":
        path = out / "extraction.json"
        path.write_text(path.read_text().replace('"rank": 4', '"rank": 5', 1))
    elif damage == "truncated":
        os.truncate(out / "extraction.json", 200)
    elif damage == "a file lost":
        (out / "adapter_model.safetensors").unlink()
    elif damage == "config lost":
        (out / "adapter_config.json").unlink()
    else:
        path = out / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    left, of_report = files_of(out), damage in ("edited", "truncated")
    kind, message = (FormatError, "extraction.json: ") if of_report else (OutputError, "some of its files are missing")
    with pytest.raises(kind, match=message) as caught:
        extract(llama, tuned, out, **OPTIONS, progress=Silent())
    assert "--overwrite" in str(caught.value)
    assert files_of(out) == left
    extract(llama, tuned, out, **OPTIONS, overwrite=True, progress=Silent())
    assert files_of(out) == files_of(truth[0])


def test_somebody_elses_files(llama: Path, tuned: Path, tmp_path: Path) -> None:
    """A folder that holds anything is refused; with --overwrite one with weights of another kind."""
    out = tmp_path / "o"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files already"):
        extract(llama, tuned, out, **OPTIONS, progress=Silent())
    save_file({"x": torch.ones(2)}, out / "other.safetensors")
    with pytest.raises(OutputError, match="holds files that no run of surgery has written"):
        extract(llama, tuned, out, **OPTIONS, overwrite=True, progress=Silent())
    assert files_of(out).keys() == {"notes.txt", "other.safetensors"}


def test_too_little_memory_is_told_with_the_largest(llama: Path, tuned: Path, tmp_path: Path) -> None:
    for call in (plan_extract, extract):
        options: dict[str, Any] = {**OPTIONS, "progress": Silent(), **({"out": tmp_path / "o"} if call is extract else {})}
        with pytest.raises(OptionError, match="too small for one matrix at a time") as caught:
            call(llama, tuned, **options, max_memory=1 << 20)
        assert "_proj.weight [" in str(caught.value)
        assert not (tmp_path / "o").exists()
    assert plan_extract(llama, tuned, **OPTIONS, progress=Silent()).peak_memory_bytes > 1 << 20
