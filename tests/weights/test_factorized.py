"""A factorized checkpoint that is open gives back the model that it was made from, tensor by tensor."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError, SourceError
from surgery.hub.client_cache import cache_folder
from tests.kept_layouts import CASES, KEPT
from tests.loopback_hub import LoopbackHub
from tests.models import tensors_of
from tests.quantized.fp8 import dequantize
from tests.weights.test_fp8 import quantize_model

_LOSSLESS = [name for name in CASES if name not in ("uncorrected", "dequantized", "fp8")]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", _LOSSLESS)
def test_every_tensor_is_the_originals(name: str, tmp_path: Path) -> None:
    """Of all layouts; also what was passed over, and tensors that are one parameter with another."""
    model = CASES[name].save(tmp_path / "model")
    base = model if CASES[name].is_overlay else None
    with surgery.Factorized.open(KEPT / name, base=base) as checkpoint:
        for tensor, original in tensors_of(model).items():
            assert _same(checkpoint.original(tensor), original), tensor
            if tensor in checkpoint.targets and original.ndim == 3:
                for i, matrix in enumerate(original):
                    assert _same(checkpoint.original(tensor, i), matrix[None])


def test_of_real_weights(llama: Path, factorized: Path) -> None:
    with surgery.Factorized.open(str(factorized)) as checkpoint:
        assert all(_same(checkpoint.original(tensor), original) for tensor, original in tensors_of(llama).items())
        assert checkpoint.targets.keys() == {target.tensor for target in checkpoint.manifest.targets}


def test_fp8_is_dequantized(llama: Path, tmp_path: Path) -> None:
    base = quantize_model(llama, tmp_path / "fp8", apart=True)
    surgery.factorize(base, tmp_path / "f", rank=2)
    stored = tensors_of(base)
    with surgery.Factorized.open(tmp_path / "f", base) as checkpoint:
        for target in checkpoint.manifest.targets:
            q, scales = stored[target.tensor], stored[f"{target.tensor}_scale_inv"]
            m, n = q.shape
            spread = scales[(torch.arange(m) // 16)[:, None], (torch.arange(n) // 16)[None, :]]
            assert _same(checkpoint.original(target.tensor), q.float() * spread)


@pytest.mark.parametrize("layout", ["overlay", "residual"])
def test_fp8_that_is_no_target(layout: str, llama: Path, tmp_path: Path) -> None:
    """It is dequantized as well, whatever the targets are, and never given as numbers without their scales."""
    base = quantize_model(llama, tmp_path / "fp8", apart=True)
    options: dict[str, Any] = {"rank": 2, "include": ["*embed_tokens*"], "layout": layout}
    surgery.factorize(base, tmp_path / "f", **options)
    name = "model.layers.0.self_attn.q_proj.weight"
    q, scales = (tensors_of(base)[f"{name}{end}"] for end in ("", "_scale_inv"))
    with surgery.Factorized.open(tmp_path / "f", base if layout == "overlay" else None) as checkpoint:
        assert _same(checkpoint.original(name), dequantize(q, scales, (16, 16)))
        assert _same(checkpoint.original("model.norm.weight"), tensors_of(base)["model.norm.weight"])


def test_without_a_correction_it_is_what_a_fold_gives(tmp_path: Path) -> None:
    manifest = surgery.Manifest.read(KEPT / "uncorrected")
    ones = {target.key: torch.ones(tuple(target.scales_shape)) for target in manifest.targets}
    surgery.fold(KEPT / "uncorrected", ones, tmp_path / "folded", device="cpu")
    with surgery.Factorized.open(KEPT / "uncorrected") as checkpoint:
        for tensor, folded in tensors_of(tmp_path / "folded").items():
            assert _same(checkpoint.original(tensor), folded)


@pytest.mark.parametrize("name", ["residual", "slices", "stacks", "overlay"])
def test_factors_are_those_in_the_files(name: str, tmp_path: Path) -> None:
    stored = {key: value for file in (KEPT / name / "surgery").glob("factors-*") for key, value in load_file(file).items()}
    base = CASES[name].save(tmp_path / "model") if CASES[name].is_overlay else None
    with surgery.Factorized.open(KEPT / name, base=base) as checkpoint:
        for target in checkpoint.manifest.targets:
            factors = checkpoint.factors(target.key)
            parts = {"U": factors.U, "s": factors.s, "V": factors.V}
            assert all(_same(part, stored[f"{target.key}.{which}"]) for which, part in parts.items())
            if target.view == "stack":
                assert _same(checkpoint.factors(target.key, 1).U, factors.U[1])


def _spread(model: Path, count: int) -> Path:
    """Weights and their scales go to different ones of so many files."""
    tensors = tensors_of(model)
    for path in model.glob("model*.safetensors*"):
        path.unlink()
    files = {name: f"model-{1 + i % count:05d}-of-{count:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return model


@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_from_the_hub(
    fp8: bool, llama: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than two files are on the disk at a time, also where the scales of FP8 weights are in other files."""
    model = _spread(quantize_model(llama, tmp_path / "fp8"), 3) if fp8 else llama
    hub.publish(f"opened/streamed-{fp8}", model)
    surgery.factorize(f"opened/streamed-{fp8}", tmp_path / "f", rank=2, layout="overlay", stream=True)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    most = 0
    tensors = tensors_of(model)
    with surgery.Factorized.open(tmp_path / "f", stream=True) as checkpoint:
        for tensor, original in tensors.items():
            if tensor.endswith("_scale_inv"):
                continue
            if original.dtype == torch.float8_e4m3fn:
                original = dequantize(original, tensors[f"{tensor}_scale_inv"], (16, 16))
            assert _same(checkpoint.original(tensor), original)
            most = max(most, len(list(place.rglob("*.safetensors"))))
    assert len(list(model.glob("*.safetensors"))) > 2
    assert most == 2
    assert list(place.iterdir()) == []


def test_streamed_by_threads(llama: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """A file that one of them is reading is not dropped by another one."""
    hub.publish("opened/threads", llama)
    surgery.factorize("opened/threads", tmp_path / "f", rank=2, layout="overlay", stream=True)
    originals = tensors_of(llama)
    with surgery.Factorized.open(tmp_path / "f", stream=True) as checkpoint, ThreadPoolExecutor(6) as pool:
        names = [name for i in range(3) for name in sorted(originals, key=lambda name: hash((i, name)))]
        assert all(
            _same(tensor, originals[name]) for name, tensor in zip(names, pool.map(checkpoint.original, names), strict=True)
        )


def test_a_damaged_file_in_the_cache(llama: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """Noticed by its hash, also where a tensor is asked for of which the manifest has no sample."""
    hub.publish("opened/damaged", llama)
    surgery.factorize("opened/damaged", tmp_path / "f", rank=2, layout="overlay")
    (shard,) = {item.shard for item in surgery.Manifest.read(tmp_path / "f").skipped if item.tensor == "model.norm.weight"}
    (path,) = [path for path in cache_folder().rglob(shard) if "opened--damaged" in str(path)]
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with surgery.Factorized.open(tmp_path / "f") as checkpoint:
        with pytest.raises(SourceError, match="force-download"):
            checkpoint.original("model.norm.weight")


def test_what_is_no_weight(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 3), "ids": torch.arange(4), "empty": torch.zeros(0, 2), "one": torch.tensor(3.5)}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model/model.safetensors")
    surgery.factorize(tmp_path / "model", tmp_path / "f", rank=2, include=["a.weight"])
    with surgery.Factorized.open(tmp_path / "f") as checkpoint:
        assert all(_same(checkpoint.original(name), tensors[name]) for name in ("a.weight", "empty", "one"))
        with pytest.raises(OptionError, match=r"'ids' holds no weights\n  got: +I64\n.*BF16(.|\n)*unchanged in model"):
            checkpoint.original("ids")


def test_nothing_is_read_after_closing(llama: Path, factorized: Path) -> None:
    checkpoint = surgery.Factorized.open(factorized)
    target = checkpoint.manifest.targets[0]
    checkpoint.original(target.tensor)
    checkpoint.close()
    checkpoint.close()
    for read in (checkpoint.original, checkpoint.factors):
        with pytest.raises(OptionError, match="is closed"):
            read(target.key)


@pytest.fixture
def checkpoint() -> Iterator[surgery.Factorized]:
    with surgery.Factorized.open(KEPT / "stacks") as opened:
        yield opened


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda checkpoint: checkpoint.original("no.such"), "has no tensor 'no.such'"),
        (lambda checkpoint: checkpoint.factors("no.such"), "has no target 'no.such'"),
        (lambda checkpoint: checkpoint.original("layers.0.experts.up", 3), "no such matrix.*\n.*index 3\n.*from 0 to 2"),
        (lambda checkpoint: checkpoint.original("layers.0.attn.q.weight", 0), "no such matrix.*\n.*index 0\n.*it is no stack"),
        (lambda checkpoint: checkpoint.factors("layers.0.experts.up", -1), "no such matrix"),
    ],
)
def test_what_is_not_there(call: object, message: str, checkpoint: surgery.Factorized) -> None:
    assert callable(call)
    with pytest.raises(OptionError, match=message):
        call(checkpoint)


def test_another_model_as_the_base(tmp_path: Path) -> None:
    """One with the same names and sizes is noticed by the tensor that is asked for."""
    model = CASES["overlay"].save(tmp_path / "model")
    target = surgery.Manifest.read(KEPT / "overlay").targets[0]
    file, name = model / target.shard, target.tensor
    tensors = load_file(file)
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    with surgery.Factorized.open(KEPT / "overlay", model) as checkpoint:
        with pytest.raises(FormatError, match="is not the tensor that was factorized"):
            checkpoint.original(name)
    with pytest.raises(SourceError, match="is not the base of this overlay"):
        surgery.Factorized.open(KEPT / "overlay", CASES["stacks"].save(tmp_path / "other"))


def test_a_base_that_is_not_needed(llama: Path, factorized: Path) -> None:
    with pytest.raises(OptionError, match="--base is for overlays"):
        surgery.Factorized.open(factorized, llama)
    with pytest.raises(OptionError, match="--stream is for overlays"):
        surgery.Factorized.open(factorized, stream=True)
