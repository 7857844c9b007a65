"""What is told of a matrix before and after, against float64; what is given stays as it was."""

from __future__ import annotations

import pytest
import torch

from surgery.extraction.extents import Extent
from surgery.extraction.matrices import ChangedMatrix, Extracting, extract_matrices
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.views import View
from surgery.planning.targets import Target


def _changed(before: torch.Tensor, after: torch.Tensor, rank: int) -> ChangedMatrix:
    dtype = next(name for name, dtype in TORCH_DTYPES.items() if dtype == before.dtype)
    return ChangedMatrix(
        Target("w", "model.safetensors", dtype, tuple(before.shape), View("matrix"), rank, None, rank), 0, before, after
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1030, 600), (24, 40)])  # in two blocks of rows, and in one
def test_norms_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator).to(dtype)
    after = (before.float() + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    kept = before.clone(), after.clone()
    extracting = Extracting(Extent(2), "F32", 1e-5, 0)
    [one] = extract_matrices([_changed(before, after, 2)], extracting, torch.device("cpu"))
    D = after.double() - before.double()
    product = (one.factors.U * one.factors.s).double() @ one.factors.V.T.double()
    merged = (before.double() + product).to(dtype).double() - after.double()
    for told, truth in (
        (one.found.before, before.double()),
        (one.found.after, after.double()),
        (one.found.change, D),
        (one.found.error, D - product),
    ):
        assert told == pytest.approx(truth.norm().item(), rel=1e-6)
    assert one.found.merged == pytest.approx(merged.norm().item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert all(map(torch.equal, (before, after), kept))


def test_matrix_without_a_change_is_told_as_it_is() -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    kept = W.clone()
    for extent in (Extent(2), Extent("auto")):
        extracting = Extracting(extent, "F32", 1e-5, 0)
        [one] = extract_matrices([_changed(W, W.clone(), 2)], extracting, torch.device("cpu"))
        assert torch.equal(W, kept)
        assert one.found.before == one.found.after == pytest.approx(kept.double().norm().item(), rel=1e-12)
        assert (one.found.change, one.found.error, one.found.merged, len(one.factors.s)) == (0.0, 0.0, 0.0, 0)
