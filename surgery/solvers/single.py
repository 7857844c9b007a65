"""The Krylov basis of one matrix on a CPU.

What ``surgery.solvers.krylov.KrylovBasis`` does for a batch, with fewer and smaller operations: the products of a step with a
matrix of a million entries take half a millisecond, an operation of torch some microseconds whatever its size.
"""

from __future__ import annotations

import math

import torch

from surgery.memory import scratch
from surgery.solvers.basis import Basis
from surgery.solvers.dense import eigh
from surgery.solvers.operator import Operator
from surgery.solvers.random import generator_of
from surgery.solvers.repair import NOISE, repaired

#: The least length of what is left of a row of length 1: rounding in it grows by the inverse.
_LEFT = 0.5


class SingleBasis(Basis):
    """An orthonormal basis of the Krylov space of one matrix on a CPU, its images, and the projection of C on it.

    The products of a block with C lie in that block, the one before and the next. So only the first two are taken out of them
    before they are orthonormalised, and all of the basis once after that, for rounding (Golub, Underwood, "The block Lanczos
    method for computing eigenvalues", in Rice, "Mathematical Software III", 1977). The first products after a restart lie in
    all of the basis.

    Args:
        operator: of one matrix on the CPU, float32 or float64.
        limit, block: see ``Basis``.
        seed: of the random rows.
    """

    def __init__(self, operator: Operator, *, limit: int, block: int, seed: int) -> None:
        super().__init__(operator, limit, block)
        matrix = operator.matrices[0]
        rows = self.limit + block
        self._rows = scratch("basis", (rows, operator.short), matrix.dtype, matrix.device)
        self._images = scratch("images", (self.limit, operator.long), matrix.dtype, matrix.device)
        self._projected = scratch("projected", (rows, rows), torch.float64, matrix.device)  # its lower triangle
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)
        self._top = 0.0  # longest image so far
        self._generator = generator_of(seed)
        self._near = 0  # the first of the rows in which products with C may lie

    def begin(self, start: torch.Tensor | None) -> None:
        """Begin with ``start`` (1, b, short) and random rows after it, in this order."""
        known = self._rows[:0] if start is None else start[0]
        rows = torch.cat([known, self._random(min(self.block, self.limit) - len(known))])
        self._append(rows, [0.0] * len(rows))

    def step(self) -> None:
        """Multiply the pending rows by C and orthonormalise the result into the next ones."""
        first, stop = self.size, self.size + self._pending
        images = self._images[None, first:stop]
        images.copy_(self.operator.to_long(self._rows[None, first:stop]))
        products = self.operator.to_short(images)[0]
        self.size, self._last = stop, self._pending
        self._steps += self._whole
        near = self._rows[self._near : stop]
        coefficients = products @ near.T
        products = torch.addmm(products, coefficients, near, alpha=-1)
        # The diagonal holds the squared lengths of the images. The rounding error of a product is proportional to the
        # length of its own image and to the norm of B.
        lengths = [math.sqrt(max(0.0, square)) for square in coefficients.diagonal(first - self._near).tolist()]
        self._top = max(self._top, *lengths)
        projected = self._append(products, [NOISE * self._top * length for length in lengths])
        projected[:, self._near :] += coefficients
        self._projected[first:stop, :stop] = projected
        self._near = first

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ritz values (1, size), descending, their coefficients (columns) and residual norms; float64."""
        values, vectors = eigh(self._projected[None, : self.size, : self.size])
        values, vectors = values.flip(1), vectors.flip(2)
        residuals = (self._coupling.T @ vectors[:, self.size - self._last :]).norm(dim=1)
        return values, vectors, residuals

    def combine(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, size, c) coefficients -> (1, c, short) rows and (1, c, long) images."""
        turned = coefficients[0].T.to(self._rows.dtype)
        return (turned @ self._rows[: self.size])[None], (turned @ self._images[: self.size])[None]

    def restart(self, values: torch.Tensor, vectors: torch.Tensor, keep: int) -> None:
        """Shrink the basis to its leading Ritz vectors and go on from the pending rows."""
        pending = self._rows[self.size : self.size + self._pending].clone()
        rows, images = self.combine(vectors[:, :, :keep])
        self._rows[:keep], self._images[:keep] = rows[0], images[0]
        self._projected[:keep, :keep] = values[0, :keep].diag()
        self.size, self._near, self._whole = keep, 0, False
        self._append(pending, [0.0] * len(pending))

    def _append(self, rows: torch.Tensor, noise: list[float]) -> torch.Tensor:
        """Orthonormalise ``rows`` (b, short), nearly free of the basis, and store them as the next block.

        A direction no longer than the ``noise`` (b) of its row is rounding error, and replaced by a random one, so that the
        block keeps its width and finds copies of a repeated value; its coupling to the previous block is zero.

        Returns:
            float64 (b, size), the coefficients of that part of ``rows`` that was still in the basis.
        """
        room = min(self.block, self.operator.short - self.size)
        known = self._rows[: self.size]
        self._pending = room
        still = torch.zeros(len(rows), self.size, dtype=torch.float64)
        block, self._coupling = rows[:0], still[:, :0]
        if len(rows) == room and (found := _orthonormalised(rows, known, noise)) is not None:
            block, self._coupling, still = found
        elif room:
            lengths = torch.tensor(noise, dtype=torch.float64)
            block, self._coupling = repaired(rows, lengths, known, room, self._random)
        self._rows[self.size : self.size + room] = block
        return still

    def _random(self, count: int) -> torch.Tensor:
        rows = torch.randn(count, self.operator.short, generator=self._generator, dtype=torch.float32)
        rows /= rows.norm(dim=1, keepdim=True)
        return rows.to(self._rows.dtype)


def _orthonormalised(
    rows: torch.Tensor, known: torch.Tensor, noise: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Orthonormalise rows (b, short) by Cholesky QR and take ``known`` (size, short) out of them.

    Returns:
        orthonormal rows (b, short); float64 coupling (b, b) and ``still`` (b, size) with
        ``rows = coupling rows' + still known``. None if they are not well enough conditioned.
    """
    # In float64: a Gram matrix has the square of the condition.
    wide = rows.double()
    gram = wide @ wide.T
    factor, info = torch.linalg.cholesky_ex(gram)
    # Each entry of the diagonal is the length of a row outside the span of those before it.
    left, squares = factor.diagonal().tolist(), gram.diagonal().tolist()
    if info or any(length <= least for length, least in zip(left, noise, strict=True)):
        return None
    eye = torch.eye(len(rows), dtype=torch.float64)
    block = (torch.linalg.solve_triangular(factor, eye, upper=False) @ wide).to(rows)
    again = block @ known.T
    block.addmm_(again, known, alpha=-1)
    still = factor @ again.double()
    # How far the rows are from orthonormal now: by the rounding of the Gram matrix and by the square of what was taken out.
    steepest = max(square / length**2 for square, length in zip(squares, left, strict=True))
    skew = torch.finfo(torch.float64).eps * steepest + torch.linalg.vector_norm(again).item() ** 2
    if skew > torch.finfo(rows.dtype).eps:
        wide = block.double()
        root, info = torch.linalg.cholesky_ex(wide @ wide.T)
        if info or min(root.diagonal().tolist()) < _LEFT:
            return None
        block = (torch.linalg.solve_triangular(root, eye, upper=False) @ wide).to(rows)
        factor = factor @ root
    return block, factor, still
