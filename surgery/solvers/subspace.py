"""The leading eigenvectors of dense symmetric positive semidefinite matrices by Chebyshev-filtered subspace iteration.

For Gram matrices of small matrices, where a full eigendecomposition would cost many times as much. The matrices of a
batch advance together, each with its own filter. Source: Zhou, Saad, Tiago, Chelikowsky, "Self-consistent-field
calculations using Chebyshev-filtered subspace iteration" (J. Comput. Phys. 219, 2006).
"""

from __future__ import annotations

import math

import torch

from surgery.device import downloaded
from surgery.solvers.dense import eigh, eigh_on_host
from surgery.solvers.lanczos import BEYOND_RESIDUAL
from surgery.solvers.operator import widened
from surgery.solvers.orthonormal import orthonormal_rows
from surgery.solvers.random import generator_of
from surgery.solvers.search import Search
from surgery.torch_threads import one_thread_each

_MAX_ROUNDS = 20
_MAX_DEGREE = 16
#: The most by which a filter may magnify the first direction over the last: else the last ones are lost in rounding.
_MAX_CONTRAST = {torch.float32: 1e12, torch.float64: 1e10}
#: Residuals and eigenvalues below this share of the largest eigenvalue are rounding errors.
_FLOOR = {torch.float32: 5e-7, torch.float64: 1e-14}
#: Units of the precision of a Gram matrix, over the largest eigenvalue, by which its small eigenvalues may be wrong.
_ROUNDING = 2
#: Directions of eigenvalues below this share of the largest are lost in the rounding of the two products that make the start
#: block. It may by chance keep some of them exactly; then no residual shows that others are missing.
_VISIBLE = {dtype: math.sqrt(torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)}
#: If a round leaves more than this share of the residuals, the limit of the precision is reached.
_STALLED = 0.7


def leading_eigenvectors(
    G: torch.Tensor, k: int, *, tolerance: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[Search | None]]:
    """The k largest eigenvalues of each matrix and their vectors.

    Args:
        G: (B, n, n), symmetric, positive semidefinite; float32, or float64.
        k: ``1 <= k <= n``.
        tolerance: with sigma the square root of an eigenvalue, ``|G v - sigma^2 v|`` is brought below ``tolerance
            sigma_1 sigma`` and below ``100 tolerance sigma^2``, as far as the precision of G allows. The caller has to
            check that.
        seed: of the random start block, drawn on the CPU.

    Returns:
        (B, k, n) orthonormal rows in the dtype of G; float64 (B, k + 1): the k values, descending, and an upper
        estimate of the next one, or zero for k = n; and the search of each matrix, None where all eigenvalues were computed.
    """
    count, n = G.shape[:2]
    width = k + max(8, k // 2)
    searches: list[Search | None] = [None] * count
    if width > n // 4:
        rows, values = _decompose(G, range(count), k)
    else:
        rows, values, filters, settled = _iterate(G, k, width, tolerance, seed)
        left = [i for i in range(count) if not settled[i]] if G.dtype == torch.float64 else []
        if left:
            rows[left], values[left] = _decompose(G, left, k)
        for i in set(range(count)) - set(left):
            searches[i] = Search(width, filters=tuple(filters[i]))
    if k < n:
        values[:, k] = values[:, k].clamp(min=0) + _ROUNDING * torch.finfo(G.dtype).eps * values[:, 0]
    return rows, values, searches


def _decompose(G: torch.Tensor, which: range | list[int], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``leading_eigenvectors`` of the matrices ``which`` by full eigendecompositions in float64."""

    def one(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        wide = widened(G[i])
        values, vectors = eigh((wide + wide.T) / 2)
        return vectors.T[-k:].flip(0), torch.cat([values.flip(0), values.new_zeros(1)])[: k + 1]

    workers = min(len(which), torch.get_num_threads()) if G.device.type == "cpu" else 1
    if workers > 1:
        with one_thread_each(workers) as pool:
            found = list(pool.map(one, which))
    else:
        found = [one(i) for i in which]
    return torch.stack([rows for rows, _ in found]).to(G), torch.stack([values for _, values in found]).cpu()


def _iterate(
    G: torch.Tensor, k: int, width: int, tolerance: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[list[tuple[float, int]]], list[bool]]:
    """``leading_eigenvectors`` by iteration, without an allowance for the rounding of G; filters, and which converged."""
    count, n = G.shape[:2]
    floor, visible = _FLOOR[G.dtype], _VISIBLE[G.dtype]
    rows = G.new_empty(count, k, n)
    found = torch.empty(count, k + 1, dtype=torch.float64)
    settled = [False] * count
    filters: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    generator = generator_of(seed)
    start = torch.randn(width, n, generator=generator, dtype=torch.float32).to(G.dtype).to(G.device, non_blocking=True)
    block = orthonormal_rows(widened(start @ G @ G)).to(G)
    active, before = list(range(count)), [float("inf")] * count
    for round_number in range(_MAX_ROUNDS):
        images = torch.bmm(block, G)
        values, turn = eigh_on_host(torch.bmm(widened(images), widened(block).mT))
        values = values.flip(1)
        turn = turn.mT.flip(1).to(G.dtype).to(G.device, non_blocking=True)
        block, images = torch.bmm(turn, block), torch.bmm(turn, images)
        top, edge = values[:, :1], values[:, -1:]
        sigma = values[:, :k].clamp(min=0).sqrt()
        allowed = torch.minimum(tolerance * sigma[:, :1] * sigma, 100 * tolerance * values[:, :k])
        allowed = torch.maximum(allowed, floor * top)
        scales = values[:, : k + 1, None].to(G.dtype).to(G.device, non_blocking=True)
        lengths = downloaded((images[:, : k + 1] - block[:, : k + 1] * scales).norm(dim=2))[0].double()
        worst = (lengths[:, :k] / allowed).amax(dim=1)
        degrees = _degrees(values, worst, k, edge, floor, _MAX_CONTRAST[G.dtype])
        going, stopped = [], []
        told = torch.stack([worst, degrees.to(worst), edge[:, 0]], dim=1).tolist()
        for j, (i, (far, degree, low)) in enumerate(zip(active, told, strict=True)):
            settled[i] = far <= 1 and bool(values[j, k - 1] >= visible * values[j, 0])
            if far > 1 and degree >= 2 and far < before[i] * _STALLED and round_number < _MAX_ROUNDS - 1:
                going.append(j)
                before[i] = far
                filters[i].append((low, int(degree)))
            else:
                stopped.append(j)
                found[i] = values[j, : k + 1]
                found[i, k] = (found[i, k] + BEYOND_RESIDUAL * lengths[j, k]).clamp(min=visible * values[j, 0])
        if stopped:
            into = _index([active[j] for j in stopped], G.device)
            rows.index_copy_(0, into, block[:, :k].index_select(0, _index(stopped, G.device)))
        if not going:
            break
        if stopped:
            active, edge, degrees = [active[j] for j in going], edge[going], degrees[going]
            G, block, images = (x.index_select(0, _index(going, G.device)) for x in (G, block, images))
        block = orthonormal_rows(widened(_filtered(G, block, images, edge, degrees))).to(G)
    return rows, found, filters, settled


def _index(places: list[int], device: torch.device) -> torch.Tensor:
    """As an index on a device, which the program does not wait for."""
    return torch.tensor(places).to(device, non_blocking=True)


def _degrees(
    values: torch.Tensor, worst: torch.Tensor, k: int, edge: torch.Tensor, floor: float, contrast: float
) -> torch.Tensor:
    """Degrees of the filters, int (B,): enough for the k-th direction, but not too many for the first; 0 if none helps."""
    top = values[:, :1]
    usable = edge > floor * top

    def growth(value: torch.Tensor) -> torch.Tensor:
        """The logarithm of the factor by which one more degree magnifies a direction."""
        return torch.acosh((2 * value / torch.where(usable, edge, 1.0) - 1).clamp(min=1.0))[:, 0]

    needed = (3 * worst).log() / growth(values[:, k - 1 : k]).clamp(min=1e-2)
    affordable = math.log(contrast) / growth(top).clamp(min=1e-4)
    degrees = torch.minimum(needed + 1, affordable).clamp(max=_MAX_DEGREE).floor()
    return torch.where(usable[:, 0], degrees, 0.0).int()


def _filtered(
    G: torch.Tensor, block: torch.Tensor, images: torch.Tensor, edge: torch.Tensor, degrees: torch.Tensor
) -> torch.Tensor:
    """The Chebyshev polynomials that stay below one on [0, edge] applied to ``block``; ``images = block G``.

    Args:
        G: (B, n, n); block, images (B, b, n), on its device.
        edge: float64 (B, 1) on the CPU.
        degrees: int (B,) on the CPU, 2 or more.
    """
    half = (edge / 2).to(G.dtype).to(G.device, non_blocking=True)[:, :, None]
    before, now = block, (images - half * block) / half
    final = now
    least, most = int(degrees.min()), int(degrees.max())
    # Filters whose degree is reached are not changed any more: too high a degree would overflow.
    growing = (degrees >= torch.arange(most + 1)[:, None]).to(G.device, non_blocking=True)[:, :, None, None]
    if G.device.type != "cpu":  # a GPU would rather have one operation more on G than four on each of its products
        turned = G / half
        turned.diagonal(0, 1, 2).sub_(1)
    for degree in range(2, most + 1):
        if G.device.type == "cpu":
            before, now = now, (torch.bmm(now, G) / half - now).mul_(2).sub_(before)
        else:
            before, now = now, torch.baddbmm(before, now, turned, beta=-1, alpha=2)
        final = now if degree <= least else torch.where(growing[degree], now, final)
    return final
