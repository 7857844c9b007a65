"""The effective rank of a matrix: of all its singular values, or estimated where there are too many to compute.

Effective rank: Roy, Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), here of the
squared values, so that it is the exponential of the entropy of the energy. Stochastic Lanczos quadrature: Ubaru, Chen,
Saad, "Fast estimation of tr(f(A))" (SIAM J. Matrix Anal. 38, 2017). Control variates: Glasserman, "Monte Carlo methods
in financial engineering" (2003), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.linalg.preparation import in_working_precision
from surgery.linalg.svd import TruncatedSVD
from surgery.lossless.rounding import times_power_of_two
from surgery.precision import full_precision
from surgery.solvers.operator import Operator
from surgery.solvers.random import generator_of

#: Up to this many values, of a matrix of so many entries, all of them are computed.
_EXACT_SIZE = 1024
_EXACT_ENTRIES = 1 << 22
#: Probes: products with fewer rows take as long. Steps: more change less than the probes leave open (docs/study.md).
_PROBES = 16
_STEPS = 8
#: By so many steps fewer the error of the quadrature is told.
_FEWER = 2
#: Nodes that spread less than this, of their mean, determine no slope.
_SPREAD = 1e-6


def effective_rank(A: torch.Tensor, svd: TruncatedSVD, seed: int) -> tuple[float, float]:
    """The effective rank, and its standard error; 0 where it was computed from all values.

    Args:
        A: (m, n), any real floating dtype, any device.
        svd: of A, its leading triplets or all.
        seed: of the probes.
    """
    energy = svd.norm.item() ** 2
    if energy == 0:
        return 0.0, 0.0
    squares = svd.s.double().cpu().square()
    if len(squares) < min(A.shape) <= _EXACT_SIZE and A.numel() <= _EXACT_ENTRIES:
        # Of float32 weights the squares of all values are float64 numbers, to its rounding of their sum: no SVD is needed.
        matrix = A.double().cpu()
        gram = matrix @ matrix.T if A.shape[0] < A.shape[1] else matrix.T @ matrix
        squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    leading = -torch.special.xlogy(squares / energy, squares / energy).sum().item()
    if len(squares) == min(A.shape):
        return math.exp(leading), 0.0
    tail, error = _tail_entropy(A, svd, seed)
    return math.exp(leading + tail), math.exp(leading + tail) * error


def _tail_entropy(A: torch.Tensor, svd: TruncatedSVD, seed: int) -> tuple[float, float]:
    """The entropy of all values but the leading ones, and its standard error.

    Stochastic Lanczos quadrature for the trace of ``-x log x`` of ``x = A^T A / energy`` on the complement of the leading
    vectors of the short side. Three things are known and not estimated: the leading values; the dimension, to which each
    probe is scaled; and the trace of x, so that only that of ``-x log(x / mean)`` is left, less the multiple of x with which
    it varies least from probe to probe.
    """
    energy = svd.norm.item() ** 2
    share = 1 - svd.s.double().square().sum().item() / energy
    if share <= 0:  # the rounding of the norm
        return 0.0, 0.0
    work, norm = in_working_precision(A[None]), svd.norm.item()
    exponent = math.frexp(norm)[1]
    if not -12 <= exponent <= 24:
        # Squares of the entries must neither overflow nor vanish. A power of two changes no bit.
        work, norm = times_power_of_two(work, -exponent), math.ldexp(norm, -exponent)
    operator = Operator(work, A.shape[1])
    known = (svd.U if operator.wide else svd.V).T.to(work)
    start = torch.randint(0, 2, (_PROBES, operator.short), generator=generator_of(seed)).to(work) * 2 - 1

    def apart(rows: torch.Tensor) -> torch.Tensor:
        return rows - (rows @ known.T) @ known

    def product(rows: torch.Tensor) -> torch.Tensor:
        return apart(operator.to_short(operator.to_long(rows[None]))[0] / norm**2)

    dimension = operator.short - len(known)
    with torch.no_grad(), full_precision(A.device):
        rows = apart(start)
        lengths = rows.double().norm(dim=1, keepdim=True)
        T = _lanczos(product, rows / lengths.to(rows), min(_STEPS, dimension))
    mean = share / dimension
    steps = T.shape[1]
    found, spread = _quadrature(T, mean)
    # What the last steps changed is more than what further ones would.
    change = abs(found - _quadrature(T[:, : steps - _FEWER, : steps - _FEWER], mean)[0]) if _FEWER < steps < dimension else 0.0
    return share * (found - math.log(mean)), share * math.hypot(spread, change)


def _quadrature(T: torch.Tensor, mean: float) -> tuple[float, float]:
    """The mean of ``-y log y``, with y the values over their known mean, and its standard error.

    Args:
        T: float64 (b, steps, steps), the tridiagonal matrices of the probes.
        mean: of the values.
    """
    nodes, vectors = torch.linalg.eigh(T)
    nodes, weights = nodes.clamp(min=0) / mean, vectors[:, 0].square()
    values = -torch.special.xlogy(nodes, nodes)
    means, known = (weights * values).sum(dim=1), (weights * nodes).sum(dim=1)
    aside = nodes - known.mean()
    variance = (weights * aside.square()).sum() / len(T)
    # The tangent at the mean where there is no spread to fit a line to.
    slope = (weights * aside * values).sum() / len(T) / variance if variance > _SPREAD else -1.0
    estimates = means - slope * (known - 1)
    return estimates.mean().item(), estimates.std().item() / math.sqrt(len(T) - 1)


def _lanczos(product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int) -> torch.Tensor:
    """The tridiagonal matrices (b, steps, steps), float64 on the CPU, of unit rows (b, n), each on its own."""
    basis = start.new_empty(len(start), steps, start.shape[1])
    basis[:, 0] = start
    T = torch.zeros(len(start), steps, steps, dtype=torch.float64)
    for step in range(steps):
        image = product(basis[:, step])
        alpha = (image * basis[:, step]).double().sum(dim=1)
        T[:, step, step] = alpha.cpu()
        if step == 0:
            least = 1e-7 * alpha.abs().clamp(min=1e-30)
        if step + 1 == steps:
            break
        # Twice against all before: the numbers must be those of exact arithmetic, not ghosts of converged ones.
        before = basis[:, : step + 1]
        for _ in range(2):
            image = image - torch.bmm(torch.bmm(image[:, None], before.mT), before)[:, 0]
        lengths = image.double().norm(dim=1)
        # An exhausted space gives noise, which a coupling of 0 keeps out.
        alive = lengths > least
        T[:, step, step + 1] = T[:, step + 1, step] = torch.where(alive, lengths, 0.0).cpu()
        basis[:, step + 1] = torch.where(alive[:, None], image / lengths.clamp(min=1e-30).to(image)[:, None], 0.0)
    return T
