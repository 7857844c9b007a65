"""Random start vectors that are independent of the caller's random numbers."""

from __future__ import annotations

import torch

_OURS = int.from_bytes(b"surgery", "big")


def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU for a seed of 63 bits, whose numbers differ from those of a caller with the same seed.

    The caller may have made the matrix from these: ``torch.manual_seed(0)``, and orthogonal vectors from ``torch.randn``. A
    start block of the same numbers would span some of its singular vectors, and miss all others without notice.
    """
    return torch.Generator().manual_seed(seed ^ _OURS)
