"""Truncated singular value decomposition with a certificate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from surgery.device import as_memory_allows, on_its_own_terms
from surgery.errors import OptionError, WeightError
from surgery.linalg.preparation import Prepared, prepared
from surgery.linalg.proof import prove_top_k
from surgery.linalg.top_k import NOTHING_ELSE, TopK, top_k_of
from surgery.lossless.rounding import check_dense, times_power_of_two
from surgery.precision import full_precision
from surgery.solvers.limits import DEFAULT_TOLERANCE, check_accuracy
from surgery.solvers.operator import Operator
from surgery.solvers.triplets import Solution, engine, solve

_Solved = TypeVar("_Solved")

#: Rounding error of float64 products with the matrix and of the small problems made of them, over its Frobenius norm.
_MEASURED = 2.0**-50

#: How many start blocks are tried at most before a proof is given up.
_TRIES = 3
#: The bits of a seed that make another start block; torch takes no more than 32 bits of it.
_OTHER_SEED = 30

#: Entries of the Gram matrices that are solved together on a CPU: few enough for its cache.
GRAM_ENTRIES = 1 << 21


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known about the accuracy of a truncated SVD.

    All tensors are on the CPU. They are float64, except where another dtype is given.

    Attributes:
        residual: (..., k), ``max(|A v - s u|, |A^T u - s v|) / s_1`` of the returned vectors. It is measured in float64
            and includes an allowance for rounding. By Weyl's inequality, some singular value lies within
            ``residual * s_1`` of each s.
        gap: (..., k), a lower bound on the distance to the nearest other singular value, over s_1. The error of that
            other value is subtracted. For the last triplet, the next value is assumed to be as large as its residual
            and rounding allow. The gap is 0 if none is known.
        angle_bound: (..., k), ``residual / gap``, at most 1. It bounds the sine of the angle between the returned
            vectors and the true ones (Wedin 1972). At 1 the bound says nothing about the direction; this is not a
            failure.
        converged: bool (...,), whether every residual is within the tolerance.
        passes: int64 (...,), the number of products with A or its transpose.
        method: ``block-lanczos``, ``gram``, ``svd`` or ``zero``; a tuple of these for a batch.
        top_k: what is known about singular values that were not found (``TopK``); a tuple for a batch. Residuals say
            nothing about these values.
    """

    residual: torch.Tensor
    gap: torch.Tensor
    angle_bound: torch.Tensor
    converged: torch.Tensor
    passes: torch.Tensor
    method: str | tuple[str, ...]
    top_k: TopK | tuple[TopK, ...]


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """``A ~ U diag(s) V^T`` with the k largest singular values.

    Attributes:
        U: (..., m, k), with orthonormal columns.
        s: (..., k), in descending order.
        V: (..., n, k), with orthonormal columns.
        norm: float64 (...,) on the CPU, the Frobenius norm of A.
        certificate: how accurate the triplets are.

    U, s and V are float32, or float64 for a float64 matrix. They are on the device of the matrix.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor
    norm: torch.Tensor
    certificate: Certificate


@on_its_own_terms
def truncated_svd(
    A: torch.Tensor, k: int, *, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0, prove: bool = False
) -> TruncatedSVD:
    """The k largest singular triplets of a matrix, or of each matrix of a batch, with a certificate.

    If k is small compared with the matrix, the method is thick-restart randomized block Lanczos. Otherwise it takes the
    leading eigenvectors of the Gram matrix, or a float64 SVD. On a GPU, the matrices of a batch are solved together.

    The same seed gives the same bits, on the same device and with the same number of threads. The function does not
    read or change the global random state. It also does not change the caller's settings of matmul precision, or depend
    on them.

    The sign of each pair of vectors is chosen such that the entry of largest magnitude in the two vectors is positive.

    Args:
        A: (m, n) or (B, m, n), any real floating dtype, any device.
        k: 1 <= k <= min(m, n).
        tolerance: the iteration brings all residuals below ``tolerance * s_1``, and below ``100 * tolerance * s_i`` as
            far as rounding allows. The limit of rounding is 2e-6 s_1 in float32; this is also the smallest tolerance.
            The error of a singular value is of second order in the tolerance. Within a cluster of values that is no
            wider than the tolerance, it is of first order.
        seed: seed of the random start block.
        prove: whether to prove that no larger singular value was missed. The proof is a Cholesky factorization in
            float64 on the shorter side n. It costs n^3 / 3 operations, and n^2 max(m, n) to form its matrix. If the
            proof fails, the matrix is solved again from another random start, at most twice.

    Returns:
        ``TruncatedSVD``. If the iteration fails on a matrix, ``certificate.converged`` says so. ``certificate.top_k``
        says whether the values are the largest ones. With ``prove`` it is ``proven``, or ``unknown`` if the proof
        fails. Without ``prove`` it is ``likely`` if the random start block makes it very improbable that a larger value
        was missed. For a matrix that was constructed with knowledge of these random numbers, ``likely`` says nothing.

    If a GPU has too little memory for a whole batch, the batch is solved in parts. A matrix that does not fit alone is
    solved on the CPU, with a ``SurgeryWarning``.

    Raises:
        OptionError: k, tolerance, seed, or the shape or dtype of A is not valid.
        WeightError: A holds NaN or infinity, or its singular values overflow.

    Source: see ``surgery.solvers.lanczos``. The certificate is that of Golub, Van Loan, "Matrix Computations", section
    8.6, and Wedin, "Perturbation bounds in connection with singular value decomposition" (BIT 12, 1972). Proofs: Rump,
    "Verification of positive definiteness" (BIT 46, 2006).
    """
    check_dense(A, "A")
    if A.ndim not in (2, 3):
        raise OptionError("A is neither a matrix nor a batch of matrices", got=f"shape {tuple(A.shape)}")
    found = truncated_svds(A[None] if A.ndim == 2 else A, k, tolerance=tolerance, seed=seed, prove=prove)
    return found[0] if A.ndim == 2 else _stack(found)


def truncated_svds(
    A: torch.Tensor, k: int, *, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0, prove: bool = False
) -> list[TruncatedSVD]:
    """``truncated_svd`` of a batch (B, m, n), with one result for each matrix; arguments and errors are the same."""
    check_batch(A, k)
    check_accuracy(tolerance, seed, "float64" if A.dtype == torch.float64 else "float32")

    def solve_some(part: torch.Tensor) -> list[TruncatedSVD]:
        found = _solve(part, k, tolerance, seed, prove=prove)
        return [_on(A.device, one) for one in found]

    return solved_in_parts(A, k, solve_some)


def proven_svd(A: torch.Tensor, found: TruncatedSVD, *, tolerance: float, seed: int) -> TruncatedSVD:
    """``truncated_svd(A, k, prove=True)`` of one matrix, after ``truncated_svd`` without a proof has ``found`` something."""
    if not found.norm.item():
        return found

    def prove_one(part: torch.Tensor) -> list[TruncatedSVD]:
        return [_on(A.device, _proven(prepared(part), 0, _on(part.device, found), tolerance, seed))]

    return solved_in_parts(A[None], len(found.s), prove_one)[0]


def check_batch(A: torch.Tensor, k: int) -> None:
    """Refuse an empty batch (B, m, n), and a rank that does not fit its matrices, with an OptionError."""
    if len(A) == 0:
        raise OptionError("the batch is empty", got=f"shape {tuple(A.shape)}")
    if not 1 <= k <= min(A.shape[1:]):
        raise OptionError("the rank does not fit the matrix", got=f"k = {k}", expected=f"1 <= k <= {min(A.shape[1:])}")


def solved_in_parts(A: torch.Tensor, k: int, solve_some: Callable[[torch.Tensor], list[_Solved]]) -> list[_Solved]:
    """What ``solve_some`` gives for all matrices of a batch (B, m, n), called with as many as are solved together.

    It is called in full precision, with matrices on their own device, or on the CPU where a GPU has too little memory.
    """

    def solve_on(part: Sequence[int], device: torch.device) -> list[_Solved]:
        return solve_some(A[part[0] : part[-1] + 1].to(device))

    step = _in_step(A, k)
    with torch.no_grad(), full_precision(A.device):
        parts = [as_memory_allows(solve_on, range(len(A))[i : i + step], A.device) for i in range(0, len(A), step)]
    return [result for part in parts for result in part]


def _on(device: torch.device, svd: TruncatedSVD) -> TruncatedSVD:
    return dataclasses.replace(svd, U=svd.U.to(device), s=svd.s.to(device), V=svd.V.to(device))


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
            top_k=tuple(c.top_k for c in certificates if isinstance(c.top_k, TopK)),
        ),
    )


def _in_step(A: torch.Tensor, k: int) -> int:
    """How many matrices of a batch are given to the solver together."""
    short = min(A.shape[1:])
    return len(A) if A.device.type == "cuda" or engine(short, k) == "svd" else solved_together(short, k)


def solved_together(short: int, k: int) -> int:
    """How many matrices with this shorter side are solved together on a CPU; 1 where one after the other is faster."""
    return max(1, GRAM_ENTRIES // short**2) if engine(short, k) == "gram" else 1


def _solve(A: torch.Tensor, k: int, tolerance: float, seed: int, *, prove: bool) -> list[TruncatedSVD]:
    """The truncated SVD of each matrix of a batch (B, m, n)."""
    ready = prepared(A)
    results: list[TruncatedSVD | None] = [None] * len(A)
    if ready.nonzero:
        solutions = solve(ready.operator, k, tolerance, seed)
        for j, found in enumerate(_finished(ready.operator, solutions, ready.norms, ready.exponents, tolerance)):
            results[ready.nonzero[j]] = _proven(ready, j, found, tolerance, seed) if prove else found
    dtype = ready.operator.matrices.dtype
    return [_zero(A[i], dtype, k) if result is None else result for i, result in enumerate(results)]


def _proven(ready: Prepared, j: int, found: TruncatedSVD, tolerance: float, seed: int) -> TruncatedSVD:
    """What was found of the matrix j, with a proof; where there is none, what is found from other random rows.

    The first ones may have missed a direction, by chance or because the matrix was made around them.
    """
    operator, norm, shift = ready.operator.one(j), ready.norms[j : j + 1], ready.exponents[j : j + 1]
    for other in range(_TRIES):
        if other:
            operator.passes = int(found.certificate.passes)
            solutions = solve(operator, found.s.shape[0], tolerance, seed ^ other << _OTHER_SEED)
            (found,) = _finished(operator, solutions, norm, shift, tolerance)
        s = times_power_of_two(found.s.cpu().double(), -int(shift))
        top_k = prove_top_k(operator.matrices[0], found.U, s, found.V, found.certificate.residual)
        if top_k.verdict == "proven" or found.certificate.method == "svd":
            break
    return dataclasses.replace(found, certificate=dataclasses.replace(found.certificate, top_k=top_k))


def _zero(matrix: torch.Tensor, dtype: torch.dtype, k: int) -> TruncatedSVD:
    m, n = matrix.shape
    zeros = torch.zeros(k, dtype=torch.float64)
    return TruncatedSVD(
        torch.eye(m, k, dtype=dtype, device=matrix.device),
        torch.zeros(k, dtype=dtype, device=matrix.device),
        torch.eye(n, k, dtype=dtype, device=matrix.device),
        torch.tensor(0.0, dtype=torch.float64),
        Certificate(
            residual=zeros,
            gap=zeros.clone(),
            angle_bound=torch.ones(k, dtype=torch.float64),
            converged=torch.tensor(True),
            passes=torch.tensor(0),
            method="zero",
            top_k=NOTHING_ELSE,
        ),
    )


def _finished(
    operator: Operator, solutions: Sequence[Solution], norms: torch.Tensor, shifts: torch.Tensor, tolerance: float
) -> list[TruncatedSVD]:
    """The SVDs of matrices that have been divided by ``2^shift``; their ``norms`` are those of what was divided."""
    long = torch.stack([solution.triplets.long for solution in solutions])
    short = torch.stack([solution.triplets.short for solution in solutions])
    U, V = (short, long) if operator.wide else (long, short)
    sign = pair_signs(U, V)[:, None]
    U, V = U * sign, V * sign
    scaled = [in_range(one.triplets.s, int(shift), U.dtype) for one, shift in zip(solutions, shifts, strict=True)]
    s = torch.stack(scaled).to(U.device, non_blocking=True)
    return [
        TruncatedSVD(
            U[i],
            s[i],
            V[i],
            times_power_of_two(norms[i], int(shifts[i])),
            _certificate(operator, solution, times_power_of_two(scaled[i].double(), -int(shifts[i])), norms[i], tolerance),
        )
        for i, solution in enumerate(solutions)
    ]


def _certificate(
    operator: Operator, solution: Solution, rounded: torch.Tensor, norm: torch.Tensor, tolerance: float
) -> Certificate:
    """The certificate of one matrix.

    Args:
        rounded: float64 (k,), the values as they are returned, but for the shift.
        norm: of the matrix.
    """
    triplets = solution.triplets
    s, eps = triplets.s, torch.finfo(triplets.long.dtype).eps
    top = s[0].clamp(min=1e-300)
    # Values below the normal range have few bits left, so their rounding is added to the residual.
    triplets = dataclasses.replace(triplets, residual=triplets.residual + (rounded - s).abs() / top)
    residual = triplets.residual + _MEASURED * max(1.0, norm.item() / top.item())
    gap = _gaps(s / top, residual, triplets.next_bound / top.item(), operator)
    return Certificate(
        residual=residual,
        gap=gap,
        angle_bound=(residual / gap.clamp(min=1e-300)).clamp(max=1.0),
        converged=torch.tensor(triplets.converged(tolerance)),
        passes=torch.tensor(solution.passes),
        method=solution.method,
        top_k=top_k_of(solution.search, rounded, operator.short, eps),
    )


def in_range(s: torch.Tensor, shift: int, dtype: torch.dtype) -> torch.Tensor:
    """Singular values ``2^shift s`` in ``dtype``, for float64 s (k,) on the CPU. Raises WeightError where they overflow."""
    values = times_power_of_two(s, shift).to(dtype)
    if not math.isfinite(values[0].item()):
        largest = times_power_of_two(s[0], shift).item()
        raise WeightError(f"the matrix has singular values beyond the range of {dtype}", got=largest)
    return values


def _gaps(s: torch.Tensor, residual: torch.Tensor, next_bound: float, operator: Operator) -> torch.Tensor:
    """Lower bounds on the distance of each value from all others of the matrix, over s_1, float64 (k,); 0 if none is known.

    Args:
        s, residual: float64 (k,), over s_1; next_bound: over s_1.

    The other values have errors too: at most their residual, or of second order in all residuals if there is a margin
    between them and the next value (Kahan 1967; Parlett, "The Symmetric Eigenvalue Problem", section 11.7).
    """
    margin = (s - next_bound).clamp(min=1e-300)
    error = torch.minimum(residual, residual.square().sum() / margin) + _MEASURED
    apart = s[:-1] - s[1:]
    below, above = s.new_full(s.shape, math.inf), s.new_full(s.shape, math.inf)
    below[:-1], above[1:] = apart - error[1:], apart - error[:-1]
    if len(s) < operator.short:
        below = torch.minimum(below, s - next_bound)  # what was not found may lie anywhere up to there
    elif operator.short < operator.long or len(s) == 1:
        below[-1] = s[-1]  # the long side has vectors that the matrix takes to zero
    return torch.minimum(below, above).clamp(min=0.0)


def pair_signs(U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """Signs +-1, (..., k), that make the entry of largest magnitude in each pair of columns positive.

    Looking at both vectors gives a matrix and its transpose the same signs.
    """
    u, v = (X.gather(-2, X.abs().argmax(dim=-2, keepdim=True))[..., 0, :] for X in (U, V))
    decisive = torch.where(u.abs() >= v.abs(), u, v)
    return torch.where(decisive < 0, -1.0, 1.0).to(U.dtype)
