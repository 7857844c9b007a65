"""FP8 weights with scales by block: W[i, j] = q[i, j] * scale[i // rows, j // columns].

The format of DeepSeek-V3 ("DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3; weights are described in the
README_WEIGHTS of its repository): float8_e4m3fn, blocks of 128 x 128, those at the edges cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    for rows, factors in _rows_of_blocks(scale, weight.shape, block):
        weight[..., rows, :] *= factors
    return weight


def block_scales(weight: torch.Tensor, block: tuple[int, int] | None, like: torch.Tensor) -> torch.Tensor:
    """Scales with which the largest entry of each block becomes the largest FP8 number.

    Args:
        weight: float32 (..., m, n), finite.
        block: (rows, columns), or None for one scale.
        like: the scales they replace, whose shape and dtype they take. Powers of two are rounded up (float8_e8m0fnu).
    """
    if block is None:
        largest = weight.abs().amax()
    else:
        m, n = weight.shape[-2:]
        padding = -n % block[1]
        rows = [
            torch.nn.functional.pad(weight[..., first : first + block[0], :].abs().amax(-2), (0, padding))
            for first in range(0, m, block[0])
        ]
        largest = torch.stack(rows, -2)
        largest = largest.view(*largest.shape[:-1], -1, block[1]).amax(-1)
    scale = largest / _LARGEST
    if like.dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    scale = torch.where(largest > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return scale.to(like.dtype).reshape(like.shape)


def quantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """float8_e4m3fn (..., m, n), the nearest to ``weight / scale``; arguments as for ``dequantize``."""
    q = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for rows, factors in _rows_of_blocks(scale, weight.shape, block):
        q[..., rows, :] = (weight[..., rows, :] / factors).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return q


def _rows_of_blocks(
    scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows that share their scales, and those, float32 (..., 1, n): a few at a time, as all would be as large as the weight."""
    if block is None:
        yield slice(None), scale.float().reshape(())
        return
    m, n = shape[-2:]
    for i, first in enumerate(range(0, m, block[0])):
        factors = scale[..., i, :].float().repeat_interleave(block[1], -1)[..., None, :n]
        yield slice(first, first + block[0]), factors
