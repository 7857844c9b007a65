"""What a weight is recognized by: the sha256 of a sample of its entries.

All of it is in its file's sha256. This one is for telling, in a model that is loaded, whether a weight is the original or its
residual, for which a sample does as well, and takes next to no time.
"""

from __future__ import annotations

import hashlib

import torch

from surgery.memory import bytes_of

_STRETCHES = 16
_ENTRIES = 8192


def stretches(entries: int) -> list[slice]:
    """What is taken of a matrix with so many entries, row by row: 16 times 8192, evenly spread, or all there are."""
    if entries <= _STRETCHES * _ENTRIES:
        return [slice(0, entries)]
    starts = (i * (entries - _ENTRIES) // (_STRETCHES - 1) for i in range(_STRETCHES))
    return [slice(start, start + _ENTRIES) for start in starts]


class SampleHash:
    """sha256 over the samples of matrices, one after the other, in the dtype of the checkpoint."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.exact = True

    def update(self, matrices: torch.Tensor) -> None:
        """Add matrices (B, m, n), contiguous, any float dtype, any device; ``exact`` tells whether the dtype holds them."""
        for matrix in matrices:
            flat = matrix.view(-1)
            for part in stretches(len(flat)):
                entries = flat[part]
                cast = entries.to(self._dtype)
                self.exact &= cast.dtype == entries.dtype or torch.equal(cast.to(entries.dtype), entries)
                self._digest.update(bytes_of(cast.cpu().contiguous()))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
