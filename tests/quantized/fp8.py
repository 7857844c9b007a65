"""FP8 with scales by block, for tests that compute with such weights."""

from __future__ import annotations

import torch

from surgery.format.views import Slice
from surgery.lossless.grids import Grid
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E4M3


def fp8(block: tuple[int, int]) -> Codec:
    return Codec(E4M3, block, "FP8", renewed=True)


def dequantize(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return fp8(block).dequantize(q, {"scale": scale}, tuple(q.shape))


def quantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return fp8(block).quantize(weight, {"scale": scale})


def block_scales(weight: torch.Tensor, block: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """A fresh scale for each block."""
    return _scales(weight, block, like, renew=True)


def scales_that_hold(weight: torch.Tensor, block: tuple[int, int], scale: torch.Tensor) -> torch.Tensor:
    """A fresh scale for each block whose own does not hold its numbers."""
    return _scales(weight, block, scale, renew=False)


def _scales(weight: torch.Tensor, block: tuple[int, int], scale: torch.Tensor, *, renew: bool) -> torch.Tensor:
    codec = fp8(block)
    return codec.parts_that_hold(codec.extremes(weight, {"scale": scale}), {"scale": scale}, renew=renew)["scale"]


def grid(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int], part: Slice | None = None) -> Grid:
    return fp8(block).grid({"scale": scale}, shape, part)
