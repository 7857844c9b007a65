"""The products that the SVD stands on, by whichever library, against float64."""

from __future__ import annotations

import pytest
import torch

from surgery.solvers.product import gram, rows_times, rows_times_transposed


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("b", [1, 16, 24, 33])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 700), (700, 3), (513, 640), (1030, 2050)])
def test_products(m: int, n: int, b: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(batch, m, n, generator=generator)
    x, y = torch.randn(batch, b, n, generator=generator), torch.randn(batch, b, m, generator=generator)
    assert torch.allclose(rows_times_transposed(x, A).double(), x.double() @ A.double().mT, atol=1e-3, rtol=0)
    assert torch.allclose(rows_times(y, A).double(), y.double() @ A.double(), atol=1e-3, rtol=0)
    assert rows_times(y.double(), A.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("r", "length"), [(1, 1), (3, 700), (128, 50), (129, 300), (384, 1030)])
def test_symmetric_product(r: int, length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, r, length, generator=generator, dtype=dtype)
    turned = X.mT.contiguous().mT
    apart = torch.nn.functional.pad(X.mT, (0, 16))[:, :, :r].mT
    for rows in (X, turned, apart):
        product = gram(rows)
        assert product.dtype == dtype
        assert torch.allclose(product.double(), X.double() @ X.double().mT, atol=1e-5 * length, rtol=0)
