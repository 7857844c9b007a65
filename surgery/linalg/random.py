"""Random start vectors that are nobody else's."""

from __future__ import annotations

import torch

_OURS = int.from_bytes(b"surgery", "big")


def generator_of(seed: int) -> torch.Generator:
    """On the CPU, for a seed of 63 bits, with numbers that a caller who has used the same seed has not drawn.

    A matrix may have been made from those: ``torch.manual_seed(0)``, and orthogonal vectors from ``torch.randn``. A start
    block of the same numbers would span singular vectors of it, and all others would be missed without a trace.
    """
    return torch.Generator().manual_seed(seed ^ _OURS)
