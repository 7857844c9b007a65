"""The formats that are read."""

from __future__ import annotations

from collections.abc import Callable

from surgery.format.header import TensorEntry
from surgery.quantized.fp4 import find_blocks, find_bytes, find_compressed
from surgery.quantized.fp8 import find_fp8
from surgery.quantized.integers import find_integers
from surgery.quantized.schemes import Told, Where
from surgery.quantized.weight import Quantized

#: Each finds the weight whose numbers a tensor holds; None if it holds no such numbers.
FINDERS: tuple[Callable[[TensorEntry, Where, Told], Quantized | None], ...] = (
    find_fp8,
    find_blocks,
    find_compressed,
    find_integers,
    find_bytes,
)


def find_quantized(entry: TensorEntry, where: Where, told: Told) -> Quantized | None:
    """The weight whose numbers a tensor holds; None if it holds none that are read.

    Args:
        entry: of the tensor.
        where: each tensor of the model -> its entry, and the weight file that it is in.
        told: what the config says.

    Raises:
        FormatError: what belongs to the weight is missing, does not fit it, or contradicts the config.
    """
    return next((found for find in FINDERS if (found := find(entry, where, told)) is not None), None)
