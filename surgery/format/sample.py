"""The sample of a weight's entries whose sha256 tells, in a model that is loaded, the original from its residual.

Hashing a sample takes next to no time. The integrity of whole files is checked by other hashes, in their ``FileRecord``.
"""

from __future__ import annotations

import hashlib

import torch

from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.tensor_view import TensorView
from surgery.memory import bytes_of

#: Stretches in a sample, and entries in each.
_STRETCHES = 16
_ENTRIES = 8192


def stretches(entries: int) -> list[slice]:
    """The sample of a flattened matrix with so many entries: 16 stretches of 8192, evenly spread; all if it has no more."""
    if entries <= _STRETCHES * _ENTRIES:
        return [slice(0, entries)]
    starts = (i * (entries - _ENTRIES) // (_STRETCHES - 1) for i in range(_STRETCHES))
    return [slice(start, start + _ENTRIES) for start in starts]


def sampled_dtype(target: TensorView) -> torch.dtype:
    """The dtype of the entries that the samples of a target's tensor consist of: bytes, where its numbers are packed."""
    return TORCH_DTYPES.get(target.dtype, torch.uint8)


def sampled(target: TensorView, stored: torch.Tensor) -> torch.Tensor:
    """The matrices (B, m, n) that are sampled of a target's tensor, or of some matrices of a stack.

    Those of the target. Of packed numbers the bytes as stored: of all of the tensor, also for a slice of it.
    """
    if target.dtype in TORCH_DTYPES:
        return target.seen_as.matrices(stored)
    count = len(stored) if target.seen_as.kind == "stack" else 1
    return stored.contiguous().view(torch.uint8).reshape(count, 1, -1)


class SampleHash:
    """sha256 over the samples of matrices, one after the other.

    Args:
        dtype: of the tensor in the checkpoint, to which entries are converted first.

    Attributes:
        exact: whether that conversion has changed no entry so far.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.exact = True

    def update(self, matrices: torch.Tensor) -> None:
        """Add the samples of matrices (B, m, n): contiguous, of any float dtype, on any device."""
        for matrix in matrices:
            flat = matrix.view(-1)
            for part in stretches(len(flat)):
                entries = flat[part].cpu()  # as they are: a GPU may be too full for anything else
                cast = entries.to(self._dtype)
                self.exact &= cast.dtype == entries.dtype or torch.equal(cast.to(entries.dtype), entries)
                self._digest.update(bytes_of(cast.contiguous()))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
