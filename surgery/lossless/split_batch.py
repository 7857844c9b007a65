"""Splitting a batch of weights on a GPU: a few large operations, one copy to the host, and hardly a wait for either.

The operations are those of ``split``, so the bits are too. The host gets what it has to encode and nothing else: a bit for each
entry, and a byte for each that differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from surgery.arithmetic import exact_arithmetic
from surgery.lossless.blocks import BLOCK_ENTRIES, DEVICE_BLOCKS, row_slices, rows_at_a_time
from surgery.lossless.correction import ESCAPE, CorrectionBlock
from surgery.lossless.factors import Factors
from surgery.lossless.parts import UnencodedParts, residual_error
from surgery.lossless.prediction import Prediction, working_dtype
from surgery.lossless.rounding import bits_of, flipped

#: Times a number whose eight bytes are 0 or 1, its highest byte has these as bits, that of the first byte as the lowest.
_GATHER = 0x0102_0408_1020_4080


@exact_arithmetic()
def split_batch(
    weights: torch.Tensor,
    factors: Factors,
    *,
    correct: bool = True,
    out: torch.Tensor | None = None,
) -> list[UnencodedParts]:
    """``split`` of each matrix of a batch, up to the encoding of the corrections, which any thread can do after.

    Args:
        weights: (B, m, n), as for ``split``.
        factors: of all of them, with a leading dimension B, on the same device.
        correct: whether to find what residual and factors alone do not give back.
        out: where the residuals go, like the weights; may be these themselves.

    Returns:
        Of each matrix. The residuals are on the device, and may be used in the current stream.

    Raises:
        ResidualError: a residual is beyond the range of the dtype. The contents of ``out`` are invalid then.
    """
    count, m, n = weights.shape
    residuals = torch.empty_like(weights) if out is None else out
    prediction = Prediction(factors, weights.dtype)
    portions = []
    for matrices, rows in _portions(count, m, n):
        low_rank = prediction.of(matrices, rows)
        portions.append(_split(weights[matrices, rows], low_rank, residuals[matrices, rows], correct))
    blocks, differing = [list[CorrectionBlock]() for _ in range(count)], [0] * count
    for (matrices, _), portion in zip(_portions(count, m, n), portions, strict=True):
        for i, (largest, differ, found) in zip(range(count)[matrices], portion.by_matrix(), strict=True):
            _check_range(largest, weights.dtype, i)
            blocks[i] += found
            differing[i] += differ
    return [
        UnencodedParts(residuals[i], blocks[i] if correct else None, rows_at_a_time(n), differing[i] / (m * n))
        for i in range(count)
    ]


def _portions(count: int, m: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Which rows of which matrices are done together: some matrices, or some blocks of one that is large."""
    most = DEVICE_BLOCKS * BLOCK_ENTRIES
    together = max(1, most // (m * n))
    step = rows_at_a_time(n)
    for first in range(0, count, together):
        for rows in row_slices(m, m if m * n <= most else step * DEVICE_BLOCKS):
            yield slice(first, min(first + together, count)), rows


@dataclass(frozen=True, slots=True)
class _Portion:
    """What was found in the same rows of b matrices, in memory of the host.

    One after the other there are, of each matrix, how many entries differ in each block, int64, and the largest number before
    the rounding to a residual, in the working dtype; and if that was wanted, escapes, masks and values of all blocks.

    Attributes:
        memory: uint8, all of it.
        dtype: of the weights.
        matrices: b.
        entries: of each block of a matrix.
        escapes: how many there are; None if differences were not wanted.
    """

    memory: torch.Tensor
    dtype: torch.dtype
    matrices: int
    entries: list[int]
    escapes: int | None

    def by_matrix(self) -> Iterator[tuple[float, int, list[CorrectionBlock]]]:
        """Of each matrix the largest number, how many entries differ, and the blocks."""
        memory, at = self.memory.numpy(), 0

        def taken(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            nonlocal at
            first, at = at, at + count * np.dtype(dtype).itemsize
            return memory[first:at].view(dtype)

        b, blocks = self.matrices, len(self.entries)
        counts = taken(b * blocks, np.int64).reshape(b, blocks)
        largest = taken(b, f"f{working_dtype(self.dtype).itemsize}").tolist()
        differing = counts.sum(axis=1).tolist()
        if self.escapes is None:
            yield from zip(largest, differing, [[] for _ in range(b)], strict=True)
            return
        escapes = taken(self.escapes, f"i{self.dtype.itemsize}")
        sizes = [(entries + 7) // 8 for entries in self.entries]
        masks, values = taken(b * sum(sizes), np.uint8), taken(sum(differing), np.int8)
        for i in range(b):
            found = []
            for size, count in zip(sizes, counts[i].tolist(), strict=True):
                mask, masks = masks[:size], masks[size:]
                short, values = values[:count], values[count:]
                escaped = np.count_nonzero(short == ESCAPE)
                found.append(CorrectionBlock(mask, short, escapes[:escaped]))
                escapes = escapes[escaped:]
            yield largest[i], differing[i], found


def _split(weight: torch.Tensor, low_rank: torch.Tensor, residual: torch.Tensor, correct: bool) -> _Portion:
    """Make the residual of rows (b, r, n), and copy to the host what it takes to recover them.

    Args:
        weight: the rows.
        low_rank: their prediction, in the working dtype; it is overwritten.
        residual: where the residual goes, perhaps the weight itself.
        correct: whether they are to be recovered.
    """
    sums = weight - low_rank
    largest = torch.linalg.vector_norm(sums, math.inf, dim=(1, 2))
    rounded = sums.to(weight.dtype)
    guess = bits_of(torch.add(rounded, low_rank, out=sums).to(weight.dtype)).view(-1)
    exact = bits_of(weight).reshape(-1)
    differs = (exact != guess).view(rounded.shape)
    by_block = _by_block(differs, rows_at_a_time(weight.shape[-1]))
    counts = _joined([part.sum(dim=-1) for part in by_block])
    parts, escapes = [counts, largest], None
    if correct:
        where = differs.view(-1).nonzero().view(-1)
        ordinals = flipped(torch.stack([exact[where], guess[where]]))
        units = ordinals[0] - ordinals[1]
        short = units.to(torch.int8)  # its lower bits
        escaped = (short != units) | (short == ESCAPE)
        beyond = units[escaped.nonzero().view(-1)]
        masks = _joined([_packed(part) for part in by_block])
        parts += [beyond, masks, short.masked_fill_(escaped, ESCAPE)]
        escapes = len(beyond)
    together = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    memory = together.cpu()
    residual.copy_(rounded)  # last: it may be the weight itself
    entries = [part.shape[-1] for part in by_block for _ in range(part.shape[1])]
    return _Portion(memory, weight.dtype, len(weight), entries, escapes)


def _by_block(differs: torch.Tensor, step: int) -> list[torch.Tensor]:
    """The entries of rows (b, r, n) by blocks: (b, blocks, entries) for those of ``step`` rows, and for the rest."""
    b, r, n = differs.shape
    whole = r // step * step
    parts = [differs[:, :whole].reshape(b, -1, step * n), differs[:, whole:].reshape(b, 1, -1)]
    return [part for part in parts if part.numel()]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """What there is of each matrix in the parts (b, ...), one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _packed(differs: torch.Tensor) -> torch.Tensor:
    """Bits for the booleans of blocks (b, blocks, entries), each block from the lowest of a byte on: uint8 (b, bytes)."""
    entries = differs.shape[-1]
    if entries % 8 or differs.storage_offset() % 8:
        filled = differs.new_zeros(*differs.shape[:-1], (entries + 7) // 8 * 8)
        filled[..., :entries] = differs
        differs = filled
    return (differs.reshape(-1).view(torch.int64) * _GATHER).view(torch.uint8)[7::8].view(len(differs), -1)


def _check_range(largest: float, dtype: torch.dtype, index: int) -> None:
    # Rounding keeps the order: if that of the largest number is finite, all of the residual is.
    if not torch.tensor(largest, dtype=torch.float64).to(dtype).isfinite():
        raise residual_error(largest, dtype, index)
