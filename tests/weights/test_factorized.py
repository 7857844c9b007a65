"""A factorized checkpoint that is open gives back the model that it was made from, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError, SourceError
from tests.kept_layouts import CASES, KEPT
from tests.loopback_hub import LoopbackHub
from tests.models import tensors_of
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


def test_streamed_from_the_hub(llama: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.publish("opened/llama", llama)
    surgery.factorize("opened/llama", tmp_path / "f", rank=2, layout="overlay")
    with surgery.Factorized.open(tmp_path / "f", stream=True) as checkpoint:
        assert all(_same(checkpoint.original(tensor), original) for tensor, original in tensors_of(llama).items())


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
