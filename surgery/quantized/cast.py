"""FP8 without scales: weights that were cast, so that the stored numbers are the weights.

Diffusion models are often published so (``flux1-dev-fp8.safetensors``). A changed weight is rounded to numbers of its dtype.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from surgery.format.header import TensorEntry
from surgery.names import FP8, FP8_WIDE
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E4M3, E5M2, Elements
from surgery.quantized.weight import Quantized

_ELEMENTS: dict[str, Elements] = {FP8: E4M3, FP8_WIDE: E5M2}


def is_fp8_matrix(entry: TensorEntry) -> bool:
    """Whether a tensor may be a weight that was cast."""
    return entry.dtype in _ELEMENTS and len(entry.shape) > 1


def as_cast(entry: TensorEntry, shard: str) -> Quantized:
    """A weight that was cast to FP8.

    Args:
        entry: of it.
        shard: the weight file that it is in.
    """
    m, n = entry.shape[-2:]
    codec = Codec(_ELEMENTS[entry.dtype], (max(m, 1), max(n, 1)), entry.name)
    return Quantized(entry.name, entry.dtype, entry.shape, shard, entry.stored, codec, ())


def scales_beside(weight: str, names: Sequence[str]) -> list[str]:
    """The tensors beside a weight that may be its scales, by their names.

    Args:
        weight: its name.
        names: of all tensors, sorted.
    """
    stem, found = weight.removesuffix("weight"), list[str]()
    for i in range(bisect.bisect_left(names, stem), len(names)):
        if not names[i].startswith(stem):
            break
        if "scale" in names[i][len(stem) :]:
            found.append(names[i])
    return found
