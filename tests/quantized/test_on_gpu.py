"""Quantized weights whose numbers a GPU computes: against what the bytes stand for, and the CPU's bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery.engine.walk import TargetPiece
from surgery.errors import SurgeryWarning
from surgery.quantized import codec as codecs
from surgery.quantized.recognize import Quantization
from surgery.source.open import open_source
from surgery.weights.model import ModelWeights
from surgery.weights.recognition import quantization_in
from tests.gpus import Gpu, only_pretended
from tests.models import files_of
from tests.pretend_gpu import GPU
from tests.quantized.layouts import LAYOUTS
from tests.quantized.test_formats import save


def opened(model: Path) -> ModelWeights:
    source = open_source(str(model))
    headers = {shard: source.header(shard) for shard in source.selection.shards}
    found: Quantization = quantization_in(source, headers, source.config())
    return ModelWeights(source, lambda: found)


def piece_of(weights: ModelWeights, name: str, first: int = 0, count: int | None = None) -> TargetPiece:
    with weights.reader(weights.quantized[name].shard) as reader:
        entry = reader.entries[name]
        tensor = reader.read(entry, first, count)
    return TargetPiece(entry, first, tensor, tensor.contiguous().view(torch.uint8).view(-1))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_device_reads_each_format_as_the_cpu_does(
    name: str, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[name]()
    read = layout.read(layout.tensors)
    expected = torch.from_numpy((read.codes - read.zeros).astype(np.float32) * np.asarray(read.scales, np.float32))
    with opened(save(layout, tmp_path / "m", apart="expert" in name)) as weights:
        piece = piece_of(weights, layout.name)
        here = weights.exact_piece(piece)
        assert torch.equal(bits(here), bits(expected))
        with gpu() as log:
            there = weights.exact_piece(piece, GPU)
            assert (there.device, there.dtype) == (GPU, torch.float32)
            assert torch.equal(bits(there.cpu()), bits(expected))
            assert log["launches"] < 50
            also = weights.exact(layout.name, piece.tensor.to(GPU))  # where it lies
            assert torch.equal(bits(also.cpu()), bits(expected))
            monkeypatch.setattr(codecs, "DEVICE_BLOCKS", 1)
            monkeypatch.setattr(codecs, "BLOCK_ENTRIES", 700)  # in several bands
            assert torch.equal(bits(weights.exact_piece(piece, GPU).cpu()), bits(expected))
            if len(expected.shape) == 3:
                some = piece_of(weights, layout.name, 1, 2)
                assert torch.equal(bits(weights.exact_piece(some, GPU).cpu()), bits(expected[1:3]))


def test_what_is_not_quantized_stays_where_it_is(tmp_path: Path, gpu: Gpu) -> None:
    layout = LAYOUTS["deepseek-v3"]()
    with opened(save(layout, tmp_path / "m")) as weights, gpu():
        with weights.reader(weights.quantized[layout.name].shard) as reader:
            entry = next(entry for entry in reader.entries.values() if entry.name not in layout.tensors)
            tensor = reader.read(entry)
        assert weights.exact_piece(TargetPiece(entry, 0, tensor, tensor.view(torch.uint8).view(-1)), GPU) is tensor


@only_pretended
def test_a_device_that_is_full_leaves_it_to_the_cpu(tmp_path: Path, gpu: Gpu) -> None:
    layout = LAYOUTS["deepseek-v3"]()
    with opened(save(layout, tmp_path / "m")) as weights, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SurgeryWarning)
        piece = piece_of(weights, layout.name)
        with gpu(largest=2 * piece.tensor.numel()):
            found = weights.exact_piece(piece, GPU)
        assert torch.equal(bits(found), bits(weights.exact_piece(piece)))
        assert any("done on the CPU" in str(warning.message) for warning in said)


@pytest.mark.parametrize("name", ["deepseek-v3", "modelopt nvfp4", "int4 zeros"])
def test_a_model_is_factorized_and_verified_with_the_numbers_that_a_device_reads(name: str, tmp_path: Path, gpu: Gpu) -> None:
    layout = LAYOUTS[name]()
    base = save(layout, tmp_path / "base")
    options: Mapping[str, object] = {"rank": 4, "include": [layout.name]}
    surgery.factorize(base, tmp_path / "here", device="cpu", **options)
    with gpu() as log:
        surgery.factorize(base, tmp_path / "there", device="cuda:0", **options)
        assert surgery.verify(tmp_path / "there", base=base, device="cuda:0").ok
        assert surgery.verify(tmp_path / "here", base=base, device="cuda:0").ok
        surgery.spectra(base, device="cuda:0", include=[layout.name])
        assert log["launches"] > 0
    here, there = files_of(tmp_path / "here/surgery"), files_of(tmp_path / "there/surgery")
    assert here.keys() == there.keys()
