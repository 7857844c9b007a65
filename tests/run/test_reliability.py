"""What is on the disk after a kill, a full disk or an interruption, and how a run goes on from there."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OutputError, SourceError, SurgeryError
from surgery.files import file_writer
from surgery.names import TRAINS, Train
from surgery.progress import Silent
from surgery.run.journal import differing_runs
from surgery.run.lock import locked
from tests.measure import run_module
from tests.models import files_of, realistic, save_llama
from tests.sealing import seal

# What is said of a run that was begun before, where a test does not listen.
pytestmark = pytest.mark.filterwarnings("ignore:continuing after|.* is already complete:surgery.errors.SurgeryWarning")

ROOT = Path(__file__).parents[2]


class _Stop(Silent):
    """Interrupts a run when it comes to a tensor of this name."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def item(self, name: str) -> None:
        if name == self.at:
            raise KeyboardInterrupt


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def truth(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed result."""
    out = tmp_path_factory.mktemp("truth") / "f"
    surgery.factorize(llama, out, rank=4)
    return out


def _interrupted(llama: Path, out: Path, **options: Any) -> _Stop:
    stop = _Stop(LAST)
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, out, progress=stop, **{"rank": 4, **options})
    return stop


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("trials", [pytest.param(5), pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_any_moment(trials: int, llama: Path, tmp_path: Path) -> None:
    said = run_module("tests.faults", llama, tmp_path, trials, 0)
    assert said.count("random moments tried") == 3


def test_goes_on_after_the_last_finished_shard(llama: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    stop = _interrupted(llama, out)
    assert stop.notes[-1] == "stopped after 2 shards; the same command continues from there"
    assert not (out / "surgery/manifest.json").exists()
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.partial"))
    again = Silent()
    surgery.factorize(llama, out, rank=4, progress=again)
    assert again.notes == ["continuing after 2 of 3 shards"]
    assert files_of(out) == files_of(truth)


def test_interrupted_while_the_last_files_are_copied(
    llama: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint comes there as well, for factorize and for fold."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    scales = truth / "surgery/scales.safetensors"
    for module, run in (
        ("run.factorization", lambda progress: surgery.factorize(llama, tmp_path / "f", rank=4, progress=progress)),
        ("run.written_model", lambda progress: surgery.fold(truth, scales, tmp_path / "o", progress=progress)),
    ):
        said = Silent()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"surgery.{module}.copy_file", stopped)
            run(said)
        assert said.notes == ["stopped after 3 shards; the same command continues from there"]
        run(Silent())
    assert files_of(tmp_path / "f") == files_of(truth)
    assert files_of(tmp_path / "o") == files_of(llama)


@pytest.mark.parametrize("stride", [pytest.param(7), pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_interrupted_at_any_moment(stride: int, tmp_path: Path) -> None:
    """The hint to go on comes exactly when there is something to go on with."""
    said = run_module("tests.interrupts", tmp_path, stride)
    assert said.count("moments") == 5


def test_a_run_of_other_options_that_is_interrupted_while_it_is_planned(llama: Path, tmp_path: Path) -> None:
    """It does not claim to be the one that can be gone on with."""
    _interrupted(llama, tmp_path / "f")

    class Planned(Silent):
        def start(self, label: str, total_bytes: int) -> None:
            if label == "planning":
                raise KeyboardInterrupt

    said = Planned()
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, tmp_path / "f", rank=5, progress=said)
    expected = "holds a run that was stopped after 2 shards; the command that started it continues from there"
    assert said.notes == [f"{tmp_path / 'f'} {expected}"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_races_for_the_lock(tmp_path: Path) -> None:
    """Nobody has it together with another, and who does not get it is told of the other run, of nothing else."""
    said = run_module("tests.races", tmp_path, 3)
    assert said.startswith("had ")


def _copied(records: Path) -> None:
    (records / "00002.json").write_bytes((records / "00001.json").read_bytes())


def _swapped(records: Path) -> None:
    first, second = (records / name for name in ("00001.json", "00002.json"))
    before = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(before)


def _one_too_many(records: Path) -> None:
    (records / "00003.json").write_bytes((records / "00002.json").read_bytes())


def _relabelled(**changes: Any) -> Callable[[Path], None]:
    """Sealed anew, as somebody would who means it."""

    def change(records: Path) -> None:
        record = json.loads((records / "00001.json").read_text())
        del record["sha256"]
        record.update({"shard": 1, "file": "model-00002-of-00003.safetensors", **changes})
        (records / "00002.json").write_bytes(seal(json.dumps(record)))

    return change


def _edited(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    def change(records: Path) -> None:
        record = json.loads((records / "00002.json").read_text())
        del record["sha256"]
        edit(record["value"])
        (records / "00002.json").write_bytes(seal(json.dumps(record)))

    return change


def _instead(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(records: Path) -> None:
        (records / "00002.json").unlink()
        put(records / "00002.json")

    return change


def _huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 33)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a copy of another's": _copied,
    "two that have changed places": _swapped,
    "a copy for a shard that is not finished": _one_too_many,
    "a copy under another's name": _relabelled(),
    "a record of no shard": _relabelled(shard=-1),
    "truncated": lambda records: os.truncate(records / "00002.json", 100),
    "empty": lambda records: os.truncate(records / "00002.json", 0),
    "a flipped bit": lambda records: (records / "00002.json").write_bytes(
        (records / "00002.json").read_bytes().replace(b"1", b"3", 1)
    ),
    "a link": _instead(lambda path: path.symlink_to("00001.json")),
    "a link to nothing": _instead(lambda path: path.symlink_to("nothing")),
    "a folder": _instead(lambda path: (path / "inside").mkdir(parents=True)),
    "a pipe": _instead(os.mkfifo),
    "huge": _instead(_huge),
    "deep": _instead(lambda path: path.write_bytes(seal(b'{"run": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"))),
    "no object": _instead(lambda path: path.write_bytes(b"[1]")),
}
CONTRADICTIONS: dict[str, Callable[[Any], object]] = {
    "another source": lambda value: value["shard"]["source"].update(file="model-00001-of-00003.safetensors"),
    "another size": lambda value: value["shard"]["source"].update(size=5),
    "no residual": lambda value: value["shard"].update(residual=None),
    "a residual elsewhere": lambda value: value["shard"]["residual"].update(file="../../etc/passwd"),
    "no factors": lambda value: value["shard"].update(factors=None),
    "another's factors": lambda value: value["shard"].update(
        factors={**value["shard"]["factors"], "file": "surgery/factors-00001-of-00003.safetensors"}
    ),
    "no targets": lambda value: value.update(targets=[]),
    "a target less": lambda value: value["targets"].pop(),
    "another order": lambda value: value["targets"].reverse(),
    "a target twice": lambda value: value["targets"].append(value["targets"][0]),
    "another tensor": lambda value: value["targets"][0].update(tensor="model.embed_tokens.weight"),
    "another shard": lambda value: value["targets"][0].update(shard="model-00001-of-00003.safetensors"),
    "another shape": lambda value: value["targets"][0].update(shape=[32, 32, 1]),
    "another dtype": lambda value: value["targets"][0].update(dtype="F16"),
    "an alias": lambda value: value["targets"][0].update(aliases=[{"tensor": "x", "shard": "y"}]),
    "another rank": lambda value: value["targets"][0].update(
        rank=1, certificates=[{**value["targets"][0]["certificates"][0], "residual": [0.0], "gap": [1.0]}]
    ),
    "nothing inexact": lambda value: value["targets"][0].update(inexact=None),
    "no view": lambda value: value["targets"][0].update(view="heap"),
    "nothing": lambda value: value.clear(),
}


@pytest.fixture(scope="module")
def halves(llama: Path, truth: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A factorize run and a fold, each stopped after two of three shards."""
    folder = tmp_path_factory.mktemp("halves")
    _interrupted(llama, folder / "factorize")
    with pytest.raises(KeyboardInterrupt):
        surgery.fold(truth, _twos(truth), folder / "fold", progress=_Stop(LAST))
    return {name: folder / name for name in ("factorize", "fold")}


def _twos(truth: Path) -> dict[str, torch.Tensor]:
    return {t.key: torch.full(t.scales_shape, 2.0) for t in surgery.Manifest.read(truth).targets}


@pytest.mark.skipif(os.name == "nt", reason="pipes")
@pytest.mark.parametrize("damage", [*DAMAGES, *CONTRADICTIONS])
def test_records_that_are_not_those_of_their_shards(
    damage: str, halves: dict[str, Path], llama: Path, truth: Path, tmp_path: Path
) -> None:
    """They are taken for damaged, whatever they are, and their shards are made again: to the same bytes."""
    out = Path(shutil.copytree(halves["factorize"], tmp_path / "f"))
    (DAMAGES.get(damage) or _edited(CONTRADICTIONS[damage]))(out / ".surgery")
    surgery.factorize(llama, out, rank=4, progress=Silent())
    assert files_of(out) == files_of(truth)


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_records_of_a_fold_as_well(halves: dict[str, Path], truth: Path, tmp_path: Path) -> None:
    surgery.fold(truth, _twos(truth), tmp_path / "whole")
    wrong: dict[str, Callable[[Path], None]] = {
        "another file": _edited(lambda value: value["file"].update(file="model-00001-of-00003.safetensors")),
        "a file elsewhere": _edited(lambda value: value["file"].update(file="../../etc/passwd")),
        "another size": _edited(lambda value: value["file"].update(size=3)),
        "no file": _edited(lambda value: value.update(file=None)),
        "no record": _edited(lambda value: value.clear()),
    }
    for name, damage in (DAMAGES | wrong).items():
        out = Path(shutil.copytree(halves["fold"], tmp_path / name))
        damage(out / ".surgery")
        surgery.fold(truth, _twos(truth), out)
        assert files_of(out) == files_of(tmp_path / "whole"), name


def test_records_of_another_run(halves: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    """Of other options, with the files that they speak of: the names and the shapes are the same, and the seed is not."""
    surgery.factorize(llama, tmp_path / "truth", rank=4, seed=1)
    out = tmp_path / "f"
    _interrupted(llama, out, seed=1)
    for path in sorted(halves["factorize"].rglob("*")):
        name = path.relative_to(halves["factorize"])
        if path.is_file() and name.name not in ("run.json", "files.json", "lock"):
            shutil.copy(path, out / name)
    said = Silent()
    surgery.factorize(llama, out, rank=4, seed=1, progress=said)
    assert said.notes == []
    assert files_of(out) == files_of(tmp_path / "truth")


@pytest.mark.parametrize("damage", [b"", b'{"command": ', b"[]", b'{"command": "factorize", "command": "fold"}', b"\xff"])
def test_a_journal_that_cannot_be_read(
    damage: bytes, halves: dict[str, Path], llama: Path, truth: Path, tmp_path: Path
) -> None:
    """What the run was is not guessed: it is begun anew when that is asked for, whatever it would have written."""
    out = Path(shutil.copytree(halves["factorize"], tmp_path / "f"))
    (out / ".surgery/run.json").write_bytes(damage)
    before = files_of(out)
    with pytest.raises(OutputError, match=r"an unfinished run whose journal is damaged[\s\S]*--overwrite .*starts again"):
        surgery.factorize(llama, out, rank=4)
    assert files_of(out) == before
    (out / ".surgery/files.json").write_bytes(damage)
    surgery.factorize(llama, out, rank=4, overwrite=True)
    assert files_of(out) == files_of(truth)


def test_a_damaged_shard_is_made_again(llama: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    _interrupted(llama, out)
    for name in ("model-00001-of-00003.safetensors", "surgery/factors-00002-of-00003.safetensors"):
        damaged = bytearray((out / name).read_bytes())
        damaged[-1] ^= 1
        (out / name).write_bytes(damaged)
    again = Silent()
    surgery.factorize(llama, out, rank=4, progress=again)
    assert again.notes == []
    assert files_of(out) == files_of(truth)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"rank": 5}, "options.rank: 4 then, 5 now"),
        ({"seed": 1}, "options.seed: 0 then, 1 now"),
        ({"layout": "overlay"}, 'layout: "residual" then, "overlay" now'),
        ({"exclude": ["*q_proj*"]}, "options.exclude"),
        ({"recipe": "attention"}, 'options.recipe: "llama" then, "attention" now'),
        ({"correction": False}, "options.correction: true then, false now"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], difference: str, llama: Path, tmp_path: Path) -> None:
    """Of an unfinished run and of a complete one, which then go on or are complete as if nothing had been asked."""
    _interrupted(llama, tmp_path / "f")
    before = files_of(tmp_path / "f")
    with pytest.raises(OutputError, match="an unfinished run of another kind") as caught:
        surgery.factorize(llama, tmp_path / "f", **{"rank": 4, **options})
    assert difference in str(caught.value)
    assert "targets" not in str(caught.value)  # a hash, which differs with the options
    assert files_of(tmp_path / "f") == before
    surgery.factorize(llama, tmp_path / "f", rank=4)
    before = files_of(tmp_path / "f")
    with pytest.raises(OutputError, match="the complete result of another run") as caught:
        surgery.factorize(llama, tmp_path / "f", **{"rank": 4, **options})
    assert difference in str(caught.value)
    assert files_of(tmp_path / "f") == before


def test_other_targets_are_told_of_alone() -> None:
    """They follow from other options; what differs in them is a hash, and nothing to read."""
    then, now = ({"targets": 64 * digit, "options": {"rank": 4}} for digit in "ab")
    assert differing_runs(then, now) == ["targets: changed"]
    assert differing_runs(then, {**now, "options": {"rank": 5}}) == ["options.rank: 4 then, 5 now"]
    assert differing_runs(then, then) == []


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    model, out = save_llama(tmp_path / "m", torch.bfloat16), tmp_path / "f"
    _interrupted(model, out)
    shard = model / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="an unfinished run of another kind") as caught:
        surgery.factorize(model, out, rank=4)
    assert f"source.files.{shard.name}: changed" in str(caught.value)
    surgery.factorize(model, out, rank=4, overwrite=True)
    # Of a complete one, whatever the file's times say.
    was = shard.stat()
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    os.utime(shard, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(OutputError, match=f"{shard.name} of the model has changed"):
        surgery.factorize(model, out, rank=4)


def test_a_complete_result_is_left_alone(llama: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    surgery.factorize(llama, out, rank=4)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = Silent()
    manifest = surgery.factorize(llama, out, rank=4, progress=again).manifest
    assert manifest == surgery.Manifest.read(truth)
    assert again.notes == [f"{out} is already complete: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times
    (out / "surgery/factors-00002-of-00003.safetensors").unlink()
    with pytest.raises(OutputError, match="some of its files are missing"):
        surgery.factorize(llama, out, rank=4)


@pytest.mark.parametrize("train", TRAINS)
def test_fold_goes_on(train: Train, llama: Path, truth: Path, tmp_path: Path) -> None:
    scales = {t.key: torch.full(t.shape_of(train), 2.0) for t in surgery.Manifest.read(truth).targets}
    surgery.fold(truth, scales, tmp_path / "whole")
    stop = _Stop(LAST)
    with pytest.raises(KeyboardInterrupt):
        surgery.fold(truth, scales, tmp_path / "o", progress=stop)
    assert stop.notes == ["stopped after 2 shards; the same command continues from there"]
    assert not (tmp_path / "o/config.json").exists()
    first = tmp_path / "o/model-00001-of-00003.safetensors"
    written = first.stat().st_mtime_ns
    with pytest.raises(OutputError, match="an unfinished run of another kind") as caught:
        surgery.fold(truth, {name: value * 2 for name, value in scales.items()}, tmp_path / "o")
    assert "scales: changed" in str(caught.value)
    surgery.fold(truth, scales, tmp_path / "o")
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")
    assert first.stat().st_mtime_ns == written


def test_a_complete_fold_is_left_alone(llama: Path, truth: Path, tmp_path: Path) -> None:
    scales = {t.key: torch.full(t.scales_shape, 2.0) for t in surgery.Manifest.read(truth).targets}
    first = surgery.fold(truth, scales, tmp_path / "o")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")}
    again = Silent()
    assert surgery.fold(truth, scales, tmp_path / "o", progress=again) == first
    assert again.notes == [f"{tmp_path / 'o'} is already complete: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")} == times
    # Of other scales, or changed since, or with something more in it, it is not.
    with pytest.raises(OutputError, match="they are not those of this run"):
        surgery.fold(truth, {name: value * 2 for name, value in scales.items()}, tmp_path / "o")
    (tmp_path / "o/tokenizer.json").write_text('{"made": "UP"}')
    with pytest.raises(OutputError, match="they are not those of this run"):
        surgery.fold(truth, scales, tmp_path / "o")
    (tmp_path / "o/thesis.txt").write_text("")
    with pytest.raises(OutputError, match="holds files already\n"):
        surgery.fold(truth, scales, tmp_path / "o")


def test_two_runs_into_one_folder(llama: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "f", []), pytest.raises(OutputError, match="another run is writing to"):
        surgery.factorize(llama, tmp_path / "f", rank=4)
    surgery.factorize(llama, tmp_path / "f", rank=4)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_the_place_of_the_lock_is_not_followed(llama: Path, tmp_path: Path, exists: bool) -> None:
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    (tmp_path / "f/.surgery").mkdir(parents=True)
    (tmp_path / "f/.surgery/lock").symlink_to(victim)
    with pytest.raises(OutputError, match=r"\.surgery/lock is a link"):
        surgery.factorize(llama, tmp_path / "f", rank=4)
    with pytest.raises(OSError, match="symbolic link"):  # also one that is planted in between
        FileLock(tmp_path / "f/.surgery/lock", timeout=0).acquire()
    assert victim.exists() == exists
    assert not exists or victim.read_text() == "precious"


def test_nothing_is_left_of_a_run_that_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError):
        surgery.factorize(llama, tmp_path / "new", rank=4, include=["nothing"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("")
    with pytest.raises(OutputError, match="holds files already"):
        surgery.factorize(llama, tmp_path / "full", rank=4)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


class _FailingFile(io.FileIO):
    """Takes a few bytes at a time, and after so many in all fails as a disk does."""

    left = 0
    error = errno.ENOSPC

    def write(self, data: Any) -> int:
        if _FailingFile.left <= 0:
            raise OSError(_FailingFile.error, os.strerror(_FailingFile.error))
        taken = min(len(data), _FailingFile.left, 10_000)
        _FailingFile.left -= taken
        return super().write(data[:taken]) or 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails(error: int, llama: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short writes, and an error after so many bytes: named, nothing that looks whole, and the next start goes on."""
    total = sum(len(data) for data in files_of(truth).values())

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        return _FailingFile(path, mode.replace("b", "")) if "x" in mode else open(path, mode, buffering)

    monkeypatch.setattr(file_writer, "open", opened, raising=False)
    _FailingFile.error = error
    out = tmp_path / "f"
    chance = random.Random(error)
    for _ in range(12):
        _FailingFile.left = chance.randrange(total // 2)
        try:
            surgery.factorize(llama, out, rank=4)
        except OutputError as raised:
            failure = str(raised)
        else:
            break
        assert os.strerror(error) in failure
        assert not (out / "surgery/manifest.json").exists()
        assert not list(out.rglob("*.partial"))
    _FailingFile.left = 2 * total
    surgery.factorize(llama, out, rank=4)
    assert files_of(out) == files_of(truth)


def test_a_sync_that_fails(llama: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, iter(range(10**6))

    def failing(descriptor: int) -> None:
        if next(calls) % 7 == 6:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(100):
        try:
            surgery.factorize(llama, tmp_path / "f", rank=4)
        except OutputError:
            continue
        break
    monkeypatch.undo()
    surgery.factorize(llama, tmp_path / "f", rank=4)
    assert files_of(tmp_path / "f") == files_of(truth)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_command(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Within seconds, with a word on how to go on, and then it does."""
    model, out = tmp_path / "m", tmp_path / "f"
    model.mkdir()
    for i in range(8):
        weights = {f"layers.{i}.a{j}.weight": realistic(512, 600, seed=10 * i + j) for j in range(2)}
        save_file(weights, model / f"part-{i}.safetensors")
    command = [sys.executable, str(ROOT / "cli.py"), "factorize", str(model), "-o", str(out), "--device", "cpu"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / ".surgery/00001.json").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(number)
    sent = time.monotonic()
    stdout, stderr = running.communicate(timeout=60)
    assert time.monotonic() - sent < 30  # two seconds on a machine that does nothing else
    assert (running.returncode, stdout) == (code, "")
    assert "the same command continues from there" in stderr
    assert "Traceback" not in stderr
    assert not list(out.rglob("*.partial"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert "continuing after" in done.stderr
    surgery.factorize(model, tmp_path / "truth", device="cpu")
    assert files_of(out).keys() == files_of(tmp_path / "truth").keys()


def test_links_in_the_output_are_never_written_through(llama: Path, tmp_path: Path) -> None:
    out, precious = tmp_path / "f", tmp_path / "precious"
    out.mkdir()
    precious.mkdir()
    (precious / "file").write_text("as it was")
    _interrupted(llama, out)
    (out / "config.json.partial").symlink_to(precious / "file")
    (out / "config.json").symlink_to(precious / "file")
    surgery.factorize(llama, out, rank=4)
    assert (precious / "file").read_text() == "as it was"
    assert not (out / "config.json").is_symlink()
    (tmp_path / "g").mkdir()
    (tmp_path / "g/surgery").symlink_to(precious)
    with pytest.raises(OutputError):
        surgery.factorize(llama, tmp_path / "g", rank=4, overwrite=True)
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.bfloat16)
    before = files_of(model)
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "link", model / "inside", tmp_path):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="one lies in the other"):
                surgery.factorize(model, out, rank=4, overwrite=overwrite)
    assert files_of(model) == before


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_ordinary_permissions_and_nothing_private(llama: Path, truth: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in truth.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
    text = (truth / "surgery/manifest.json").read_text()
    for private in (str(llama), str(truth), str(Path.home()), os.environ["HF_HOME"]):
        assert private not in text
    assert json.loads(text)["source"] == {"kind": "folder", "repo_id": None, "commit": None, "subfolder": None}


def test_a_recipe_that_has_changed_is_another_run(llama: Path, tmp_path: Path) -> None:
    """Its name says nothing: what it chooses does, slices included."""
    recipe = tmp_path / "mine.toml"
    text = '[[rules]]\nmatch = "*proj.weight"\nslices = ["a", "b"]\nsplit = true\nrank = 3\n'
    recipe.write_text(text)
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, tmp_path / "f", recipe=recipe, progress=_Stop(LAST))
    for change in (text + 'axis = "columns"\n', text.replace("rank = 3", "rank = 4")):
        recipe.write_text(change)
        with pytest.raises(OutputError, match="of another kind"):
            surgery.factorize(llama, tmp_path / "f", recipe=recipe)
    recipe.write_text(text)
    surgery.factorize(llama, tmp_path / "f", recipe=recipe)
    for change, difference in ((text + 'axis = "columns"\n', "targets"), (text.replace("rank = 3", "rank = 4"), "ranks")):
        recipe.write_text(change)
        with pytest.raises(OutputError, match=f"the {difference} differ"):
            surgery.factorize(llama, tmp_path / "f", recipe=recipe)


def test_complete_means_all_of_it(tmp_path: Path) -> None:
    model, out = save_llama(tmp_path / "m", torch.bfloat16), tmp_path / "f"
    surgery.factorize(model, out, rank=4)
    before = (model / "tokenizer.json").read_bytes()
    (model / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(OutputError, match=r"tokenizer\.json of the model has changed"):
        surgery.factorize(model, out, rank=4)
    (model / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match=r"tokenizer\.json of the model is gone"):
        surgery.factorize(model, out, rank=4)
    (model / "tokenizer.json").write_bytes(before)
    surgery.factorize(model, out, rank=4)
    (out / "surgery/scales.safetensors").unlink()
    with pytest.raises(OutputError, match="some of its files are missing") as caught:
        surgery.factorize(model, out, rank=4)
    assert "scales.safetensors" in str(caught.value)


def test_overwrite_goes_on_as_well(llama: Path, truth: Path, tmp_path: Path) -> None:
    """An interrupted run with --overwrite is gone on with by the same command; another one replaces it."""
    out = tmp_path / "f"
    surgery.factorize(llama, out, rank=3)
    _interrupted(llama, out, overwrite=True)
    again = Silent()
    surgery.factorize(llama, out, rank=4, overwrite=True, progress=again)
    assert again.notes == ["continuing after 2 of 3 shards"]
    assert files_of(out) == files_of(truth)
    # An unfinished run of a model with other files.
    other = save_llama(tmp_path / "m", torch.bfloat16, shard_size="10MB")
    surgery.factorize(other, tmp_path / "expected", rank=4)
    (out / "surgery/manifest.json").unlink()
    _interrupted(llama, out, overwrite=True)
    with pytest.raises(SourceError, match="is an unfinished factorized checkpoint") as caught:
        surgery.fold(out, {}, tmp_path / "o")
    assert caught.value.hint == "repeat the command that writes it: it continues where it stopped"
    surgery.factorize(other, out, rank=4, overwrite=True)
    assert files_of(out) == files_of(tmp_path / "expected")


def test_killed_while_it_cleared(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, out = save_llama(tmp_path / "m", torch.bfloat16, shard_size="10MB"), tmp_path / "f"
    surgery.factorize(other, tmp_path / "expected", rank=4)
    surgery.factorize(llama, out, rank=4)
    unlink, count = Path.unlink, iter(range(1000))

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(out) and ".surgery" not in path.parts and next(count) == 4:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(other, out, rank=4, overwrite=True)
    monkeypatch.undo()
    surgery.factorize(other, out, rank=4, overwrite=True)
    assert files_of(out) == files_of(tmp_path / "expected")


def test_links_that_lead_nowhere_as_the_output(llama: Path, factorized: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    scales = factorized / "surgery/scales.safetensors"
    for command in (
        lambda out: surgery.factorize(llama, out, rank=4),
        lambda out: surgery.fold(factorized, scales, out),
        lambda out: surgery.export(factorized, scales, out),
        lambda out: surgery.blend([scales], out),
        lambda out: surgery.blend([scales], out, overwrite=True),
    ):
        for out in (link, link / "deeper"):
            with pytest.raises(OutputError, match="is a link that leads nowhere") as caught:
                command(out)
            assert str(tmp_path / "gone") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    (tmp_path / "gone").mkdir()
    surgery.factorize(llama, link, rank=4)
    assert files_of(tmp_path / "gone") == files_of(factorized)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not hold for root")
def test_folders_that_may_not_be_written_to(llama: Path, factorized: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for out in (closed, closed / "deeper"):
        with pytest.raises(OutputError, match="Permission denied"):
            surgery.factorize(llama, out, rank=4)
    with pytest.raises(OutputError, match="may not be written to"):
        surgery.project(factorized, llama, closed / "s.safetensors")


def test_paths_that_cannot_be(llama: Path, truth: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / ("x" * 300), tmp_path / "a", tmp_path / "file/x", tmp_path / "file"):
        with pytest.raises(OutputError):
            surgery.factorize(llama, out, rank=4)
    command = [sys.executable, str(ROOT / "cli.py"), "inspect", str(tmp_path / ("x" * 300))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")
