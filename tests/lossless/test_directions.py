"""Rounding that keeps the directions of an update, against float64 sums of what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from surgery.lossless.factors import Addition, Factors, both
from surgery.lossless.grids import DtypeGrid, Grid
from surgery.lossless.join import join
from surgery.lossless.kept import Kept
from surgery.lossless.split import split
from surgery.lossless.update import NEAREST, Written, approximate, rescale
from surgery.names import TRAINS, Train
from tests.quantized.codecs import CODECS, stored
from tests.quantized.fp8 import block_scales, dequantize, quantize, scales_that_hold
from tests.quantized.fp8 import grid as fp8_grid

DIRECTIONS = Written(rounding="directions")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _spectrum(m: int, n: int, seed: int) -> torch.Tensor:
    """A power law over a bulk, as weights have it, float64 with a standard deviation of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, min(m, n), generator=generator, dtype=torch.float64))[0] for size in (m, n)
    )
    i = torch.arange(1, min(m, n) + 1).double()
    weight: torch.Tensor = (left * (8 * i**-0.7 + 0.55 * (1 - i / (len(i) + 1)) ** 0.5)) @ right.T
    return weight.mul_(0.02 / weight.std())


def _stored(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    """A weight on the grid of a format."""
    m, n = weight.shape
    single = weight.float()
    if kind in CODECS:
        codec, parts, numbers = stored(kind, single)
        return numbers, codec.grid(parts, (m, n))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[kind]
    return single.to(dtype), DtypeGrid(dtype)


def _trained(weight: torch.Tensor, k: int, size: float, seed: int, train: Train = "scales") -> tuple[Factors, torch.Tensor]:
    """Its strongest directions, and scales that differ from 1 by about ``size``, both ways, or a core that does as much."""
    u, s, vt = torch.linalg.svd(weight.float())
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (k,), generator=generator) * 2 - 1
    trained = 1 + size * signs * (1 + 0.3 * torch.randn(k, generator=generator))
    if train == "core":
        trained = torch.eye(k) + size / k**0.5 * torch.randn(k, k, generator=generator)
    return Factors(u[:, :k].contiguous(), s[:k].clone(), vt[:k].T.contiguous()), trained


def _change(factors: Factors, trained: torch.Tensor) -> torch.Tensor:
    root = factors.s.double().sqrt()
    core = torch.diag(trained) if trained.ndim == 1 else trained
    inner = root[:, None] * (core.double() - torch.eye(len(root), dtype=torch.float64)) * root
    return factors.U.double() @ inner @ factors.V.double().T


def _truth(weight: torch.Tensor, result: torch.Tensor, change: torch.Tensor, factors: Factors) -> tuple[float, float]:
    """The share that has arrived, and the error within the directions, of all the numbers in float64."""
    arrived = result.double() - weight.double()
    left, right = factors.U.double(), factors.V.double()
    missed = left.T @ (arrived - change) @ right
    return ((arrived * change).sum() / change.square().sum()).item(), (missed.norm() / change.norm()).item()


def _tells_the_truth(kept: Kept, share: float, error: float) -> None:
    assert kept.share == pytest.approx(share, abs=2e-3)
    assert kept.error == pytest.approx(error, abs=2e-3)


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize(
    ("kind", "size", "nearest_keeps", "most"),
    [
        ("fp8", 0.003, 0.1, 0.01),
        ("fp8", 0.01, 0.3, 0.01),
        ("fp8", 0.03, 0.7, 0.01),
        ("bfloat16", 5e-4, 0.2, 0.01),
        ("bfloat16", 1e-3, 0.4, 0.01),
        ("bfloat16", 3e-3, 0.9, 0.01),
        ("float16", 1e-4, 0.4, 0.01),
        ("int4", 0.01, 0.01, 0.035),  # 5,000 entries move, which have to be right in 256 numbers
        ("int4", 0.03, 0.01, 0.02),
        ("int4", 0.1, 0.5, 0.01),
        ("int8", 0.01, 0.5, 0.01),
        ("mxfp4", 0.03, 0.01, 0.01),
        ("nvfp4", 0.03, 0.01, 0.01),
    ],
)
def test_what_was_trained_arrives(kind: str, size: float, nearest_keeps: float, most: float, train: Train) -> None:
    weight, grid = _stored(kind, _spectrum(768, 1024, 0))
    factors, g = _trained(weight, 16, size, 0, train)
    change = _change(factors, g)
    exact = weight.double() + change
    nearest = grid.nearest(exact.float(), slice(0, 768)).double()
    assert _truth(weight, nearest, change, factors)[0] < nearest_keeps
    result, kept = rescale(weight.clone(), factors, g, None, replace(DIRECTIONS, grid=grid))
    assert torch.equal(grid.nearest(result.float(), slice(0, 768)), result.float())  # it is on the grid
    share, error = _truth(weight, result, change, factors)
    assert abs(share - 1) <= 0.01
    assert error < most
    _tells_the_truth(kept, share, error)
    # It costs some distance to the exact weight, much less than the format does.
    assert (result.double() - exact).norm() < 4.5 * (nearest - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", TRAINS)
def test_what_nearest_keeps_is_told(dtype: torch.dtype, train: Train) -> None:
    weight = _spectrum(300, 260, 1).to(dtype)
    factors, g = _trained(weight, 8, 1e-3, 1, train)
    addition = Addition(1e-3 * _random(300, 2, seed=1), _random(260, 2, seed=2))
    change = _change(factors, g) + addition.left.double() @ addition.right.double().T
    parts = split(weight, factors)
    assert parts.correction is not None
    for result, kept in (
        rescale(weight, factors, g, addition),
        join(parts.residual, factors, parts.correction, g, addition),
        approximate(parts.residual, factors, g, addition),
    ):
        arrived = ((result.double() - weight.double()) * change).sum() / change.square().sum()
        assert kept.share == pytest.approx(arrived.item(), abs=5e-3)
        assert kept.asked == pytest.approx(change.square().sum().item(), rel=1e-6)
        assert kept.error is None


@pytest.mark.parametrize("train", TRAINS)
def test_all_kinds_of_stored_weights_keep_it(train: Train) -> None:
    weight = _spectrum(300, 260, 2).bfloat16()
    factors, g = _trained(weight, 8, 1e-3, 2, train)
    parts = split(weight, factors)
    assert parts.correction is not None
    expected, _ = rescale(weight, factors, g, None, DIRECTIONS)
    joined, kept = join(parts.residual, factors, parts.correction, g, None, DIRECTIONS)
    assert torch.equal(joined, expected)
    _tells_the_truth(kept, *_truth(weight, joined, _change(factors, g), factors))
    approximated, _ = approximate(parts.residual, factors, g, None, DIRECTIONS)
    before, _ = approximate(parts.residual, factors)
    assert _truth(before, approximated, _change(factors, g), factors)[0] == pytest.approx(1, abs=0.02)
    for written in (DIRECTIONS, NEAREST):  # nothing is asked
        result, kept = join(parts.residual, factors, parts.correction, None, None, written)
        assert torch.equal(result, weight)
        assert (kept.asked, kept.share, kept.error) == (0, 1, 0)


def test_nearest_where_that_suffices() -> None:
    weight = _spectrum(300, 260, 3).bfloat16()
    decided = Written(rounding=None)
    for size, same in ((0.05, True), (1e-3, False)):
        factors, g = _trained(weight, 8, size, 3)
        result, kept = rescale(weight, factors, g, None, decided)
        assert torch.equal(result, rescale(weight, factors, g)[0]) is same
        assert kept.share == pytest.approx(1, abs=0.01)
    single, g = weight.float(), torch.full((8,), 1 + 1e-4)
    assert torch.equal(rescale(single, factors, g, None, DIRECTIONS)[0], rescale(single, factors, g)[0])


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_threads_do_not_change_the_bytes(kind: str, train: Train) -> None:
    weight, grid = _stored(kind, _spectrum(700, 900, 4))
    factors, g = _trained(weight, 16, 1e-3, 4, train)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = weight.clone()
            results.append(rescale(again, factors, g, None, Written(again, "directions", grid)))
            assert results[-1][0] is again
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0][0]) and kept == results[0][1] for result, kept in results[1:])


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (17, 40), (200, 24)])
def test_as_many_directions_as_rows_or_columns(shape: tuple[int, int], train: Train) -> None:
    weight = (0.02 * _random(*shape, seed=5)).bfloat16()
    for k in {1, min(shape)}:
        factors, g = _trained(weight, k, 2e-3, 5, train)
        result, kept = rescale(weight, factors, g, None, DIRECTIONS)
        share, error = _truth(weight, result, _change(factors, g), factors)
        _tells_the_truth(kept, share, error)
        nearest = rescale(weight, factors, g)[0]
        assert error <= 1.01 * _truth(weight, nearest, _change(factors, g), factors)[1]


def test_rows_without_an_update_zeros_and_subnormals_stay() -> None:
    weight = _spectrum(256, 320, 6).bfloat16()
    weight[:64] = 0
    weight[64:96] = (weight[64:96].float() * 1e-37).bfloat16()
    addition = Addition(3e-5 * _random(256, 4, seed=6), _random(320, 4, seed=7))
    addition.left[128:] = 0
    result, kept = rescale(weight, None, None, addition, DIRECTIONS)
    assert torch.equal(result[128:], weight[128:])
    assert bool(torch.isfinite(result).all())
    change = addition.left.double() @ addition.right.double().T
    arrived = ((result.double() - weight.double()) * change).sum() / change.square().sum()
    assert arrived.item() == pytest.approx(1, abs=0.01)
    assert kept.share == pytest.approx(arrived.item(), abs=2e-3)
    nothing = replace(addition, left=torch.zeros_like(addition.left))
    assert torch.equal(rescale(weight, None, None, nothing, DIRECTIONS)[0], weight)


@pytest.mark.parametrize("g", [-2.0, 0.0, 50.0])
def test_large_scales(g: float) -> None:
    weight = _spectrum(200, 160, 7).bfloat16()
    factors, _ = _trained(weight, 4, 0, 7)
    scales = torch.full((4,), g)
    result, kept = rescale(weight, factors, scales, None, DIRECTIONS)
    share, error = _truth(weight, result, _change(factors, scales), factors)
    assert share == pytest.approx(1, abs=1e-3)
    _tells_the_truth(kept, share, error)


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize(
    ("kind", "core"),
    [
        ("all the same", lambda k: torch.eye(k) + 2.0**-7),
        ("one row", lambda k: torch.eye(k) + 2.0**-7 * torch.nn.functional.one_hot(torch.tensor(k - 1), k)[:, None]),
        ("one column", lambda k: torch.eye(k) + 2.0**-7 * torch.nn.functional.one_hot(torch.tensor(0), k)),
        (
            "one entry beside the diagonal",
            lambda k: torch.eye(k).index_put_((torch.tensor(0), torch.tensor(1)), torch.tensor(0.01)),
        ),
        ("a turn", lambda k: torch.matrix_exp(0.01 * (torch.ones(k, k).triu(1) - torch.ones(k, k).tril(-1)))),
    ],
)
@pytest.mark.parametrize("is_even", [True, False])
def test_cores_of_few_numbers(is_even: bool, kind: str, core: Callable[[int], torch.Tensor], k: int) -> None:
    """Where few rows have all of the update as well."""
    weight = _spectrum(300, 260, 12)
    weight[: 300 if is_even else 6] *= 40
    weight = weight.bfloat16()
    factors, _ = _trained(weight, k, 0, 12)
    factors.s.fill_(factors.s[0])  # so that the update is as regular as the core
    change = _change(factors, core(k))
    result, kept = rescale(weight, factors, core(k), None, DIRECTIONS)
    moved = core(k) != torch.eye(k)
    some = moved.any(dim=0) | moved.any(dim=1)  # the directions that the update has
    within = Factors(factors.U[:, some], factors.s[some], factors.V[:, some])
    share, error = _truth(weight, result, change, within)
    _tells_the_truth(kept, share, error)
    assert abs(share - 1) < 0.01, kind
    assert error < (0.01 if is_even else 0.05), kind


def test_the_update_of_two_rounds_the_same_as_their_sum() -> None:
    weight = _spectrum(200, 160, 8).bfloat16()
    one, other = (Addition(1e-5 * _random(200, 3, seed=seed), _random(160, 3, seed=seed + 1)) for seed in (1, 3))
    change = one.left.double() @ one.right.double().T + other.left.double() @ other.right.double().T
    result, kept = rescale(weight, None, None, both(one, other), DIRECTIONS)
    arrived = ((result.double() - weight.double()) * change).sum() / change.square().sum()
    assert kept.share == pytest.approx(arrived.item(), abs=2e-3)
    assert arrived.item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("written", [NEAREST, DIRECTIONS])
def test_a_factor_of_the_weight(by_rows: bool, written: Written) -> None:
    weight = _spectrum(300, 260, 9).bfloat16()
    factor = 1 + 1e-3 * _random(*((300, 1) if by_rows else (1, 260)), seed=9).double()
    addition = Addition(2e-6 * _random(300, 4, seed=1), _random(260, 4, seed=2), factor)
    exact = weight.double() * factor + addition.left.double() @ addition.right.double().T
    result, kept = rescale(weight, None, None, addition, written)
    change, arrived = exact - weight.double(), result.double() - weight.double()
    assert kept.asked == pytest.approx(change.square().sum().item(), rel=2e-3)
    assert kept.share == pytest.approx(((arrived * change).sum() / change.square().sum()).item(), abs=5e-3)
    left, right = (torch.linalg.qr(side.double())[0] for side in (addition.left, addition.right))
    error = ((left.T @ (result.double() - exact) @ right).norm() / (left.T @ change @ right).norm()).item()
    if written is NEAREST:
        assert bool(((result.double() - exact).abs() <= exact.abs() * 2.0**-8).all())  # half a unit in the last place
        assert error > 0.05
    else:
        assert error < 0.02
        assert kept.error == pytest.approx(error, abs=5e-3)
    summed = both(addition, replace(addition, factor=None)), both(addition, addition)
    assert torch.equal(summed[0].factor if summed[0].factor is not None else torch.empty(0), factor)
    assert torch.allclose(summed[1].factor if summed[1].factor is not None else torch.empty(0), 2 * factor - 1)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_fp8_numbers_of_the_grid_are_quantized_exactly(powers_of_two: bool) -> None:
    block, (m, n) = (32, 48), (100, 130)
    weight = _spectrum(m, n, 10).float()
    weight[:40, :50] = 0
    like = torch.empty(4, 3).to(torch.float8_e8m0fnu if powers_of_two else torch.float32)
    scale = block_scales(weight, block, like)
    grid = fp8_grid(scale, block, (m, n))
    for rows in (slice(0, m), slice(17, 70), torch.tensor([3, 31, 32, 99])):
        x = 1.5 * weight[rows]
        spread = scale.float().repeat_interleave(32, 0)[:m].repeat_interleave(48, 1)[:, :n][rows]
        expected = (x / spread).clamp(-448, 448).to(torch.float8_e4m3fn).float() * spread
        assert torch.equal(grid.nearest(x.clone(), rows).view(torch.int32), expected.view(torch.int32))
    stored = dequantize(quantize(weight, scale, block), scale, block)
    factors, g = _trained(stored, 4, 0.01, 10)
    result, _ = rescale(stored, factors, g, None, replace(DIRECTIONS, grid=grid))
    assert torch.equal(dequantize(quantize(result, scale, block), scale, block), result)


def test_all_numbers_and_ties_of_fp8() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[torch.isfinite(numbers)].sort().values
    between = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([464.0, 500.0, -1e30, 1e-30])])
    x = torch.cat(
        [between, torch.nextafter(between, torch.tensor(torch.inf)), torch.nextafter(between, -torch.tensor(torch.inf))]
    )
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    got = fp8_grid(torch.ones(1), (1, len(x)), (1, len(x))).nearest(x[None].clone(), slice(0, 1))[0]
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_stay_while_they_hold_their_block(dtype: torch.dtype) -> None:
    weight = _spectrum(64, 96, 11).float()
    scale = block_scales(weight, (32, 32), torch.empty(2, 3).to(dtype))
    changed = weight.clone()
    changed[:32, :32] *= 3
    changed[32:, 64:] *= 0.5
    kept = scales_that_hold(changed, (32, 32), scale)
    assert kept.dtype == dtype
    fresh = block_scales(changed, (32, 32), scale)
    assert kept[0, 0].float() == fresh[0, 0].float() != scale[0, 0].float()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 0] = False
    assert torch.equal(kept.float()[others], scale.float()[others])
    assert float(kept[1, 2].float()) != float(fresh[1, 2].float())  # smaller entries need no other scale
