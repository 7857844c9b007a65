"""Formats by name, and weights that are stored in them, for tests that compute with such weights."""

from __future__ import annotations

import torch

from surgery.quantized.codec import Codec, Role
from surgery.quantized.elements import E2M1, E4M3, Integers

#: Name -> the format, and the dtype of its scales.
CODECS = {
    "fp8": (Codec(E4M3, (128, 128), "fp8", renewed=True), torch.float32),
    "fp8 by channel": (Codec(E4M3, (1, 1 << 30), "fp8 by channel", renewed=True), torch.bfloat16),
    "mxfp8": (Codec(E4M3, (1, 32), "mxfp8", renewed=True), torch.float8_e8m0fnu),
    "int8": (Codec(Integers(8, packed=False), (1, 1 << 30), "int8"), torch.bfloat16),
    "int4": (Codec(Integers(4, packed=True), (1, 32), "int4"), torch.bfloat16),
    "int4 of 128": (Codec(Integers(4, packed=True), (1, 128), "int4 of 128"), torch.bfloat16),
    "mxfp4": (Codec(E2M1(), (1, 32), "mxfp4"), torch.float8_e8m0fnu),
    "nvfp4": (Codec(E2M1(), (1, 16), "nvfp4", divides=True), torch.float8_e4m3fn),
}


def stored(kind: str, weight: torch.Tensor) -> tuple[Codec, dict[Role, torch.Tensor], torch.Tensor]:
    """A float32 matrix rounded to a format with fresh scales: the format, its parts, and the numbers that it holds now."""
    codec, dtype = CODECS[kind]
    shape = weight.shape[0], weight.shape[1]
    nothing = 0.0 if dtype != torch.float8_e8m0fnu else 2.0**-100
    parts: dict[Role, torch.Tensor] = {"scale": torch.full(codec.grid_of(shape), nothing).to(dtype)}
    if codec.divides:
        parts["global_scale"] = (448 * 6 / weight.abs().max()).view(1)
    parts = codec.parts_that_hold(codec.extremes(weight, parts), parts)
    return codec, parts, codec.dequantize(codec.quantize(weight, parts), parts, shape)
