"""Bases of Krylov spaces, block by block; ``surgery.solvers.lanczos`` iterates with them, and names the sources."""

from __future__ import annotations

from functools import partial

import torch

from surgery.device import downloaded
from surgery.memory import scratch
from surgery.solvers.basis import Basis
from surgery.solvers.dense import eigh
from surgery.solvers.operator import Operator, wide_device, widened
from surgery.solvers.random import generator_of
from surgery.solvers.repair import NOISE, repaired


class KrylovBasis(Basis):
    """Orthonormal bases of Krylov spaces, their images, and the projections of C on them."""

    def __init__(self, operator: Operator, *, limit: int, block: int, seed: int) -> None:
        super().__init__(operator, limit, block)
        matrices = operator.matrices
        count = len(operator)
        rows = self.limit + block
        self._rows = scratch("basis", (count, rows, operator.short), matrices.dtype, matrices.device)
        self._images = scratch("images", (count, self.limit, operator.long), matrices.dtype, matrices.device)
        self._wide = wide_device(matrices)
        self._projected = torch.zeros(count, rows, rows, dtype=torch.float64, device=self._wide)
        self._coupling = torch.zeros(count, 0, 0, dtype=torch.float64, device=self._wide)
        self._top = torch.zeros(count, 1, dtype=torch.float64, device=self._wide)  # longest image so far
        # One generator for each matrix: its random rows must not depend on the other matrices of the batch.
        self._generators = [generator_of(seed) for _ in range(count)]

    def alone(self, i: int) -> KrylovBasis:
        """The basis of matrix i, in the same memory: a step of it changes this one."""
        single = KrylovBasis.__new__(KrylovBasis)
        # The operator of a single matrix may be of a kind of its own, which its parts are not.
        single.operator = self.operator if len(self.operator) == 1 else self.operator.one(i)
        single.block, single.limit = self.block, self.limit
        single._rows, single._images = self._rows[i : i + 1], self._images[i : i + 1]
        single._wide, single._projected = self._wide, self._projected[i : i + 1]
        single._coupling, single._top = self._coupling[i : i + 1], self._top[i : i + 1]
        single._generators = self._generators[i : i + 1]
        single.size, single._pending, single._last = self.size, self._pending, self._last
        single._steps, single._whole = self._steps, self._whole
        return single

    def begin(self, start: torch.Tensor | None) -> None:
        """Begin with ``start`` and random rows after it. The order is kept: mixing rows would lose small values in rounding."""
        width = min(self.block, self.limit) - (0 if start is None else start.shape[1])
        more = self._same_random(width).to(self._rows).repeat(len(self.operator), 1, 1)
        start = more if start is None else torch.cat([start, more], dim=1)
        self._append(start, torch.zeros(start.shape[:2], dtype=torch.float64, device=self._wide))

    def step(self) -> None:
        """Multiply the pending rows by C and orthonormalise the result into the next ones."""
        first, stop = self.size, self.size + self._pending
        images = self.operator.to_long(self._rows[:, first:stop])
        self._images[:, first:stop] = images
        products = self.operator.to_short(images)
        self.size, self._last = stop, self._pending
        self._steps += self._whole
        known = self._rows[:, :stop]
        coefficients = torch.bmm(products, known.mT)
        products = torch.baddbmm(products, coefficients, known, alpha=-1)
        projected = widened(coefficients)
        # The diagonal holds the squared lengths of the images. The rounding error of a product is proportional to the
        # length of its own image and to the norm of B.
        lengths = projected.diagonal(first, 1, 2).clamp(min=0).sqrt()
        self._top = torch.maximum(self._top, lengths.amax(dim=1, keepdim=True))
        noise = NOISE * self._top * lengths
        # Only the lower triangle is set, since eigh reads nothing else.
        self._projected[:, first:stop, :stop] = projected + self._append(products, noise)

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ritz values (B, size), descending, their coefficients (columns) and residual norms; float64, on the CPU."""
        projected, coupling = downloaded(self._projected[:, : self.size, : self.size], self._coupling)
        return self._described(*eigh(projected), coupling)

    def _described(
        self, values: torch.Tensor, vectors: torch.Tensor, coupling: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``ritz`` gives, of the eigenvalues of the projection, ascending, and its eigenvectors."""
        values, vectors = values.flip(1), vectors.flip(2)
        return values, vectors, (coupling.mT @ vectors[:, self.size - self._last :]).norm(dim=1)

    def combine(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, size, c) coefficients -> (B, c, short) rows and (B, c, long) images."""
        turned = coefficients.mT.to(self._rows.dtype).to(self._rows.device, non_blocking=True)
        return turned @ self._rows[:, : self.size], turned @ self._images[:, : self.size]

    def restart(self, values: torch.Tensor, vectors: torch.Tensor, keep: int) -> None:
        """Shrink the basis to its leading Ritz vectors and go on from the pending rows."""
        pending = self._rows[:, self.size : self.size + self._pending].clone()
        self._rows[:, :keep], self._images[:, :keep] = self.combine(vectors[:, :, :keep])
        self._projected.zero_()
        self._whole = False
        self._projected.diagonal(0, 1, 2)[:, :keep] = values[:, :keep]
        self.size = keep
        self._append(pending, torch.zeros(pending.shape[:2], dtype=torch.float64, device=self._wide))

    def _append(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Orthonormalise ``rows`` (B, b, short), nearly free of the basis, and store them as the next block.

        A direction no longer than the ``noise`` (B, b) of its row is rounding error. Such directions are replaced by
        random ones, so that the block keeps its width and finds copies of a repeated value; their coupling to the
        previous block is zero.

        Returns:
            float64 (B, b, size), the coefficients of that part of ``rows`` that was still in the basis.
        """
        room = min(self.block, self.operator.short - self.size)
        known = self._rows[:, : self.size]
        self._pending = room
        if rows.shape[1] == room:
            block, coupling, still, sound = _orthonormalised(rows, known, noise)
        else:
            count, width, short = rows.shape
            block, sound = rows.new_empty(count, room, short), [room == 0] * count
            coupling = torch.zeros(count, width, room, dtype=torch.float64, device=self._wide)
            still = torch.zeros(count, width, self.size, dtype=torch.float64, device=self._wide)
        for i, done in enumerate(sound):
            if not done:
                block[i], coupling[i] = repaired(rows[i], noise[i], known[i], room, partial(self._random, i))
                still[i] = 0
        self._rows[:, self.size : self.size + room] = block
        self._coupling = coupling
        return still

    def _random(self, i: int, count: int) -> torch.Tensor:
        """(count, short), the next random rows of matrix i; float32, on the CPU."""
        rows = torch.randn(count, self.operator.short, generator=self._generators[i], dtype=torch.float32)
        rows /= rows.norm(dim=1, keepdim=True)
        return rows

    def _same_random(self, count: int) -> torch.Tensor:
        """(count, short), the next random rows of all matrices, of which none has been given others yet."""
        rows = self._random(0, count)
        for generator in self._generators[1:]:
            generator.set_state(self._generators[0].get_state())
        return rows


def _orthonormalised(
    rows: torch.Tensor, known: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[bool]]:
    """Orthonormalise rows (B, b, short) by Cholesky QR, twice with a projection between; they must be well conditioned.

    Returns:
        orthonormal rows (B, b, short); float64 coupling (B, b, b) and ``still`` (B, b, size) with
        ``rows = coupling rows' + still known``; for each matrix, whether that worked.
    """
    wide = widened(rows)
    factor, info = torch.linalg.cholesky_ex(torch.bmm(wide, wide.mT))
    # Each entry of the diagonal is the length of a row outside the span of those before it.
    sound = (info == 0) & (factor.diagonal(0, 1, 2) > noise).all(dim=1)
    eye = torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device).expand_as(factor)
    if not (all_sound := bool(sound.all())):
        factor = torch.where(sound[:, None, None], factor, eye)
    # In float64: the inverse of an ill-conditioned factor would magnify the rounding of a float32 product.
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    block = torch.bmm(inverse, wide).to(rows)
    again = torch.bmm(block, known.mT)
    block = torch.baddbmm(block, again, known, alpha=-1)
    wide = widened(block)
    root, info = torch.linalg.cholesky_ex(torch.bmm(wide, wide.mT))
    sound &= info == 0
    block = torch.bmm(torch.linalg.solve_triangular(root, eye, upper=False).to(rows), block)
    outcome = [True] * len(rows) if all_sound and not info.any() else sound.tolist()
    return block, torch.bmm(factor, root), torch.bmm(factor, widened(again)), outcome
