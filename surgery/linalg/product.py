"""Products of a few rows with large matrices, by the fastest float32 routine that torch has on this machine.

On a CPU torch sends float32 matrix products to MKL, which on other makers' processors is slower than oneDNN, the other
library it carries: by 1.3 to 2 times for these shapes, where the products are most of the work. The only ways to oneDNN
are a copy of the matrix in its own tensor type, for each orientation, or an operator that torch's compiler uses; the
latter is taken if it is there and gives the right answer on a small case.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def rows_times(y: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``y A``: (B, b, m) and (B, m, n) -> (B, b, n)."""
    return _linear(y, matrices.mT)


def rows_times_transposed(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``x A^T``: (B, b, n) and (B, m, n) -> (B, b, m)."""
    return _linear(x, matrices)


def _linear(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    onednn = _onednn_linear() if x.device.type == "cpu" and x.dtype == torch.float32 and weights.numel() else None
    if onednn is not None:
        if len(x) == 1:
            single: torch.Tensor = onednn(x[0], weights[0], None, "none", [], "")
            return single[None]
        # One by one: on a CPU a batched product is slower.
        return torch.stack([onednn(rows, weight, None, "none", [], "") for rows, weight in zip(x, weights, strict=True)])
    return torch.bmm(x, weights.mT)


@cache
def _onednn_linear() -> Any:
    """The operator, if this build of torch has one that works; else None."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        x = torch.arange(32.0).reshape(2, 16)
        straight, turned = torch.arange(80.0).reshape(5, 16), torch.arange(80.0).reshape(16, 5).T
        # Small integers: the product is exact, in whatever order.
        right = all(torch.equal(operator(x, w, None, "none", [], ""), x @ w.T) for w in (straight, turned))
    except (AttributeError, RuntimeError, TypeError):  # not in this build, or with other arguments
        return None
    return operator if right else None
