"""Weights as numbers of few bits and scales: ``W[i, j] = (q[i, j] - zero[block]) * scale[block]``, dequantized and quantized.

Blocks are rectangles of a matrix; those at its edges are cut off. A scale for a channel is a block of one row, a group along
the inputs a block of one row and as many columns, one for the whole matrix a block as large as the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from surgery.errors import WeightError
from surgery.format.views import Slice
from surgery.quantized.elements import Elements

#: The tensors beside the numbers of a weight: the scales of its blocks; one number that multiplies or divides all of them;
#: what stands for zero in each block, as a signed integer; and the group that each column belongs to.
Role = Literal["scale", "global_scale", "zero_point", "group_index"]
Parts = Mapping[Role, torch.Tensor]
#: What these are called in words.
PART_NAMES: Mapping[Role, str] = {
    "scale": "scales",
    "global_scale": "global scale",
    "zero_point": "zero points",
    "group_index": "order of the columns",
}

#: Rows whose scales are expanded to entries at a time: those of all would be as large as the weight.
_BAND = 64


@dataclass(frozen=True, slots=True)
class Extremes:
    """The smallest and the largest number in each block, float32 (..., rows of blocks, columns of blocks).

    NaN in those of a matrix that does not change.
    """

    lows: torch.Tensor
    highs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Codec:
    """How a weight (..., m, n) is stored: its numbers and how they are scaled.

    Attributes:
        elements: what the numbers can be.
        block: how many rows and columns of a matrix share a scale.
        label: what the format is called, for messages.
        divides: whether the weight's scales are divided by the global one; else they are multiplied by it.
        transposed: whether what is stored of a matrix is its transpose; ``block`` is that of the matrix.
        renewed: whether rounding to nearest renews the scales of all blocks, as the quantizers of such models do; else only
            of those that cannot hold the new numbers.
    """

    elements: Elements
    block: tuple[int, int]
    label: str
    divides: bool = False
    transposed: bool = False
    renewed: bool = False

    def dequantize(self, stored: torch.Tensor, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        """The weights that stored numbers stand for.

        Args:
            stored: the numbers as in the file, of a whole tensor or of some matrices of a stack.
            parts: what belongs to them.
            shape: (..., m, n) of the weights.

        Returns:
            float32 (..., m, n), each product rounded once.
        """
        *stack, m, n = shape
        rows, columns = (n, m) if self.transposed else (m, n)
        weight = self.elements.values(stored.reshape(*stack, rows, -1), columns)
        weight = weight.mT.contiguous() if self.transposed else weight
        for band, scales, zeros in self._bands(parts, shape):
            if zeros is not None:
                weight[..., band, :] -= zeros
            weight[..., band, :] *= scales
        return weight

    def quantize(self, weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The numbers nearest to ``weight / scale + zero``.

        Args:
            weight: float32 (..., m, n).
            parts: scales that hold it.

        Returns:
            As the elements are stored: (..., rows, columns / how many lie in one stored number).
        """
        shape = tuple(weight.shape)
        if self.transposed:  # what lies together in the file are the columns
            scaled = torch.empty_like(weight)
            for band, scales, zeros in self._bands(parts, shape):
                scaled[..., band, :] = _divided(weight[..., band, :], scales, zeros)
            return self.elements.stored(scaled.mT.contiguous())
        bands = (_divided(weight[..., band, :], scales, zeros) for band, scales, zeros in self._bands(parts, shape))
        return torch.cat([self.elements.stored(band) for band in bands], -2)

    def extremes(self, weight: torch.Tensor, parts: Parts) -> Extremes:
        """The smallest and the largest number in each block of a weight (..., m, n), float32."""
        *stack, m, n = weight.shape
        if "group_index" in parts:
            group = parts["group_index"].long().expand_as(weight)
            groups = self._count(n, self.block[1])
            start = weight.new_zeros(*stack, m, groups)
            return Extremes(*(start.scatter_reduce(-1, group, weight, how, include_self=False) for how in ("amin", "amax")))
        rows, columns = min(self.block[0], m), min(self.block[1], n)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for first in range(0, m, rows * max(1, _BAND // rows)):
            band = weight[..., first : first + rows * max(1, _BAND // rows), :]
            # A block that is cut off is filled up with numbers that it has.
            if padding := -n % columns:
                band = torch.cat([band, band[..., -1:].expand(*band.shape[:-1], padding)], -1)
            if padding := -band.shape[-2] % rows:
                band = torch.cat([band, band[..., -1:, :].expand(*band.shape[:-2], padding, band.shape[-1])], -2)
            blocks = band.view(*stack, -1, rows, self._count(n, columns), columns)
            found.append((blocks.amin((-3, -1)), blocks.amax((-3, -1))))
        return Extremes(*(torch.cat(ends, -2) for ends in zip(*found, strict=True)))

    def parts_that_hold(self, extremes: Extremes, parts: Parts, *, renew: bool = False) -> dict[Role, torch.Tensor]:
        """The parts for a changed weight: a block keeps its scale if that holds its numbers, else it gets a fresh one.

        Another scale moves every entry of a block, most by more than an update does.

        Args:
            extremes: of the changed weight.
            parts: those that are stored.
            renew: give every block a fresh scale, if the format's quantizers do.

        Returns:
            In shape and dtype of the stored ones.

        Raises:
            WeightError: the global scale allows none that is large enough.
        """
        lows, highs = extremes.lows, extremes.highs
        scales, zeros = self._scales(parts, lows.shape), self._zeros(parts, lows.shape)
        low, high, offset = self.elements.low, self.elements.high, 0.0 if zeros is None else zeros
        ends = (self.elements.low_held - offset) * scales, (self.elements.high_held - offset) * scales
        # Of NaN no comparison is true: what does not change is held.
        held = ~((lows < torch.minimum(*ends)) | (highs > torch.maximum(*ends)))
        shared = parts["scale"].numel() == 1 and lows.numel() > 1
        if renew and self.renewed and not shared:
            held = lows.isnan()
        if bool(held.all()):
            return dict(parts)
        if shared:
            raise WeightError(
                "the update is too large for the one scale that all matrices of a stack have",
                hint="--dequantize writes bfloat16",
            )
        if zeros is None:
            fresh = torch.maximum(lows / low, highs / high)
        else:
            fresh = (highs.clamp(min=0) - lows.clamp(max=0)) / (high - low)
        stored = self._stored_scales(fresh, parts)
        new: dict[Role, torch.Tensor] = dict(parts)
        new["scale"] = torch.where(held, self._scales_as_stored(parts, lows.shape), stored).to(parts["scale"].dtype)
        new["scale"] = self._in_place_of(new["scale"], parts["scale"])
        if zeros is not None:
            used = self._scales(new, lows.shape)
            shifted = (low - lows.clamp(max=0) / torch.where(used == 0, 1.0, used)).round().clamp(low, high)
            new["zero_point"] = self._in_place_of(torch.where(held, zeros, shifted), parts["zero_point"])
        return new

    def _stored_scales(self, scales: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Fresh scales as numbers of the stored dtype, float32; of powers of two the next larger one."""
        whole = parts.get("global_scale")
        if whole is not None:
            scales = scales * whole.float() if self.divides else scales / whole.float()
        dtype = parts["scale"].dtype
        is_zero = scales <= 0
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        if dtype == torch.float8_e8m0fnu:
            # Of a normal number the upper bits are its exponent; one more where any lower bit is set.
            bits = scales.view(torch.int32)
            scales = (((bits + 0x007F_FFFF) >> 23) << 23).view(torch.float32)
        elif bool((scales > torch.finfo(dtype).max).any()):
            raise WeightError(
                f"the update is too large for the scales of {self.label}",
                got=f"a scale of {scales.max().item():.3g}",
                expected=f"at most {torch.finfo(dtype).max:.3g}",
                hint="--dequantize writes bfloat16",
            )
        return torch.where(is_zero, 1.0, scales.to(dtype).float())

    def _scales(self, parts: Parts, grid: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """The scale of each block, float32 (..., rows of blocks, columns of blocks)."""
        scales, whole = self._scales_as_stored(parts, grid), parts.get("global_scale")
        if whole is None:
            return scales
        return scales / whole.float() if self.divides else scales * whole.float()

    def _scales_as_stored(self, parts: Parts, grid: torch.Size | tuple[int, ...]) -> torch.Tensor:
        return self._in_grid(parts["scale"].float(), grid)

    def _zeros(self, parts: Parts, grid: torch.Size | tuple[int, ...]) -> torch.Tensor | None:
        zeros = parts.get("zero_point")
        return None if zeros is None else self._in_grid(zeros.float(), grid)

    def _in_grid(self, numbers: torch.Tensor, grid: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Numbers of blocks in the order of the file, as those of the matrix's blocks."""
        if numbers.numel() == 1:
            return numbers.reshape(()).expand(grid)
        if self.transposed:
            return numbers.reshape(*grid[:-2], grid[-1], grid[-2]).mT
        return numbers.reshape(grid)

    def _in_place_of(self, numbers: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """The inverse of ``_in_grid``: in the shape and dtype of ``stored``."""
        numbers = numbers.mT if self.transposed else numbers
        return numbers.to(stored.dtype).reshape(stored.shape)

    def grid_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many blocks a weight (..., m, n) has: (..., rows of blocks, columns of blocks)."""
        *stack, m, n = shape
        return *stack, self._count(m, self.block[0]), self._count(n, self.block[1])

    @staticmethod
    def _count(length: int, of_block: int) -> int:
        return -(-length // of_block)

    def _bands(self, parts: Parts, shape: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Some rows at a time, with their scales and zeros, float32, expanded to entries where they are many."""
        m, n = shape[-2:]
        rows = self.block[0]
        grid = self.grid_of(shape)
        scales, zeros = self._scales(parts, grid), self._zeros(parts, grid)
        column = self.block_of_column(n, parts)
        step = max(1, _BAND // rows)
        for i in range(0, grid[-2], step):
            band = slice(i * rows, min((i + step) * rows, m))
            count = band.stop - band.start

            def spread(numbers: torch.Tensor, i: int = i, count: int = count) -> torch.Tensor:
                there = numbers[..., i : i + step, :][..., column]
                return there if there.shape[-2] == 1 else there.repeat_interleave(rows, -2)[..., :count, :]

            yield band, spread(scales), None if zeros is None else spread(zeros)

    def block_of_column(self, n: int, parts: Parts) -> torch.Tensor:
        """The column of blocks that each column of a matrix is in, int64 (n,)."""
        group = parts.get("group_index")
        return torch.arange(n, device=parts["scale"].device) // self.block[1] if group is None else group.long()

    def grid(self, parts: Parts, shape: tuple[int, int], part: Slice | None = None) -> CodecGrid:
        """The numbers that the entries of one matrix (m, n), or of a slice of it, may take."""
        grid = self.grid_of(shape)
        row, column = torch.arange(shape[0]) // self.block[0], self.block_of_column(shape[1], parts).cpu()
        if part is not None:
            meant = part.holds(torch.arange(shape[part.axis]))
            row, column = (row[meant], column) if part.axis == 0 else (row, column[meant])
        return CodecGrid(self.elements, self._scales(parts, grid), self._zeros(parts, grid), row, column)


class CodecGrid:
    """The numbers that a matrix can hold with its scales: ``Codec.quantize`` gives each of them back exactly.

    Args:
        elements: what its stored numbers can be.
        scales, zeros: of its blocks, float32 (rows of blocks, columns of blocks); no zeros: all are 0.
        row, column: the row and the column of blocks that each row and column is in.
    """

    def __init__(
        self,
        elements: Elements,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        row: torch.Tensor,
        column: torch.Tensor,
    ) -> None:
        self._elements = elements
        self._of_row = row
        # Where a row of blocks has many rows, its scales are expanded once.
        self._is_few = len(row) >= 16 * scales.shape[0]
        self._column = column
        self._scales, self._zeros = (
            numbers[:, column].contiguous() if self._is_few and numbers is not None else numbers for numbers in (scales, zeros)
        )
        assert self._scales is not None
        self._has_zero = bool((scales == 0).any())

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        of_row = self._of_row[rows]
        first, last = int(of_row[0]), int(of_row[-1])
        if isinstance(rows, slice) and self._is_few:
            # Few blocks: row of blocks by row of blocks, with the scales of each as they are.
            ends = torch.searchsorted(of_row, torch.arange(first, last + 1), right=True).tolist() if last > first else [len(x)]
            for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False), first):
                self._nearest(x[start:end], *(None if one is None else one[i].to(x.device) for one in self._both))
            return x
        return self._nearest(x, *(None if one is None else self._expanded(one, of_row).to(x.device) for one in self._both))

    @property
    def _both(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._scales, self._zeros

    def _expanded(self, numbers: torch.Tensor, of_row: torch.Tensor) -> torch.Tensor:
        there = numbers[of_row.to(numbers.device)]
        return there if self._is_few else there[:, self._column.to(numbers.device)]

    def _nearest(self, x: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None) -> torch.Tensor:
        assert scales is not None
        _divide_(x, scales, zeros, guarded=self._has_zero)
        self._elements.round_(x)
        return x.mul_(scales) if zeros is None else x.sub_(zeros).mul_(scales)


def _divided(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    return _divide_(weight.clone(), scales, zeros, guarded=bool((scales == 0).any()))


def _divide_(x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, guarded: bool) -> torch.Tensor:
    """``x / scales + zeros``, in place; where a scale is 0, so that a block holds nothing but zeros, ``x`` itself."""
    x.div_(torch.where(scales == 0, 1.0, scales) if guarded else scales)
    return x if zeros is None else x.add_(zeros)
