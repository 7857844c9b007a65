"""FP8 weights with scales by block: W[i, j] = q[i, j] * scale[i // rows, j // columns].

The format of DeepSeek-V3 ("DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3; weights are described in the
README_WEIGHTS of its repository): float8_e4m3fn, blocks of 128 x 128, those at the edges cut off. One scale for a whole
matrix, as Mistral's models have it, is a block as large as the matrix.

Scales come in the shape in which they are stored, with as many numbers as there are blocks: of one block for each matrix
also (), (1,) or, for a stack of B matrices, (B,).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_LARGEST = 448.0  # of float8_e4m3fn


def dequantize(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The weights that FP8 numbers and their scales stand for.

    Args:
        q: float8_e4m3fn (..., m, n).
        scale: any float dtype, (..., ceil(m / rows), ceil(n / columns)), or another shape of as many numbers.
        block: (rows, columns).

    Returns:
        float32 (..., m, n), each product rounded once.
    """
    weight = q.float()
    for rows, factors in _rows_of_blocks(scale, weight.shape, block):
        weight[..., rows, :] *= factors
    return weight


def block_scales(weight: torch.Tensor, block: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """The scales with which the largest entry of each block becomes the largest FP8 number, 448.

    Args:
        weight: float32 (..., m, n), finite.
        block: (rows, columns).
        like: the scales they replace, whose shape and dtype they take; in float8_e8m0fnu they are rounded up to powers of two.
    """
    m, n = weight.shape[-2:]
    padding = -n % block[1]
    rows = [
        torch.nn.functional.pad(weight[..., first : first + block[0], :].abs().amax(-2), (0, padding))
        for first in range(0, m, block[0])
    ]
    largest = torch.stack(rows, -2)
    largest = largest.view(*largest.shape[:-1], -1, block[1]).amax(-1)
    scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    if like.dtype == torch.float8_e8m0fnu:
        # Of a normal number the upper bits are its exponent; one more where any lower bit is set.
        bits = scale.view(torch.int32)
        scale = (((bits + 0x007F_FFFF) >> 23) << 23).view(torch.float32)
    return torch.where(largest > 0, scale, 1.0).to(like.dtype).reshape(like.shape)


def quantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Round ``weight / scale`` to the nearest FP8 numbers.

    Args:
        weight: float32 (..., m, n).
        scale, block: as for ``dequantize``.

    Returns:
        float8_e4m3fn (..., m, n).
    """
    q = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for rows, factors in _rows_of_blocks(scale, weight.shape, block):
        q[..., rows, :] = (weight[..., rows, :] / factors).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return q


def _rows_of_blocks(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each row of blocks: the rows of the weight in it, and the scale of each column there, float32 (..., 1, n).

    One row of blocks at a time, as the scales of all of them, expanded to entries, would be as large as the weight.
    """
    *stack, m, n = shape
    grid = scale.reshape(*stack, -(-m // block[0]), -(-n // block[1]))
    for i, first in enumerate(range(0, m, block[0])):
        factors = grid[..., i, :].float().repeat_interleave(block[1], -1)[..., None, :n]
        yield slice(first, first + block[0]), factors
