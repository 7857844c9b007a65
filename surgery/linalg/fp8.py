"""FP8 weights with scales by block: W[i, j] = q[i, j] * scale[i // rows, j // columns].

The format of DeepSeek-V3 ("DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3; weights are described in the
README_WEIGHTS of its repository): float8_e4m3fn, blocks of 128 x 128, those at the edges cut off.
"""

from __future__ import annotations

import torch

_LARGEST = 448.0  # of float8_e4m3fn


def dequantize(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """The weights that FP8 numbers and their scales stand for.

    Args:
        q: float8_e4m3fn (..., m, n).
        scale: any float dtype, (..., ceil(m / rows), ceil(n / columns)); one number where ``block`` is None.
        block: (rows, columns).

    Returns:
        float32 (..., m, n), each product rounded once.
    """
    weight = q.float()
    return weight.mul_(_spread(scale.float(), q.shape[-2:], block))


def block_scales(weight: torch.Tensor, block: tuple[int, int] | None, like: torch.Tensor) -> torch.Tensor:
    """Scales with which the largest entry of each block becomes the largest FP8 number.

    Args:
        weight: float32 (..., m, n), finite.
        block: (rows, columns), or None for one scale.
        like: the scales they replace, whose shape and dtype they take. Powers of two are rounded up (float8_e8m0fnu).
    """
    largest = weight.abs()
    if block is None:
        largest = largest.amax()
    else:
        m, n = weight.shape[-2:]
        rows, columns = -(-m // block[0]), -(-n // block[1])
        padding = (0, columns * block[1] - n, 0, rows * block[0] - m)
        largest = torch.nn.functional.pad(largest, padding)
        largest = largest.view(*weight.shape[:-2], rows, block[0], columns, block[1]).amax(dim=(-3, -1))
    scale = largest / _LARGEST
    if like.dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    scale = torch.where(largest > 0, scale, 1.0)
    return scale.to(like.dtype).reshape(like.shape)


def quantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """float8_e4m3fn (..., m, n), the nearest to ``weight / scale``; arguments as for ``dequantize``."""
    spread = _spread(scale.float(), weight.shape[-2:], block)
    return (weight / spread).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def _spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None) -> torch.Tensor:
    """A scale for each entry."""
    if block is None:
        return scale.reshape(())
    m, n = shape
    return scale.repeat_interleave(block[0], -2)[..., :m, :].repeat_interleave(block[1], -1)[..., :n]
