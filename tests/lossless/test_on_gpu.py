"""Splitting and joining on a GPU: against the original bytes, and those that the CPU writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.lossless import blocks, split_batch
from surgery.lossless.correction import CorrectionReader, CorruptCorrection
from surgery.lossless.factors import Factors
from surgery.lossless.join import join, recover
from surgery.lossless.parts import ResidualError
from surgery.lossless.split import split
from surgery.lossless.uploaded import UploadedCorrection
from tests.models import realistic
from tests.pretend_gpu import GPU

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def batch_of(dtype: torch.dtype, count: int, m: int, n: int, k: int = 6) -> tuple[torch.Tensor, Factors]:
    """Unlike matrices, one of them zero and one with numbers of all sizes, down to subnormal ones; on the CPU."""
    matrices = [realistic(m, n, seed=seed) for seed in range(count)]
    matrices[-1] = matrices[-1] * torch.logspace(2, -44, n, dtype=torch.float64).float()
    if count > 2:
        matrices[1] = torch.zeros(m, n)
    weights = torch.stack(matrices).to(dtype)
    U, s, Vt = torch.linalg.svd(weights.double(), full_matrices=False)
    return weights, Factors(U[..., :k].float().contiguous(), s[..., :k].float(), Vt[..., :k, :].mT.float().contiguous())


def of(factors: Factors, i: int) -> Factors:
    return Factors(factors.U[i], factors.s[i], factors.V[i])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


#: Entries of a block and blocks of a portion: all in one; several, of which the last is short, and which with 37 columns do not
#: end with a byte of the mask; several portions.
ONE, BLOCKS, PORTIONS = (blocks.BLOCK_ENTRIES, blocks.DEVICE_BLOCKS), (200, 64), (200, 4)


@pytest.mark.parametrize(
    ("dtype", "m", "n", "sizes"),
    [
        (torch.bfloat16, 32, 48, ONE),
        (torch.bfloat16, 32, 48, PORTIONS),
        (torch.bfloat16, 29, 37, BLOCKS),
        (torch.bfloat16, 5, 3, ONE),
        (torch.float16, 32, 48, BLOCKS),
        (torch.float16, 29, 37, PORTIONS),
        (torch.float32, 29, 37, ONE),
        (torch.float32, 31, 32, PORTIONS),
    ],
)
def test_a_batch_is_split_as_its_matrices_are_on_the_cpu(
    dtype: torch.dtype, m: int, n: int, sizes: tuple[int, int], on_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", sizes[0])
    for module in (blocks, split_batch):
        monkeypatch.setattr(module, "DEVICE_BLOCKS", sizes[1])
    monkeypatch.setattr(split_batch, "BLOCK_ENTRIES", sizes[0])
    weights, factors = batch_of(dtype, 4, m, n, k=3)
    expected = [split(weight, of(factors, i)) for i, weight in enumerate(weights)]
    there = weights.to(GPU)
    found = split_batch.split_batch(there, factors.to(GPU), out=there)
    without = split_batch.split_batch(weights.to(GPU), factors.to(GPU), correct=False)
    assert sum(part.inexact for part in found) > 0 or m == 5
    for i, parts in enumerate(expected):
        assert parts.correction is not None
        assert found[i].residual.device == GPU
        assert same_bits(found[i].residual.cpu(), parts.residual)
        assert torch.equal(torch.as_tensor(found[i].correction()), parts.correction)
        assert same_bits(there[i].cpu(), parts.residual)
        assert found[i].inexact == parts.inexact == without[i].inexact
        assert without[i].correction() is None
        alone = split(weights[i].to(GPU), of(factors, i).to(GPU))
        assert torch.equal(torch.as_tensor(alone.correction), parts.correction)
        # And back, there and here.
        weight, share = recover(there[i], of(factors, i).to(GPU), parts.correction)
        assert same_bits(weight.cpu(), weights[i])
        assert share == parts.inexact
        assert same_bits(join(found[i].residual.cpu(), of(factors, i), parts.correction)[0], weights[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prediction_that_is_far_off_has_escapes(dtype: torch.dtype, on_gpu: dict[str, int]) -> None:
    weights, factors = batch_of(dtype, 1, 60, 50)
    wrong = Factors(factors.U, factors.s * 300, factors.V)
    parts = split_batch.split_batch(weights.to(GPU), wrong.to(GPU))[0]
    assert parts.blocks is not None
    assert sum(len(block.escapes) for block in parts.blocks) > 20
    expected = split(weights[0], of(wrong, 0)).correction
    assert expected is not None
    assert torch.equal(torch.as_tensor(parts.correction()), expected)
    assert same_bits(join(parts.residual, of(wrong, 0).to(GPU), expected)[0].cpu(), weights[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_updates(dtype: torch.dtype, on_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 700)
    monkeypatch.setattr(blocks, "DEVICE_BLOCKS", 2)
    weights, factors = batch_of(dtype, 1, 70, 90)
    here, there = of(factors, 0), of(factors, 0).to(GPU)
    parts = split(weights[0], here)
    assert parts.correction is not None
    scales = torch.linspace(0.7, 1.2, 6)
    expected, kept = join(parts.residual, here, parts.correction, scales)
    found, also = join(parts.residual.to(GPU), there, parts.correction, scales)
    assert same_bits(found.cpu(), expected)
    assert also.share == pytest.approx(kept.share)


def test_no_difference_at_all(on_gpu: dict[str, int]) -> None:
    weights, factors = batch_of(torch.bfloat16, 3, 40, 24)
    parts = split(weights[1].to(GPU), of(factors, 1).to(GPU))
    assert parts.correction is not None
    assert parts.inexact == 0
    assert same_bits(join(parts.residual, of(factors, 1).to(GPU), parts.correction)[0].cpu(), weights[1])


def test_a_residual_that_is_infinite_is_refused_by_its_number(on_gpu: dict[str, int]) -> None:
    weights, factors = batch_of(torch.float16, 3, 30, 20)
    weights[2] = 6e4
    factors.U[2], factors.V[2] = 30**-0.5, -(20**-0.5)
    factors.s[2] = torch.tensor([(30 * 20) ** 0.5 * 6e4, 0, 0, 0, 0, 0])
    with pytest.raises(ResidualError, match=r"beyond the range of float16(.|\n)*up to 120000\n") as caught:
        split_batch.split_batch(weights.to(GPU), factors.to(GPU))
    assert caught.value.index == 2


def test_damage_is_told_before_the_device_sees_it(on_gpu: dict[str, int]) -> None:
    weights, factors = batch_of(torch.float16, 1, 40, 51, k=4)
    parts = split(weights[0], of(factors, 0))
    assert parts.correction is not None
    correction = parts.correction
    for length in range(0, correction.numel(), 41):
        with pytest.raises(CorruptCorrection):
            join(parts.residual.to(GPU), of(factors, 0).to(GPU), correction[:length])
    refused = 0
    for position in range(0, correction.numel(), 13):
        damaged = correction.clone()
        damaged[position] ^= 0x55
        try:
            assert join(parts.residual.to(GPU), of(factors, 0).to(GPU), damaged)[0].shape == weights[0].shape
        except CorruptCorrection:
            refused += 1
    assert refused > 10


def test_bits_behind_the_last_entry_are_passed_over() -> None:
    """No reader may take them for entries; ours writes zeros there."""
    import struct
    import zlib

    def deflate(data: bytes) -> bytes:
        coder = zlib.compressobj(1, zlib.DEFLATED, -15)
        return coder.compress(data) + coder.flush()

    mask, values = deflate(bytes([0b1111_0101])), deflate(np.array([1, -2], np.int8).tobytes())  # 3 entries, 5 bits behind them
    block = struct.pack("<III", len(mask), len(values), 0) + mask + values
    data = struct.pack("<3Q", 1, 1, len(block)) + block
    reader = CorrectionReader(memoryview(data + bytes(-len(data) % 8)), 1, 3, 2)
    assert reader.units(0)[0].tolist() == [0, 2]
    assert reader.block(0).mask.tolist() == [0b101]
    weight = torch.zeros(1, 3, dtype=torch.bfloat16)
    UploadedCorrection(reader, torch.device("cpu")).correct_(weight, 0)
    assert weight.view(torch.int16).tolist() == [[1, 0, -0x7FFF]]  # -2 from +0: -0, then the smallest below it


def test_what_a_device_is_asked(on_gpu: dict[str, int]) -> None:
    """Once it was 41 operations and 8 waits to split a matrix, 29 and 4 to join a block of it, 11 and 2 more for each other."""
    weights, factors = batch_of(torch.bfloat16, 16, 64, 48)
    there, kept = weights.to(GPU), factors.to(GPU)

    def asked(work: object) -> tuple[int, int]:
        before = dict(on_gpu)
        work()  # type: ignore[operator]
        return on_gpu["launches"] - before["launches"], on_gpu["syncs"] - before["syncs"]

    found: list[list[split_batch.UnencodedParts]] = []
    launches, syncs = asked(lambda: found.append(split_batch.split_batch(there, kept)))
    assert launches <= 16 * 41 / 3
    assert syncs <= 3
    correction = found[0][0].correction()
    assert correction is not None
    residual, own = found[0][0].residual, of(kept, 0)
    launches, syncs = asked(lambda: join(residual, own, correction))
    assert launches <= 42
    assert syncs <= 1
