"""A correction on a GPU: decoded by all cores of the host, sent up in one copy, and spread over the entries there."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from surgery.lossless.blocks import HOST_THREADS
from surgery.lossless.correction import ESCAPE, CorrectionReader
from surgery.lossless.rounding import bits_of, flipped


class UploadedCorrection:
    """The blocks of a correction, decoded, on a device. To apply them, the host does not wait for it.

    It is not for ``HOST_THREADS``, which decode them, to make one.

    Args:
        reader: of the correction of a weight (m, n).
        device: where they go.

    Attributes:
        differing: how many entries the correction changes.

    Raises:
        CorruptCorrection: a block cannot be decoded.
    """

    def __init__(self, reader: CorrectionReader, device: torch.device) -> None:
        blocks = list(HOST_THREADS.map(reader.block, range(len(reader))))
        self.differing = sum(int(np.count_nonzero(block.values)) for block in blocks)
        self._rows_per_block = reader.rows_per_block
        escapes, masks, values = (
            [array.view(np.uint8) for array in arrays]
            for arrays in ([b.escapes for b in blocks], [b.mask for b in blocks], [b.values for b in blocks])
        )
        # Escapes first: they begin at a multiple of their width.
        there = torch.from_numpy(np.concatenate([*escapes, *masks, *values])).to(device)
        sizes = [sum(map(len, arrays)) for arrays in (escapes, masks, values)]
        of_escapes, self._masks, of_values = torch.split(there, sizes)
        self._escapes = of_escapes.view(torch.int16 if reader.width == 2 else torch.int32)
        self._values = of_values.view(torch.int8)
        # Where those of each block begin, and where the last ones end.
        self._first_escape = [0, *accumulate(len(block.escapes) for block in blocks)]
        self._first_byte = [0, *accumulate(map(len, masks))]
        self._first_value = [0, *accumulate(map(len, values))]
        self._bits = 1 << torch.arange(8, dtype=torch.uint8, device=device)

    def correct_(self, rows: torch.Tensor, first_row: int) -> None:
        """Change the predicted floats of some rows (r, n), in place, to those that they stand for.

        Args:
            rows: contiguous, on the device; whole blocks.
            first_row: the index of the first of them in the weight.
        """
        r, n = rows.shape
        first = first_row // self._rows_per_block
        last = first + -(-r // self._rows_per_block)
        flat = bits_of(rows).view(-1)
        where = self._positions(r, n, first, last)
        units = self._units(first, last)
        flat[where] = flipped(flipped(flat[where]) + units)

    def _positions(self, r: int, n: int, first: int, last: int) -> torch.Tensor:
        """Which entries of r rows, those of the blocks from ``first`` to ``last``, differ: int64 (d,)."""
        masks = self._masks[self._first_byte[first] : self._first_byte[last]]
        count = self._first_value[last] - self._first_value[first]
        is_set = (masks[:, None] & self._bits).view(-1)
        entries = self._rows_per_block * n
        if entries % 8:  # the bits behind the last entry of each block belong to none
            whole = r // self._rows_per_block
            padded = (entries + 7) // 8 * 8
            of_whole = is_set[: whole * padded].view(whole, padded)[:, :entries].reshape(-1)
            is_set = torch.cat([of_whole, is_set[whole * padded :][: r * n - whole * entries]])
        return _indices(is_set, count)

    def _units(self, first: int, last: int) -> torch.Tensor:
        """By how many units in the last place the entries that differ do, in the integers of the weight's width: (d,)."""
        short = self._values[self._first_value[first] : self._first_value[last]]
        units: torch.Tensor = short.to(self._escapes.dtype)
        escapes = self._escapes[self._first_escape[first] : self._first_escape[last]]
        if len(escapes):
            units[_indices(short == ESCAPE, len(escapes))] = escapes
        return units


def _indices(x: torch.Tensor, count: int) -> torch.Tensor:
    """Where a tensor (d,), of which ``count`` entries are not zero, is not: the host does not have to wait to know how many."""
    where: torch.Tensor = x.nonzero_static(size=count).view(-1)
    return where
