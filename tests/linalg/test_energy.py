"""Ranks chosen by energy, against the values of a full float64 SVD."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.commands.factorize import plan
from surgery.errors import OptionError, WeightError
from tests.models import files_of, realistic


def _least_rank(A: torch.Tensor, energy: float) -> int:
    squares = torch.linalg.svdvals(A.double()).square()
    return int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1


@pytest.mark.parametrize("energy", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("shape", [(90, 70), (200, 640), (700, 650)])
def test_the_least_rank_that_is_enough(shape: tuple[int, int], energy: float) -> None:
    A = realistic(*shape)
    result = surgery.energy_svd(A, energy, max_rank=1000)
    assert len(result.s) == _least_rank(A, energy)
    assert bool(result.certificate.converged)
    assert result.U.shape == (shape[0], len(result.s))
    assert len(result.certificate.residual) == len(result.certificate.gap) == len(result.s)
    truth = torch.linalg.svdvals(A.double())[: len(result.s)]
    assert torch.allclose(result.s.double(), truth, atol=1e-6 * truth[0].item(), rtol=0)


@given(m=st.integers(2, 60), n=st.integers(2, 60), energy=st.floats(0.01, 0.999), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_any_shape_and_share(m: int, n: int, energy: float, seed: int) -> None:
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    k = len(surgery.energy_svd(A, energy, max_rank=100).s)
    shares = torch.linalg.svdvals(A.double()).square().cumsum(0) / A.double().square().sum()
    assert shares[k - 1].item() >= energy - 1e-6
    assert k == 1 or shares[k - 2].item() < energy + 1e-6


def test_no_more_than_the_largest_rank() -> None:
    assert len(surgery.energy_svd(torch.eye(600), 0.9, max_rank=20).s) == 20
    assert len(surgery.energy_svd(torch.zeros(30, 40), 0.9, max_rank=20).s) == 1


@pytest.mark.parametrize("seed", range(8))
def test_all_of_a_matrix_of_few_entries(seed: int) -> None:
    A = torch.zeros(70, 90)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(70, (5,), generator=generator)
    A[rows] = torch.randn(5, 90, generator=generator)
    kept = surgery.energy_svd(A, 1.0, max_rank=64).s.double()
    assert kept.square().sum().item() == pytest.approx(A.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize(("energy", "max_rank"), [(0.0, 4), (1.5, 4), (float("nan"), 4), (0.5, 0)])
def test_shares_and_limits_that_make_no_sense(energy: float, max_rank: int) -> None:
    with pytest.raises(OptionError):
        surgery.energy_svd(torch.ones(4, 5), energy, max_rank=max_rank)


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(WeightError):
        surgery.energy_svd(torch.full((4, 5), float("nan")), 0.5, max_rank=2)


def test_a_model_by_energy(llama: Path, tmp_path: Path) -> None:
    steps = plan(llama, energy=0.5, max_rank=12)
    assert {target.rank for target in steps.targets} == {12}
    manifest = surgery.factorize(llama, tmp_path / "out", energy=0.5, max_rank=12, device="cpu").manifest
    assert (manifest.options.energy, manifest.options.rank, manifest.options.max_rank) == (0.5, None, 12)
    assert len({target.rank for target in manifest.targets}) > 1
    assert all(target.energy >= 0.5 or target.rank == 12 for target in manifest.targets)
    assert all(target.rank <= 12 for target in manifest.targets)
    report = surgery.fold(tmp_path / "out", tmp_path / "out/surgery/scales.safetensors", tmp_path / "back", device="cpu")
    assert report.restored
    assert files_of(tmp_path / "back") == files_of(llama)


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 4, "energy": 0.5}, "contradict"), ({"max_rank": 4}, "goes with an energy")]
)
def test_options_that_contradict_each_other(llama: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan(llama, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("A", "energy", "rank"),
    [
        (torch.diag(torch.tensor([1.0] * 5 + [0.0] * 95)), 1.0, 5),
        (torch.full((600, 600), 0.3), 1.0, 1),
        (torch.full((65, 70000), 0.3), 0.99995, 1),
        (torch.eye(640), 0.5, 320),
        (torch.zeros(60, 70), 0.5, 1),
    ],
)
def test_rounding_asks_for_no_more(A: torch.Tensor, energy: float, rank: int) -> None:
    assert len(surgery.energy_svd(A, energy, max_rank=640).s) == rank


@pytest.mark.parametrize("scale", [1e-200, 1e-165, 1e160, 1e300])
def test_squares_that_float64_cannot_hold(scale: float) -> None:
    A = torch.randn(100, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert len(surgery.energy_svd(A * scale, 0.3, max_rank=100).s) == len(surgery.energy_svd(A, 0.3, max_rank=100).s)


@pytest.mark.parametrize(("short", "prove"), [(60, False), (300, True)])
def test_values_that_are_left_out_may_be_as_large_as_the_last_that_is_kept(short: int, prove: bool) -> None:
    """Twelve equal values, of which four are kept: that the others are no larger is known up to rounding, and no further."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, short, dtype=torch.float64))[0] for n in (short, short + 20))
    s = torch.cat([torch.ones(12, dtype=torch.float64), torch.linspace(0.3, 0, short - 12, dtype=torch.float64)])
    A = ((left * s) @ right.T).float()
    result = surgery.energy_svd(A, (4 / s.square().sum()).item() - 1e-3, max_rank=short, prove=prove)
    top, kept = result.certificate.top_k, result.s.double()
    assert isinstance(top, surgery.TopK)
    assert (len(kept), top.verdict) == (4, "proven")
    # Above zero whatever the rounding happens to be here, and no more than that of float32.
    assert 0 < top.margin < 1e-5
    assert torch.linalg.svdvals(A.double())[4].item() <= kept[-1].item() + top.margin * kept[0].item()
