"""Truncated singular value decomposition with a certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from surgery.errors import OptionError, WeightError
from surgery.linalg.lanczos import Operator, block_lanczos, block_size, widened

DEFAULT_TOLERANCE = 1e-5

#: A block of b vectors sees at most b copies of a repeated value; values this close (over s_1) count as copies.
_CLUSTER = 1e-3
_MAX_ROUNDS = 4
#: Units of the working precision that rounding may leave in a residual.
_ROUNDING = 16
#: Beyond this the Gram matrix is no fallback any more: its eigenproblem takes longer than anybody waits.
_MAX_GRAM = 8192


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known about the accuracy of a truncated SVD. Tensors are float64 on the CPU.

    Attributes:
        residual: (..., k), ``max(|A v - s u|, |A^T u - s v|) / s_1`` of the vectors returned, measured in float64.
            By Weyl's inequality some singular value lies within ``residual * s_1`` of each s.
        gap: (..., k), distance to the nearest other singular value over s_1. For the last triplet the next value
            is estimated from below.
        angle_bound: (..., k), ``residual / gap``, at most 1: bounds the sine of the angle between the vectors and
            the true ones (Wedin 1972). At 1 the direction is not determined by the matrix: that is no failure.
        converged: bool (...,), every residual is within the tolerance.
        passes: int64 (...,), products with A or its transpose.
        method: ``block-lanczos``, ``gram``, ``svd`` or ``zero``; a tuple of these for a batch.
    """

    residual: torch.Tensor
    gap: torch.Tensor
    angle_bound: torch.Tensor
    converged: torch.Tensor
    passes: torch.Tensor
    method: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """``A ~ U diag(s) V^T`` with the k largest singular values.

    Attributes:
        U: (..., m, k), orthonormal columns.
        s: (..., k), descending.
        V: (..., n, k), orthonormal columns.
        norm: float64 (...,) on the CPU, the Frobenius norm of A.
        certificate: how accurate they are.

    Vectors and values are float32, or float64 for a float64 matrix, on the device of the matrix.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor
    norm: torch.Tensor
    certificate: Certificate


def truncated_svd(A: torch.Tensor, k: int, *, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0) -> TruncatedSVD:
    """The k largest singular triplets of a matrix, or of each of a batch, with a certificate.

    Thick-restart randomized block Lanczos where k is small against the matrix, an eigendecomposition of the float64
    Gram matrix or a float64 SVD otherwise. The same seed on the same device gives the same bits; the global random
    state is neither read nor changed, nor are the caller's matmul precision settings.

    The sign of each pair is such that the entry of largest magnitude among both of its vectors is positive.

    Args:
        A: (m, n) or (B, m, n), any real floating dtype, any device.
        k: 1 <= k <= min(m, n).
        tolerance: residuals are brought below ``tolerance * s_1``, and below ``100 * tolerance * s_i`` as far as
            rounding allows (2e-6 s_1 in float32, also its least value). The error of a singular value is of second
            order in it.
        seed: of the random start block.

    Returns:
        ``TruncatedSVD``. Look at ``certificate.converged``: a matrix on which the iteration fails is reported there,
        never hidden.

    Raises:
        OptionError: k, tolerance, seed or the shape or dtype of A make no sense.
        WeightError: A holds NaN or infinity, or its singular values overflow.

    Source: see ``surgery.linalg.lanczos``; the certificate is that of Golub, Van Loan, "Matrix Computations",
    section 8.6, and Wedin, "Perturbation bounds in connection with singular value decomposition" (BIT 12, 1972).
    """
    if A.ndim not in (2, 3) or not A.dtype.is_floating_point:
        raise OptionError(
            "truncated_svd needs a matrix or a batch of matrices of floating-point numbers",
            got=f"{A.dtype} of shape {tuple(A.shape)}",
        )
    if A.ndim == 3 and len(A) == 0:
        raise OptionError("the batch is empty", got=f"shape {tuple(A.shape)}")
    if not 1 <= k <= min(A.shape[-2:]):
        raise OptionError("the rank does not fit the matrix", got=f"k = {k}", expected=f"1 <= k <= {min(A.shape[-2:])}")
    check_accuracy(tolerance, seed, torch.float64 if A.dtype == torch.float64 else torch.float32)
    with torch.no_grad(), _full_precision(A.device):
        if A.ndim == 2:
            return _solve(A, k, tolerance, seed)
        return _stack([_solve(matrix, k, tolerance, seed) for matrix in A])


def check_accuracy(tolerance: float, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a tolerance or seed that no run in ``dtype`` can honour.

    Raises:
        OptionError: naming the limits.
    """
    floor = _ROUNDING * torch.finfo(dtype).eps
    if not floor <= tolerance < 1:
        raise OptionError(
            "the tolerance makes no sense",
            got=tolerance,
            expected=f"at least {floor:.1e}, the rounding of {dtype}, and below 1",
        )
    if not 0 <= seed < 1 << 63:
        raise OptionError("the seed makes no sense", got=seed, expected="a whole number from 0 to 2^63 - 1")


def _stack(parts: list[TruncatedSVD]) -> TruncatedSVD:
    certificates = [part.certificate for part in parts]
    return TruncatedSVD(
        torch.stack([part.U for part in parts]),
        torch.stack([part.s for part in parts]),
        torch.stack([part.V for part in parts]),
        torch.stack([part.norm for part in parts]),
        Certificate(
            residual=torch.stack([c.residual for c in certificates]),
            gap=torch.stack([c.gap for c in certificates]),
            angle_bound=torch.stack([c.angle_bound for c in certificates]),
            converged=torch.stack([c.converged for c in certificates]),
            passes=torch.stack([c.passes for c in certificates]),
            method=tuple(str(c.method) for c in certificates),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Triplets:
    """A candidate: ``long`` (long, k), ``s`` (k,) float64 CPU, ``short`` (short, k), residual over s_1 (k,) float64 CPU."""

    long: torch.Tensor
    s: torch.Tensor
    short: torch.Tensor
    residual: torch.Tensor
    next_value: float


def _solve(A: torch.Tensor, k: int, tolerance: float, seed: int) -> TruncatedSVD:
    work = A.to(A.dtype if A.dtype == torch.float64 else torch.float32).contiguous()
    low, high = (value.item() for value in torch.aminmax(work))
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise WeightError("the matrix holds NaN or infinity", got=f"values from {low} to {high}")
    if largest == 0.0:
        return _zero(work, k)
    # Squares of the entries must neither overflow nor vanish. A power of two changes no bit of the mantissa.
    exponent = math.frexp(largest)[1]
    shift = exponent if abs(exponent) > 24 else 0
    if shift:
        work = torch.ldexp(work, torch.tensor(-shift, device=work.device))
    operator = Operator(work)
    method, triplets = _by_best_engine(operator, k, tolerance, seed)
    if not math.isfinite(torch.ldexp(triplets.s, torch.tensor(shift)).to(work.dtype)[0].item()):
        raise WeightError(f"the matrix has singular values beyond the range of {work.dtype}", got=f"entries of up to {largest}")
    return _finished(operator, triplets, method, tolerance, shift)


def _by_best_engine(operator: Operator, k: int, tolerance: float, seed: int) -> tuple[str, _Triplets]:
    r = operator.short
    if k > r // 2 or r <= 64:
        return "svd", _full_svd(operator, k)
    if r <= 512 or k > r // 6 or (r <= 1024 and k > r // 16):
        return "gram", _gram(operator, k)
    triplets = _lanczos(operator, k, tolerance, seed)
    if _converged(triplets, tolerance, operator) or r > _MAX_GRAM:
        return "block-lanczos", triplets
    return "gram", _gram(operator, k)


def _lanczos(operator: Operator, k: int, tolerance: float, seed: int) -> _Triplets:
    generator = torch.Generator().manual_seed(seed)
    widest = operator.short - 1
    block = min(block_size(k, operator.matrix.device), widest)
    start, best = None, None
    for _ in range(_MAX_ROUNDS):
        ritz = block_lanczos(operator, k, tolerance=tolerance, block=block, generator=generator, start=start)
        triplets = _from_rows(operator, ritz.rows, max(ritz.values[k].item(), 0.0) ** 0.5)
        if block < min(k, widest) and _clustered(triplets.s, block):
            # Residuals cannot show that a copy of a repeated value is missing: look again with a block wider than k.
            block, start = min(k + 8, widest), None
            continue
        if best is None or triplets.residual.max() < best.residual.max():
            best = triplets
        if _converged(best, tolerance, operator):
            break
        block, start = min(max(block, k), widest), best.short.T
    assert best is not None  # a clustered round is followed by one that is not
    return best


def _clustered(s: torch.Tensor, block: int) -> bool:
    return bool(((s[: len(s) - block + 1] - s[block - 1 :]) <= _CLUSTER * s[0]).any())


def _allowed(s: torch.Tensor, tolerance: float, operator: Operator) -> torch.Tensor:
    """Largest residual over s_1 that passes, per triplet."""
    floor = _ROUNDING * torch.finfo(operator.matrix.dtype).eps
    relative = 100 * tolerance * s / s[0].clamp(min=1e-300)
    return relative.clamp(max=tolerance).clamp(min=floor)


def _converged(triplets: _Triplets, tolerance: float, operator: Operator) -> bool:
    return bool((triplets.residual <= _allowed(triplets.s, tolerance, operator)).all())


def _from_rows(operator: Operator, rows: torch.Tensor, next_value: float) -> _Triplets:
    """Singular triplets from a nearly orthonormal basis (k, short) of the right space, in float64."""
    basis, _ = torch.linalg.qr(widened(rows).T)
    images = operator.to_long_wide(basis.T).T
    q, r = torch.linalg.qr(images)
    left, s, right = (part.to(q.device) for part in torch.linalg.svd(r.cpu()))
    return _measured(operator, q @ left, s, basis @ right.T, images @ right.T, next_value)


def _measured(
    operator: Operator, long: torch.Tensor, s: torch.Tensor, short: torch.Tensor, images: torch.Tensor, next_value: float
) -> _Triplets:
    """Round float64 vectors to the working precision and measure the residuals of what is returned.

    ``images`` are the products of the matrix with ``short``, so that one side needs no further pass; the rounding of
    ``short`` is added to it.
    """
    matrix = operator.matrix
    # The dtype first: not every device knows float64.
    rounded_long, rounded_short = (vectors.to(matrix.dtype).to(matrix.device) for vectors in (long, short))
    top = max(s[0].item(), 1e-300)
    on_long = (images - widened(rounded_long) * s).norm(dim=0) / top + (widened(rounded_short) - short).norm(dim=0)
    back = operator.to_short_wide(widened(rounded_long).T.contiguous()).T
    on_short = (back - widened(rounded_short) * s).norm(dim=0) / top
    return _Triplets(rounded_long, s.cpu(), rounded_short, torch.maximum(on_long, on_short).cpu(), next_value)


def _gram(operator: Operator, k: int) -> _Triplets:
    """Leading eigenvectors of the float64 Gram matrix of the short side."""
    values, vectors = torch.linalg.eigh(operator.gram_wide())
    next_value = max(values[-k - 1].item(), 0.0) ** 0.5 if k < len(values) else 0.0
    return _from_rows(operator, vectors[:, -k:].flip(1).T, next_value)


def _full_svd(operator: Operator, k: int) -> _Triplets:
    matrix = widened(operator.matrix)
    operator.passes += 1
    left, s, right = torch.linalg.svd(matrix.T if operator.wide else matrix, full_matrices=False)
    next_value = s[k].item() if k < len(s) else 0.0
    short = right[:k].T
    return _measured(operator, left[:, :k], s[:k], short, operator.to_long_wide(short.T.contiguous()).T, next_value)


def _zero(matrix: torch.Tensor, k: int) -> TruncatedSVD:
    m, n = matrix.shape
    zeros = torch.zeros(k, dtype=torch.float64)
    return TruncatedSVD(
        torch.eye(m, k, dtype=matrix.dtype, device=matrix.device),
        torch.zeros(k, dtype=matrix.dtype, device=matrix.device),
        torch.eye(n, k, dtype=matrix.dtype, device=matrix.device),
        torch.tensor(0.0, dtype=torch.float64),
        Certificate(zeros, zeros.clone(), torch.ones(k, dtype=torch.float64), torch.tensor(True), torch.tensor(0), "zero"),
    )


def _finished(operator: Operator, triplets: _Triplets, method: str, tolerance: float, shift: int) -> TruncatedSVD:
    U, V = (triplets.short, triplets.long) if operator.wide else (triplets.long, triplets.short)
    sign = _signs(U, V)
    s = triplets.s
    top = max(s[0].item(), 1e-300)
    distances = torch.cat([s[:-1] - s[1:], s[-1:] - triplets.next_value]).abs()
    gap = torch.minimum(distances, torch.cat([distances[:1], distances[:-1]])) / top
    if len(s) == 1:
        gap = distances / top
    if triplets.next_value == 0.0 and len(s) == operator.short:
        gap[-1] = distances[-2 if len(s) > 1 else -1] / top
    return TruncatedSVD(
        U * sign,
        torch.ldexp(s, torch.tensor(shift)).to(U.dtype).to(U.device),
        V * sign,
        torch.ldexp(_norm(operator.matrix), torch.tensor(shift)),
        Certificate(
            residual=triplets.residual,
            gap=gap,
            angle_bound=(triplets.residual / gap.clamp(min=1e-300)).clamp(max=1.0),
            converged=torch.tensor(_converged(triplets, tolerance, operator)),
            passes=torch.tensor(operator.passes),
            method=method,
        ),
    )


def _norm(matrix: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of numbers of order one: of each row in its own dtype, of all rows in float64."""
    rows: torch.Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return widened(rows).square().sum().sqrt().cpu()


def _signs(U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """(k,) of +-1 that make the entry of largest magnitude in each pair of columns positive.

    Looking at both vectors gives a matrix and its transpose the same signs.
    """
    columns = torch.arange(U.shape[1], device=U.device)
    u = U[U.abs().argmax(dim=0), columns]
    v = V[V.abs().argmax(dim=0), columns]
    decisive = torch.where(u.abs() >= v.abs(), u, v)
    return torch.where(decisive < 0, -1.0, 1.0).to(U.dtype)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, bfloat16 or autocast inside float32 products, whatever the caller has chosen; put back afterwards."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
