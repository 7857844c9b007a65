"""Models that somebody writes to while they are read: an error that names the file, and never a result of two models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import SurgeryError
from surgery.progress import Silent
from surgery.source.open import open_source
from tests.models import files_of, save_llama
from tests.weights.test_fp8 import quantize_model

#: Changes a weight file, and gives it other numbers.
Change = Callable[[Path], None]


class _Once(Silent):
    """Does something when the first tensor is done, and remembers that it has."""

    def __init__(self, change: Callable[[], None]) -> None:
        super().__init__()
        self._change: Callable[[], None] | None = change

    def item(self, name: str) -> None:
        change, self._change = self._change, None
        if change is not None:
            change()

    @property
    def done(self) -> bool:
        return self._change is None


def _other(shard: Path) -> dict[str, torch.Tensor]:
    """The same tensors with other numbers."""
    return {name: tensor.flip(0).contiguous() if tensor.ndim > 1 else tensor for name, tensor in load_file(shard).items()}


def _save_anew(shard: Path) -> None:
    save_file(_other(shard), shard, metadata={"format": "pt"})


def _replace(shard: Path) -> None:
    save_file(_other(shard), shard.with_suffix(".new"), metadata={"format": "pt"})
    shard.with_suffix(".new").replace(shard)


def _rewrite_in_its_time(shard: Path) -> None:
    """In place, as large as before, with the time of change set back."""
    data, before = bytearray(shard.read_bytes()), shard.stat()
    data[-2] ^= 1
    with open(shard, "r+b") as file:
        file.write(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def _swap_the_folder(shard: Path) -> None:
    folder = shard.parent
    shutil.copytree(folder, folder.with_name("swap"))
    _replace(folder.with_name("swap") / shard.name)
    folder.rename(folder.with_name("away"))
    folder.with_name("swap").rename(folder)


def _lead_elsewhere(shard: Path) -> None:
    """A link that led to one file leads to another."""
    other = shard.parent / ".versions" / "other"
    save_file(_other(shard), other, metadata={"format": "pt"})
    shard.unlink()
    shard.symlink_to(other)


def _cut_off(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 2)


def _remove(shard: Path) -> None:
    shard.unlink()


CHANGES = [_save_anew, _replace, _rewrite_in_its_time, _swap_the_folder, _lead_elsewhere, _cut_off, _remove]


def _model(folder: Path) -> Path:
    """In four shards and more, each a link to the file itself, in a hidden folder beside them."""
    model = save_llama(folder, torch.bfloat16, shard_size="24KB")
    (model / ".versions").mkdir()
    for shard in model.glob("*.safetensors"):
        shard.rename(model / ".versions" / shard.name)
        shard.symlink_to(model / ".versions" / shard.name)
    return model


def _plain(folder: Path) -> Path:
    return save_llama(folder, torch.bfloat16, shard_size="24KB")


def _with_targets(model: Path) -> list[Path]:
    return [model / shard.file for shard in surgery.plan(model, rank=4).shards if shard.targets]


@pytest.mark.filterwarnings("ignore:continuing after:surgery.errors.SurgeryWarning")
@pytest.mark.parametrize("which", [0, -1], ids=["read already", "not yet read"])
@pytest.mark.parametrize("change", CHANGES)
def test_factorize_says_so(change: Change, which: int, tmp_path: Path) -> None:
    model = (_model if change is _lead_elsewhere else _plain)(tmp_path / "m")
    shard = _with_targets(model)[which]
    progress = _Once(lambda: change(shard))
    with pytest.raises(SurgeryError) as caught:
        surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", progress=progress)
    assert progress.done
    # With the folder each of its files is another one.
    assert (".safetensors" if change is _swap_the_folder else shard.name) in str(caught.value)
    assert not (tmp_path / "f/surgery/manifest.json").exists()
    assert not (tmp_path / "f/config.json").exists()
    if change in (_cut_off, _remove):
        return
    # What is there now is one whole model, and the run on that gives what it would have given alone.
    surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", overwrite=True)
    surgery.factorize(model, tmp_path / "truth", rank=4, device="cpu")
    assert files_of(tmp_path / "f") == files_of(tmp_path / "truth")


def test_a_small_file_that_goes_while_the_run_is_planned(tmp_path: Path) -> None:
    source = open_source(_plain(tmp_path / "m"))
    (tmp_path / "m/tokenizer.json").unlink()
    for look in (source.size, source.fetch):
        with pytest.raises(SurgeryError, match=r"tokenizer\.json: cannot be read"):
            look("tokenizer.json")
    with pytest.raises(SurgeryError, match=r"tokenizer\.json is not there any more"):
        source.folders()


def test_goes_on_with_what_has_changed_between_two_starts(tmp_path: Path) -> None:
    """By the contents of the finished shards' files, whatever their times say."""
    model = _plain(tmp_path / "m")
    first, *_, last = _with_targets(model)

    def stop() -> None:
        raise KeyboardInterrupt

    class _AtTheEnd(Silent):
        def item(self, name: str) -> None:
            if name in load_file(last):
                stop()

    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", progress=_AtTheEnd())
    finished = len(list((tmp_path / "f/.surgery").glob("[0-9]*.json")))
    _rewrite_in_its_time(first)
    again = Silent()
    surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", progress=again)
    shards = len(surgery.plan(model, rank=4).shards)
    assert again.notes == [f"continuing after {finished - 1} of {shards} shards"]
    surgery.factorize(model, tmp_path / "truth", rank=4, device="cpu")
    assert files_of(tmp_path / "f") == files_of(tmp_path / "truth")


def test_a_config_that_changes(tmp_path: Path) -> None:
    model = _plain(tmp_path / "m")
    config = model / "config.json"
    progress = _Once(lambda: config.write_text(config.read_text() + "\n") and None)
    with pytest.raises(SurgeryError, match=r"config\.json has changed while it was in use"):
        surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", progress=progress)
    assert not (tmp_path / "f/config.json").exists()


def test_scales_of_fp8_in_another_file(tmp_path: Path, llama: Path) -> None:
    model = quantize_model(llama, tmp_path / "m", apart=True)
    scales = next(path for path in model.glob("*.safetensors") if all(n.endswith("_scale_inv") for n in load_file(path)))

    def change() -> None:
        save_file({name: tensor * 2 for name, tensor in load_file(scales).items()}, scales)

    with pytest.raises(SurgeryError, match=scales.name):
        surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", progress=_Once(change))
    surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", overwrite=True)
    values = {t.key: torch.full(t.scales_shape, 1.5) for t in surgery.Manifest.read(tmp_path / "f").targets}
    with pytest.raises(SurgeryError, match=scales.name):
        surgery.fold(tmp_path / "f", values, tmp_path / "o", base=model, device="cpu", progress=_Once(change))
    assert not (tmp_path / "o/config.json").exists()


@pytest.mark.parametrize("which", [0, -1], ids=["read already", "not yet read"])
@pytest.mark.parametrize("change", [_save_anew, _rewrite_in_its_time, _swap_the_folder])
def test_models_that_are_compared(change: Change, which: int, tmp_path: Path, llama: Path) -> None:
    """spectra, recommend and project, of the model and of the fine-tuned one."""
    surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu")
    runs: list[Callable[[Path, Silent], object]] = [
        lambda model, progress: surgery.spectra(model, top=4, device="cpu", progress=progress),
        lambda model, progress: surgery.spectra(llama, model, top=4, device="cpu", progress=progress),
        lambda model, progress: surgery.recommend(
            model, budget=40, out=tmp_path / "r.toml", max_rank=4, device="cpu", progress=progress
        ),
        lambda model, progress: surgery.project(tmp_path / "f", model, tmp_path / "g", device="cpu", progress=progress),
    ]
    for i, run in enumerate(runs):
        model = _plain(tmp_path / f"{i}" / "m")
        shard = _with_targets(model)[which]
        progress = _Once(lambda shard=shard: change(shard))
        with pytest.raises(SurgeryError, match=".safetensors" if change is _swap_the_folder else shard.name):
            run(model, progress)
        assert progress.done
    assert not (tmp_path / "r.toml").exists()
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("change", [_save_anew, _rewrite_in_its_time])
def test_what_is_folded_and_verified(change: Change, tmp_path: Path, llama: Path) -> None:
    """Bases of overlays, residuals and factors, one that was read already and one that was not."""
    for layout in ("residual", "overlay"):
        made = tmp_path / layout
        surgery.factorize(llama, made, rank=4, layout=layout, device="cpu")
        scales = {t.key: torch.full(t.scales_shape, 1.5) for t in surgery.Manifest.read(made).targets}
        for which in (0, -1):
            for part in ("weights", "factors"):
                model = shutil.copytree(llama, tmp_path / f"{layout} {which} {part} m")
                folder = shutil.copytree(made, tmp_path / f"{layout} {which} {part} f")
                weights = model if layout == "overlay" else folder
                files = weights.glob("*.safetensors") if part == "weights" else folder.glob("surgery/factors*")
                victim = sorted(files)[which]
                base = {"base": model} if layout == "overlay" else {}
                progress = _Once(lambda victim=victim: change(victim))
                report = surgery.verify(folder, device="cpu", progress=progress, **base)
                assert progress.done
                assert not report.ok
                told = [f"{failure.where} {failure.check}" for failure in report.failures]
                assert any(victim.name in line for line in told), told
        # As a fold reads each file once and knows its hash, what it has read by then may be right: it is told, or it is whole.
        whole = tmp_path / f"{layout} whole"
        surgery.fold(made, scales, whole, device="cpu", **({"base": llama} if layout == "overlay" else {}))
        model, folder = shutil.copytree(llama, tmp_path / f"{layout} m"), shutil.copytree(made, tmp_path / f"{layout} f")
        victim = sorted((model if layout == "overlay" else folder).glob("*.safetensors"))[-1]
        with pytest.raises(SurgeryError, match=victim.name):
            surgery.fold(
                folder,
                scales,
                tmp_path / f"{layout} o",
                device="cpu",
                progress=_Once(lambda victim=victim: change(victim)),
                **({"base": model} if layout == "overlay" else {}),
            )


def test_what_our_own_runs_do_to_a_model_is_no_change(tmp_path: Path) -> None:
    """Nor is reading it at the same time."""
    model = _plain(tmp_path / "m")
    progress = _Once(lambda: surgery.factorize(model, tmp_path / "g", rank=4, device="cpu") and None)
    surgery.factorize(model, tmp_path / "f", rank=4, device="cpu", progress=progress)
    assert files_of(tmp_path / "f") == files_of(tmp_path / "g")
