"""Products in float64, block by block, against those of the whole matrices."""

from __future__ import annotations

import pytest
import torch

from surgery.solvers import operator as module
from surgery.solvers.operator import Operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("m", "n"), [(70, 300), (300, 70), (129, 128), (1, 200), (200, 1)])
def test_float64_products(m: int, n: int, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDE_ENTRIES", 1024)
    monkeypatch.setattr(module, "_WIDE_COLUMNS", 64)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(count, m, n, generator=generator).to(dtype)
    tall = A.double() if m >= n else A.double().mT
    operator = Operator(A)
    x = torch.randn(count, 5, operator.short, generator=generator, dtype=torch.float64)
    y = torch.randn(count, 5, operator.long, generator=generator, dtype=torch.float64)
    to_long, to_short = x @ tall.mT, y @ tall
    for found, truth in (
        (operator.to_long_wide(x), to_long),
        (operator.to_short_wide(y), to_short),
        (operator.both_wide(x, y)[0], to_long),
        (operator.both_wide(x, y)[1], to_short),
        (operator.gram_wide(), tall.mT @ tall),
    ):
        assert found.dtype == torch.float64
        assert torch.allclose(found, truth, rtol=0, atol=1e-11)
