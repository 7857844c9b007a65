"""Weights as numbers of few bits and scales: ``W[i, j] = (q[i, j] - zero[block]) * scale[block]``, dequantized and quantized.

Blocks are rectangles of a matrix; those at its edges are cut off. A scale for a channel is a block of one row, a group along
the inputs a block of one row and as many columns, one for the whole matrix a block as large as the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from surgery.errors import FormatError, WeightError
from surgery.format.views import Slice
from surgery.lossless.blocks import BLOCK_ENTRIES, DEVICE_BLOCKS
from surgery.lossless.grids import Grid
from surgery.quantized.elements import Elements
from surgery.quantized.scaling import BlockScaling

#: The tensors beside the numbers of a weight: the scales of its blocks; one number that multiplies or divides all of them;
#: what stands for zero in each block, as a signed integer; the group that each column belongs to; and the weight's shape.
Role = Literal["scale", "global_scale", "zero_point", "group_index", "shape"]
Parts = Mapping[Role, torch.Tensor]
#: What these are called in words.
PART_NAMES: Mapping[Role, str] = {
    "scale": "scales",
    "global_scale": "global scale",
    "zero_point": "zero points",
    "group_index": "order of the columns",
    "shape": "shape",
}

#: Rows whose extremes are looked for at a time, and entries that a CPU scales and rounds at a time: what stays in cache.
_BAND = 64
_AT_A_TIME = 1 << 18

#: How many times the largest scale a block may want. Quantizers of NVFP4 choose the global scale such that the largest of the
#: others is the largest number of its dtype, so that the block with the largest entries of a weight wants more when these grow:
#: it gets that scale, and the few entries beyond it the largest number. Another global scale would not do: loaders that join
#: the weights of q, k and v take one for all three.
_MOST = 2

#: Integers as wide as the dtypes of scales: of positive numbers the next larger one has the next larger bits.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
        label: the weight, for messages.
        divides: whether the weight's scales are divided by the global one; else they are multiplied by it.
        transposed: whether what is stored of a matrix, numbers and scales, is its transpose; ``block`` is that of the matrix.
        columnwise: whether several numbers that are stored in one are of one column of a matrix, and not of one row.
        renewed: whether rounding to nearest renews the scales of all blocks, as the quantizers of such models do; else only
            of those that cannot hold the new numbers.
        powers_of_two: whether fresh scales are powers of two, whatever their dtype.
    """

    elements: Elements
    block: tuple[int, int]
    label: str
    divides: bool = False
    transposed: bool = False
    columnwise: bool = False
    renewed: bool = False
    powers_of_two: bool = False

    def dequantize(self, stored: torch.Tensor, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        """The weights that stored numbers stand for.

        Args:
            stored: the numbers as in the file, of a whole tensor or of some matrices of a stack; on the CPU or on a GPU.
            parts: what belongs to them, on the CPU. A GPU gets scales and zero points as they are stored.
            shape: (..., m, n) of the weights.

        Returns:
            float32 (..., m, n), each product rounded once, on the device of ``stored``: the same bits on all devices.

        Raises:
            FormatError: the groups of columns are none.
        """
        *stack, m, n = shape
        rows, columns = (n, m) if self._is_turned else (m, n)
        if self.columnwise:
            stored = stored.reshape(*stack, -1, n).mT.contiguous()
        stored = stored.reshape(*stack, rows, -1)
        scaling = self._scaling(_sent(parts, stored.device), shape, turned=self._is_turned).to(stored.device)
        weight = torch.empty(*stack, rows, columns, dtype=torch.float32, device=stored.device)
        for band in _bands(weight):
            values = weight[..., band, :].copy_(self.elements.values(stored[..., band, :], columns))
            scaling.multiply_(values, band)
        return weight.mT.contiguous() if self._is_turned else weight

    def quantize(self, weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The numbers nearest to ``weight / scale + zero``.

        Args:
            weight: float32 (..., m, n).
            parts: scales that hold it.

        Returns:
            As the elements are stored.
        """
        scaling = self._scaling(parts, tuple(weight.shape), turned=self._is_turned)
        turned = weight.mT if self._is_turned else weight
        found: torch.Tensor | None = None
        for band in _bands(turned):
            scaled = torch.empty(turned[..., band, :].shape, dtype=torch.float32, device=weight.device)
            numbers = self.elements.stored(scaling.divide_(scaled.copy_(turned[..., band, :]), band))
            if found is None:
                found = numbers.new_empty(*turned.shape[:-1], numbers.shape[-1])
            found[..., band, :] = numbers
        if found is None:
            found = self.elements.stored(weight)
        return found.mT.contiguous() if self.columnwise else found

    @property
    def _is_turned(self) -> bool:
        """Whether numbers that lie beside each other in the file are of one column."""
        return self.transposed or self.columnwise

    def extremes(self, weight: torch.Tensor, parts: Parts) -> Extremes:
        """The smallest and the largest number in each block of a weight (..., m, n), float32."""
        *stack, m, n = weight.shape
        column = self._columns(parts, n)
        if not isinstance(column, int):
            group = column.to(weight.device).expand_as(weight)
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
        scales, zeros = self._scales(parts, lows.shape).to(lows.device), self._zeros(parts, lows.shape)
        low, high, offset = self.elements.low, self.elements.high, 0.0 if zeros is None else zeros
        ends = (self.elements.low_held - offset) * scales, (self.elements.high_held - offset) * scales
        # Of NaN no comparison is true: what does not change is held.
        held = ~((lows < torch.minimum(*ends)) | (highs > torch.maximum(*ends)))
        if "scale" not in parts:
            return self._without_scales(held, extremes)
        shared = parts["scale"].numel() == 1 and lows.numel() > 1
        if renew and self.renewed and not shared:
            held = lows.isnan()
        if bool(held.all()):
            return dict(parts)
        if shared:
            raise WeightError(
                f"{self.label}: the update is too large for the one scale that all its matrices share",
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

    def _without_scales(self, held: torch.Tensor, extremes: Extremes) -> dict[Role, torch.Tensor]:
        """The parts of numbers that stand for themselves: none. Raises WeightError if they cannot hold a changed weight."""
        if bool(held.all()):
            return {}
        raise WeightError(
            f"{self.label}: the update is too large for FP8 without scales",
            got=f"a weight of {torch.maximum(extremes.highs, -extremes.lows).nan_to_num(0.0).max().item():.3g}",
            expected=f"at most {self.elements.high:g}",
            hint="--dequantize writes bfloat16",
        )

    def _stored_scales(self, scales: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Fresh scales as numbers of the stored dtype, float32; of powers of two the next larger one.

        Raises:
            WeightError: one is too large for it.
        """
        whole = self._global_scale(parts, scales.shape)
        if whole is not None:
            scales = scales * whole if self.divides else scales / whole
        dtype = parts["scale"].dtype
        is_zero = scales <= 0
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        if dtype == torch.float8_e8m0fnu or self.powers_of_two:
            # Of a normal number the upper bits are its exponent; one more where any lower bit is set.
            bits = scales.view(torch.int32)
            return torch.where(is_zero, 1.0, (((bits + 0x007F_FFFF) >> 23) << 23).view(torch.float32))
        # A scale that is smaller than wanted holds the numbers too, if it is not by much.
        low, high = self.elements.low / self.elements.low_held, self.elements.high / self.elements.high_held
        enough = scales if "zero_point" in parts else scales * max(low, high)
        largest = torch.finfo(dtype).max
        if bool((scales > _MOST * largest).any()):
            raise WeightError(
                f"{self.label}: the update is too large for its scales",
                got=f"a scale of {scales.max().item():.3g}",
                expected=f"at most {_MOST * largest:.3g}",
                hint="--dequantize writes bfloat16",
            )
        stored = scales.clamp(max=largest).to(dtype)
        # Near zero the numbers of a narrow dtype lie far apart.
        larger = (stored.view(_BITS[dtype.itemsize]) + 1).view(dtype).float()
        stored = torch.where((stored.float() < enough) & (stored.float() < largest), larger, stored.float())
        return torch.where(is_zero, 1.0, stored)

    def _scales(self, parts: Parts, grid: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """The scale of each block, float32 (..., rows of blocks, columns of blocks)."""
        scales, whole = self._scales_as_stored(parts, grid), self._global_scale(parts, grid)
        if whole is None:
            return scales
        whole = whole.to(scales.device)
        return scales / whole if self.divides else scales * whole

    def _global_scale(self, parts: Parts, grid: torch.Size | tuple[int, ...]) -> torch.Tensor | None:
        """The global scale of each matrix, float32, to be broadcast to the blocks."""
        whole = parts.get("global_scale")
        if whole is None:
            return None
        if not bool(torch.isfinite(whole.float()).all()):  # divided by infinity, numbers would look like sound zeros
            raise WeightError(f"{self.label}: its global scale is no number", hint="the file is damaged: fetch it again")
        return whole.float().reshape(()) if whole.numel() == 1 else whole.float().reshape(*grid[:-2], 1, 1)

    def _scales_as_stored(self, parts: Parts, grid: torch.Size | tuple[int, ...]) -> torch.Tensor:
        # Without scales the numbers stand for themselves.
        return self._in_grid(parts["scale"].float(), grid) if "scale" in parts else torch.ones(grid)

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

    def _columns(self, parts: Parts, n: int) -> torch.Tensor | int:
        """The group that each column belongs to, int64 (n,); or how many columns each has, where they follow each other.

        Raises:
            FormatError: a column is in a group that there is not, or a group has too many columns.
        """
        group = parts.get("group_index")
        if group is None or bool((group < 0).any()):  # compressed-tensors: -1 stands for no order of its own
            return self.block[1]
        group = group.long()
        groups, last = self._count(n, self.block[1]), int(group.max()) if n else 0
        if last >= groups or bool((torch.bincount(group) > self.block[1]).any()):
            raise FormatError(
                f"{self.label}: the groups of its columns make no sense",
                got=f"a group {last}" if last >= groups else f"a group of {int(torch.bincount(group).max())} columns",
                expected=f"{groups} groups of {self.block[1]}",
                hint="the file is damaged: fetch it again",
            )
        return group

    def _scaling(
        self, parts: Parts, shape: tuple[int, ...], part: Slice | None = None, *, turned: bool = False
    ) -> BlockScaling:
        """The scales for the entries of a weight, of a slice of a matrix, or of the transposes of all matrices."""
        m, n = shape[-2:]
        grid = self.grid_of(shape)
        scales, zeros = self._scales(parts, grid), self._zeros(parts, grid)
        rows, columns = self.block
        if turned:
            scales, zeros, m, rows, columns = scales.mT, None if zeros is None else zeros.mT, n, columns, rows
        row, column = torch.arange(m, device=scales.device) // rows, columns if turned else self._columns(parts, n)
        if part is not None:
            meant = part.holds(torch.arange(shape[part.axis]))
            if part.axis == 0:
                row = row[meant]
            else:
                column = (torch.arange(n) // column if isinstance(column, int) else column.cpu())[meant]
        return BlockScaling(scales, zeros, row, column)

    def grid(self, parts: Parts, shape: tuple[int, int], part: Slice | None = None) -> Grid:
        """The numbers that the entries of one matrix (m, n), or of a slice of it, may take."""
        return CodecGrid(self.elements, self._scaling(parts, shape, part))


class CodecGrid:
    """The numbers that a matrix can hold with its scales: ``Codec.quantize`` gives each of them back exactly.

    Args:
        elements: what its stored numbers can be.
        scaling: what these are multiplied by.
    """

    def __init__(self, elements: Elements, scaling: BlockScaling) -> None:
        self._elements = elements
        self._scaling = scaling

    def nearest(self, x: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        self._scaling = self._scaling.to(x.device)
        return self._scaling.multiply_(self._elements.round_(self._scaling.divide_(x, rows)), rows)


def _sent(parts: Parts, device: torch.device) -> Parts:
    """Parts of which those that there is a number of for each block are on a device; the others are checked on the CPU."""
    return {role: part.to(device) if role in ("scale", "zero_point") else part for role, part in parts.items()}


def _bands(weight: torch.Tensor) -> list[slice]:
    """Rows of a weight, or of all matrices of a stack, that are scaled at a time."""
    m = weight.shape[-2]
    entries = _AT_A_TIME if weight.device.type == "cpu" else DEVICE_BLOCKS * BLOCK_ENTRIES
    at_a_time = max(1, entries * m // max(1, weight.numel()))
    return [slice(first, min(first + at_a_time, m)) for first in range(0, m, at_a_time)]
