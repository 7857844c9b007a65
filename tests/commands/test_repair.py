"""surgery verify --repair: damaged files made anew from the source, to the same bytes or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import OutputError
from surgery.format.manifest import Manifest
from surgery.progress import Silent
from tests.families import FAMILIES
from tests.loopback_hub import LoopbackHub
from tests.models import files_of
from tests.weights.test_fp8 import quantize_model

WAYS: dict[str, dict[str, Any]] = {
    "residual": {"rank": 6},
    "no correction": {"rank": 6, "correction": False},
    "overlay": {"rank": 6, "layout": "overlay"},
    "energy": {"energy": 0.5, "max_rank": 12, "seed": 3, "tolerance": 1e-4},
}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repair")
    for name, options in WAYS.items():
        surgery.factorize(llama, root / name, device="cpu", **options)
    return root


def _flip(at: float) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 16
        path.write_bytes(data)

    return flip


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit at the beginning": _flip(0),
    "a bit in the middle": _flip(0.5),
    "a bit at the end": _flip(1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": Path.unlink,
}


def _files(folder: Path) -> dict[str, str]:
    """One file of each kind; of weights the last, which has targets."""
    manifest = Manifest.read(folder)
    shard = [shard for shard in manifest.shards if shard.factors][-1]
    assert shard.factors
    found = {"factors": shard.factors.file, "config": "config.json", "tokenizer": "tokenizer.json"}
    index = "model.safetensors.index.json"
    return {**found, **({"residual": shard.residual.file, "index": index} if shard.residual else {})}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_each_damage_in_each_kind_of_file(damage: str, way: str, made: Path, llama: Path, tmp_path: Path) -> None:
    """One after the other, and then all at once."""
    whole = files_of(made / way)
    folder = Path(shutil.copytree(made / way, tmp_path / "f"))
    files = list(_files(folder).values())
    for hurt in ([files[0]], files):
        for file in hurt:
            DAMAGE[damage](folder / file)
        report = surgery.verify(folder, repair=True, base=llama, device="cpu")
        assert report.ok, report.failures
        assert sorted(report.repaired) == sorted(hurt)
        assert files_of(folder) == whole
    assert surgery.verify(folder, repair=True, base=llama, device="cpu").repaired == ()


@pytest.mark.parametrize("which", ["residual", "factors"])
def test_two_shards_at_once_and_swapped(which: str, made: Path, llama: Path, tmp_path: Path) -> None:
    whole = files_of(made / "residual")
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    shards = [shard for shard in Manifest.read(folder).shards if shard.factors][:2]
    one, other = (folder / getattr(shard, which).file for shard in shards)
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    assert not surgery.verify(folder, device="cpu").ok
    assert surgery.verify(folder, repair=True, base=llama, device="cpu").ok
    assert files_of(folder) == whole


def test_a_residual_needs_no_svd(made: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another number of threads, by the factors alone."""
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    file = _files(folder)["residual"]
    (folder / file).unlink()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an SVD")

    monkeypatch.setattr("surgery.commands.repair.run_job", never)
    torch.set_num_threads(1)
    try:
        assert surgery.verify(folder, repair=True, base=llama, device="cpu").repaired == (file,)
    finally:
        torch.set_num_threads(2)
    assert files_of(folder) == files_of(made / "residual")


@pytest.mark.parametrize("family", ["phi3", "gpt2", "qwen3_moe"])
def test_slices_stacks_and_convolutions(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].save(tmp_path / "m")
    split = {"split": True} if FAMILIES[family].fused else {}
    folder = tmp_path / "f"
    surgery.factorize(model, folder, rank=4, device="cpu", **split)
    whole = files_of(folder)
    for file in (*folder.glob("surgery/factors*"), *folder.glob("*.safetensors")):
        _flip(0.7)(file)
        assert surgery.verify(folder, repair=True, base=model, device="cpu").ok
        assert files_of(folder) == whole


def test_an_overlay_of_an_fp8_model(llama: Path, tmp_path: Path) -> None:
    base = quantize_model(llama, tmp_path / "q", apart=True)
    folder = tmp_path / "f"
    surgery.factorize(base, folder, rank=4, device="cpu")
    whole = files_of(folder)
    for file in ("config.json", sorted(path.relative_to(folder).as_posix() for path in folder.glob("surgery/factors*"))[-1]):
        (folder / file).unlink()
    assert surgery.verify(folder, repair=True, base=base, device="cpu").ok
    assert files_of(folder) == whole


def test_the_source_that_the_manifest_names(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    repo = "acme/repaired"
    hub.publish(repo, llama)
    folder = tmp_path / "f"
    surgery.factorize(repo, folder, rank=4, device="cpu")
    whole = files_of(folder)
    for file in _files(folder).values():
        (folder / file).unlink()
    assert surgery.verify(folder, repair=True, device="cpu").ok
    assert files_of(folder) == whole


@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_the_source_by_any_name_is_that_of_the_manifest(hub: LoopbackHub, llama: Path, tmp_path: Path, layout: str) -> None:
    """Its branch may have moved since."""
    repo = f"acme/moved-{layout}"
    published = hub.publish(repo, llama)
    folder = tmp_path / "f"
    surgery.factorize(repo, folder, rank=4, device="cpu", layout=layout)
    whole = files_of(folder)
    published.branches["old"], published.branches["main"] = published.commit, "c" * 40
    published.branches[published.commit] = published.commit
    published.commit = "c" * 40
    for base in (repo, f"{hub.url}/{repo}", f"https://huggingface.co/{repo}"):
        before = len(hub.requests)
        (folder / "config.json").unlink()
        assert surgery.verify(folder, repair=True, base=base, device="cpu").ok
        assert files_of(folder) == whole
        assert not [path for _, path, _ in hub.requests[before:] if "c" * 40 in path or "revision" in path]


def test_a_checkpoint_that_becomes_another_meanwhile(
    made: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the source is opened, by a run that replaces it."""
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    _flip(0.5)(folder / _files(folder)["residual"])
    real = surgery.commands.verify.source_to_repair_from

    def replaced(*given: Any) -> Any:
        surgery.factorize(llama, folder, rank=3, device="cpu", overwrite=True)
        return real(*given)

    monkeypatch.setattr("surgery.commands.verify.source_to_repair_from", replaced)
    with pytest.raises(OutputError, match="has been replaced by another checkpoint meanwhile"):
        surgery.verify(folder, repair=True, base=llama, device="cpu")
    monkeypatch.undo()
    assert surgery.verify(folder, device="cpu").ok


def test_trained_scales_stay_as_they_are(made: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    scales = folder / "surgery/scales.safetensors"
    from safetensors import safe_open

    with safe_open(scales, "pt") as opened:
        metadata = opened.metadata()
    trained = {name: tensor * 1.5 for name, tensor in load_file(scales).items()}
    save_file(trained, scales, metadata=metadata)
    kept = scales.read_bytes()
    _flip(0.5)(folder / _files(folder)["residual"])
    assert surgery.verify(folder, repair=True, base=llama, device="cpu").ok
    assert scales.read_bytes() == kept
    scales.write_bytes(kept[:-5])  # damaged: nobody can know what was trained
    report = surgery.verify(folder, repair=True, base=llama, device="cpu")
    assert not report.ok
    assert report.repaired == ()
    assert scales.read_bytes() == kept[:-5]
    scales.unlink()
    with pytest.warns(surgery.SurgeryWarning, match="all 1"):
        report = surgery.verify(folder, repair=True, base=llama, device="cpu")
    assert (report.ok, report.repaired) == (True, ("surgery/scales.safetensors",))
    assert files_of(folder) == files_of(made / "residual")


def test_what_cannot_be_made_to_the_same_bytes_stays(made: Path, llama: Path, tmp_path: Path) -> None:
    """Factors of another device; other files are repaired all the same."""
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    manifest = Manifest.read(folder)
    shards = [shard for shard in manifest.shards if shard.factors]
    hurt, residual = shards[0].factors, shards[1].residual
    assert hurt
    assert residual
    # Matrices as small as these are decomposed whole, whatever the seed: another hash stands for other bits.
    shards[0] = dataclasses.replace(shards[0], factors=dataclasses.replace(hurt, sha256="0" * 64))
    others = [shard for shard in manifest.shards if shard.source != shards[0].source]
    dataclasses.replace(manifest, shards=[shards[0], *others]).write(folder)
    for file in (hurt.file, residual.file, "tokenizer.json"):
        _flip(0.4)(folder / file)
    before = (folder / hurt.file).read_bytes()
    report = surgery.verify(folder, repair=True, base=llama, device="cpu")
    assert sorted(report.repaired) == sorted([residual.file, "tokenizer.json"])
    (told,) = [failure for failure in report.failures if failure.check == "repair"]
    assert told.where == hurt.file
    assert "with the same bytes" in told.got
    assert torch.__version__ in told.got
    assert (folder / hurt.file).read_bytes() == before
    assert not (folder / ".surgery").exists()


@pytest.mark.parametrize("lost", ["another weight", "a shard", "a file"])
def test_a_source_that_is_not_the_one(lost: str, made: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    base = Path(shutil.copytree(llama, tmp_path / "m"))
    files = _files(folder)
    for file in (files["residual"], files["tokenizer"]):
        _flip(0.4)(folder / file)
    if lost == "another weight":
        _flip(1)(base / files["residual"])
    elif lost == "a shard":
        tensors = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for path in base.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        (base / "tokenizer.json").unlink()
    before = files_of(folder)
    report = surgery.verify(folder, repair=True, base=base, device="cpu")
    assert not report.ok
    stays = files["tokenizer"] if lost == "a file" else files["residual"]
    assert [failure.where for failure in report.failures if failure.check == "repair"] == [stays]
    assert (folder / stays).read_bytes() == before[stays]
    assert len(report.repaired) == 1


def test_what_is_refused(made: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    _flip(0.5)(folder / _files(folder)["residual"])
    before = files_of(folder)
    with pytest.raises(surgery.SurgeryError, match="does not say where"):
        surgery.verify(folder, repair=True, device="cpu")
    with pytest.raises(surgery.SurgeryError, match="itself a factorized checkpoint"):
        surgery.verify(folder, repair=True, base=folder, device="cpu")
    inside = Path(shutil.copytree(llama, folder / "inside"))
    with pytest.raises(surgery.SurgeryError, match="one lies in the other"):
        surgery.verify(folder, repair=True, base=inside, device="cpu")
    shutil.rmtree(inside)
    assert files_of(folder) == before
    (folder / ".surgery").mkdir()
    with FileLock(folder / ".surgery/lock"), pytest.raises(surgery.SurgeryError, match="another run"):
        surgery.verify(folder, repair=True, base=llama, device="cpu")
    assert files_of(folder).items() >= before.items()


class _Stop(Silent):
    def item(self, name: str) -> None:
        if name.endswith("proj.weight"):
            raise KeyboardInterrupt


def test_interrupted(made: Path, llama: Path, tmp_path: Path) -> None:
    """Each file is what it was or what it should be, nothing else is left, and the same call goes to the end."""
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    for file in _files(folder).values():
        _flip(0.5)(folder / file)
    damaged, whole = files_of(folder), files_of(made / "residual")
    with pytest.raises(KeyboardInterrupt):
        surgery.verify(folder, repair=True, base=llama, device="cpu", progress=_Stop())
    left = files_of(folder)
    assert left.keys() == whole.keys()
    assert all(data in (damaged[file], whole[file]) for file, data in left.items())
    assert left != whole
    assert surgery.verify(folder, repair=True, base=llama, device="cpu").ok
    assert files_of(folder) == whole


def test_command(made: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    file = _files(folder)["factors"]
    _flip(0.5)(folder / file)
    arguments = ["verify", str(folder), "--repair", "--base", str(llama), "--device", "cpu"]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"made again: {file}" in done.stderr
    (folder / file).unlink()
    parsed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert (parsed["ok"], parsed["repaired"]) == (True, [file])
    _flip(0.5)(folder / file)
    base = Path(shutil.copytree(llama, tmp_path / "m"))
    for path in base.glob("*.safetensors"):
        _flip(1)(path)
    done = CliRunner().invoke(main, [*arguments[:4], str(base), "--device", "cpu"])
    assert done.exit_code == 3
    assert "repair" in done.stdout
