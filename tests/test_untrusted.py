"""Whatever is read may be damaged or hostile: nothing worse than a SurgeryError comes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import FormatError, SourceError, SurgeryError
from surgery.format.safetensors import ShardReader
from tests.fuzz import Fuzz
from tests.loopback_hub import LoopbackHub
from tests.models import save_llama

ROOT = Path(__file__).parent.parent
ADVERSARIAL = Path(__file__).parent / "adversarial"
EXPECTED: dict[str, str] = json.loads((ADVERSARIAL / "expected.json").read_text())
KINDS = ("weights", "index", "config", "recipe", "manifest", "scales", "factors", "journal")
#: Kinds that take longer, or are of the same inputs as others: fewer of them.
STUDIES = ("spectra", "measured", "report", "recommend")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("count", [pytest.param(100), pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind: str, count: int, fuzz: Fuzz) -> None:
    """Seeds are counted from 0, so that what fails once fails again: python -m tests.fuzz SEED 1."""
    assert kind in fuzz.kinds
    taken = sum(fuzz.one(kind, seed) for seed in range(count))
    assert taken < count  # the mutations do something


@pytest.mark.parametrize("count", [pytest.param(30), pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", STUDIES)
def test_mutations_of_studies(kind: str, count: int, fuzz: Fuzz) -> None:
    test_mutations(kind, count, fuzz)


def test_every_kind_is_tested(fuzz: Fuzz) -> None:
    assert fuzz.kinds.keys() == {*KINDS, *STUDIES}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_adversarial_file(name: str, tmp_path: Path) -> None:
    """Each by itself a model, or the index of one, with the message that is to be said of it."""
    if name.endswith(".safetensors"):
        shutil.copy(ADVERSARIAL / name, tmp_path / "model.safetensors")
        place = "model.safetensors"
    else:
        save_file({"layers.0.a.weight": torch.randn(4, 4)}, tmp_path / "part.safetensors")
        shutil.copy(ADVERSARIAL / name, tmp_path / "model.safetensors.index.json")
        place = "model.safetensors.index.json"
    with pytest.raises(SurgeryError) as caught:
        surgery.plan(tmp_path, rank=1)
    assert EXPECTED[name] in str(caught.value)
    assert place in str(caught.value)


def test_through_the_command(tmp_path: Path) -> None:
    """Exit code 1, one message, no traceback."""
    shutil.copy(ADVERSARIAL / "deep.safetensors", tmp_path / "model.safetensors")
    ran = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "plan", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Error: ")
    assert "Traceback" not in ran.stderr


def test_every_adversarial_file_is_expected() -> None:
    assert {path.name for path in ADVERSARIAL.iterdir()} == {*EXPECTED, "expected.json"}


def test_links_that_leave_the_model(tmp_path: Path) -> None:
    """What they lead to would be copied into the result, and published with it."""
    (tmp_path / "secret").write_text("not for the world")
    model = save_llama(tmp_path / "m", torch.bfloat16)
    (model / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"README\.md is a link that leaves the model's folder"):
        surgery.plan(model, rank=4)
    # Within the folder they are fine.
    (model / "README.md").unlink()
    (model / "README.md").symlink_to(model / "tokenizer.json")
    surgery.factorize(model, tmp_path / "f", rank=4)
    assert (tmp_path / "f/README.md").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not (tmp_path / "f/README.md").is_symlink()
    # Weights are only read: what such a link leads to is a model or an error.
    shard = next(model.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="no safetensors file"):
        surgery.plan(model, rank=4)


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.randn(1000, 1000)}, tmp_path / "m.safetensors")
    with ShardReader(tmp_path / "m.safetensors") as reader:
        os.truncate(tmp_path / "m.safetensors", 1_000_000)
        with pytest.raises(FormatError, match="ended while it was being read"):
            reader.read(reader.header.tensors[0])


def test_a_config_that_is_no_config(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.bfloat16)
    for text, message in (
        (b"[]", "no JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 10**5, "not valid"),
    ):
        (model / "config.json").write_bytes(text)
        with pytest.raises(FormatError, match=message):
            surgery.plan(model, rank=4)
    with open(model / "config.json", "wb") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(FormatError, match="too large"):
        surgery.plan(model, rank=4)
    (model / "config.json").unlink()
    with open(model / "model.safetensors.index.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(FormatError, match="too large"):
        surgery.plan(model, rank=4)


def test_a_name_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    """In a header of the largest size allowed, too: one pass over the names."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{i % 59_999}":{entry}' for i in range(60_000)) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FormatError, match="'t0' appears twice"):
        surgery.plan(tmp_path)


def test_scales_are_looked_at_before_they_are_read(llama: Path, tmp_path: Path) -> None:
    """A sparse file of four terabytes, named as if it were scales."""
    surgery.factorize(llama, tmp_path / "f", rank=4)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    with open(tmp_path / "s.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 42))
    with pytest.raises(SurgeryError, match="'x' is no target"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "o")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_devices_are_no_files(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    scales = tmp_path / "f/surgery/scales.safetensors"
    for name, make in (
        ("tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
        ("surgery/factors-00002-of-00003.safetensors", os.mkfifo),
    ):
        shutil.copytree(tmp_path / "f", tmp_path / "g")
        (tmp_path / "g" / name).unlink()
        make(tmp_path / "g" / name)  # type: ignore[operator]
        with pytest.raises(FormatError):
            surgery.fold(tmp_path / "g", scales, tmp_path / "o")
        shutil.rmtree(tmp_path / "g")
        shutil.rmtree(tmp_path / "o", ignore_errors=True)


@pytest.mark.skipif(sys.platform != "linux", reason="names as bytes")
def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.bfloat16)
    with open(os.fsencode(model) + b"/caf\xe9.txt", "wb"):
        pass
    with pytest.raises(FormatError, match="no Unicode text"):
        surgery.plan(model, rank=4)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].append(manifest["shards"][0]["source"]),
        lambda manifest: manifest["files"].append({**manifest["files"][0], "file": ".surgery/run.json"}),
        lambda manifest: manifest["files"].append({**manifest["files"][0], "file": "surgery/manifest.json"}),
        lambda manifest: manifest["files"].append({**manifest["files"][0], "file": "config.json/x"}),
        lambda manifest: manifest["shards"][0]["residual"].update(file=manifest["shards"][1]["residual"]["file"]),
        lambda manifest: manifest["targets"][0].update(energy=10**400),
    ],
)
def test_manifests_whose_files_contradict_each_other(change: Any, llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    path = tmp_path / "f/surgery/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError):
        surgery.Manifest.read(tmp_path / "f")


def test_headers_from_the_hub_are_no_more_trusted(hub: LoopbackHub, tmp_path: Path) -> None:
    """Those go through the hub client, which takes their shape for granted."""
    headers = [b"[1]", b'{"a": 5}', b"[" * 50_000, b'{"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}']
    headers += [b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}', b'{"a": ' + b"9" * 5000 + b"}"]
    headers += [b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}']
    for i, header in enumerate(headers):
        model = tmp_path / f"m{i}"
        model.mkdir()
        (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
        hub.publish(f"acme/hostile{i}", model)
        with pytest.raises(SurgeryError):
            surgery.plan(f"acme/hostile{i}", rank=4)
    model = tmp_path / "index"
    save_llama(model, torch.bfloat16)
    (model / "model.safetensors.index.json").write_bytes(b"\xff\xfe{}")
    hub.publish("acme/hostile-index", model)
    with pytest.raises(FormatError, match="not UTF-8"):
        surgery.plan("acme/hostile-index", rank=4)
