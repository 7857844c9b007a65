"""FP8 without scales: weights that were cast, so that the stored numbers are the weights.

Diffusion models are often published so (``flux1-dev-fp8.safetensors``). A changed weight is rounded to numbers of its dtype.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.errors import WeightError
from surgery.format.header import TensorEntry
from surgery.format.views import Slice
from surgery.lossless.grids import Grid
from surgery.names import FP8, FP8_WIDE
from surgery.quantized.codec import Codec, Extremes, Parts, Role
from surgery.quantized.elements import E4M3, Elements, Floats
from surgery.quantized.weight import Quantized


@dataclass(frozen=True, slots=True)
class E5M2(Floats):
    """float8_e5m2, one number to a byte; its infinities are no weights."""

    # Halfway to 65536, which is infinity.
    high: float = 57344.0
    high_held: float = 61440.0
    digits: int = 2
    smallest: float = 2.0**-14

    def values(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        return stored.float()

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_(-self.high, self.high).to(torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class CastGrid:
    """The numbers of a dtype."""

    elements: Elements

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        return self.elements.round_(x)


@dataclass(frozen=True, slots=True)
class Cast(Codec):
    """Numbers that are the weights: nothing scales them."""

    def dequantize(self, stored: torch.Tensor, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        return self.elements.values(stored, shape[-1]).reshape(shape)

    def quantize(self, weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        return self.elements.stored(self.elements.round_(weight.clone().view(-1, weight.shape[-1]))).view(weight.shape)

    def grid_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return *shape[:-2], 1, 1

    def extremes(self, weight: torch.Tensor, parts: Parts) -> Extremes:
        return Extremes(weight.amin((-2, -1), keepdim=True), weight.amax((-2, -1), keepdim=True))

    def parts_that_hold(self, extremes: Extremes, parts: Parts, *, renew: bool = False) -> dict[Role, torch.Tensor]:
        largest = torch.maximum(extremes.highs, -extremes.lows).nan_to_num(0.0).amax().item()
        if largest > self.elements.high_held:
            raise WeightError(
                f"{self.label}: the update is too large for FP8 without scales",
                got=f"a weight of {largest:.3g}",
                expected=f"at most {self.elements.high:g}",
                hint="--dequantize writes bfloat16",
            )
        return {}

    def grid(self, parts: Parts, shape: tuple[int, int], part: Slice | None = None) -> Grid:
        return CastGrid(self.elements)


_ELEMENTS: dict[str, Elements] = {FP8: E4M3(), FP8_WIDE: E5M2()}


def is_fp8_matrix(entry: TensorEntry) -> bool:
    """Whether a tensor may be a weight that was cast."""
    return entry.dtype in _ELEMENTS and len(entry.shape) > 1


def as_cast(entry: TensorEntry, shard: str) -> Quantized:
    """A weight that was cast to FP8.

    Args:
        entry: of it.
        shard: the weight file that it is in.
    """
    codec = Cast(_ELEMENTS[entry.dtype], (1, 1), entry.name)
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
