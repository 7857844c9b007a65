"""The Krylov basis of one matrix on a CPU, against products in float64 and against the basis that serves batches."""

from __future__ import annotations

import pytest
import torch

from surgery.solvers.lanczos import KrylovBasis, krylov_basis
from surgery.solvers.operator import Operator
from surgery.solvers.single import SingleBasis
from tests.models import realistic

N = 200


def _with_values(values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    return (left * values.double()) @ right.T


MATRICES = {
    "wide": realistic(N, N + 60),
    "tall": realistic(N + 60, N),
    "rank 20": _with_values((torch.arange(N) < 20) * torch.linspace(2, 1, N)),
    "geometric": _with_values(2.0 ** -torch.arange(float(N))),
    "copies": _with_values(torch.linspace(2, 0, 20).repeat_interleave(N // 20)),
    "dominant": _with_values(torch.cat([torch.tensor([1e3]), torch.linspace(1, 0, N - 1)])),
}


def _residuals(basis: SingleBasis | KrylovBasis, matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Of the leading Ritz pairs: by the basis and in truth, over s_1^2; the skew of rows; how far images are from products."""
    values, vectors, estimated = basis.ritz()
    rows, images = (part[0].double() for part in basis.combine(vectors[:, :, :count]))
    wide = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    scale = torch.linalg.matrix_norm(wide, 2) ** 2
    true = (rows @ (wide.T @ wide) - values[0, :count, None] * rows).norm(dim=1) / scale
    skew = (rows @ rows.T - torch.eye(count, dtype=torch.float64)).abs().max()
    return estimated[0, :count] / scale, true, skew, (images - rows @ wide.T).abs().max() / scale.sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [2, 8])
@pytest.mark.parametrize("name", MATRICES)
def test_it_knows_its_residuals(name: str, block: int, dtype: torch.dtype) -> None:
    """Step by step, through restarts and until nothing is left: what the recurrence says is what products in float64 give."""
    A = MATRICES[name].to(dtype)
    eps = torch.finfo(dtype).eps
    basis = krylov_basis(Operator(A[None]), limit=64, block=block, seed=1)
    assert isinstance(basis, SingleBasis)
    basis.begin(None)
    restarts = 0
    for _ in range(96 // block):
        basis.step()
        count = min(12, basis.size)
        estimated, true, skew, apart = _residuals(basis, A, count)
        # What is dropped as noise is 3e-7 of s_1 and the length of the image, in either precision.
        assert (estimated - true).abs().max() < 40 * eps + 2e-6
        assert skew < 40 * eps
        assert apart < 40 * eps
        if basis.size + block > basis.limit:
            values, vectors, _ = basis.ritz()
            basis.restart(values, vectors, 32)
            restarts += 1
    assert restarts >= 1
    assert basis.search.rows == block
    assert basis.search.steps == 64 // block


@pytest.mark.parametrize("name", MATRICES)
def test_it_finds_what_the_basis_of_a_batch_finds(name: str) -> None:
    A = MATRICES[name].float()
    found = []
    for kind in (SingleBasis, KrylovBasis):
        basis = kind(Operator(A[None]), limit=96, block=8, seed=2)
        basis.begin(None)
        for _ in range(12):
            basis.step()
        found.append(basis.ritz()[0][0, :8])
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0][0]


def test_until_nothing_is_left() -> None:
    A = realistic(30, 50)
    basis = SingleBasis(Operator(A[None]), limit=400, block=8, seed=0)
    basis.begin(None)
    while not basis.exhausted:
        basis.step()
    assert basis.size == 30
    values = basis.ritz()[0][0].clamp(min=0).sqrt()
    assert (values - torch.linalg.svdvals(A.double())).abs().max() < 1e-4 * values[0]


def test_a_batch_has_the_other_kind() -> None:
    assert isinstance(krylov_basis(Operator(torch.ones(2, 90, 80)), limit=64, block=8, seed=0), KrylovBasis)
