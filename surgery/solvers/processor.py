"""Which routines the libraries below take on this processor, as far as their results show it."""

from __future__ import annotations

import hashlib
from functools import cache

import torch

from surgery.memory import bytes_of
from surgery.solvers.product import gram, rows_times, rows_times_transposed
from surgery.torch_threads import one_thread

_ROWS, _SHORT, _LONG = 24, 160, 224


@cache
def processor() -> str:
    """What the last bits of decompositions depend on, beside torch's version and a GPU: ``AVX2 3f2a91c4``.

    First the instruction set that torch uses. MKL and oneDNN choose by themselves, each by other rules, and tell nobody; the
    digits are of the sha256 of small products, factorizations and eigenvectors, so that those who choose otherwise differ in
    them. Takes some milliseconds, once.
    """
    with one_thread(), torch.no_grad():
        A = _numbers(_SHORT, _LONG)
        y, x = _numbers(_ROWS, _SHORT), _numbers(_ROWS, _LONG)
        G = A.double() @ A.double().T
        L = torch.linalg.cholesky(G + torch.eye(_SHORT, dtype=torch.float64))
        results = [
            rows_times(y[None], A[None]),
            rows_times_transposed(x[None], A[None]),
            gram(A[None]),
            G,
            *torch.linalg.eigh(G),
            *torch.linalg.eigh(G.float()),
            *torch.linalg.qr(A.T),
            L,
            torch.linalg.solve_triangular(L, A.double(), upper=False),
            torch.linalg.vector_norm(A, dim=1),
            A.sum(0),
        ]
    digest = hashlib.sha256(b"".join(bytes(bytes_of(result.contiguous())) for result in results))
    return f"{torch.backends.cpu.get_cpu_capability()} {digest.hexdigest()[:8]}"


def _numbers(m: int, n: int) -> torch.Tensor:
    """float32 (m, n), between -1/2 and 1/2 without a pattern, the same everywhere."""
    i = torch.arange(1, m * n + 1, dtype=torch.int64)
    scattered = (i * i * 2654435761 >> 12) % (1 << 20)
    return (scattered.to(torch.float32) / (1 << 20) - 0.5).view(m, n)
