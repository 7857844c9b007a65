"""Decompositions that fail, or give what is wrong, on a device and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from surgery.solvers import dense
from surgery.solvers.dense import eigh, on_all_cores, svd
from surgery.solvers.orthonormal import orthonormal_rows, orthonormal_together
from tests.pretend_gpu import GPU, OnGpu, pretend_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    monkeypatch.setattr(dense, "_HOST_ORDER", 8)
    with pretend_gpu() as log:
        yield log


def _psd(n: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, n + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.T


def _fails(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch, *, everywhere: bool = False) -> None:
    """A decomposition of torch raises this on the device, or everywhere."""
    own = getattr(torch.linalg, name)

    def failing(matrix: torch.Tensor, *args: object, **options: object) -> object:
        if everywhere or isinstance(matrix, OnGpu):
            raise error
        return own(matrix, *args, **options)

    monkeypatch.setattr(torch.linalg, name, failing)


FAILURES = [
    torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnDsyevd`"),
]


@pytest.mark.parametrize("error", FAILURES)
def test_what_fails_on_the_device_is_done_on_the_cpu(
    error: Exception, gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = _psd(12)
    expected = torch.linalg.eigvalsh(matrix)
    _fails("eigh", error, monkeypatch)
    _fails("svd", error, monkeypatch)
    values, vectors = eigh(matrix.to(GPU))
    assert (values.device, vectors.device) == (GPU, GPU)
    assert torch.allclose(values.cpu(), expected, rtol=1e-12)
    assert torch.allclose(matrix @ vectors.cpu(), vectors.cpu() * values.cpu(), atol=1e-10)
    left, s, right = svd(matrix.to(GPU))
    assert s.device == GPU
    assert torch.allclose((left.cpu() * s.cpu()) @ right.cpu(), matrix, atol=1e-10)


def test_a_full_device_is_no_failure_of_a_decomposition(gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in (("eigh", eigh), ("svd", svd)):
        _fails(name, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            call(_psd(12).to(GPU))


@pytest.mark.parametrize("wrong", ["vectors", "values"])
def test_wrong_results_of_a_device_are_not_taken(wrong: str, gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, own = _psd(12), torch.linalg.eigh

    def off(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = own(symmetric)
        if isinstance(symmetric, OnGpu):
            (vectors[:, :2] if wrong == "vectors" else values).mul_(1 + 1e-6)
        return values, vectors

    expected, _ = own(matrix)
    monkeypatch.setattr(torch.linalg, "eigh", off)
    values, vectors = (part.cpu() for part in eigh(matrix.to(GPU)))
    assert torch.allclose(values, expected, rtol=1e-13)
    assert (vectors.T @ vectors - torch.eye(12, dtype=torch.float64)).abs().max() < 1e-13


def test_where_eigh_fails_on_the_cpu_the_svd_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _psd(20)
    expected = torch.linalg.eigvalsh(matrix)
    _fails("eigh", FAILURES[0], monkeypatch, everywhere=True)
    values, vectors = eigh(matrix.tril() + torch.full((20, 20), torch.nan, dtype=torch.float64).triu(1).nan_to_num(7.0))
    assert torch.allclose(values, expected, rtol=1e-12)
    assert torch.allclose(matrix @ vectors, vectors * values, atol=1e-10)


def test_all_cores_give_what_each_gives_alone() -> None:
    batch = torch.stack([_psd(30, seed) for seed in range(5)])
    values, vectors = on_all_cores(eigh, batch)
    for i, matrix in enumerate(batch):
        alone = on_all_cores(eigh, matrix[None])
        assert torch.equal(values[i], alone[0][0])
        assert torch.equal(vectors[i], alone[1][0])


@pytest.mark.parametrize("dependence", [1.0, 1e-4, 1e-9, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-60])
def test_orthonormal_rows(dependence: float, scale: float, gpu: dict[str, int]) -> None:
    """Of the same space, orthonormal to rounding, however dependent the rows are and whatever their lengths."""
    rows = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[1, 3] = rows[1, 0] + rows[1, 2] + dependence * rows[1, 3]
    rows[:, 2] *= scale
    other = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = rows.to(GPU), other.to(GPU)
    before = gpu["syncs"]
    together = orthonormal_together(*given)
    assert gpu["syncs"] - before <= 2
    device, beside = (part.cpu() for part in together)
    for found, spanned in ((device, rows), (beside, other), (orthonormal_rows(rows), rows)):
        assert (found @ found.mT - torch.eye(found.shape[1], dtype=torch.float64)).abs().max() < 1e-14
        unit = spanned / spanned.norm(dim=2, keepdim=True)
        assert (unit - (unit @ found.mT) @ found).norm(dim=2).max() < 1e-12 / max(dependence, 1e-4)
