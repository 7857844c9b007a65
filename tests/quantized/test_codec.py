"""Scales that are kept or renewed, at the ends of their dtypes, and the nearest numbers, by trying all."""

from __future__ import annotations

import itertools

import pytest
import torch

from surgery.errors import FormatError, WeightError
from surgery.quantized.codec import Codec, Parts, Role
from surgery.quantized.elements import E2M1, E4M3, Elements, Integers
from surgery.quantized.weight import StoredPart

_ELEMENTS: dict[str, Elements] = {
    "e4m3": E4M3,
    "e2m1": E2M1(),
    "int4": Integers(4, packed=True),
    "int8": Integers(8, packed=True),
    "int8 plain": Integers(8, packed=False),
}
_EVERY = {
    "e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double(),
    "e2m1": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64),
    "int4": torch.arange(-8, 8).double(),
    "int8": torch.arange(-128, 128).double(),
    "int8 plain": torch.arange(-128, 128).double(),
}


def _distance(x: torch.Tensor, kind: str) -> torch.Tensor:
    """How far the nearest number is from each, float64."""
    every = _EVERY[kind]
    return (x.double()[..., None] - every[~every.isnan()]).abs().amin(-1)


@pytest.mark.parametrize("kind", _ELEMENTS)
def test_nearest_numbers(kind: str) -> None:
    """Of random numbers, of all numbers themselves, of what lies in the middle of two, and beyond the ends."""
    elements, every = _ELEMENTS[kind], _EVERY[kind]
    every = every[~every.isnan()].sort().values
    middle = (every[1:] + every[:-1]) / 2
    random = torch.randn(997, generator=torch.Generator().manual_seed(0)).double() * every.max() / 2
    x = torch.cat([every, middle, random, torch.tensor([1e30, -1e30, 1e-30, -1e-30, -0.0, 0.0])]).float()
    x = x[: len(x) // 8 * 8].view(1, -1)
    rounded = elements.round_(x.clone())
    assert torch.equal((rounded.double() - x.double()).abs(), _distance(x, kind))
    stored = elements.stored(x.clone())
    assert torch.equal(elements.values(stored, x.shape[-1]), rounded)
    if kind.startswith("e"):
        assert torch.equal(elements.values(stored, x.shape[-1]).signbit(), x.signbit())


def test_nan_stays_nan() -> None:
    stored = torch.tensor([[0x7F, 0xFF, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert E4M3.values(stored, 3).isnan().tolist() == [[True, True, False]]


_BLOCKS = [(1, 16), (16, 1), (7, 5), (1, 10**6), (10**6, 10**6), (10**6, 1), (1, 1)]
_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn]


def _block(block: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    return min(block[0], shape[-2]), min(block[1], shape[-1])


@pytest.mark.parametrize("kind", _ELEMENTS)
@pytest.mark.parametrize("shape", [(24, 32), (2, 9, 24)])
@pytest.mark.parametrize("turned", ["", "transposed", "columnwise"])
def test_each_number_is_the_nearest(kind: str, shape: tuple[int, ...], turned: str) -> None:
    """With fresh scales of each dtype and block; and what the grid gives is stored exactly."""
    if turned and len(shape) == 3:  # what lies together is of a column
        shape = (2, 8, 24)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-2, 1, shape[-1])
    for block, dtype in zip(_BLOCKS, itertools.cycle(_DTYPES), strict=False):
        codec = Codec(
            _ELEMENTS[kind], _block(block, shape), "w", transposed=turned == "transposed", columnwise=turned == "columnwise"
        )
        grid = codec.grid_of(shape)
        stored_grid = (*grid[:-2], grid[-1], grid[-2]) if turned else grid
        old: Parts = {"scale": torch.full(stored_grid, 2.0**-9).to(dtype)}  # which holds next to nothing
        if turned == "columnwise":
            old = {"scale": torch.full(grid, 2.0**-9).to(dtype)}
        parts = codec.parts_that_hold(codec.extremes(weight, old), old)
        scale = parts["scale"].float().double()
        scale = scale.mT if turned == "transposed" else scale
        m, n = shape[-2:]
        each = scale[..., (torch.arange(m) // codec.block[0])[:, None], (torch.arange(n) // codec.block[1])[None, :]]
        stored = codec.quantize(weight, parts)
        found = codec.dequantize(stored, parts, shape)
        error = (found.double() - weight.double()).abs()
        assert bool((error <= _distance(weight.double() / each, kind) * each + 2.0**-22 * weight.abs().double()).all())
        # No scale is so small that the largest number is farther off than others can be.
        elements = _ELEMENTS[kind]
        assert bool((weight.abs() <= each * max(elements.high_held, -elements.low_held) * (1 + 1e-6)).all())
        matrices = zip(weight.view(-1, m, n), found.view(-1, m, n), strict=True)
        for i, (one, nearest) in enumerate(matrices):
            of_one = {"scale": parts["scale"][i] if len(shape) == 3 else parts["scale"]}
            for rows in (slice(0, m), slice(3, 7), torch.tensor([5, 1, 1, 0])):
                assert torch.equal(codec.grid(of_one, (m, n)).nearest(one[rows].clone(), rows), nearest[rows])


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("kind", _ELEMENTS)
def test_scales_are_kept_where_they_hold(kind: str, dtype: torch.dtype) -> None:
    codec = Codec(_ELEMENTS[kind], (1, 8), "w")
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    parts: Parts = {"scale": torch.full((16, 4), 2.0**-9).to(dtype)}
    parts = codec.parts_that_hold(codec.extremes(weight, parts), parts)
    stored = codec.dequantize(codec.quantize(weight, parts), parts, (16, 32))
    again = codec.parts_that_hold(codec.extremes(stored, parts), parts)
    assert torch.equal(again["scale"].float(), parts["scale"].float())
    grown = stored.clone()
    grown[3, 8:16] *= 2.5
    new = codec.parts_that_hold(codec.extremes(grown, parts), parts)["scale"].float()
    others = torch.ones(16, 4, dtype=torch.bool)
    others[3, 1] = False
    assert torch.equal(new[others], parts["scale"].float()[others])
    assert new[3, 1] > parts["scale"].float()[3, 1]


@pytest.mark.parametrize("scale", [torch.float8_e4m3fn, torch.float16])
def test_scales_at_the_lower_end_of_their_dtype(scale: torch.dtype) -> None:
    """Near zero the numbers of a dtype lie far apart: the next larger one is taken, never 0 for what is not 0."""
    smallest = torch.tensor([1], dtype={1: torch.uint8, 2: torch.int16}[scale.itemsize]).view(scale).float().item()
    codec = Codec(E2M1(), (1, 4), "w", divides=True)
    weight = smallest * 6 * torch.tensor([[0.01], [0.3], [0.9], [1.2], [1.4], [1.6], [0.0]]).expand(7, 4)
    parts: Parts = {"scale": torch.zeros(7, 1).to(scale), "global_scale": torch.ones(1)}
    new = codec.parts_that_hold(codec.extremes(weight, parts), parts)
    assert (new["scale"].float() / smallest).flatten().tolist()[:-1] == [1, 1, 1, 2, 2, 2]
    assert new["scale"].float()[-1] == 0  # holds what it is
    found = codec.dequantize(codec.quantize(weight, new), new, (7, 4))
    assert bool(((found - weight).abs() <= new["scale"].float()).all())


@pytest.mark.parametrize(("scale", "size"), [(torch.float8_e4m3fn, 448.0), (torch.float16, 65504.0)])
def test_scales_at_the_upper_end_of_their_dtype(scale: torch.dtype, size: float) -> None:
    """Up to twice what the largest scale holds it gives that, which is 6 times the scale; beyond, the weight is named."""
    codec = Codec(E2M1(), (1, 4), "layers.0.up.weight")
    parts: Parts = {"scale": torch.ones(1, 1).to(scale), "global_scale": torch.tensor(0.5)}
    for times in (3.4, 5.9):
        weight = torch.full((1, 4), times * size)
        new = codec.parts_that_hold(codec.extremes(weight, parts), parts)
        assert new["scale"].float().item() == size
        assert codec.dequantize(codec.quantize(weight, new), new, (1, 4)).tolist() == [[3 * size] * 4]
    with pytest.raises(WeightError, match=r"layers.0.up.weight: the update is too large"):
        codec.parts_that_hold(codec.extremes(weight * 1.1, parts), parts)


def test_zero_scales_and_zeros() -> None:
    """A scale of 0 holds zeros; it is renewed for anything else. Of zeros a fresh scale is 1."""
    codec = Codec(E4M3, (1, 4), "w")
    parts: Parts = {"scale": torch.tensor([[0.0], [0.0], [1e-30]])}
    weight = torch.tensor([[0.0, -0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    new = codec.parts_that_hold(codec.extremes(weight, parts), parts)
    assert new["scale"].flatten().tolist() == [0.0, pytest.approx(1 / 448), pytest.approx(1e-30)]
    stored = codec.quantize(weight, new)
    assert torch.equal(codec.dequantize(stored, new, (3, 4)).abs(), weight.abs())
    assert stored.view(torch.uint8)[0].tolist() == [0, 128, 0, 0]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points(bits: int, packed: bool) -> None:
    """Fresh ones let a block of one sign use all numbers; each entry is within half a step."""
    codec = Codec(Integers(bits, packed), (1, 8), "w")
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(16, 32, generator=generator) * torch.tensor([1.0, -1.0]).repeat(8)[:, None] + 0.1
    parts: Parts = {"scale": torch.full((16, 4), 1e-6), "zero_point": torch.zeros(16, 4, dtype=torch.int8)}
    new = codec.parts_that_hold(codec.extremes(weight, parts), parts)
    assert new["zero_point"].unique().numel() > 1
    step = new["scale"].repeat_interleave(8, 1)
    found = codec.dequantize(codec.quantize(weight, new), new, (16, 32))
    assert bool(((found - weight).abs() <= 0.5001 * step).all())
    assert bool((step <= 1.21 / (2**bits - 1)).all())  # zero is among the numbers too
    again = codec.parts_that_hold(codec.extremes(found, new), new)
    assert all(torch.equal(again[role], new[role]) for role in new)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(37, 5), (3, 32, 2), (1, 1)])
def test_packed_zero_points(bits: int, shape: tuple[int, ...]) -> None:
    part = StoredPart("zero_point", "z", "f", storage="packed rows", rows=shape[-2], bits=bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    numbers = torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(4))
    stored = part.stored(numbers)
    assert (stored.dtype, stored.shape) == (torch.int32, (*shape[:-2], -(-shape[-2] * bits // 32), shape[-1]))
    assert torch.equal(part.numbers(stored), numbers)
    # From the lowest bits on, with an offset.
    assert (int(stored[..., 0, 0].flatten()[0]) & (2**bits - 1)) + low == int(numbers[..., 0, 0].flatten()[0])


def _ordered(group: list[int]) -> tuple[Codec, dict[Role, torch.Tensor]]:
    return Codec(Integers(4, packed=True), (1, 4), "w"), {
        "scale": torch.tensor([[1.0, 10.0]]),
        "group_index": torch.tensor(group, dtype=torch.int32),
    }


def test_groups_of_columns() -> None:
    codec, parts = _ordered([1, 0, 1, 0, 0, 1, 1, 0])
    stored = codec.quantize(torch.tensor([[10.0, 2.0, 30.0, 4.0, 5.0, 60.0, 70.0, -8.0]]), parts)
    assert codec.dequantize(stored, parts, (1, 8)).tolist() == [[10.0, 2.0, 30.0, 4.0, 5.0, 60.0, 70.0, -8.0]]
    # compressed-tensors: any -1 stands for columns in order.
    codec, parts = _ordered([-1] * 8)
    assert codec.dequantize(stored, parts, (1, 8)).tolist() == [[1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0, -80.0]]


@pytest.mark.parametrize("group", [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 2, 2, 2, 2], [7] * 8, [2**31 - 1] * 8])
def test_groups_of_columns_that_make_no_sense(group: list[int]) -> None:
    codec, parts = _ordered(group)
    with pytest.raises(FormatError, match="w: the groups of its columns make no sense"):
        codec.dequantize(torch.zeros(1, 1, dtype=torch.int32), parts, (1, 8))
