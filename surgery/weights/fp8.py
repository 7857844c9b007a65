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

from surgery.format.views import Slice
from surgery.memory import scratch

_LARGEST, _LARGEST_HELD = 448.0, 464.0  # of float8_e4m3fn, and what still rounds to it


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
    return _fresh(block_maxima(weight, block), like).reshape(like.shape)


def block_maxima(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude in each block of a weight (..., m, n), float32 (..., ceil(m / rows), ceil(n / columns)).

    Args:
        weight: float32.
        block: (rows, columns).
    """
    m, n = weight.shape[-2:]
    padding = -n % block[1]
    rows = [
        torch.nn.functional.pad(weight[..., first : first + block[0], :].abs().amax(-2), (0, padding))
        for first in range(0, m, block[0])
    ]
    largest = torch.stack(rows, -2)
    return largest.view(*largest.shape[:-1], -1, block[1]).amax(-1)


def scales_that_hold(largest: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scales of an updated weight: the stored one for each block whose entries it still holds, and otherwise a fresh one.

    Another scale moves every entry of a block, most by more than the update does.

    Args:
        largest: of the updated weight, as ``block_maxima`` gives it.
        scale: the stored scales, any float dtype, as many numbers as there are blocks.

    Returns:
        In shape and dtype of ``scale``.
    """
    stored = scale.float().reshape(largest.shape)
    # Up to there, and there too, the nearest FP8 number is 448: the next one would be 480, whose last digit is odd.
    held = largest <= _LARGEST_HELD * stored
    fresh = _fresh(largest, scale)
    return torch.where(held, stored, fresh.float()).to(scale.dtype).reshape(scale.shape)


def _fresh(largest: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """For the largest magnitudes of blocks: the scales with which they become 448, in the dtype of ``like``."""
    scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    if like.dtype == torch.float8_e8m0fnu:
        # Of a normal number the upper bits are its exponent; one more where any lower bit is set.
        bits = scale.view(torch.int32)
        scale = (((bits + 0x007F_FFFF) >> 23) << 23).view(torch.float32)
    return torch.where(largest > 0, scale, 1.0).to(like.dtype)


class Fp8Grid:
    """The numbers that FP8 and the scales of one matrix (m, n) can stand for: ``quantize`` gives each of them back exactly.

    Args:
        scale: as for ``dequantize``, of one matrix, on the device of the weights.
        block: (rows, columns).
        shape: (m, n).
        part: the rows or columns of the matrix that are meant; None for all of it.
    """

    def __init__(self, scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int], part: Slice | None = None) -> None:
        m, n = shape
        grid = scale.float().reshape(-(-m // block[0]), -(-n // block[1]))
        columns = grid.repeat_interleave(block[1], -1)[:, :n]
        self._rows, self._is_whole = block[0], part is None or part.axis == 1
        self._of_row = torch.arange(m) // block[0]
        if part is not None:
            meant = part.holds(torch.arange(shape[part.axis]))
            columns = columns[:, meant] if part.axis == 1 else columns
            self._of_row = self._of_row[meant] if part.axis == 0 else self._of_row
        self._columns = columns.contiguous()

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        if not isinstance(rows, slice) or not self._is_whole:
            return _nearest(x, self._columns.to(x.device)[self._of_row[rows].to(x.device)])
        first, last = rows.start, rows.stop
        for i in range(first // self._rows, (last - 1) // self._rows + 1):
            part = slice(max(i * self._rows - first, 0), min((i + 1) * self._rows, last) - first)
            _nearest(x[part], self._columns[i].to(x.device))
        return x


def _nearest(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The FP8 numbers nearest to ``x / scales``, times the scales, in place of ``x``, float32 (r, n).

    Rounded by adding and taking away what leaves three bits behind the point: as the conversion does, which takes many times
    as long on a CPU.
    """
    x.div_(scales).clamp_(-_LARGEST, _LARGEST)
    unit = scratch("fp8 units", x.shape, torch.int32, x.device)
    magic = torch.bitwise_and(x.view(torch.int32), 0x7F80_0000, out=unit).view(torch.float32)
    magic.clamp_(min=2.0**-6).mul_(1.5 * 2.0**20)
    bits, sign = x.view(torch.int32), scratch("fp8 signs", x.shape, torch.int32, x.device)
    torch.bitwise_and(bits, -0x8000_0000, out=sign)
    x.add_(magic).sub_(magic)
    bits.bitwise_or_(sign)  # a negative number that rounds to zero gives -0; many times faster than copysign
    return x.mul_(scales)


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
