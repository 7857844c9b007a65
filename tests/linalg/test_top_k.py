"""What is said of values that were not found: the laws of chance against counted draws, and searches with planted values."""

from __future__ import annotations

import math

import pytest
import torch

import surgery
from surgery.linalg import top_k
from surgery.linalg.svd import truncated_svds
from surgery.linalg.top_k import CHANCE, TopK, known, least_projection, norm_with_rest, steps_for, stretch
from surgery.solvers.random import generator_of
from surgery.solvers.search import Decomposed, Search
from tests.models import realistic


def _rows(count: int, b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, b, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "b", "axes"), [(40, 1, 1), (40, 3, 1), (40, 8, 1), (40, 8, 2), (40, 8, 5), (40, 8, 8)])
def test_a_projection_is_below_its_bound_no_more_often_than_said(n: int, b: int, axes: int) -> None:
    draws = 4000
    span = torch.linalg.qr(_rows(draws, b, n).mT)[0]
    least = torch.linalg.svdvals(span[:, :axes])[:, axes - 1].square()
    for chance in (0.3, 0.05, 0.01):
        often = (least < least_projection(b, n, axes, chance)).double().mean().item()
        slack = 4 * math.sqrt(chance / draws)
        assert often <= chance + slack
        if axes == 1 and chance < 0.3:
            assert often >= chance / 4  # and is not made of air


def _krylov(values: torch.Tensor, rows: torch.Tensor, steps: int) -> torch.Tensor:
    """Orthonormal bases (N, b steps, n) of the Krylov spaces of ``diag(values)`` from rows (N, b, n)."""
    basis = torch.linalg.qr(rows.mT)[0].mT
    block = basis
    for _ in range(steps - 1):
        block = block * values
        for _ in range(2):
            block = block - (block @ basis.mT) @ basis
            block = torch.linalg.qr(block.mT)[0].mT
        basis = torch.cat([basis, block], dim=1)
    return basis


def _ritz(values: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Ritz values, descending, (N, dimensions of the bases)."""
    return torch.linalg.eigvalsh((basis * values) @ basis.mT).flip(1)


def _worst(steps: int, count: int) -> torch.Tensor:
    """Values up to 1 that hide one above 1 best: where the Chebyshev polynomial of the bound takes its extrema."""
    angles = (torch.arange(steps, dtype=torch.float64) + 0.5) * math.pi / (2 * steps - 1)
    return angles.cos().square().repeat(-(-count // steps))[:count]


@pytest.mark.parametrize(("b", "steps"), [(1, 2), (1, 4), (1, 6), (2, 4), (3, 3)])
def test_the_largest_value_is_within_what_the_start_rows_tell(b: int, steps: int) -> None:
    """Not by chance: for each draw, whatever the projection of its direction on the start rows is."""
    n, draws, sharpest = 40, 200, 0.0
    for height in (1.05, 1.2, 1.7):
        values = torch.cat([torch.tensor([height**2], dtype=torch.float64), _worst(steps, n - 1)])
        rows = _rows(draws, b, n)
        largest = _ritz(values, _krylov(values, rows, steps))[:, 0]
        shares = torch.linalg.qr(rows.mT)[0][:, 0].square().sum(dim=1)
        for mu, share in zip(largest.tolist(), shares.tolist(), strict=True):
            bound = mu * stretch(Search(b, steps), share, mu) ** 2
            assert height**2 <= bound * (1 + 1e-12)
            sharpest = max(sharpest, height**2 / bound)
    assert sharpest > 0.97  # the next polynomial would be too high


@pytest.mark.parametrize(
    ("b", "steps", "found"),
    [
        (1, 4, []),
        (2, 4, []),
        (1, 8, [4, 2]),
        (1, 12, [3, 2.5, 2]),
        (1, 16, [2, 1.8, 1.6, 1.4]),
        (2, 10, [1.3, 1.15]),
        (2, 15, [5, 4, 3.5, 3, 2.5, 2, 1.7, 1.5, 1.3]),
        (4, 12, [3, 2.7, 2.4, 2.1, 1.8, 1.5, 1.3, 1.2]),
    ],
)
def test_planted_values_are_missed_no_more_often_than_said(b: int, steps: int, found: list[float]) -> None:
    n, draws = 70, 400
    for chance in (0.3, 0.1):
        left = top_k._left(Search(b, steps), len(found), 1) if found else Search(b, steps)
        height = stretch(left, least_projection(b, n, 1, chance), 1.0)
        leading = height**2 * torch.tensor([*found, 1.0], dtype=torch.float64)
        values = torch.cat([leading, _worst(left.steps, n - len(leading))])
        # In S the values are those that were found, and the planted one if it is not missed.
        missed = _ritz(values, _krylov(values, _rows(draws, b, n), steps))[:, len(found)] <= 1 + 1e-9
        assert missed.double().mean().item() <= chance + 4 * math.sqrt(chance / draws)


def test_planted_values_would_be_missed_if_directions_found_took_nothing() -> None:
    """Why steps are taken off for them."""
    n, b, steps, found = 60, 1, 12, [3, 2.5, 2]
    height = stretch(Search(b, steps), least_projection(b, n, 1, 0.3), 1.0)
    leading = height**2 * torch.tensor([*found, 1.0], dtype=torch.float64)
    values = torch.cat([leading, _worst(steps, n - 4)])
    missed = _ritz(values, _krylov(values, _rows(400, b, n), steps))[:, 3] <= 1 + 1e-9
    assert missed.double().mean().item() > 0.35


@pytest.mark.parametrize(("b", "copies"), [(2, 2), (3, 2), (3, 3)])
def test_copies_of_a_value_are_missed_no_more_often_than_said(b: int, copies: int) -> None:
    n, steps, draws = 60, 5, 400
    for chance in (0.3, 0.1):
        height = stretch(Search(b, steps), least_projection(b, n, copies, chance), 1.0)
        values = torch.cat([torch.full((copies,), height**2, dtype=torch.float64), _worst(steps, n - copies)])
        missed = _ritz(values, _krylov(values, _rows(draws, b, n), steps))[:, copies - 1] <= 1 + 1e-9
        assert missed.double().mean().item() <= chance + 4 * math.sqrt(chance / draws)


def _filter(search: Search, x: torch.Tensor) -> torch.Tensor:
    total = x.square()
    for edge, degree in search.filters:
        at = 2 * x / edge - 1
        below = (degree * at.clamp(-1, 1).acos()).cos()
        total = total * torch.where(at.abs() <= 1, below, (degree * at.clamp(min=1).acosh()).cosh())
    return total


@pytest.mark.parametrize(("b", "filters"), [(4, ((0.5, 6),)), (6, ((0.5, 10), (0.6, 6))), (12, ((0.4, 5), (0.7, 9)))])
def test_what_filters_leave_unseen(b: int, filters: tuple[tuple[float, int], ...]) -> None:
    n, draws, found = 60, 400, [2.0, 1.5, 1.3][: b - 3]
    search = Search(b, filters=filters)
    x = torch.linspace(0.01, 1, 2000, dtype=torch.float64)
    worst = x[(_filter(search, x).square() * (1 - x)).argmax()]
    for chance in (0.3, 0.1):
        left = top_k._left(search, len(found), 0)
        height = stretch(left, least_projection(left.rows, n, 1, chance), 1.0)
        assert 1 < height < 1.2
        leading = height**2 * torch.tensor([*found, 1.0], dtype=torch.float64)
        values = torch.cat([leading, worst.repeat(n - len(leading))])
        basis = torch.linalg.qr((_rows(draws, b, n) * _filter(search, values)).mT)[0].mT
        missed = _ritz(values, basis)[:, len(found)] <= 1 + 1e-9
        assert missed.double().mean().item() <= chance + 4 * math.sqrt(chance / draws)


def test_a_verdict_is_given_where_its_margin_says_something() -> None:
    s = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert known(s, 1.02, 0.0) == TopK("proven", pytest.approx(0.01), 0.0)
    assert known(s, 1.02, CHANCE) == TopK("likely", pytest.approx(0.01), CHANCE)
    assert known(s, 0.5, 0.0) == TopK("proven", 0.0, 0.0)
    assert known(s, 1.2, 0.0) == known(s, math.inf, CHANCE) == TopK("unknown", math.inf, 1.0)
    tiny = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert known(tiny, 1e-6, 0.0).verdict == "proven"  # below what anything is known to
    assert known(tiny, 1e-4, 0.0).verdict == "unknown"


def test_what_is_not_random_is_proven_and_what_is_hardly_random_unknown() -> None:
    s = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert top_k.top_k_of(Decomposed(1.01), s, 9, 1e-7) == TopK("proven", pytest.approx(0.005), 0.0)
    assert top_k.top_k_of(Search(8, 1), s, 2, 1e-7) == TopK("proven", 0.0, 0.0)  # there are no others
    assert top_k.top_k_of(Search(8, 1), s, 900, 1e-7).verdict == "unknown"
    assert top_k.top_k_of(Search(8, 20), s, 900, 1e-7).verdict == "likely"
    assert top_k.top_k_of(Search(8, 20), torch.ones(8, dtype=torch.float64), 900, 1e-7).verdict == "unknown"  # copies
    assert top_k.top_k_of(Search(8, 20), s * torch.tensor([1, 1e-5]), 900, 1e-7).verdict == "unknown"  # lost in products


@pytest.mark.parametrize(("norm", "rest"), [(1.0, 1e-3), (1e-3, 1e-3), (0.0, 1.0), (1.0, 0.0)])
def test_the_norm_with_what_triplets_have_left(norm: float, rest: float) -> None:
    blocks = torch.tensor([[rest, rest], [rest, norm]], dtype=torch.float64)
    assert norm_with_rest(norm, rest) == pytest.approx(torch.linalg.matrix_norm(blocks, 2).item())


@pytest.mark.parametrize("share", [1e-2, 1e-7])
def test_as_many_steps_as_a_limit_takes(share: float) -> None:
    steps = steps_for(1.08, share)
    assert stretch(Search(8, steps), share, 1.0) <= 1.08 < stretch(Search(8, steps - 1), share, 1.0)


@pytest.mark.parametrize(
    ("shape", "k", "method"), [((640, 700), 16, "block-lanczos"), ((384, 300), 16, "gram"), ((60, 90), 8, "svd")]
)
def test_natural_matrices(shape: tuple[int, int], k: int, method: str) -> None:
    A = realistic(*shape)
    certificate = surgery.truncated_svd(A, k).certificate
    assert certificate.method == method
    top = certificate.top_k
    assert isinstance(top, TopK)
    truth = torch.linalg.svdvals(A.double())
    assert truth[k] <= truth[k - 1] + top.margin * truth[0]
    assert (top.verdict, top.chance) == (("proven", 0.0) if method == "svd" else ("likely", CHANCE))
    together = truncated_svds(torch.stack([A, torch.zeros_like(A)]), k)
    assert [one.certificate.top_k for one in together] == [top, TopK("proven", 0.0, 0.0)]
    assert surgery.truncated_svd(torch.stack([A, -A]), k).certificate.top_k == (top, top)


def test_the_start_rows_of_a_seed_are_drawn_as_counted() -> None:
    """torch takes 32 bits of a seed: others that differ beyond them are the same."""
    first = torch.randn(9, generator=generator_of(0))
    assert torch.equal(first, torch.randn(9, generator=generator_of(1 << 61)))
    assert not torch.equal(first, torch.randn(9, generator=generator_of(1 << 30)))
