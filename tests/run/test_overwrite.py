"""--overwrite: the earlier result stays whole until another can take its place, and then nothing of it stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OutputError, ReadError, ScalesError, SurgeryError, SurgeryWarning, WeightError
from surgery.files import file_writer
from surgery.progress import Silent
from tests.models import files_of, realistic, save_llama, tensors_of
from tests.weights.test_fp8 import quantize_model

NAME = "model.layers.0.mlp.up_proj.weight"
BESIDE = {
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"temperature": 0.1}',
    "tokenizer.json": '{"of": "A"}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "merges.txt": "a b",
    "vocab.json": "{}",
    "preprocessor_config.json": "{}",
    "modeling_a.py": "pass",
    "README.md": "# A",
    "LICENSE": "A's",
}


def _small(folder: Path, dtype: torch.dtype = torch.float16, *, shards: int = 1, seed: int = 0) -> Path:
    """A model of a few small matrices that its files hold, and a config."""
    folder.mkdir()
    tensors = {NAME.replace("0", str(i)): realistic(24, 16, seed=seed + i).to(dtype) for i in range(max(3, shards))}
    names = list(tensors)
    files_ = (
        ["model.safetensors"] if shards == 1 else [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    )
    place = {}
    for i, file in enumerate(files_):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps({"made": f"up {seed}"}))
    return folder


def _made(model: Path, out: Path, **options: Any) -> Path:
    surgery.factorize(model, out, rank=2, device="cpu", **options)
    return out


def _ones(made: Path, value: float = 1.5) -> dict[str, torch.Tensor]:
    return {t.key: torch.full(t.scales_shape, value) for t in surgery.Manifest.read(made).targets}


class _Stop(Silent):
    """Interrupts a run when it has done so many tensors."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def item(self, name: str) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize(("first", "then"), [(1, 1), (3, 1), (1, 3), (4, 3)])
def test_what_another_fold_has_left_does_not_stay(first: int, then: int, tmp_path: Path) -> None:
    a, b = _small(tmp_path / "a", shards=first), _small(tmp_path / "b", shards=then, seed=9)
    for name, text in BESIDE.items():
        (a / name).write_text(text)
    # Folders that a config names.
    (a / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "1_Pooling", "type": "Pooling"}]')
    (a / "1_Pooling").mkdir()
    (a / "1_Pooling/config.json").write_text("{}")
    (b / "tokenizer.json").write_text('{"of": "B"}')
    of_a, of_b, out = _made(a, tmp_path / "fa"), _made(b, tmp_path / "fb"), tmp_path / "out"
    surgery.fold(of_a, _ones(of_a), out, device="cpu")
    assert {*BESIDE, "modules.json", "1_Pooling/config.json"} <= files_of(out).keys()
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots/loss.png").write_bytes(b"mine")
    said = Silent()
    surgery.fold(of_b, _ones(of_b), out, device="cpu", overwrite=True, progress=said)
    surgery.fold(of_b, _ones(of_b), tmp_path / "alone", device="cpu")
    own = {"notes.txt": b"mine", "plots/loss.png": b"mine"}
    assert files_of(out) == {**files_of(tmp_path / "alone"), **own}
    assert said.notes == [f"{out} keeps files that are no part of a model: notes.txt, plots/loss.png"]


def test_a_folder_with_a_config_and_no_model_in_it(tmp_path: Path) -> None:
    """Somebody's own files: those that a result has too are replaced, the others stay, and are told."""
    made, out = _made(_small(tmp_path / "m"), tmp_path / "f"), tmp_path / "out"
    surgery.fold(made, _ones(made), tmp_path / "alone", device="cpu")
    own = {"train.py": b"mine", "README.md": b"mine", "requirements.txt": b"mine", "notes.csv": b"mine"}
    for config in (True, False):
        out.mkdir()
        for name, data in {**own, **({"config.json": b"{}"} if config else {})}.items():
            (out / name).write_bytes(data)
        said = Silent()
        surgery.fold(made, _ones(made), out, device="cpu", overwrite=True, progress=said)
        assert files_of(out) == {**files_of(tmp_path / "alone"), **own}
        assert said.notes == [
            f"{out} keeps files that are no part of a model: notes.csv",
            f"{out} keeps files that loaders may take for a part of the model: README.md, requirements.txt, train.py",
        ]
        shutil.rmtree(out)


def test_each_kind_of_result_replaces_the_other(tmp_path: Path) -> None:
    a, b, out = _small(tmp_path / "a", shards=3), _small(tmp_path / "b", seed=9), tmp_path / "out"
    (a / "tokenizer.json").write_text("{}")
    of_a, of_b = _made(a, tmp_path / "fa"), _made(b, tmp_path / "fb")
    surgery.fold(of_b, _ones(of_b), tmp_path / "alone", device="cpu")
    surgery.factorize(a, out, rank=2, device="cpu")
    surgery.fold(of_b, _ones(of_b), out, device="cpu", overwrite=True)
    assert files_of(out) == files_of(tmp_path / "alone")
    assert not (out / "surgery").exists()
    surgery.factorize(b, out, rank=2, device="cpu", overwrite=True)
    assert files_of(out) == files_of(of_b)
    # Weights of other names may be anybody's where they are no fold's.
    surgery.fold(of_a, _ones(of_a), tmp_path / "folded", device="cpu")
    before = files_of(tmp_path / "folded")
    with pytest.raises(OutputError, match="no run of surgery has written"):
        surgery.factorize(b, tmp_path / "folded", rank=2, device="cpu", overwrite=True)
    assert files_of(tmp_path / "folded") == before


def _overflow(made: Path, _: Path) -> Callable[[Path], object]:
    scales = _ones(made)
    last = sorted(scales)[-1]
    scales[last] = torch.full_like(scales[last], 1e9)
    return lambda out: surgery.fold(made, scales, out, device="cpu", overwrite=True)


def _damaged(made: Path, _: Path) -> Callable[[Path], object]:
    scales = _ones(made)
    victim = sorted((made / "surgery").glob("factors*"))[-1]
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    return lambda out: surgery.fold(made, scales, out, device="cpu", overwrite=True)


def _not_a_number(_: Path, model: Path) -> Callable[[Path], object]:
    victim = sorted(model.glob("*.safetensors"))[-1]
    tensors = load_file(victim)
    next(iter(tensors.values()))[-1, -1] = float("nan")
    save_file(tensors, victim, metadata={"format": "pt"})
    return lambda out: surgery.factorize(model, out, rank=2, device="cpu", overwrite=True)


@pytest.mark.parametrize(
    ("failing", "error"), [(_overflow, ScalesError), (_damaged, FormatError), (_not_a_number, WeightError)]
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_run_that_fails_leaves_the_earlier_result(
    failing: Callable[[Path, Path], Callable[[Path], object]], error: type[SurgeryError], shards: int, tmp_path: Path
) -> None:
    model, out = _small(tmp_path / "m", shards=shards), tmp_path / "out"
    made = _made(model, tmp_path / "f")
    if failing is _not_a_number:
        surgery.factorize(model, out, rank=3, device="cpu")
    else:
        surgery.fold(made, _ones(made, 1.25), out, device="cpu")
    before = files_of(out)
    run = failing(made, model)
    with pytest.raises(error):
        run(out)
    left = files_of(out)
    assert {name: data for name, data in left.items() if not name.startswith(".surgery/")} == before
    # What the same command would meet again leaves nothing to go on with.
    assert error is FormatError or left == before


def test_an_export_that_fails_leaves_the_earlier_adapter(tmp_path: Path) -> None:
    made, out = _made(_small(tmp_path / "m", shards=3), tmp_path / "f"), tmp_path / "adapter"
    surgery.export(made, _ones(made, 1.25), out)
    before = files_of(out)
    victim = sorted((made / "surgery").glob("factors*"))[-1]
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(FormatError, match=victim.name):
        surgery.export(made, _ones(made), out, overwrite=True)
    assert files_of(out) == before


def test_a_disk_that_is_full_leaves_it_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = _made(_small(tmp_path / "m", shards=3), tmp_path / "f"), tmp_path / "out"
    surgery.fold(made, _ones(made, 1.25), out, device="cpu")
    surgery.fold(made, _ones(made), tmp_path / "truth", device="cpu")
    before = files_of(out)
    sync, calls = os.fsync, iter(range(10**6))

    def failing(descriptor: int) -> None:
        if next(calls) % 5 == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(file_writer.os, "fsync", failing)
    for _ in range(100):
        try:
            surgery.fold(made, _ones(made), out, device="cpu", overwrite=True)
        except OutputError:
            there = {name: data for name, data in files_of(out).items() if not name.startswith(".surgery/")}
            assert there == before or "config.json" not in there or there == files_of(tmp_path / "truth")
            continue
        break
    monkeypatch.undo()
    assert files_of(out) == files_of(tmp_path / "truth")


def test_room_is_wanted_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = _made(_small(tmp_path / "m"), tmp_path / "f"), tmp_path / "out"
    surgery.fold(made, _ones(made), out, device="cpu")
    before = files_of(out)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(real)(real.total, real.used, 100))
    with pytest.raises(OutputError, match="remove the earlier result"):
        surgery.fold(made, _ones(made, 1.25), out, device="cpu", overwrite=True)
    assert files_of(out) == before


def test_interrupted_it_goes_on_and_the_earlier_result_is_there_until_then(tmp_path: Path) -> None:
    model, out = _small(tmp_path / "m", shards=5), tmp_path / "out"
    made = _made(model, tmp_path / "f")
    surgery.fold(made, _ones(made, 1.25), out, device="cpu")
    surgery.fold(made, _ones(made), tmp_path / "truth", device="cpu")
    before = files_of(out)
    stop = _Stop(after=4)
    with pytest.raises(KeyboardInterrupt):
        surgery.fold(made, _ones(made), out, device="cpu", overwrite=True, progress=stop)
    assert {name: data for name, data in files_of(out).items() if not name.startswith(".surgery/")} == before
    done = len(list((out / ".surgery").glob("[0-9]*.json")))
    assert done
    # Another command does not take it up, one with --overwrite begins anew.
    with pytest.raises(OutputError, match="an unfinished run of another kind"):
        surgery.fold(made, _ones(made, 3.0), out, device="cpu")
    written = {path.name: path.stat().st_ino for path in (out / ".surgery/result").glob("*.safetensors")}
    surgery.fold(made, _ones(made), out, device="cpu", overwrite=True)
    assert files_of(out) == files_of(tmp_path / "truth")
    assert written
    assert written.items() <= {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}.items()
    with pytest.raises(KeyboardInterrupt):
        surgery.fold(made, _ones(made, 2.0), out, device="cpu", overwrite=True, progress=_Stop(after=4))
    surgery.fold(made, _ones(made, 3.0), out, device="cpu", overwrite=True)
    surgery.fold(made, _ones(made, 3.0), tmp_path / "third", device="cpu")
    assert files_of(out) == files_of(tmp_path / "third")


@pytest.mark.parametrize("then", ["same", "other"])
def test_stopped_while_it_takes_the_place(then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its steps; the same command goes on, and another one with --overwrite gives its own result alone."""
    a, b = _small(tmp_path / "a", shards=3), _small(tmp_path / "b", seed=9)
    (a / "tokenizer.json").write_text("{}")
    of_a, of_b = _made(a, tmp_path / "fa"), _made(b, tmp_path / "fb")
    surgery.fold(of_a, _ones(of_a), tmp_path / "earlier", device="cpu")
    value = {"same": 1.5, "other": 2.0}[then]
    surgery.fold(of_b, _ones(of_b, value), tmp_path / "truth", device="cpu")
    names = {path.name for path in (tmp_path / "earlier").iterdir()} | {path.name for path in (tmp_path / "truth").iterdir()}
    unlink, replace = Path.unlink, Path.replace
    steps = 0
    while True:
        out, count, stopped = tmp_path / f"out {steps}", iter(range(1000)), False
        shutil.copytree(tmp_path / "earlier", out)

        def step(path: Path, number: int = steps, count: Any = count) -> None:
            # Of what lies in the folder itself.
            if path.parent.name == f"out {number}" and path.name in names and next(count) == number:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", lambda path, missing_ok=False: (step(path), unlink(path, missing_ok))[1])
            patched.setattr(Path, "replace", lambda path, target: (step(Path(target)), replace(path, target))[1])
            try:
                surgery.fold(of_b, _ones(of_b), out, device="cpu", overwrite=True)
            except KeyboardInterrupt:
                stopped = True
        if not stopped:
            break
        there = {name: data for name, data in files_of(out).items() if not name.startswith(".surgery/")}
        assert there == files_of(tmp_path / "earlier") or "config.json" not in there
        surgery.fold(of_b, _ones(of_b, value), out, device="cpu", overwrite=True)
        assert files_of(out) == files_of(tmp_path / "truth")
        steps += 1
    assert steps >= 6  # what goes of the one and comes of the other


def test_something_in_the_way(tmp_path: Path) -> None:
    model = _small(tmp_path / "m")
    (model / "tokenizer.json").write_text("{}")
    made, out = _made(model, tmp_path / "f"), tmp_path / "out"
    surgery.fold(made, _ones(made), out, device="cpu")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    (out / "tokenizer.json/mine").write_text("mine")
    before = files_of(out)
    with pytest.raises(OutputError, match=r"in the way of tokenizer\.json"):
        surgery.fold(made, _ones(made, 1.25), out, device="cpu", overwrite=True)
    assert files_of(out) == before


class _NoWork(Silent):
    def start(self, label: str, total_bytes: int) -> None:
        raise AssertionError(f"{label}: work has begun")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "additional_chat_templates/notes.jinja"])
def test_edits_of_what_is_no_weight_are_taken_along(name: str, llama: Path, tmp_path: Path) -> None:
    made = _made(llama, tmp_path / "f")
    edited = made / name
    text = b'{"model_type": "llama", "edited": true}'
    edited.write_bytes(text)
    said = Silent()
    surgery.fold(made, _ones(made, 1.0), tmp_path / "o", device="cpu", progress=said)
    assert said.notes == [f"these files have changed since {made} was made, and are copied as they are now: {name}"]
    assert files_of(tmp_path / "o") == {**files_of(llama), name: text}
    again = Silent()
    surgery.fold(made, _ones(made, 1.0), tmp_path / "o", device="cpu", progress=again)
    assert again.notes[-1] == f"{tmp_path / 'o'} is already complete: nothing to do"
    # Edited once more it is another fold, also of one that was begun.
    with pytest.raises(KeyboardInterrupt):
        surgery.fold(made, _ones(made), tmp_path / "p", device="cpu", progress=_Stop(after=12))
    edited.write_bytes(text + b" ")
    with pytest.raises(OutputError, match="not those of this run"):
        surgery.fold(made, _ones(made, 1.0), tmp_path / "o", device="cpu")
    with pytest.raises(OutputError, match=f"edited.{name}"):
        surgery.fold(made, _ones(made), tmp_path / "p", device="cpu")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda made: (made / "tokenizer.json").unlink(), r"tokenizer\.json is not there"),
        (lambda made: (made / "config.json").unlink(), r"config\.json is not there"),
        (lambda made: (made / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (
            lambda made: (made / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            r"index\.json is not the file that the manifest describes",
        ),
        (lambda made: os.truncate(made / "model-00002-of-00003.safetensors", 100), "model-00002-of-00003.safetensors"),
        (lambda made: (made / "surgery/factors-00003-of-00003.safetensors").unlink(), "factors-00003-of-00003.safetensors"),
        (
            lambda made: ((made / "tokenizer.json").unlink(), (made / "tokenizer.json").symlink_to(ELSEWHERE)),
            r"tokenizer\.json is not the file that the manifest describes",
        ),
    ],
)
def test_what_cannot_be_folded_is_seen_before_any_work(
    spoil: Callable[[Path], object], message: str, llama: Path, tmp_path: Path
) -> None:
    made = _made(llama, tmp_path / "f")
    surgery.fold(made, _ones(made, 1.25), tmp_path / "o", device="cpu")
    before = files_of(tmp_path / "o")
    scales = _ones(made)
    spoil(made)
    for overwrite in (False, True):
        with pytest.raises(FormatError, match=message):
            surgery.fold(made, scales, tmp_path / "o", device="cpu", overwrite=overwrite, progress=_NoWork())
    assert files_of(tmp_path / "o") == before


#: Outside of any model.
ELSEWHERE = Path(__file__)


def test_edits_of_the_config_of_an_fp8_model(llama: Path, tmp_path: Path) -> None:
    model = quantize_model(llama, tmp_path / "m")
    made = _made(model, tmp_path / "f")
    surgery.fold(made, _ones(made), tmp_path / "truth", base=model, device="cpu")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    with pytest.warns(SurgeryWarning, match="copied as they are now: config.json"):
        surgery.fold(made, _ones(made), tmp_path / "o", base=model, device="cpu")
    expected = tensors_of(tmp_path / "truth")
    assert {name: tensor.tolist() for name, tensor in tensors_of(tmp_path / "o").items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert json.loads((tmp_path / "o/config.json").read_text())["rope_theta"] == 5e5
    config["quantization_config"]["weight_block_size"] = [32, 32]
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="another quantization"):
        surgery.fold(made, _ones(made), tmp_path / "p", base=model, device="cpu", progress=_NoWork())


def test_a_base_of_another_size_is_seen_before_any_work(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.bfloat16)
    made = _made(model, tmp_path / "f", layout="overlay")
    last = sorted(model.glob("*.safetensors"))[-1]
    save_file({**load_file(last), "more": torch.ones(1)}, last, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{last.name} is not the file that the manifest describes"):
        surgery.fold(made, _ones(made), tmp_path / "o", base=model, device="cpu", progress=_NoWork())


def test_a_folder_of_the_earlier_result_that_may_not_be_listed(
    llama: Path, factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in there is not known, and would be left in the midst of the new result."""
    out = Path(shutil.copytree(llama, tmp_path / "o", copy_function=shutil.copy))  # with times of its own, as a fold has
    before = files_of(out)
    scan = os.scandir

    def refused(path: object = ".") -> object:
        if str(path).endswith("additional_chat_templates"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    scales = factorized / "surgery/scales.safetensors"
    with pytest.raises(ReadError, match="cannot be read") as caught:
        surgery.fold(factorized, scales, out, overwrite=True)
    monkeypatch.undo()
    assert str(out) in str(caught.value)
    assert files_of(out) == before
    surgery.fold(factorized, scales, out, overwrite=True)
    assert files_of(out) == files_of(llama)
