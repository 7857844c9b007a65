"""Solvers on a GPU: how often they wait for it, how much they launch, and that noise is found nevertheless."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from surgery.linalg.preparation import prepared
from surgery.linalg.svd import truncated_svds
from surgery.precision import full_precision
from surgery.solvers.deferred import DeferredBasis
from surgery.solvers.lanczos import krylov_basis
from surgery.solvers.operator import Operator
from tests.linalg.test_svd import MATRICES, check
from tests.models import realistic
from tests.pretend_gpu import GPU, pretend_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

BLOCK, LIMIT = 24, 144
#: Those of which a Krylov space has noise in it, or too small a part to see.
HARD = ["rank 5", "staircase of 33", "geometric", "dominant", "identity", "scaled rows"]


@pytest.fixture
def gpu() -> Iterator[dict[str, int]]:
    with pretend_gpu() as log, torch.no_grad(), full_precision(torch.device("cpu")):
        yield log


def _since(log: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: log[name] - before[name] for name in log}


def _begun(batch: torch.Tensor) -> DeferredBasis:
    basis = krylov_basis(Operator(batch.to(GPU)), limit=LIMIT, block=BLOCK, seed=0)
    assert isinstance(basis, DeferredBasis)
    basis.begin(None)
    return basis


def test_a_step_waits_for_nothing_and_launches_little(gpu: dict[str, int]) -> None:
    basis = _begun(torch.stack([realistic(540, 520, seed=seed) for seed in range(3)]))
    before = dict(gpu)
    for _ in range(4):
        basis.step()
    counts = _since(gpu, before)
    assert counts["syncs"] == 0
    assert counts["launches"] <= 4 * 12
    before = dict(gpu)
    basis.ritz()
    assert _since(gpu, before)["syncs"] == 1


@pytest.mark.parametrize(
    ("shape", "count", "launches", "syncs"),
    [((700, 540), 1, 225, 9), ((700, 540), 8, 240, 9), ((500, 300), 1, 235, 24), ((500, 300), 8, 250, 24)],
)
def test_a_batch_waits_and_launches_hardly_more_than_one_matrix(
    shape: tuple[int, int], count: int, launches: int, syncs: int, gpu: dict[str, int]
) -> None:
    batch = torch.stack([realistic(*shape, seed=seed) for seed in range(count)]).to(GPU)
    before = dict(gpu)
    found = truncated_svds(batch, 16)
    counts = _since(gpu, before)
    assert all(bool(one.certificate.converged) for one in found)
    assert counts["launches"] <= launches
    assert counts["syncs"] <= syncs


@pytest.mark.parametrize(
    "name", [name if name in HARD else pytest.param(name, marks=pytest.mark.slow) for name in MATRICES if name != "medium"]
)
def test_unlike_matrices_in_a_batch(name: str, gpu: dict[str, int]) -> None:
    A = MATRICES[name]
    k = min(16, *A.shape)
    low = realistic(A.shape[0], 3) @ realistic(3, A.shape[1])
    batch = torch.stack([realistic(*A.shape, seed=7), A, torch.zeros_like(A), low, A])
    found = [dataclasses.replace(one, U=one.U.cpu(), s=one.s.cpu(), V=one.V.cpu()) for one in truncated_svds(batch.to(GPU), k)]
    for i in (0, 1, 3):
        check(batch[i], found[i], k, value_error=1e-5 if name == "subnormal" else 1e-6)
    assert not found[2].s.any()
    assert torch.equal(found[1].s, found[4].s)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("rank 5", 1), ("rank 5", 4), ("staircase of 33", 4), ("geometric", 1), ("dominant", 4), ("Gaussian", 4)],
)
def test_a_basis_is_one(name: str, steps: int, gpu: dict[str, int]) -> None:
    """Orthonormal rows, and the projection of C on them, in float64, whether or not there was noise; also after a restart."""
    A = prepared(torch.stack([MATRICES[name], MATRICES["rank 5"]])).operator.matrices
    basis = _begun(A)
    B = A.double().mT if basis.operator.wide else A.double()
    for size in (steps * BLOCK, LIMIT - BLOCK):
        for _ in range(steps):
            basis.step()
        values, vectors, residuals = basis.ritz()
        rows = basis._rows.cpu().double()[:, : basis.size + BLOCK]
        eye = torch.eye(rows.shape[1], dtype=torch.float64)
        assert (rows @ rows.mT - eye).abs().max() < 3e-6
        images = rows[:, : basis.size] @ B.mT
        scale = torch.linalg.matrix_norm(B, 2).square()[:, None]
        truth = torch.linalg.eigvalsh(images @ images.mT).flip(1)
        assert ((values - truth).abs() <= 3e-6 * scale).all()
        ritz = vectors.mT @ rows[:, : basis.size]
        true_residuals = ((ritz @ B.mT) @ B - values[:, :, None] * ritz).norm(dim=2)
        assert ((residuals - true_residuals).abs() <= 3e-6 * scale).all()
        if basis.size == size:
            basis.restart(values, vectors, BLOCK)


def test_float64_and_the_cpu_look_at_each_step() -> None:
    matrix = realistic(540, 520)[None]
    assert not isinstance(krylov_basis(Operator(matrix), limit=LIMIT, block=BLOCK, seed=0), DeferredBasis)
    with pretend_gpu():
        wide = krylov_basis(Operator(matrix.double().to(GPU)), limit=LIMIT, block=BLOCK, seed=0)
    assert not isinstance(wide, DeferredBasis)


def test_the_last_rows_of_a_space(gpu: dict[str, int]) -> None:
    """The whole space has no room for another whole block: its values are those of the matrix."""
    A = realistic(90, 64)[None]
    basis = _begun(A)
    while not basis.exhausted:
        basis.step()
    values, _, _ = basis.ritz()
    assert (values.clamp(min=0).sqrt() - torch.linalg.svdvals(A.double())).abs().max() < 1e-5
