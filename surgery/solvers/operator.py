"""``Operator``: products with a batch of matrices and their transposes, in the working precision and in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery.memory import scratch
from surgery.solvers.product import GAP, gram, rows_times, rows_times_transposed

#: Entries of a matrix that are widened to float64 at a time on a CPU: few enough for its cache, enough for its products.
_WIDE_ENTRIES = 1 << 18
#: The same on a GPU, of all matrices of a batch.
_WIDE_ENTRIES_GPU = 1 << 25
#: The most columns of a block on a CPU: of wider blocks only few rows fit the cache, and products with few rows are slow
#: (4096x11008 on two cores, with and without: 64 and 91 ms for 16 vectors, 226 and 339 ms for 64).
_WIDE_COLUMNS = 1 << 11


class Operator:
    """Products with matrices A (B, m, n) and their transposes.

    Vectors are rows: (B, b, short) or (B, b, long) with short = min(m, n) and long = max(m, n).

    Args:
        padded: (B, m, n or more), float32 or float64, contiguous for products in the working precision.
        columns: n, if the rows are padded; the entries behind it are zeros.

    Attributes:
        matrices: (B, m, n).
        short, long: the smaller and the larger of m and n.
        wide: whether m is the smaller.
        passes: how many products with the matrices or their transposes have been made.
    """

    def __init__(self, padded: torch.Tensor, columns: int | None = None) -> None:
        self._padded = padded
        self.matrices = padded[:, :, :columns]
        m, n = self.matrices.shape[1:]
        self.wide = m < n
        self.long, self.short = max(m, n), min(m, n)
        self.passes = 0

    def __len__(self) -> int:
        return len(self.matrices)

    def one(self, i: int) -> Operator:
        """The operator of matrix i alone, as a batch of one; it counts its passes separately, on top of those so far."""
        single = Operator(self._padded[i : i + 1], self.matrices.shape[2])
        single.passes = self.passes
        return single

    def to_long(self, x: torch.Tensor) -> torch.Tensor:
        """(B, b, short) -> (B, b, long)."""
        self.passes += 1
        return self._by_columns(x) if self.wide else self._by_rows(x)

    def to_short(self, y: torch.Tensor) -> torch.Tensor:
        """(B, b, long) -> (B, b, short)."""
        self.passes += 1
        return self._by_rows(y) if self.wide else self._by_columns(y)

    def gram(self) -> torch.Tensor:
        """(B, short, short), A^T A or A A^T in the working precision."""
        self.passes += 1
        return gram(self._padded if self.wide else self.matrices.mT)  # the zeros of the padding add nothing

    def _by_columns(self, rows: torch.Tensor) -> torch.Tensor:
        return rows_times(rows, self._padded)[:, :, : self.matrices.shape[2]]

    def _by_rows(self, rows: torch.Tensor) -> torch.Tensor:
        if zeros := self._padded.shape[2] - self.matrices.shape[2]:
            rows = torch.nn.functional.pad(rows, (0, zeros))
        return rows_times_transposed(rows, self._padded)

    # Products in float64, for the last step and the certificate: float32 products of vectors without changes of
    # sign are off by more than 1e-6. The matrices are converted a block at a time.

    def both_wide(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both products in one pass: float64 (B, b, short), (B, b, long) -> (B, b, long), (B, b, short)."""
        self.passes += 2
        if self.wide:
            return self._sweep(x, y)
        short, long = self._sweep(y, x)
        return long, short

    def to_long_wide(self, x: torch.Tensor) -> torch.Tensor:
        """float64 (B, b, short) -> (B, b, long)."""
        self.passes += 1
        return self._sweep(x, None)[0] if self.wide else self._sweep(None, x)[1]

    def to_short_wide(self, y: torch.Tensor) -> torch.Tensor:
        """float64 (B, b, long) -> (B, b, short)."""
        self.passes += 1
        return self._sweep(None, y)[1] if self.wide else self._sweep(y, None)[0]

    def gram_wide(self) -> torch.Tensor:
        """float64 (B, short, short), A^T A or A A^T, without converting all of A at once."""
        self.passes += 1
        total = torch.zeros(len(self), self.short, self.short, dtype=torch.float64, device=wide_device(self.matrices))
        if self.wide:  # by columns, so that what is added up is (short, short)
            step = self._wide_rows(self.short)
            for start in range(0, self.long, step):
                columns = widened(self.matrices[:, :, start : start + step])
                total.baddbmm_(columns, columns.mT)
        else:
            for _, _, block in self._blocks(self.short):
                total.baddbmm_(block.mT, block)
        return total

    def _sweep(self, left: torch.Tensor | None, right: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``left A`` (B, b, n) for left (B, b, m), and ``right A^T`` (B, b, m) for right (B, b, n); empty for None."""
        m, n = self.matrices.shape[1:]
        device = wide_device(self.matrices)
        columns = torch.zeros(len(self), 0 if left is None else left.shape[1], n, dtype=torch.float64, device=device)
        rows = torch.zeros(len(self), 0 if right is None else right.shape[1], m, dtype=torch.float64, device=device)
        for down, across, block in self._blocks(min(n, _WIDE_COLUMNS) if self.matrices.device.type == "cpu" else n):
            if left is not None:
                columns[:, :, across].baddbmm_(left[:, :, down], block)
            if right is not None:
                rows[:, :, down].baddbmm_(right[:, :, across], block.mT)
        return columns, rows

    def _blocks(self, width: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, block) for all blocks of the matrices, in float64 and up to ``width`` columns wide.

        All blocks share one buffer: fresh memory costs more than the conversion, since the system clears its pages first.
        """
        m, n = self.matrices.shape[1:]
        if self.matrices.dtype == torch.float64:
            yield slice(0, m), slice(0, n), self.matrices
            return
        height = min(m, self._wide_rows(width))
        device = wide_device(self.matrices)
        gap = GAP if device.type == "cpu" else 0
        buffer = scratch("widened rows", (len(self), height, width + gap), torch.float64, device)
        for top in range(0, m, height):
            down = slice(top, min(top + height, m))
            for first in range(0, n, width):
                across = slice(first, min(first + width, n))
                part = self.matrices[:, down, across]
                yield down, across, buffer[:, : part.shape[1], : part.shape[2]].copy_(part.to(device))

    def _wide_rows(self, length: int) -> int:
        if self.matrices.device.type == "cpu":
            return _rows_at_a_time(length)
        return max(1, _WIDE_ENTRIES_GPU // (len(self) * length))


def _rows_at_a_time(width: int) -> int:
    return max(16, _WIDE_ENTRIES // max(1, width))


def widened_bytes(m: int, n: int) -> int:
    """Bytes that float64 products with a matrix (m, n) take on a CPU, besides their results."""
    width = min(n, _WIDE_COLUMNS)
    return 8 * min(m, _rows_at_a_time(width)) * (width + GAP)


def wide_device(x: torch.Tensor) -> torch.device:
    """Where float64 work on ``x`` is done: on its device, or on the CPU where the device has no float64."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def widened(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float64; on the CPU if its device has no float64."""
    return x.to(wide_device(x)).double()
