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
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, SourceError, SurgeryError
from surgery.escapes import escaped
from surgery.files.paths import check_relative_path
from surgery.format.safetensors import ShardReader
from tests.fuzz import Fuzz
from tests.loopback_hub import LoopbackHub
from tests.models import save_llama
from tests.sealing import MANIFEST, edited_manifest, open_manifest, seal

ROOT = Path(__file__).parent.parent
ADVERSARIAL = Path(__file__).parent / "adversarial"
EXPECTED: dict[str, str] = json.loads((ADVERSARIAL / "expected.json").read_text())
KINDS = (
    "weights",
    "index",
    "config",
    "recipe",
    "manifest",
    "scales",
    "factors",
    "journal",
    "listing",
    "adapter config",
    "adapter weights",
)
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
    is_compared, before = kind.startswith("adapter"), fuzz.compared
    count = count // 4 if is_compared else count  # PEFT takes its time
    taken = sum(fuzz.one(kind, seed) for seed in range(count))
    assert taken < count  # the mutations do something
    assert fuzz.compared > before or not is_compared


@pytest.mark.parametrize("count", [pytest.param(30), pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", STUDIES)
def test_mutations_of_studies(kind: str, count: int, fuzz: Fuzz) -> None:
    test_mutations(kind, count, fuzz)


def test_every_kind_is_tested(fuzz: Fuzz) -> None:
    assert fuzz.kinds.keys() == {*KINDS, *STUDIES}


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if name.endswith(".listing.json")))
def test_adversarial_listing(name: str, hub: LoopbackHub, llama: Path) -> None:
    """Each the second page of a listing, with the message that is to be said of it, or with what is left out and why."""
    repo = hub.publish(f"acme/{name.partition('.')[0]}", llama)
    repo.pages = [hub.described(repo), (ADVERSARIAL / name).read_bytes()]
    try:
        plan = surgery.plan(f"acme/{name.partition('.')[0]}", rank=1, progress=surgery.Silent())
        said = "\n".join(escaped(f"{file}: {reason}") for file, reason in plan.left_out.items())
        assert plan.targets
    except SurgeryError as error:
        said = str(error)
        assert f"acme/{name.partition('.')[0]}" in said
    assert EXPECTED[name] in said


def test_a_listing_without_an_end(hub: LoopbackHub, llama: Path) -> None:
    """And one whose links lead elsewhere: the next page is asked of the hub all the same, which the token is for."""
    repo = hub.publish("acme/endless", llama)
    repo.pages = [[], ...]
    with pytest.raises(SourceError, match="more than 1000 pages"):
        surgery.plan("acme/endless", rank=1)
    everything = hub.described(repo)
    repo.pages = [everything[:2], [], everything[2:]]
    hub.links_to = "http://elsewhere.invalid"
    try:
        elsewhere = surgery.plan("acme/endless", rank=1)
    finally:
        hub.links_to = None
    assert elsewhere.targets == surgery.plan(llama, rank=1).targets


@pytest.mark.parametrize("name", ["emoji 👩🏽‍💻❤️‍🔥.md", "é.txt", "e\u0301.txt", "模型.json", "Größe (1).txt", "данные", "✓.x"])
def test_ordinary_names_are_plain(name: str) -> None:
    assert check_relative_path(f"a/{name}", "m") == f"a/{name}"


@pytest.mark.skipif(sys.platform != "linux", reason="names that other systems cannot have")
@pytest.mark.parametrize("name", ["a\n{}", "\x1b[2J{}", "\u202e{}", "a\u200b{}", "CON.{}", "x\x9b{}", "a:{}", "\u2066x{}"])
def test_the_same_rule_for_folders_indexes_and_manifests(name: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "m" / name.format(".log")).write_text("x")
    left_out = surgery.plan(tmp_path / "m", rank=1).left_out
    assert left_out[name.format(".log")] == "a name that not every system allows"
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=1)
    assert {record.file for record in surgery.Manifest.read(tmp_path / "f").left_out} == {*left_out}
    (tmp_path / "m" / name.format(".py")).write_text("x")
    with pytest.raises(FormatError, match=r"a file name|leaves its folder"):
        surgery.plan(tmp_path / "m", rank=1)
    (tmp_path / "m" / name.format(".py")).unlink()
    index = tmp_path / "m/model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"] = dict.fromkeys(entries["weight_map"], name.format(".safetensors"))
    index.write_text(json.dumps(entries))
    with pytest.raises(FormatError, match=r"a file name|leaves its folder"):
        surgery.plan(tmp_path / "m", rank=1)
    with edited_manifest(tmp_path / "f") as entries:
        entries["files"][0]["file"] = name.format(".json")
    with pytest.raises(FormatError, match=r"a file name|leaves its folder"):
        surgery.Manifest.read(tmp_path / "f")


@pytest.mark.skipif(sys.platform != "linux", reason="a disk that tells case apart")
def test_names_that_differ_in_case_alone(llama: Path, tmp_path: Path) -> None:
    """Of cards one goes along, as on other disks there can be but one; of others nobody knows which is meant."""
    shutil.copytree(llama, tmp_path / "m")
    for name in ("README.md", "readme.md", "LICENSE\u00e9", "LICENSEe\u0301"):
        (tmp_path / "m" / name).write_text(name)
    left_out = surgery.plan(tmp_path / "m", rank=1).left_out
    assert left_out["readme.md"] == "the same name as README.md, where case is not told apart"
    assert len({"LICENSE\u00e9", "LICENSEe\u0301"} & left_out.keys()) == 1
    (tmp_path / "m/Config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"'Config\.json' and 'config\.json'"):
        surgery.plan(tmp_path / "m", rank=1)


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if not name.endswith(".listing.json")))
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


def _twice(path: Path, key: str, value: str) -> None:
    """Another value of the same name before the one that is there."""
    text = path.read_text()
    before, found, after = text.partition(f'"{key}"')
    assert found
    path.write_text(f'{before}"{key}": {value}, {found}{after}')


@pytest.mark.parametrize("value", ["null", "3", '"x"', "{}"])
def test_a_name_twice_in_what_decides(value: str, fuzz: Fuzz, tmp_path: Path) -> None:
    """Readers take the first of two, or the last: what is meant nobody knows."""
    model = shutil.copytree(fuzz.model, tmp_path / "m")
    for name, key in (("config.json", "num_attention_heads"), ("model.safetensors.index.json", "weight_map")):
        kept = (model / name).read_text()
        _twice(model / name, key, value)
        with pytest.raises(FormatError, match=rf"{name}: .*'{key}' appears twice"):
            surgery.plan(model, rank=2)
        (model / name).write_text(kept)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    _twice(model / "model.safetensors.index.json", tensor, value)
    with pytest.raises(FormatError, match=f"'{tensor}' appears twice"):
        surgery.plan(model, rank=2)
    factorized = shutil.copytree(fuzz.factorized, tmp_path / "f")
    adapter = shutil.copytree(fuzz.adapter, tmp_path / "lora")
    _twice(adapter / "adapter_config.json", "lora_alpha", value)
    with pytest.raises(FormatError, match=r"adapter_config\.json: .*'lora_alpha' appears twice"):
        surgery.fold(factorized, fuzz.scales, tmp_path / "o", lora=adapter)
    owner = {"surgery": f'{{"format_version": {value}, "format_version": 1}}'}
    save_file(load_file(fuzz.scales), tmp_path / "s.safetensors", metadata=owner)
    with pytest.raises(SurgeryError, match="'format_version' appears twice"):
        surgery.fold(factorized, tmp_path / "s.safetensors", tmp_path / "o")
    manifest = factorized / MANIFEST
    manifest.write_text(json.dumps(open_manifest(factorized)))
    _twice(manifest, "seed", value)
    manifest.write_bytes(seal(manifest.read_bytes()))
    with pytest.raises(FormatError, match=r"manifest\.json: .*'seed' appears twice"):
        surgery.fold(factorized, fuzz.scales, tmp_path / "o")
    half = shutil.copytree(fuzz.half, tmp_path / "half")
    for path in (half / ".surgery").glob("*.json"):
        _twice(path, next(iter(json.loads(path.read_text()))), value)
    with pytest.raises(SurgeryError, match="appears twice"):
        surgery.factorize(fuzz.model, half, rank=2, device="cpu")


@pytest.mark.parametrize("depth", [150, 900, 5000])
def test_json_that_is_nested_deeply(depth: int, fuzz: Fuzz, tmp_path: Path) -> None:
    """What can just be parsed can perhaps not be printed or compared: none is taken."""
    for brackets in ("[]", '{"a":'):
        deep = brackets[0] * depth + "]" * depth if brackets == "[]" else brackets * depth + "1" + "}" * depth
        adapter = shutil.copytree(fuzz.adapter, tmp_path / f"lora{len(brackets)}")
        for key in ("peft_type", "bias", "rank_pattern", "something_new"):
            config = json.loads((fuzz.adapter / "adapter_config.json").read_text()) | {key: "HERE"}
            (adapter / "adapter_config.json").write_text(json.dumps(config).replace('"HERE"', deep))
            with pytest.raises(FormatError, match=r"adapter_config\.json: not valid JSON \(nested deeper"):
                surgery.fold(fuzz.factorized, fuzz.scales, tmp_path / "o", lora=adapter)


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
    with edited_manifest(tmp_path / "f") as manifest:
        change(manifest)
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
