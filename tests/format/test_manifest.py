"""The manifest's own hash: whatever has changed in its file is noticed, and another tool can check it with a few lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError
from surgery.progress import Silent
from surgery.publish.card import published
from tests.models import files_of, save_llama
from tests.sealing import MANIFEST, edited_manifest


@pytest.fixture
def folder(factorized: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama at rank 4."""
    return Path(shutil.copytree(factorized, tmp_path / "f"))


def test_its_hash_is_that_of_the_bytes_before_the_last_entry(folder: Path) -> None:
    """As docs/format.md says it, and as the documented lines for a shell cut it."""
    data = (folder / MANIFEST).read_bytes()
    before, after = data[:-82], data[-82:]
    assert re.fullmatch(rb',\n "sha256": "[0-9a-f]{64}"\n}\n', after)
    assert hashlib.sha256(before).hexdigest() == json.loads(data)["sha256"] == data[-68:-4].decode()
    assert list(json.loads(data))[-1] == "sha256"
    manifest = surgery.Manifest.read(folder)
    assert manifest.as_bytes() == data
    entries = json.loads(json.dumps(dataclasses.asdict(manifest)))
    assert not entries["options"].pop("prove")  # it is there only where it is so
    assert json.loads(data) == {**entries, "sha256": data[-68:-4].decode()}


def test_no_flipped_bit_goes_unnoticed(folder: Path) -> None:
    path = folder / MANIFEST
    data, chance = path.read_bytes(), random.Random(0)
    # All of the hash and what stands around it, and of the rest a bit in every so many bytes.
    places = [(len(data) - 82 + i // 8, i % 8) for i in range(8 * 82)]
    places += [(at, chance.randrange(8)) for at in range(0, len(data) - 82, 29)]
    for at, bit in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(FormatError) as caught:
            surgery.Manifest.read(folder)
        assert "factorize again with --overwrite" in str(caught.value), (at, bit)
    path.write_bytes(data)
    assert surgery.Manifest.read(folder).as_bytes() == data


def _seed(text: bytes) -> bytes:
    return text.replace(b'"seed": 0', b'"seed": 1')


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_seed, "has changed since it was written"),
        (lambda text: text.replace(b"\n", b"\r\n"), "has changed since it was written"),
        (lambda text: text + b"\n", "has changed since it was written"),
        (lambda text: text[:-1], "has changed since it was written"),
        (lambda text: b"\xef\xbb\xbf" + text, "has changed since it was written"),
        (lambda text: json.dumps(json.loads(text)).encode(), "has changed since it was written"),
        (lambda text: re.sub(rb'"sha256": "[0-9a-f]{64}"\n}\n$', b'"sha256": null\n}\n', text), "has changed since"),
        (lambda text: text[:-68] + text[-68:].upper(), "has changed since"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text[:-82] + b"\n}\n", "carries no hash of its own"),
        (lambda text: b"\0" * len(text), "damaged"),
    ],
)
def test_edits_are_told_with_what_to_do(edit: Callable[[bytes], bytes], message: str, folder: Path, llama: Path) -> None:
    """By every command that reads it; and what the error says to do mends it."""
    path, whole = folder / MANIFEST, files_of(folder)
    path.write_bytes(edit(path.read_bytes()))
    assert path.read_bytes() != whole[MANIFEST]
    scales = folder / "surgery/scales.safetensors"
    for call in (
        lambda: surgery.Manifest.read(folder),
        lambda: surgery.verify(folder, device="cpu"),
        lambda: surgery.fold(folder, scales, folder.parent / "o", device="cpu"),
        lambda: surgery.factorize(llama, folder, rank=4, device="cpu"),
    ):
        with pytest.raises(FormatError, match=message) as caught:
            call()
        assert caught.value.hint == "restore it, from a copy or by downloading it again, or factorize again with --overwrite"
    assert not (folder.parent / "o").exists()
    surgery.factorize(llama, folder, rank=4, overwrite=True)
    assert files_of(folder) == whole


def test_an_edit_that_is_sealed_anew_is_taken(folder: Path) -> None:
    with edited_manifest(folder) as manifest:
        manifest["options"]["seed"] = 7
    assert surgery.Manifest.read(folder).options.seed == 7


def test_another_version_is_told_as_such(folder: Path) -> None:
    with edited_manifest(folder) as manifest:
        manifest["format_version"] = 2
    with pytest.raises(FormatError, match="another format version"):
        surgery.Manifest.read(folder)


def test_what_goes_to_the_hub_is_sealed_as_well(tmp_path: Path) -> None:
    """Where the card is another, so is the manifest."""
    model = save_llama(tmp_path / "m", torch.bfloat16)
    (model / "README.md").write_text("# Mine")
    manifest = surgery.factorize(model, tmp_path / "f", rank=2).manifest
    there = published(manifest)
    assert there != manifest
    there.write(tmp_path / "there")
    assert (tmp_path / "there" / MANIFEST).read_bytes() == there.as_bytes() != manifest.as_bytes()
    assert surgery.Manifest.read(tmp_path / "there") == there


def test_the_command_tells_it(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_bytes(_seed(path.read_bytes()))
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert done.exit_code == 1
    assert "has changed since it was written" in done.stderr
    assert "factorize again with --overwrite" in done.stderr


def test_a_resumed_run_gives_the_same_bytes(llama: Path, factorized: Path, tmp_path: Path) -> None:
    class Stop(Silent):
        def item(self, name: str) -> None:
            if name == "model.layers.1.mlp.down_proj.weight":
                raise KeyboardInterrupt

    stop: Any = Stop()
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, tmp_path / "o", rank=4, progress=stop)
    surgery.factorize(llama, tmp_path / "o", rank=4, progress=Silent())
    assert (tmp_path / "o" / MANIFEST).read_bytes() == (factorized / MANIFEST).read_bytes()
