"""surgery verify: silent on what is whole, and naming whatever has been tampered with."""

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
from surgery.commands.verify import verify
from surgery.files.file_records import file_sha256
from tests.models import files_of, save_llama
from tests.sealing import edited_manifest


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "f"
    surgery.factorize(llama, out, rank=6, device="cpu")
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "f"))


@pytest.mark.parametrize("fast", [True, False])
def test_a_whole_checkpoint(whole: Path, fast: bool) -> None:
    report = verify(whole, fast=fast, device="cpu")
    assert report.ok, report.failures
    assert report.targets == 14
    assert report.files == len(files_of(whole)) - 2  # the manifest and the scales are judged by what they say
    assert bool(report.unchecked) == fast


@pytest.mark.parametrize("options", [{"layout": "overlay"}, {"correction": False}])
def test_weights_that_are_elsewhere(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    first = surgery.plan(llama, rank=4, layout="overlay").shards[0]
    exclude = [target.tensor for target in first.targets]
    surgery.factorize(llama, tmp_path / "f", rank=4, exclude=exclude, device="cpu", **options)
    without = verify(tmp_path / "f", device="cpu")
    assert without.ok
    assert "--base" in without.unchecked[0]
    with_base = verify(tmp_path / "f", base=llama, device="cpu")
    assert with_base.ok, with_base.failures
    assert not with_base.unchecked
    manifest = surgery.Manifest.read(tmp_path / "f")
    assert not manifest.targets_of(first.file)
    for record in manifest.shards:  # that without targets too: a fold copies it
        shard = Path(shutil.copytree(llama, tmp_path / f"other {record.source.file}")) / record.source.file
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        failures = verify(tmp_path / "f", base=shard.parent, device="cpu").failures
        assert [failure.where for failure in failures if "base" in failure.check] == [shard.name]


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], pattern: str = "surgery/factors-*") -> None:
    """Change tensors of the first such file, and make its hash right again: only arithmetic can tell."""
    path = sorted(folder.glob(pattern))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    name = path.relative_to(folder).as_posix()
    with edited_manifest(folder) as manifest:
        for shard in manifest["shards"]:
            for record in (shard["residual"], shard["factors"]):
                if record and record["file"] == name:
                    record.update(size=path.stat().st_size, sha256=file_sha256(path))


def _edit_target(folder: Path, **changes: object) -> None:
    with edited_manifest(folder) as manifest:
        manifest["targets"][0].update(changes)


def _bent(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(".U"))
    tensors[name][:, 0] *= 1.001


def _wrong_pairs(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(".U"))
    tensors[name] = tensors[name].flip(1).contiguous()


def _swapped(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(".s"))
    tensors[name] = tensors[name].flip(0)


def _without_a_factor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith(".V"))]


def _other_residual(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][0, 0] += 1


def _flip(folder: Path, file: str) -> None:
    path = sorted(folder.glob(file))[0]
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def _other_scales(folder: Path) -> None:
    path = folder / "surgery/scales.safetensors"
    values = load_file(path)
    save_file(dict(list(values.items())[1:]), path)


#: What is done to the folder -> checks that must be among those that fail.
TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a residual": (lambda f: _flip(f, "model-*.safetensors"), "sha256"),
    "a bit of the factors": (lambda f: _flip(f, "surgery/factors-*"), "sha256"),
    "a missing shard": (lambda f: sorted(f.glob("model-*.safetensors"))[0].unlink(), "the file is there"),
    "a missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the file is there"),
    "a longer config": (lambda f: (f / "config.json").write_text("{}    "), "size"),
    "U not of unit length": (lambda f: _rewrite(f, _bent), "U is orthonormal"),
    "s ascending": (lambda f: _rewrite(f, _swapped), "s descends"),
    "a factor gone": (lambda f: _rewrite(f, _without_a_factor), "dtype and shape"),
    "another residual": (lambda f: _rewrite(f, _other_residual, "model-*.safetensors"), "sha256 of the original file"),
    "another sample of a weight": (lambda f: _edit_target(f, sample_sha256="0" * 64), "sample of the original weight"),
    "another largest value": (lambda f: _edit_target(f, s_first=99.0), "s_1, s_k"),
    "another hash of factors": (lambda f: _edit_target(f, factors_sha256="0" * 64), "fingerprint"),
    "scales that lack a target": (_other_scales, "missing"),
    "no scales": (lambda f: (f / "surgery/scales.safetensors").unlink(), "no scales file"),
}


def test_a_certificate_that_does_not_hold(llama: Path, tmp_path: Path) -> None:
    """Factors as orthonormal as ever that are not those of the weight."""
    surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu", layout="overlay")
    _rewrite(tmp_path / "f", _wrong_pairs)
    failed = {failure.check for failure in verify(tmp_path / "f", base=llama, device="cpu").failures}
    assert failed == {"certificate", "sha256 of U, s, V"}


@pytest.mark.filterwarnings("ignore:.*metadata has no fingerprint")
@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_named(name: str, folder: Path) -> None:
    tamper, check = TAMPERING[name]
    tamper(folder)
    report = verify(folder, device="cpu")
    assert not report.ok
    assert any(check in failure.check for failure in report.failures), report.failures


@pytest.mark.parametrize("layout", ["overlay", "residual"])
def test_another_model_as_the_base(layout: str, llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": "overlay"} if layout == "overlay" else {"correction": False}
    surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu", **options)
    one_file = save_llama(tmp_path / "one", torch.bfloat16, shard_size="1GB")
    report = verify(tmp_path / "f", base=one_file, device="cpu")
    assert any("is not the base" in failure.check for failure in report.failures)
    wider = Path(shutil.copytree(llama, tmp_path / "wider"))
    for shard in wider.glob("*.safetensors"):
        save_file({name: tensor.double() for name, tensor in load_file(shard).items()}, shard)
    assert not verify(tmp_path / "f", base=wider, device="cpu").ok


def test_a_base_that_is_not_needed_is_refused(whole: Path, llama: Path) -> None:
    with pytest.raises(surgery.SurgeryError, match="not needed"):
        verify(whole, base=llama, device="cpu")


def test_a_residual_of_another_shape(folder: Path) -> None:
    def turned(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        tensors[name] = tensors[name].T.contiguous()

    shard = next(path.name for path in sorted(folder.glob("model-*")) if any("up_proj" in name for name in load_file(path)))
    _rewrite(folder, turned, shard)
    assert any(failure.check == "dtype and shape" for failure in verify(folder, device="cpu").failures)


def test_what_cannot_be_read_says_what_to_do(folder: Path) -> None:
    gone = sorted(folder.glob("surgery/factors-*"))[0]
    gone.unlink()
    told = [failure.check for failure in verify(folder, device="cpu").failures if "cannot be read" in failure.check]
    assert told
    assert all(f"{gone.name}: cannot be read" in check and "then run the same command again" in check for check in told), told


@pytest.mark.parametrize("change", ["no residual", "no factors", "a shard less"])
def test_a_manifest_that_contradicts_itself(change: str, folder: Path) -> None:
    with edited_manifest(folder) as manifest:
        shard = next(shard for shard in manifest["shards"] if shard["factors"])
        if change == "a shard less":
            manifest["shards"].remove(shard)
        else:
            shard[change.removeprefix("no ")] = None
    with pytest.raises(surgery.SurgeryError):
        verify(folder, device="cpu", fast=True)


def test_command_has_its_own_exit_code_and_a_table(folder: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(folder), "--device", "cpu"])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "all is as the manifest says" in done.stderr
    done = CliRunner().invoke(main, ["verify", str(folder), "--fast"])
    assert "what was checked is as the manifest says" in done.stderr
    _flip(folder, "surgery/factors-*")
    done = CliRunner().invoke(main, ["verify", str(folder), "--fast"])
    assert done.exit_code == 3
    assert f"surgery verify {folder} --repair --base MODEL" in done.stderr
    assert "factors-00001" in done.stdout
    done = CliRunner().invoke(main, ["verify", str(folder), "--fast", "--json"])
    assert done.exit_code == 3
    parsed = json.loads(done.stdout)
    assert (parsed["schema_version"], parsed["ok"]) == (1, False)
    assert parsed["failures"][0]["check"] == "sha256"
    assert CliRunner().invoke(main, ["verify", str(folder / "nowhere")]).exit_code == 1


def test_without_a_correction(llama: Path, tmp_path: Path) -> None:
    manifest = surgery.factorize(llama, tmp_path / "f", rank=6, device="cpu", correction=False).manifest
    exact = surgery.factorize(llama, tmp_path / "e", rank=6, device="cpu").manifest
    assert not manifest.lossless
    assert exact.lossless
    lost = [target.inexact for target in manifest.targets]
    assert lost == [target.inexact for target in exact.targets]
    assert all(share is not None and 0 < share < 0.5 for share in lost)
    size = {out: sum(path.stat().st_size for path in (tmp_path / out / "surgery").iterdir()) for out in ("f", "e")}
    assert size["f"] < size["e"]
    report = surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", device="cpu")
    assert (report.lossless, report.changed) == (False, 0)
    # W' = round(R + U diag(s g) V^T), and as many weights differ from the source as the manifest says.
    factors = {name: tensor for path in (tmp_path / "f/surgery").glob("factors-*") for name, tensor in load_file(path).items()}
    for shard in sorted(path.name for path in llama.glob("*.safetensors")):
        source, residual, back = (load_file(root / shard) for root in (llama, tmp_path / "f", tmp_path / "back"))
        for target in manifest.targets_of(shard):
            U, s, V = (factors[f"{target.tensor}.{part}"].double() for part in "UsV")
            exact_sum = residual[target.tensor].double() + (U * s) @ V.T
            spacing = (torch.nextafter(back[target.tensor].abs(), torch.tensor(float("inf"), dtype=torch.bfloat16)) -
                       back[target.tensor].abs()).double()  # fmt: skip
            assert bool(((back[target.tensor].double() - exact_sum).abs() <= 0.5000001 * spacing).all())
            differing = (back[target.tensor] != source[target.tensor]).float().mean().item()
            assert differing == pytest.approx(target.inexact, abs=5e-3)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "f")]).stdout
    assert "not lossless" in shown
    assert "not lossless" not in CliRunner().invoke(main, ["inspect", str(tmp_path / "e")]).stdout
    with pytest.raises(surgery.SurgeryError, match="overlay"):
        surgery.factorize(llama, tmp_path / "o", layout="overlay", correction=False)


def test_findings_on_factors_are_told_where_the_weights_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=3)
    manifest = surgery.Manifest.read(tmp_path / "f")
    shard = next(shard for shard in manifest.shards if shard.factors is not None)
    assert shard.residual is not None
    assert shard.factors is not None
    residual, factors = tmp_path / "f" / shard.residual.file, tmp_path / "f" / shard.factors.file
    data = bytearray(factors.read_bytes())
    data[-4:] = b"\0\0\x80\x7f"  # infinity in the last of them
    factors.write_bytes(data)
    residual.unlink()
    found = surgery.verify(tmp_path / "f").failures
    assert any(failure.where == shard.residual.file and failure.check == "the file is there" for failure in found)
    assert any(failure.check == "sha256 of U, s, V" for failure in found)
