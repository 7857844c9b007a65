"""Nearly best low-rank approximations against a full float64 SVD, and their floor against noise of known kinds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.errors import OptionError, WeightError
from surgery.linalg.low_rank import LowRank, low_rank, low_rank_above_floor, low_rank_bytes, low_rank_of_energy, low_ranks
from surgery.solvers import lanczos, triplets
from tests.measure import measured_peak
from tests.models import realistic

M, N = 600, 640  # above the sizes that go to the Gram matrix


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _orthonormal(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(torch.randn(n, k, generator=generator))[0]
    return basis


def _with_values(values: torch.Tensor, m: int = M, n: int = N, seed: int = 0) -> torch.Tensor:
    generator = _seeded(seed)
    return (_orthonormal(m, len(values), generator) * values) @ _orthonormal(n, len(values), generator).T


def _noise(kind: str, m: int, n: int, seed: int) -> torch.Tensor:
    generator = _seeded(seed)
    noise = torch.randn(m, n, generator=generator)
    if kind == "rows":  # of very different lengths
        return noise * torch.randn(m, 1, generator=generator).exp()
    if kind == "rows and columns":
        return (
            noise * (0.7 * torch.randn(m, 1, generator=generator)).exp() * (0.7 * torch.randn(1, n, generator=generator)).exp()
        )
    if kind == "rounding":  # of weights with outlier columns, tuned a little, to bfloat16
        weights = 0.02 * noise * (0.5 * torch.randn(m, 1, generator=generator)).exp()
        weights[:, torch.randint(n, (3,), generator=generator)] *= 10
        weights = weights.bfloat16().float()
        return (weights + 2e-5 * torch.randn(m, n, generator=generator)).bfloat16().float() - weights
    return noise


def _planted(noise: torch.Tensor, strengths: tuple[float, ...], seed: int) -> torch.Tensor:
    """Noise, and directions of these strengths, in units of its largest singular value."""
    rows = noise if noise.shape[0] <= noise.shape[1] else noise.T
    top = torch.linalg.eigvalsh(rows @ rows.T)[-1].sqrt().item()
    return noise + _with_values(top * torch.tensor(strengths), *noise.shape, seed=seed)


def _ranks(count: int) -> torch.Tensor:
    return torch.arange(1.0, count + 1)


MATRICES: dict[str, Callable[[], torch.Tensor]] = {
    "Gaussian": lambda: _noise("", M, N, 0),
    "planted": lambda: _planted(_noise("", M, N, 0), (30.0, 10.0, 5.0, 3.0, 2.0, 1.3), 1),
    "planted, wide": lambda: _planted(_noise("", M, 1500, 0), (10.0, 3.0, 1.5), 1),
    "rounding": lambda: _planted(_noise("rounding", N, M, 0), (8.0, 3.0, 1.5), 1),
    "rows": lambda: _noise("rows", M, N, 0),
    "weights": lambda: realistic(M, N),
    "power law, flat": lambda: _with_values(_ranks(M) ** -0.1),
    "power law": lambda: _with_values(_ranks(M) ** -0.5),
    "power law, steep": lambda: _with_values(_ranks(M) ** -1.5),
    "geometric": lambda: _with_values(0.97 ** _ranks(M)),
    "geometric, steep": lambda: _with_values(2.0 ** -_ranks(M)),
    "cluster": lambda: _with_values(torch.cat([torch.tensor([1.0, 0.5] + [0.2] * 20), 0.19 * _ranks(M - 22) ** -0.3])),
    "steps": lambda: _with_values(2.0 ** -(_ranks(M) / 20).floor()),
    "rank 5": lambda: _with_values(_ranks(5)),
    "orthogonal": lambda: _with_values(torch.ones(M)),
    "dominant": lambda: _with_values(torch.cat([torch.tensor([1e3]), torch.linspace(1, 0, M - 1)])),
    "identity": lambda: torch.eye(M, N),
    "small": lambda: _planted(_noise("", 200, 300, 0), (3.0, 2.0), 1),
    "smaller": lambda: realistic(24, 40),
}


@cache
def _matrix(name: str) -> torch.Tensor:
    return MATRICES[name]()


@cache
def _values(name: str) -> torch.Tensor:
    """All singular values, float64."""
    return torch.linalg.svdvals(_matrix(name).double())


def _error(A: torch.Tensor, found: LowRank) -> float:
    return (A.double() - (found.U.double() * found.s.double()) @ found.V.double().T).norm().item()


def check(A: torch.Tensor, found: LowRank, truth: torch.Tensor, *, within: float = 1e-5) -> None:
    """All that must hold of an approximation, recomputed in float64; ``truth``: all singular values."""
    k, norm = len(found.s), truth.norm().item()
    rounding = 1e-6 if found.s.dtype == torch.float32 else 1e-12
    for vectors in (found.U, found.V):
        gram = vectors.double().T @ vectors.double()
        assert (gram - torch.eye(k, dtype=torch.float64)).abs().max().item() < 1e-6
    assert bool((found.s[:-1] >= found.s[1:]).all())
    both = torch.cat([found.U, found.V])
    assert bool((both.max(dim=0).values == both.abs().max(dim=0).values).all())
    best = truth[k:].norm().item()
    error = _error(A, found)
    assert error <= (1 + min(within, max(found.excess, 1e-7 if best > 0.01 * norm else within))) * best + rounding * norm
    assert found.error == pytest.approx(error, rel=1e-6, abs=rounding * norm)
    assert found.norm == pytest.approx(norm, rel=1e-6)
    assert found.rule in ("directions", "error")
    assert found.excess == 0 if found.rule == "directions" else found.excess <= 5e-5


@pytest.mark.parametrize("k", [1, 16, 64])
@pytest.mark.parametrize("name", MATRICES)
def test_the_error_is_nearly_the_least(name: str, k: int) -> None:
    A = _matrix(name)
    k = min(k, *A.shape)
    check(A, low_rank(A, k), _values(name))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("k", [3, 40])
def test_other_start_blocks(k: int, seed: int) -> None:
    for name in ("planted", "rounding", "cluster"):
        check(_matrix(name), low_rank(_matrix(name), k, seed=seed), _values(name))


@given(m=st.integers(1, 90), n=st.integers(1, 90), data=st.data(), seed=st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_any_shape_and_rank(m: int, n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    A = _noise("", m, n, seed)
    check(A, low_rank(A, k), torch.linalg.svdvals(A.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    A = (_matrix("planted") / 100).to(dtype)
    found = low_rank(A, 16)
    wide = dtype == torch.float64
    assert {found.U.dtype, found.s.dtype, found.V.dtype} == {torch.float64 if wide else torch.float32}
    check(A, found, torch.linalg.svdvals(A.double()))


@pytest.mark.parametrize("shape", [(M, N), (40, 60)])
@pytest.mark.parametrize("exponent", [-110, 90])
def test_powers_of_two_change_nothing_but_the_values(shape: tuple[int, int], exponent: int) -> None:
    A = _planted(_noise("", *shape, 0), (3.0, 2.0), 1)
    once, scaled = low_rank(A, 8), low_rank(A * 2.0**exponent, 8)
    assert torch.allclose(scaled.s, once.s * 2.0**exponent, rtol=1e-6)
    assert (scaled.above_floor, scaled.rule) == (once.above_floor, once.rule)
    for name in ("norm", "error", "floor"):
        assert getattr(scaled, name) == pytest.approx(math.ldexp(getattr(once, name), exponent), rel=1e-5)


def test_in_a_floor_it_takes_fewer_passes() -> None:
    A = _matrix("planted")
    found, truncated = low_rank(A, 32), surgery.truncated_svd(A, 32)
    assert found.rule == "error"
    assert found.method == truncated.certificate.method == "block-lanczos"
    assert found.passes < truncated.certificate.passes


def test_directions_that_stand_apart_are_those_of_a_truncated_svd() -> None:
    A = _matrix("planted")
    found, truncated = low_rank(A, 32), surgery.truncated_svd(A, 32)
    assert torch.allclose(found.s[:5], truncated.s[:5], rtol=1e-6)
    assert torch.allclose(found.U[:, :5], truncated.U[:, :5], atol=1e-4)
    assert torch.allclose(found.V[:, :5], truncated.V[:, :5], atol=1e-4)


def test_what_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "MAX_PASSES", 10)
    monkeypatch.setattr(triplets, "_MAX_GRAM", 64)
    found = low_rank(_matrix("Gaussian"), 16)
    assert found.rule == "passes"
    best = _values("Gaussian")[16:].norm().item()
    assert _error(_matrix("Gaussian"), found) <= (1 + found.excess) * best
    assert found.excess > 5e-5


def test_a_looser_excess_is_kept_and_cheaper() -> None:
    A, best = _matrix("Gaussian"), _values("Gaussian")[24:].norm().item()
    loose, tight = low_rank(A, 24, excess=2e-4), low_rank(A, 24, excess=1e-6)
    assert loose.passes < tight.passes
    assert _error(A, loose) <= (1 + loose.excess) * best
    assert _error(A, tight) <= (1 + 1e-6) * best


def test_zeros() -> None:
    found = low_rank(torch.zeros(70, 90), 3)
    assert (found.rule, found.method, found.error, found.above_floor) == ("zero", "zero", 0.0, 0)
    assert torch.equal(found.U, torch.eye(70, 3))
    assert low_rank_above_floor(torch.zeros(70, 90), max_rank=5).U.shape == (70, 0)
    assert len(low_rank_of_energy(torch.zeros(70, 90), 0.5, max_rank=5).s) == 1


def test_a_batch_gives_the_bits_of_each_alone_and_the_same_each_time() -> None:
    for shape in ((M, N), (100, 300), (40, 60)):
        batch = torch.stack([_planted(_noise("", *shape, seed), (2.0,), seed) for seed in range(3)] + [torch.zeros(shape)])
        for together, A in zip(low_ranks(batch, 7, seed=3), batch, strict=True):
            alone = low_rank(A, 7, seed=3)
            assert all(torch.equal(getattr(together, name), getattr(alone, name)) for name in ("U", "s", "V"))
            assert (together.error, together.floor, together.excess) == (alone.error, alone.floor, alone.excess)


# The floor


@pytest.mark.parametrize("shape", [(64, 64), (64, 512), (300, 200), (640, 700)])
@pytest.mark.parametrize("kind", ["", "rows", "rows and columns", "rounding"])
def test_noise_alone_is_all_below_the_floor(kind: str, shape: tuple[int, int]) -> None:
    assert sum(low_rank(_noise(kind, *shape, seed), 12).above_floor > 0 for seed in range(5)) == 0


@pytest.mark.parametrize("shape", [(64, 512), (300, 200), (640, 700)])
@pytest.mark.parametrize("kind", ["", "rows", "rows and columns", "rounding"])
def test_what_stands_above_noise_is_counted(kind: str, shape: tuple[int, int]) -> None:
    for seed, strengths in enumerate([(1.3,), (1.3, 1.3, 3.0), (3.0, 3.0), (40.0, 20.0, 3.0)]):
        A = _planted(_noise(kind, *shape, seed), strengths, seed + 9)
        assert low_rank(A, 12).above_floor == len(strengths)


@pytest.mark.parametrize("shape", [(512, 512), (400, 1600)])
def test_the_floor_of_even_noise_is_the_edge_of_marchenko_and_pastur(shape: tuple[int, int]) -> None:
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    for strengths in ((), (5.0, 2.0)):
        found = low_rank(_planted(_noise("", *shape, 3), strengths, 4) if strengths else _noise("", *shape, 3), 12)
        assert found.floor == pytest.approx(edge, rel=0.06)


def test_rounding_is_no_direction() -> None:
    assert low_rank(_matrix("rank 5"), 16).above_floor == 5


def test_as_many_as_stand_above_the_floor() -> None:
    noise = _noise("rounding", 640, 600, 0)
    for count in (0, 3, 40):
        A = _planted(noise, (2.0,) * count, 5) if count else noise
        found = low_rank_above_floor(A, max_rank=100)
        assert (len(found.s), found.above_floor) == (count, count)
        assert found.U.shape == (640, count)
        assert found.error == pytest.approx(_error(A, found), rel=1e-6)
    assert len(low_rank_above_floor(A, max_rank=20).s) == 20


# The energy


@pytest.mark.parametrize("energy", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("name", ["planted", "weights", "small", "power law, steep"])
def test_as_few_as_hold_a_share(name: str, energy: float) -> None:
    A, squares = _matrix(name), _values(name).square()
    found = low_rank_of_energy(A, energy, max_rank=1000)
    assert len(found.s) == int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
    assert (_error(A, found) / found.norm) ** 2 <= 1 - energy + 1e-6
    assert found.error == pytest.approx(_error(A, found), rel=1e-5)


def test_no_more_than_the_largest_rank() -> None:
    assert len(low_rank_of_energy(torch.eye(600), 0.9, max_rank=20).s) == 20


# Limits


def test_arguments_that_make_no_sense() -> None:
    A = torch.ones(4, 5)
    for k, options in (
        (0, {}),
        (5, {}),
        (2, {"excess": 0.0}),
        (2, {"excess": 2.0}),
        (2, {"tolerance": 1e-9}),
        (2, {"seed": -1}),
    ):
        with pytest.raises(OptionError):
            low_rank(A, k, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        low_rank(torch.ones(2, 4, 5), 1)
    with pytest.raises(OptionError):
        low_rank_of_energy(A, 1.5, max_rank=2)
    with pytest.raises(OptionError):
        low_rank_above_floor(A, max_rank=0)
    with pytest.raises(OptionError):
        low_ranks(torch.ones(0, 4, 5), 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(4, 5), (M, N)])
def test_what_is_no_number_is_refused(value: float, shape: tuple[int, int]) -> None:
    A = torch.ones(shape)
    A[2, 3] = value
    with pytest.raises(WeightError):
        low_rank(A, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_memory_than_planned() -> None:
    warm = "from surgery.linalg.low_rank import low_rank; A = torch.randn(4000, 1024).bfloat16(); low_rank(A[:600], 2)"
    before, peak = (measured_peak(call, threads=1) for call in (warm, f"{warm}; low_rank(A, 16)"))
    assert peak - before <= low_rank_bytes(4000, 1024, 16, torch.bfloat16)
