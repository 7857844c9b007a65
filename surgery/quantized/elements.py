"""What one stored number of a quantized weight can be, how such numbers are packed, and how others are rounded to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from surgery.memory import scratch


class Elements(Protocol):
    """The numbers that a format stores for the entries of a weight, before any scale.

    Attributes:
        low, high: the smallest and the largest of them.
        low_held, high_held: between these, the nearest of them is no farther than half the distance of two neighbours.
    """

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def low_held(self) -> float: ...

    @property
    def high_held(self) -> float: ...

    def values(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        """The numbers of a stored tensor.

        Args:
            stored: as in the file, with rows in all but the last dimension.
            columns: how many numbers there are in each row.

        Returns:
            float32 (..., columns), of its own memory.
        """

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers as they are stored; the inverse of ``values``.

        Args:
            x: float32 (..., columns), which may be overwritten; what is no element is rounded to the nearest.
        """

    def round_(self, x: torch.Tensor) -> torch.Tensor:
        """The elements nearest to numbers, in their place, float32 (r, n).

        In operations that IEEE 754 prescribes, so that the result is the same on every device.
        """


@dataclass(frozen=True, slots=True)
class Floats:
    """Small floating-point numbers without infinities.

    Attributes:
        high, high_held: see ``Elements``.
        digits: bits behind the point of a normal number.
        smallest: the smallest normal number.
    """

    high: float
    high_held: float
    digits: int
    smallest: float

    @property
    def low(self) -> float:
        return -self.high

    @property
    def low_held(self) -> float:
        return -self.high_held

    def round_(self, x: torch.Tensor) -> torch.Tensor:
        # Adding and taking away a number leaves as many digits behind the point as wanted, as a conversion does, which takes
        # many times as long on a CPU.
        x.clamp_(-self.high, self.high)
        unit = scratch("units of elements", x.shape, torch.int32, x.device)
        magic = torch.bitwise_and(x.view(torch.int32), 0x7F80_0000, out=unit).view(torch.float32)
        magic.clamp_(min=self.smallest).mul_(1.5 * 2.0 ** (23 - self.digits))
        bits, sign = x.view(torch.int32), scratch("signs of elements", x.shape, torch.int32, x.device)
        torch.bitwise_and(bits, -0x8000_0000, out=sign)
        x.add_(magic).sub_(magic)
        bits.bitwise_or_(sign)  # a negative number that rounds to zero gives -0; many times faster than copysign
        return x


def _upper_bits(bits: torch.Tensor) -> torch.Tensor:
    return (bits >> 22) & 0x3FF


def _looked_up(table: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """What each byte of a stored tensor stands for."""
    index = stored.contiguous().view(torch.uint8).int().view(-1)
    return table.to(stored.device).index_select(0, index)


@dataclass(frozen=True, slots=True)
class ByteFloats(Floats):
    """The numbers of a dtype of torch with one byte each.

    Attributes:
        dtype: that dtype.
    """

    dtype: torch.dtype

    def values(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        # Looked up they take a fourth of the time that the conversion takes on a CPU, if they are few enough for its cache.
        table = torch.arange(256, dtype=torch.uint8).view(self.dtype).float()
        return _looked_up(table, stored).view(stored.shape)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_(-self.high, self.high).to(self.dtype)


#: Up to 464, and there too, the nearest is 448: the next one would be 480, whose last digit is odd.
E4M3 = ByteFloats(448.0, 464.0, 3, 2.0**-6, torch.float8_e4m3fn)
#: Its infinities are no weights: halfway to 65536, which is the next number, they begin.
E5M2 = ByteFloats(57344.0, 61440.0, 2, 2.0**-14, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class E2M1(Floats):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, two to a byte: the first of each pair in the lower four bits.

    OCP Microscaling Formats (MX) Specification v1.0, section 5.3.3.
    """

    # The distance of 4 and 6 is 2.
    high: float = 6.0
    high_held: float = 7.0
    digits: int = 1
    smallest: float = 1.0

    def values(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32)
        table = torch.cat([table, -table])
        pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)  # byte -> its two numbers
        # As one number of 64 bits, which is looked up four times as fast.
        found = _looked_up(pairs.view(torch.int64).view(-1), stored)
        return found.view(torch.float32).view(*stored.shape[:-1], columns)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        bits = self.round_(x.contiguous()).view(torch.int32)
        # The upper bits of an element: its sign, its exponent and the one digit that may be there.
        codes = torch.zeros(1 << 10, dtype=torch.uint8)
        elements = self.values(torch.arange(16, dtype=torch.uint8).view(-1, 1), 2)[:, 0].contiguous()
        codes[_upper_bits(elements.view(torch.int32)).long()] = torch.arange(16, dtype=torch.uint8)
        code = codes.to(x.device).index_select(0, _upper_bits(bits).view(-1)).view(x.shape)
        return code[..., 0::2] | (code[..., 1::2] << 4)


@dataclass(frozen=True, slots=True)
class Integers:
    """Signed integers of some bits, -2^(b-1) to 2^(b-1) - 1.

    Attributes:
        bits: 4 or 8.
        packed: whether 32 / bits of them lie in an int32, the first in the lowest bits, each with 2^(b-1) added
            (compressed-tensors, ``pack-quantized``); else each is an int8.
    """

    bits: int
    packed: bool

    @property
    def low(self) -> float:
        return -(2.0 ** (self.bits - 1))

    @property
    def high(self) -> float:
        return 2.0 ** (self.bits - 1) - 1

    @property
    def low_held(self) -> float:
        return self.low - 0.5

    @property
    def high_held(self) -> float:
        return self.high + 0.5

    def values(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        if not self.packed:
            return stored.float()
        parts = torch.empty(*stored.shape, 32 // self.bits, dtype=torch.float32, device=stored.device)
        for i in range(32 // self.bits):
            parts[..., i] = (stored >> (i * self.bits)) & (2**self.bits - 1)
        return parts.view(*stored.shape[:-1], -1)[..., :columns].add_(self.low)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.round_(x)
        if not self.packed:
            return whole.to(torch.int8)
        per = 32 // self.bits
        codes = torch.nn.functional.pad(whole.sub_(self.low).to(torch.int32), (0, -whole.shape[-1] % per))
        codes = codes.view(*codes.shape[:-1], -1, per)
        packed = codes[..., 0].clone()
        for i in range(1, per):
            packed |= codes[..., i] << (i * self.bits)
        return packed

    def round_(self, x: torch.Tensor) -> torch.Tensor:
        return x.round_().clamp_(self.low, self.high)
