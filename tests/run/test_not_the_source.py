"""A local source that nothing names any more is not replaced by what comes of it; what a fold has written may be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import OutputError
from tests.models import files_of, save_llama
from tests.sealing import open_manifest

REFUSED = "is the model that the checkpoint was made from, or a copy of it"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "m", torch.bfloat16)


@pytest.fixture
def made(model: Path, tmp_path: Path) -> Path:
    surgery.factorize(model, tmp_path / "f", rank=2)
    return tmp_path / "f"


def _scales(made: Path, value: float) -> dict[str, torch.Tensor]:
    return {t.key: torch.full(t.scales_shape, value) for t in surgery.Manifest.read(made).targets}


def _linked(model: Path) -> Path:
    (model.parent / "link").symlink_to(model)
    return model.parent / "link"


def _moved(model: Path) -> Path:
    return model.rename(model.parent / "elsewhere")


def _through_another(model: Path) -> Path:
    return model.parent / "f/.." / model.name


def _links_to_its_files(model: Path) -> Path:
    """As a folder made of links to a store is."""
    store = _moved(model)
    model.mkdir()
    for path in store.iterdir():
        (model / path.name).symlink_to(path)
    return model


def _faithful_copy(model: Path) -> Path:
    copy = Path(shutil.copytree(model, model.parent / "copy"))
    shutil.rmtree(model)
    return copy


def _in_part(model: Path) -> Path:
    """One shard has been saved anew since: those that are left are the source's."""
    victim = next(model.glob("model-00001*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    return model


@pytest.mark.parametrize(
    "where", [lambda model: model, _linked, _moved, _through_another, _links_to_its_files, _faithful_copy, _in_part]
)
@pytest.mark.parametrize("value", [1.0, 1.5])
def test_a_fold_does_not_replace_it(where: Callable[[Path], Path], value: float, model: Path, made: Path) -> None:
    out = where(model)
    before = files_of(out)
    with pytest.raises(OutputError, match=REFUSED) as caught:
        surgery.fold(made, _scales(made, value), out, overwrite=True)
    assert "choose another output with -o" in str(caught.value)
    assert files_of(out) == before
    assert not (out / ".surgery").exists()


def test_the_command(model: Path, made: Path) -> None:
    before = files_of(model)
    cli = Path(__file__).parents[2] / "cli.py"
    scales = made / "surgery/scales.safetensors"
    command = [sys.executable, str(cli), "fold", str(made), str(scales), "-o", "m", "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=model.parent)
    assert done.returncode == 1
    assert REFUSED in done.stderr
    assert files_of(model) == before


def test_earlier_folds_are_replaced(model: Path, made: Path, tmp_path: Path) -> None:
    """One with untouched scales too, which has the same bytes as the source; also once the source is gone."""
    for gone in (False, True):
        if gone:
            shutil.rmtree(model)
        surgery.fold(made, _scales(made, 1.0), tmp_path / "o", overwrite=True)
        surgery.fold(made, _scales(made, 1.5), tmp_path / "o", overwrite=True)
        surgery.fold(made, _scales(made, 1.0), tmp_path / "o", overwrite=True)
    other = tmp_path / "other"
    surgery.fold(made, _scales(made, 1.0), other)
    assert files_of(tmp_path / "o") == files_of(other)


def test_what_is_refused_can_be_removed_by_hand(model: Path, made: Path) -> None:
    """The way out that the error names."""
    shutil.rmtree(model)
    surgery.fold(made, _scales(made, 1.5), model, overwrite=True)
    surgery.fold(made, _scales(made, 1.25), model, overwrite=True)


def test_scales_do_not_replace_a_weight_file_of_it(model: Path, made: Path, tmp_path: Path) -> None:
    tuned = save_llama(tmp_path / "tuned", torch.bfloat16)
    before = files_of(model)
    shard = next(model.glob("model-00002*"))
    os.link(shard, tmp_path / "same.safetensors")
    for out in (shard, tmp_path / "same.safetensors"):
        with pytest.raises(OutputError, match=REFUSED):
            surgery.project(made, tuned, out, overwrite=True)
    assert files_of(model) == before


def test_an_adapter_does_not_come_into_it(model: Path, made: Path) -> None:
    before = files_of(model)
    with pytest.raises(OutputError, match="there is a model in"):
        surgery.export(made, _scales(made, 1.5), model, overwrite=True)
    assert files_of(model) == before


def test_the_manifest_says_it_without_a_time_or_a_path(model: Path, made: Path, tmp_path: Path) -> None:
    manifest = open_manifest(made)
    assert len(manifest["source_stamps"]) == len(manifest["shards"]) == 3
    text = (made / "surgery/manifest.json").read_text()
    for path in model.iterdir():
        found = path.stat()
        assert str(found.st_mtime_ns) not in text
        assert str(found.st_mtime_ns // 10**9) not in text
    # The same files, moved or faithfully copied, give the same manifest.
    surgery.factorize(Path(shutil.copytree(model, tmp_path / "copy")), tmp_path / "g", rank=2)
    surgery.factorize(model.rename(tmp_path / "moved"), tmp_path / "h", rank=2)
    assert files_of(tmp_path / "g") == files_of(tmp_path / "h") == files_of(made)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts")
@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_a_second_mount_of_it(layout: str, model: Path, tmp_path: Path) -> None:
    """In a namespace of its own, where that may be made: neither the source nor, of an overlay, the base."""
    surgery.factorize(model, tmp_path / "f", rank=2, layout=layout)
    (tmp_path / "again").mkdir()
    program = (
        "import surgery, sys, torch\n"
        "made = sys.argv[1] + '/f'\n"
        "scales = {t.key: torch.full(t.scales_shape, 1.5) for t in surgery.Manifest.read(made).targets}\n"
        "base = sys.argv[1] + '/m' if sys.argv[2] == 'overlay' else None\n"
        "try:\n    surgery.fold(made, scales, sys.argv[1] + '/again', base=base, overwrite=True)\n"
        "except surgery.OutputError as error:\n    print(error.what)\n"
    )
    script = f'mount --bind "{model}" "{tmp_path}/again" || exit 77\nexec "{sys.executable}" -c "$0" "{tmp_path}" {layout}'
    before = files_of(model)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, program],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    assert REFUSED in done.stdout or "one lies in the other" in done.stdout
    assert files_of(model) == before
