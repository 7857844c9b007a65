"""Bases of Krylov spaces on a GPU, which take their steps without waiting for them.

A step of ``KrylovBasis`` looks at once at what it has made, and replaces noise by random rows. On a GPU the program would
wait for the device in every step, with nothing queued meanwhile. Here a step takes for granted that there is no noise. Whether
there was any is found out when somebody asks for Ritz values: the few matrices in which there was go back to where there
was none, and take the steps since then again, one by one.
"""

from __future__ import annotations

import torch

from surgery.device import downloaded
from surgery.solvers.dense import eigh, on_all_cores
from surgery.solvers.krylov import KrylovBasis
from surgery.solvers.operator import Operator, widened
from surgery.solvers.orthonormal import orthonormal_rows
from surgery.solvers.repair import NOISE

#: The least length of a row outside the span of those before it in its block, over its own. One Cholesky QR in float64 leaves
#: an error of 1e-16 over the square of it, here a float32 rounding.
_LEAST = 3e-5
#: The largest part of a block (Frobenius norm) that may be in the basis after the first projection. It is taken away, and
#: shortens the rows by half its square: less than a float32 rounding, so that they need no second Cholesky QR.
_MOST_AGAIN = 3e-4


class DeferredBasis(KrylovBasis):
    """``KrylovBasis`` of float32 matrices on a GPU, in which a program waits in ``begin``, ``ritz`` and ``restart`` only."""

    def __init__(self, operator: Operator, *, limit: int, block: int, seed: int) -> None:
        super().__init__(operator, limit=limit, block=block, seed=seed)
        count, rows = len(operator), self.limit + block
        # Of each row what its product had in the basis, and what it still had after that was taken away once.
        self._coefficients = self._rows.new_zeros(count, rows, rows)
        self._again = self._rows.new_zeros(count, rows, rows)
        self._taken: list[tuple[torch.Tensor, torch.Tensor]] = []  # Cholesky factor and info of each step since the last look
        self._longest = torch.zeros(count, 1, dtype=torch.float64)  # image, up to the last look

    def begin(self, start: torch.Tensor | None) -> None:
        if start is not None:
            super().begin(start)
            return
        # All matrices begin with the same rows, which need no look on the device.
        rows = orthonormal_rows(self._same_random(min(self.block, self.limit)).double()).to(self._rows.dtype)
        self._rows[:, : len(rows)] = rows.to(self._rows.device, non_blocking=True)
        self._pending = len(rows)

    def step(self) -> None:
        first, stop, width = self.size, self.size + self._pending, self._pending
        if width != min(self.block, self.operator.short - stop):
            if self._taken:
                self._look()
            self._top = self._longest.to(self._wide)
            super().step()  # the last rows of the whole space
            self._longest = self._top.cpu()
            return
        images = self.operator.to_long(self._rows[:, first:stop])
        self._images[:, first:stop] = images
        products = self.operator.to_short(images)
        self.size, self._last = stop, width
        self._steps += self._whole
        known = self._rows[:, :stop]
        coefficients = torch.bmm(products, known.mT, out=self._coefficients[:, first:stop, :stop])
        wide = widened(torch.baddbmm(products, coefficients, known, alpha=-1))
        factor, info = torch.linalg.cholesky_ex(torch.bmm(wide, wide.mT))
        block = torch.linalg.solve_triangular(factor, wide, upper=False).to(products.dtype)
        again = torch.bmm(block, known.mT, out=self._again[:, first:stop, :stop])
        torch.baddbmm(block, again, known, alpha=-1, out=self._rows[:, stop : stop + width])
        self._taken.append((factor, info))

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        projected, coupling = self._look()
        values, vectors = on_all_cores(eigh, projected)
        return self._described(values, vectors, coupling)

    def restart(self, values: torch.Tensor, vectors: torch.Tensor, keep: int) -> None:
        super().restart(values, vectors, keep)
        self._coefficients.zero_()
        self._again.zero_()

    def _look(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for all steps, and repeat those of the matrices where they have met noise.

        Returns:
            float64 (B, size, size) and (B, last, pending) on the CPU: the projections, lower triangles, and the coupling.
        """
        steps, size = len(self._taken), self.size
        if not steps:
            projected, coupling = downloaded(self._projected[:, :size, :size], self._coupling)
            return projected, coupling
        first, count = size - steps * self._last, len(self.operator)
        factors, infos = (torch.stack(parts, dim=1) for parts in zip(*self._taken, strict=True))
        rows = self._projected[:, first:size, :size]
        again = widened(self._again[:, first:size, :size]).view(count, steps, self._last, size)
        rows.copy_(self._coefficients[:, first:size, :size])
        rows += (factors @ again).view(rows.shape)
        lost = torch.linalg.vector_norm(again, dim=(2, 3))
        projected, factors, infos, lost = downloaded(self._projected[:, :size, :size], factors, infos, lost)
        self._taken.clear()
        sound = self._sound(projected, factors, (infos == 0) & (lost <= _MOST_AGAIN))
        coupling = factors[:, -1].clone()
        for i in (~sound).nonzero().flatten().tolist():
            projected[i], coupling[i] = self._repeated(i, first, steps)
        longest = projected.diagonal(0, 1, 2).amax(dim=1, keepdim=True).clamp(min=0).sqrt()
        self._longest = torch.maximum(self._longest, longest)
        self._coupling = coupling
        return projected, coupling

    def _sound(self, projected: torch.Tensor, factors: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        """Which matrices (B,) have met no noise in the last steps.

        Args:
            projected: float64 (B, size, size).
            factors: float64 (B, steps, b, b), the Cholesky factors of the blocks.
            sound: bool (B, steps), what is known besides.
        """
        lengths = projected.diagonal(0, 1, 2)[:, -factors.shape[1] * factors.shape[2] :].clamp(min=0).sqrt()
        lengths = lengths.view(factors.shape[:3])
        longest = torch.maximum(lengths.amax(dim=2).cummax(dim=1).values, self._longest)
        outside = factors.diagonal(0, 2, 3)
        noisy = outside <= NOISE * longest[:, :, None] * lengths
        dependent = ~(outside >= _LEAST * factors.norm(dim=3))
        fine: torch.Tensor = (sound & ~(noisy | dependent).any(dim=2)).all(dim=1)
        return fine

    def _repeated(self, i: int, first: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the last steps of matrix i again, each with a look at it: its (size, size) projection and its coupling."""
        alone = self.alone(i)
        alone.size, alone._top = first, self._longest[i : i + 1].to(self._wide)
        for _ in range(steps):
            alone.step()
        projected, coupling = downloaded(alone._projected[0, : self.size, : self.size], alone._coupling[0])
        return projected, coupling
