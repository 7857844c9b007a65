"""The leading singular vectors of a large matrix by thick-restart randomized block Lanczos.

Works on ``C = B^T B`` with B the matrix or its transpose, such that the basis lives on the short side. All vectors
are stored as rows. Sources: Golub, Luk, Overton, "A block Lanczos method for computing the singular values and
corresponding singular vectors of a matrix" (ACM TOMS 7, 1981); Wu, Simon, "Thick-restart Lanczos method for large
symmetric eigenvalue problems" (SIAM J. Matrix Anal. 22, 2000); Musco, Musco, "Randomized block Krylov methods"
(NeurIPS 2015) for the random start block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.linalg.product import rows_times, rows_times_transposed

MAX_PASSES = 400

#: A direction whose part outside the basis is below this multiple of what rounding leaves there is noise.
_NOISE = 3e-7


#: Entries of the matrix that are widened to float64 at a time.
_WIDE_ENTRIES_CPU = 1 << 19
_WIDE_ENTRIES = 1 << 25


class Operator:
    """Products with a matrix A (m, n) and its transpose, seen from its shorter side.

    Attributes:
        short, long: the smaller and the larger of m and n.
        passes: how many times A was gone through.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.wide = matrix.shape[0] < matrix.shape[1]
        self.long, self.short = max(matrix.shape), min(matrix.shape)
        self.passes = 0
        self._wide_entries = _WIDE_ENTRIES_CPU if matrix.device.type == "cpu" else _WIDE_ENTRIES

    def to_long(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (b, short) -> (b, long)."""
        self.passes += 1
        return rows_times(x, self.matrix) if self.wide else rows_times_transposed(x, self.matrix)

    def to_short(self, y: torch.Tensor) -> torch.Tensor:
        """Rows (b, long) -> (b, short)."""
        self.passes += 1
        return rows_times_transposed(y, self.matrix) if self.wide else rows_times(y, self.matrix)

    # The same in float64, for the last step and the certificate: float32 products of vectors without changes of
    # sign are off by more than 1e-6. The matrix is widened a few rows at a time.

    def to_long_wide(self, x: torch.Tensor) -> torch.Tensor:
        """float64 rows (b, short) -> (b, long)."""
        self.passes += 1
        return self._from_left(x) if self.wide else self._from_right(x)

    def to_short_wide(self, y: torch.Tensor) -> torch.Tensor:
        """float64 rows (b, long) -> (b, short)."""
        self.passes += 1
        return self._from_right(y) if self.wide else self._from_left(y)

    def gram_wide(self) -> torch.Tensor:
        """float64 (short, short), A^T A or A A^T, without widening all of A at once."""
        self.passes += 1
        total = torch.zeros(self.short, self.short, dtype=torch.float64, device=widened(self.matrix[:0]).device)
        step = max(1, self._wide_entries // self.short)
        for start in range(0, self.long, step):
            part = self.matrix[:, start : start + step].T if self.wide else self.matrix[start : start + step]
            rows = widened(part)
            total.addmm_(rows.T, rows)
        return total

    def _from_left(self, x: torch.Tensor) -> torch.Tensor:
        """x A, (b, m) -> (b, n)."""
        total = torch.zeros(len(x), self.matrix.shape[1], dtype=torch.float64, device=x.device)
        for rows in self._row_blocks():
            total.addmm_(x[:, rows], widened(self.matrix[rows]))
        return total

    def _from_right(self, y: torch.Tensor) -> torch.Tensor:
        """y A^T, (b, n) -> (b, m)."""
        return torch.cat([y @ widened(self.matrix[rows]).T for rows in self._row_blocks()], dim=1)

    def _row_blocks(self) -> list[slice]:
        m, n = self.matrix.shape
        step = max(1, self._wide_entries // n)
        return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def widened(x: torch.Tensor) -> torch.Tensor:
    """float64, on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


@dataclass(frozen=True, slots=True)
class RitzVectors:
    """Approximate right singular vectors of B.

    Attributes:
        rows: (k, short), nearly orthonormal.
        values: float64 (k + 1,) on the CPU, squared singular values; the last is the next one, not kept.
    """

    rows: torch.Tensor
    values: torch.Tensor


def block_size(k: int, device: torch.device) -> int:
    """Rows per step: a little more than k where that is cheap."""
    if k <= 24:
        return 8 * math.ceil((k + 8) / 8)
    return 32 if device.type == "cpu" else k + 8


def basis_limit(k: int, block: int) -> int:
    """Rows at which the basis is full and restarts."""
    return max(384, k + 4 * block)


def basis_rows(k: int) -> int:
    """Rows that a run keeps at most, for planning memory: the basis and one block behind it."""
    block = 2 * k + 32
    return basis_limit(k, block) + block


def block_lanczos(
    operator: Operator,
    k: int,
    *,
    tolerance: float,
    block: int,
    generator: torch.Generator,
    start: torch.Tensor | None = None,
) -> RitzVectors:
    """Ritz vectors for the k largest singular values.

    Stops when every residual, estimated from the recurrence, is below ``tolerance`` times the largest singular
    value and below 100 ``tolerance`` times its own, or after ``MAX_PASSES``. The caller measures the true residuals.

    Args:
        operator: the matrix, float32 or float64.
        k: how many; ``k + 1 <= operator.short``.
        tolerance: see above.
        block: rows per step.
        generator: private random generator, on the CPU.
        start: (b, short) rows to begin from, b <= ``block``; filled up with random ones.
    """
    basis = _Basis(operator, limit=basis_limit(k, block), block=block, generator=generator)
    basis.begin(start)
    keep = k + max(block, k // 2)
    last_pass = operator.passes + MAX_PASSES
    checks = _CheckSchedule()
    while True:
        basis.step()
        last = operator.passes + 2 > last_pass
        full = basis.size + block > basis.limit
        if not (checks.due() or full or last):
            continue
        values, vectors, residuals = basis.ritz()
        if len(values) > k:
            sigma = values[: k + 1].clamp(min=0).sqrt()
            top = sigma[0].item()
            # Below the noise of the working precision nothing can be asked for.
            floor = 8 * torch.finfo(operator.matrix.dtype).eps * top
            allowed = torch.minimum(sigma[:k] * (100 * tolerance), torch.tensor(tolerance * top, dtype=torch.float64))
            estimate = residuals[:k] / sigma[:k].clamp(min=floor)
            worst = (estimate / allowed.clamp(min=floor)).max().item()
            if worst <= 1 or last or basis.exhausted:
                return RitzVectors(basis.combine(vectors[:, :k]), values[: k + 1])
            checks.saw(worst)
        if full:
            basis.restart(values, vectors, min(keep, len(values) - 1))


class _CheckSchedule:
    """Looks at the residuals only when they may have become small enough: a look costs an eigenproblem."""

    def __init__(self) -> None:
        self._steps = 0
        self._next = 4
        self._seen: tuple[int, float] | None = None

    def due(self) -> bool:
        self._steps += 1
        return self._steps >= self._next

    def saw(self, worst: float) -> None:
        """``worst``: the largest residual over what is allowed."""
        wait = 2.0
        if self._seen is not None and worst < self._seen[1]:
            decay = math.log(self._seen[1] / worst) / (self._steps - self._seen[0])
            wait = 0.8 * math.log(worst) / decay
        self._seen = (self._steps, worst)
        self._next = self._steps + max(1, min(8, math.floor(wait)))


class _Basis:
    """An orthonormal basis of a Krylov space with the projection of C on it."""

    def __init__(self, operator: Operator, *, limit: int, block: int, generator: torch.Generator) -> None:
        self._operator = operator
        self._generator = generator
        self._block = block
        matrix = operator.matrix
        self.limit = min(limit, operator.short)
        self._rows = torch.empty(self.limit + block, operator.short, dtype=matrix.dtype, device=matrix.device)
        self._projected = torch.zeros(self.limit + block, self.limit + block, dtype=torch.float64)
        self.size = 0  # rows already multiplied by C
        self._pending = 0  # orthonormal rows behind them, yet to be multiplied
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)
        self._last = 0  # rows multiplied in the last step

    @property
    def exhausted(self) -> bool:
        """The basis spans the whole space, or C maps it into itself: there is nothing left to find."""
        return self._pending == 0

    def begin(self, start: torch.Tensor | None) -> None:
        rows = self._random(min(self._block, self.limit)) if start is None else start
        self._append(rows, self._noise(rows))

    def step(self) -> None:
        """Multiply the pending rows by C and orthonormalise the result into the next ones."""
        first, stop = self.size, self.size + self._pending
        images = self._operator.to_long(self._rows[first:stop])
        products = self._operator.to_short(images)
        noise = _NOISE * images.norm(dim=1).max().item() ** 2
        self.size, self._last = stop, self._pending
        known = self._rows[:stop]
        coefficients = products @ known.T
        products = products - coefficients @ known
        again = products @ known.T
        products = products - again @ known
        projected = (coefficients + again).double().cpu()
        self._projected[first:stop, :stop] = projected
        self._projected[:stop, first:stop] = projected.T
        block = self._projected[first:stop, first:stop]
        self._projected[first:stop, first:stop] = (block + block.T) / 2
        self._append(products, noise)

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ritz values (descending), their coefficients (columns) and residual norms; float64, on the CPU."""
        values, vectors = torch.linalg.eigh(self._projected[: self.size, : self.size])
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = (self._coupling.T @ vectors[self.size - self._last : self.size]).norm(dim=0)
        return values, vectors, residuals

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """(p, c) coefficients -> (c, short) rows."""
        return coefficients.T.to(self._rows) @ self._rows[: self.size]

    def restart(self, values: torch.Tensor, vectors: torch.Tensor, keep: int) -> None:
        """Shrink the basis to its leading Ritz vectors and go on from the pending rows."""
        pending = self._rows[self.size : self.size + self._pending].clone()
        self._rows[:keep] = self.combine(vectors[:, :keep])
        self._projected.zero_()
        self._projected[range(keep), range(keep)] = values[:keep]
        self.size, self._pending = keep, 0
        self._append(pending, 0.0)

    def _append(self, rows: torch.Tensor, noise: float) -> None:
        """Orthonormalise ``rows`` (already free of the basis) and store them as the next block.

        Directions shorter than ``noise`` carry no information. They are replaced by random ones, so that the block
        keeps its width and finds copies of a repeated value; their coupling to the block before is zero.
        """
        room = min(self._block, self._operator.short - self.size)
        known = self._rows[: self.size]
        values, vectors = torch.linalg.eigh(_gram(rows))
        lengths = values.clamp(min=0).sqrt()
        kept = (lengths > max(noise, 1e-14 * lengths.max().item())).nonzero().flatten().flip(0)[:room]
        coupling = vectors[:, kept] * lengths[kept]
        block = (vectors[:, kept] / lengths[kept]).T.to(rows) @ rows
        if len(kept) < room:
            coupling = torch.nn.functional.pad(coupling, (0, room - len(kept)))
            block = torch.cat([block, self._random(room - len(kept))])
        block = block - (block @ known.T) @ known
        for _ in range(2):
            # The first rows hardly move, so the coupling need not be corrected: Cholesky keeps their order.
            block = _inverse_root(_gram(block)).to(block) @ block
        self._rows[self.size : self.size + room] = block
        self._pending = room
        self._coupling = coupling

    def _random(self, count: int) -> torch.Tensor:
        rows = torch.randn(count, self._operator.short, generator=self._generator, dtype=torch.float64)
        rows /= rows.norm(dim=1, keepdim=True)
        return rows.to(self._rows)

    @staticmethod
    def _noise(rows: torch.Tensor) -> float:
        return _NOISE * float(rows.norm(dim=1).max())


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """T with ``T gram T^T = I``, from Cholesky, or from eigenvectors where rounding has made gram indefinite."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0:
        inverse: torch.Tensor = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False)
    else:
        values, vectors = torch.linalg.eigh(gram)
        inverse = (vectors / values.clamp(min=1e-14 * values[-1].item()).sqrt()).T
    return inverse


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """``rows rows^T`` in float64, on the CPU, whatever the device can do."""
    wide = widened(rows)
    return (wide @ wide.T).cpu()
