"""Products of a few rows with large matrices, by the fastest float32 routine that torch has on this machine.

On a CPU torch sends float32 matrix products to MKL, which on other makers' processors is slower than oneDNN, the other
library it carries: by 1.3 to 2 times for these shapes, where the products are most of the work. The only ways to oneDNN
are a copy of the matrix in its own tensor type, for each orientation, or an operator that torch's compiler uses; the
latter is taken if it is there and gives the right answer on a small case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

#: Entries from which on a matrix does not stay in the cache of one core.
LARGE = 1 << 21
#: Rows a multiple of ``_CROWDED`` entries apart share few cache lines, which makes packing slow; ``GAP`` zeros behind each row
#: prevent that (docs/numerics.md).
_CROWDED, GAP = 512, 16
#: Rows of a symmetric product that are computed at a time, up to the diagonal: few enough to leave out most of what lies
#: beyond it, enough for a product.
_SYMMETRIC_ROWS = 128


def rows_times(y: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``y A``: (B, b, m) and (B, m, n) -> (B, b, n)."""
    return _each(_by_columns, y, matrices) if _onednn(y, matrices) else torch.bmm(y, matrices)


def rows_times_transposed(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``x A^T``: (B, b, n) and (B, m, n) -> (B, b, m)."""
    return _each(_by_rows, x, matrices) if _onednn(x, matrices) else torch.bmm(x, matrices.mT)


def leading_dimension(m: int, n: int, device: torch.device) -> int:
    """Entries from one row to the next, at least n, with which products with a matrix (m, n) are fastest."""
    return n + GAP if device.type == "cpu" and n % _CROWDED == 0 else n


def gram(rows: torch.Tensor) -> torch.Tensor:
    """``X X^T``: (B, r, l) -> (B, r, r). On a CPU only little more than half of it is computed, and mirrored.

    X may be a transposed view of matrices, whose rows may lie further apart than they are long.
    """
    if rows.device.type != "cpu":
        return torch.bmm(rows, rows.mT)
    product = rows.new_empty(len(rows), rows.shape[1], rows.shape[1])
    direct = rows.is_contiguous() and _onednn(rows, rows)
    for X, G in zip(rows, product, strict=True):
        for start in range(0, len(X), _SYMMETRIC_ROWS):
            stop = min(start + _SYMMETRIC_ROWS, len(X))
            part, known = X[start:stop], X[:stop]
            G[start:stop, :stop] = _linear(part, known) if direct else part @ known.T
            G[:start, start:stop] = G[start:stop, :start].T
    return product


def _by_columns(y: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return _linear(y, matrix.T)


def _by_rows(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    # The matrix first: oneDNN packs the second operand, and packing a large one takes longer than multiplying by a few rows.
    return _linear(matrix, x).T


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x weight^T``. Both must be contiguous, or their transposes: oneDNN is a hundred times slower otherwise."""
    product: torch.Tensor = _onednn_linear()(x, weight, None, "none", [], "")
    return product


_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _each(product: _Product, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """A product for each matrix in turn, since a batched product is slower on a CPU."""
    if len(x) == 1:
        return product(x[0], matrices[0])[None]
    return torch.stack([product(rows, matrix) for rows, matrix in zip(x, matrices, strict=True)])


def _onednn(x: torch.Tensor, matrices: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and matrices.numel() > 0 and _onednn_linear() is not None


@cache
def _onednn_linear() -> Any:
    """The operator ``x weight^T`` of oneDNN, if this build of torch has one that works; else None."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        x, w = torch.arange(32, dtype=torch.float32).reshape(2, 16), torch.arange(80, dtype=torch.float32)
        straight, turned = w.reshape(5, 16), w.reshape(16, 5).T
        # Small integers: the product is exact, in whatever order.
        right = all(torch.equal(operator(x, w, None, "none", [], ""), x @ w.T) for w in (straight, turned))
    except (AttributeError, RuntimeError, TypeError):  # not in this build, or with other arguments
        return None
    return operator if right else None
