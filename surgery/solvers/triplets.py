"""Solvers for the leading singular triplets of a matrix, and their candidates with measured residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from surgery.device import downloaded
from surgery.solvers.dense import svd, svd_on_host
from surgery.solvers.lanczos import RitzVectors, basis_rows, block_lanczos, block_size
from surgery.solvers.limits import ROUNDING
from surgery.solvers.operator import Operator, widened, widened_bytes
from surgery.solvers.orthonormal import orthonormal_rows, orthonormal_together
from surgery.solvers.product import leading_dimension
from surgery.solvers.search import Decomposed, Search
from surgery.solvers.subspace import leading_eigenvectors
from surgery.torch_threads import one_thread_each

#: A block of b vectors sees at most b copies of a repeated value; values this close, relatively, count as copies.
_CLUSTER = 1e-3
_MAX_ROUNDS = 4
#: The largest shorter side with which the Gram matrix is a fallback: the eigenproblem of a larger one takes too long.
_MAX_GRAM = 2048
#: Entries up to which a float64 matrix gets a full SVD if its Gram matrix has lost the small values: about a second.
_MAX_FULL = 1 << 20
#: A value counts as known if its residual is at most this share of it.
_KNOWN = 1e-2


@dataclass(frozen=True, slots=True)
class Triplets:
    """A candidate for the k leading singular triplets of one matrix, seen from its shorter side.

    Attributes:
        long: (long, k) in the working precision.
        s: float64 (k,) on the CPU.
        short: (short, k) in the working precision.
        residual: float64 (k,) on the CPU, the larger of both sides, over s_1, measured in float64.
        next_bound: how large the next singular value may be, as far as the iteration can tell; 0 if there is none.
    """

    long: torch.Tensor
    s: torch.Tensor
    short: torch.Tensor
    residual: torch.Tensor
    next_bound: float

    def converged(self, tolerance: float) -> bool:
        """Whether each residual is below ``tolerance * s_1`` and ``100 * tolerance * s_i``, as far as rounding allows."""
        return bool((self.residual <= allowed_residuals(self.s, tolerance, self.long.dtype)).all())

    def known(self) -> bool:
        """Whether each residual is at most 1 % of its value, or the rounding of the working precision."""
        share = self.s / self.s[0].clamp(min=1e-300)
        return bool((self.residual <= (_KNOWN * share).clamp(min=torch.finfo(self.long.dtype).eps)).all())

    def last(self) -> bool:
        """Whether the next singular value is known to be no larger than the last one, up to 1 % or to rounding.

        A tiny last value alone does not prove that: the iteration may have missed a larger one.
        """
        rounding = torch.finfo(self.long.dtype).eps * self.s[0].item()
        return self.next_bound <= max((1 + _KNOWN) * self.s[-1].item(), rounding)


@dataclass(frozen=True, slots=True)
class Solution:
    """What an engine has found of one matrix.

    Attributes:
        method: the engine.
        triplets: the leading ones.
        passes: over the matrix.
        search: how they were found.
    """

    method: str
    triplets: Triplets
    passes: int
    search: Search | Decomposed


def allowed_residuals(s: torch.Tensor, tolerance: float, dtype: torch.dtype) -> torch.Tensor:
    """The largest residuals (k,), over s_1, that converged triplets may have, for values s (k,) and vectors in ``dtype``."""
    floor = ROUNDING * torch.finfo(dtype).eps
    relative = 100 * tolerance * s / s[0].clamp(min=1e-300)
    return relative.clamp(max=tolerance).clamp(min=floor)


def engine(short: int, k: int) -> str:
    """The solver for k triplets of matrices with this shorter side: ``svd``, ``gram`` or ``block-lanczos``."""
    if k > short // 2 or short <= 64:
        return "svd"
    if short <= 512 or k > short // 6:
        return "gram"
    return "block-lanczos"


def workspace_bytes(m: int, n: int, k: int, dtype: torch.dtype) -> int:
    """Upper estimate of the memory that solving one (m, n) matrix of ``dtype`` takes besides the matrix."""
    short = min(m, n)
    width = leading_dimension(m, n, torch.device("cpu"))
    copy = 4 * m * width if dtype.itemsize < 4 or (dtype == torch.float32 and width > n) else 0
    vectors = 48 * k * (m + n) + widened_bytes(m, n)
    match engine(short, k):
        case "svd":
            dense = 8 * 4 * m * n
        case "gram":
            dense = 8 * 6 * short**2
        case _:
            dense = dtype.itemsize if dtype == torch.float64 else 4
            dense *= basis_rows(k) * (m + n)
            if short <= _MAX_GRAM:  # where the iteration may fall back on
                dense = max(dense, 8 * 6 * short**2)
    if dtype == torch.float64 and m * n <= _MAX_FULL:
        dense = max(dense, 8 * 4 * m * n)
    return copy + vectors + dense


def solve(operator: Operator, k: int, tolerance: float, seed: int) -> list[Solution]:
    """For each matrix of a batch: the k leading triplets, by which solver, and in how many passes.

    If the iteration does not converge or leaves a value in doubt, the Gram matrix is tried, unless the matrix is too large;
    and after that a full SVD, if the matrix is float64 and small.
    """
    match engine(operator.short, k):
        case "svd":
            return _each(operator, lambda single: _full_svd(single, k))
        case "gram":
            return _gram(operator, k, tolerance, seed)
        case _:
            return _lanczos(operator, k, tolerance, seed)


def _each(operator: Operator, one: Callable[[Operator], Solution]) -> list[Solution]:
    """Solve each matrix by itself; on a CPU several at once, with one thread each."""
    singles = [operator.one(i) for i in range(len(operator))]
    workers = min(len(singles), torch.get_num_threads())
    if operator.matrices.device.type != "cpu" or workers == 1:
        return [one(single) for single in singles]
    with one_thread_each(workers) as pool:
        return list(pool.map(one, singles))


def _lanczos(operator: Operator, k: int, tolerance: float, seed: int) -> list[Solution]:
    block = min(block_size(k, operator), operator.short - 1)
    ritz, begun = block_lanczos(operator, k, tolerance=tolerance, block=block, seed=seed)
    found = []
    for i, candidate in enumerate(from_pairs(operator, ritz)):
        single = operator.one(i)
        triplets, search = _settled(single, candidate, begun, tolerance, seed)
        if (triplets.converged(tolerance) and triplets.known()) or single.short > _MAX_GRAM:
            found.append(Solution("block-lanczos", triplets, single.passes, search))
        else:
            found += _gram(single, k, tolerance, seed)
    return found


def _settled(operator: Operator, best: Triplets, search: Search, tolerance: float, seed: int) -> tuple[Triplets, Search]:
    """Further rounds for one matrix, if the first has not converged or may have missed copies of a repeated value."""
    k, block, widest = len(best.s), search.rows, operator.short - 1
    if block < min(k, widest) and clustered(best.s, block):
        # Residuals cannot show that a copy of a repeated value is missing, so try again with a block wider than k.
        block = min(k + 8, widest)
        ritz, search = block_lanczos(operator, k, tolerance=tolerance, block=block, seed=seed)
        best = from_pairs(operator, ritz)[0]
    for _ in range(_MAX_ROUNDS - 1):
        if best.converged(tolerance):
            break
        # Small values of a graded spectrum need vectors from float64 products.
        candidates = [_from_rows(operator, best.short.T, best.next_bound)]
        if not candidates[0].converged(tolerance):
            block, start = min(max(block, k), widest), candidates[0].short.T[None]
            ritz, _ = block_lanczos(operator, k, tolerance=tolerance, block=block, seed=seed + 1, start=start)
            candidates += from_pairs(operator, ritz)
        best = min([best, *candidates], key=lambda triplets: triplets.residual.max().item())
    return best, search


def clustered(s: torch.Tensor, block: int) -> bool:
    first, last = s[: len(s) - block + 1], s[block - 1 :]
    return bool((first - last <= _CLUSTER * first).any())


def _gram(operator: Operator, k: int, tolerance: float, seed: int) -> list[Solution]:
    """Solve by the Gram matrices of the short side: in the working precision, and in float64 where that is not enough."""
    if operator.matrices.dtype == torch.float64:
        return [_gram_wide(operator.one(i), k, tolerance, seed) for i in range(len(operator))]
    found = []
    for i, (triplets, search) in enumerate(_from_gram(operator, operator.gram(), k, tolerance, seed)):
        single = operator.one(i)
        if triplets.converged(tolerance) and triplets.known() and triplets.last():
            found.append(Solution("gram", triplets, single.passes, search))
        else:
            found.append(_gram_wide(single, k, tolerance, seed))
    return found


def _gram_wide(operator: Operator, k: int, tolerance: float, seed: int) -> Solution:
    """Solve one matrix by its Gram matrix in float64.

    This resolves values down to 1e-8 s_1: enough for vectors that are rounded to float32, but not for float64 ones.
    """
    triplets, search = _from_gram(operator, operator.gram_wide(), k, tolerance, seed)[0]
    matrices = operator.matrices
    small = matrices.dtype == torch.float64 and matrices.numel() <= _MAX_FULL
    if small and not (triplets.converged(tolerance) and triplets.known() and triplets.last()):
        return _full_svd(operator, k)
    return Solution("gram", triplets, operator.passes, search)


def _from_gram(
    operator: Operator, gram: torch.Tensor, k: int, tolerance: float, seed: int
) -> list[tuple[Triplets, Search | Decomposed]]:
    rows, values, searches = leading_eigenvectors(gram, k, tolerance=tolerance / 2, seed=seed)
    short = rows.to(operator.matrices.dtype).to(operator.matrices.device).contiguous()
    ritz = RitzVectors(short, operator.to_long(short), values[:, -1].clamp(min=0).sqrt())
    found = from_pairs(operator, ritz)
    for i, triplets in enumerate(found):
        if not triplets.converged(tolerance):
            found[i] = _from_rows(operator.one(i), rows[i], triplets.next_bound)
    # Any order of the sums in a Gram matrix: Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.5.
    error = operator.long * torch.finfo(gram.dtype).eps + operator.short * torch.finfo(torch.float64).eps
    (traces,) = downloaded(widened(gram.diagonal(0, 1, 2)).sum(dim=1))
    limits = (values[:, -1].clamp(min=0) + error * traces).sqrt().tolist()
    return [(found[i], search or Decomposed(limits[i])) for i, search in enumerate(searches)]


def _full_svd(operator: Operator, k: int) -> Solution:
    matrix = widened(operator.matrices[0])
    operator.passes += 1
    left, s, right = svd(matrix.T if operator.wide else matrix)
    s = s.cpu()
    next_bound = s[k].item() + ROUNDING * torch.finfo(s.dtype).eps * s[0].item() if k < len(s) else 0.0
    short = right[None, :k].contiguous()
    long = left[None, :, :k].mT.contiguous()
    to_long, to_short = operator.to_long_wide(short), operator.to_short_wide(long)
    triplets = _measured(operator, _WideTriplets(long, s[None, :k], short, to_long, to_short), [next_bound])[0]
    return Solution("svd", triplets, operator.passes, Decomposed(next_bound))


def from_pairs(operator: Operator, ritz: RitzVectors) -> list[Triplets]:
    """Triplets by a Rayleigh-Ritz step in float64 with the spaces of both sides, in one pass over the matrices."""
    short, long = orthonormal_together(widened(ritz.rows), widened(ritz.images))
    to_long, to_short = operator.both_wide(short, long)
    left, s, right = svd_on_host(torch.bmm(long, to_long.mT))
    left, right = (part.to(long.device, non_blocking=True) for part in (left, right))
    wide = _WideTriplets(left.mT @ long, s, right @ short, right @ to_long, left.mT @ to_short)
    return _measured(operator, wide, ritz.next_bound.tolist())


def _from_rows(operator: Operator, rows: torch.Tensor, next_bound: float) -> Triplets:
    """Triplets of one matrix from a nearly orthonormal basis (k, short) of the space on its short side, in float64."""
    basis = orthonormal_rows(widened(rows)[None])
    images = operator.to_long_wide(basis)
    q, r = torch.linalg.qr(images[0].T)
    left, s, right = svd(r.cpu())
    left, right = left.to(q.device), right.to(q.device)
    long, short, to_long = (q @ left).T.contiguous()[None], right @ basis, right @ images
    wide = _WideTriplets(long, s[None], short, to_long, operator.to_short_wide(long))
    return _measured(operator, wide, [next_bound])[0]


@dataclass(frozen=True, slots=True)
class _WideTriplets:
    """Triplets of the matrices of a batch in float64, with the vectors as rows.

    Attributes:
        long, short: (B, k, long), (B, k, short).
        s: (B, k), on the CPU.
        to_long, to_short: the products of the matrices with ``short`` and ``long``.
    """

    long: torch.Tensor
    s: torch.Tensor
    short: torch.Tensor
    to_long: torch.Tensor
    to_short: torch.Tensor


def _measured(operator: Operator, wide: _WideTriplets, next_bounds: Sequence[float]) -> list[Triplets]:
    """Round float64 vectors to the working precision, and measure how far the rounded ones are from singular vectors.

    The rounding of the vectors, times the norm of the matrix, is added to what their products give, so that no product of
    the rounded ones is needed.
    """
    long, s, short = wide.long, wide.s, wide.short
    matrices = operator.matrices
    rounded_long, rounded_short = long.to(matrices.dtype), short.to(matrices.dtype)
    wide_long, wide_short = rounded_long.double(), rounded_short.double()
    values = s.to(long.device, non_blocking=True)[:, :, None]
    told = downloaded(
        (wide.to_long - wide_long * values).norm(dim=2),
        (wide.to_short - wide_short * values).norm(dim=2),
        (wide_short - short).norm(dim=2),
        (wide_long - long).norm(dim=2),
    )
    top = s[:, :1].clamp(min=1e-300)
    residual = torch.maximum(told[0] / top + told[2], told[1] / top + told[3])
    # Rounded before they are moved: not every device knows float64.
    U, V = (vectors.to(matrices.device).mT.contiguous() for vectors in (rounded_long, rounded_short))
    return [Triplets(U[i], s[i], V[i], residual[i], value) for i, value in enumerate(next_bounds)]


def residuals_of(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """``max(|A v - s u|, |A^T u - s v|) / s_1`` of given triplets, in float64.

    Args:
        A: (m, n), any floating dtype; U (m, k), s (k,), V (n, k) on its device.

    Returns:
        float64 (k,) on the CPU.
    """
    operator = Operator(A[None])
    left, right = widened(U).T[None].contiguous(), widened(V).T[None].contiguous()
    short, long = (left, right) if operator.wide else (right, left)
    to_long, to_short = operator.both_wide(short, long)
    values = widened(s)[:, None]
    worst = torch.maximum((to_long - long * values).norm(dim=2), (to_short - short * values).norm(dim=2))
    return (worst[0] / values[0].clamp(min=1e-300)).cpu()
