"""Encoding and decoding corrections (docs/format.md): mostly zeros, the rest mostly -1 and 1. In NumPy."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from surgery.lossless.rounding import flipped

#: The value that stands for the next of the escapes.
ESCAPE = -128
#: How many bits of each byte are set.
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
#: zlib's message when it cannot allocate memory (Z_MEM_ERROR), which does not mean that the data is damaged.
_NO_MEMORY = "Error -4 "
_BLOCK_HEADER = struct.Struct("<III")  # bytes of the mask, bytes of the values, number of escapes

Integers = npt.NDArray[Any]


class CorruptCorrection(ValueError):
    """A correction that cannot be decoded. Callers add the names of the file and the tensor."""


@dataclass(frozen=True, slots=True)
class CorrectionBlock:
    """A block of a correction, not encoded: where rows of a weight differ from their prediction, and by how much.

    The arrays may be parts of others.

    Attributes:
        mask: uint8 (ceil(entries / 8),), a bit for each entry, the lowest first: whether it differs.
        values: int8 (d,), for each entry that differs by how many units in the last place; ``ESCAPE`` for those beyond int8.
        escapes: int16 or int32 by the width of the weight, (x,), what each ``ESCAPE`` stands for.
    """

    mask: npt.NDArray[np.uint8]
    values: npt.NDArray[np.int8]
    escapes: Integers

    @classmethod
    def of(cls, exact: Integers, guess: Integers) -> CorrectionBlock:
        """The differences of two blocks of floats.

        Args:
            exact, guess: the bits of the floats, int16 or int32 (entries,).
        """
        differs = exact != guess
        positions = np.flatnonzero(differs)
        units = flipped(exact[positions]) - flipped(guess[positions])
        escaped = (units > 127) | (units < -127)
        short = np.where(escaped, ESCAPE, units).astype(np.int8)
        return cls(np.packbits(differs, bitorder="little"), short, units[escaped])

    def encoded(self) -> bytes:
        """As it is stored (docs/format.md). In any thread; zlib leaves the interpreter to others meanwhile."""
        mask, values = _deflate(self.mask.data), _deflate(self.values.data)
        return _BLOCK_HEADER.pack(len(mask), len(values), len(self.escapes)) + mask + values + self.escapes.tobytes()


def assemble(blocks: list[bytes], rows_per_block: int) -> torch.Tensor:
    """The whole encoded correction: the directory, then the blocks, padded to a multiple of 8 bytes; uint8 (bytes,)."""
    ends = np.cumsum([len(block) for block in blocks], dtype=np.uint64)
    result = bytearray(struct.pack("<2Q", rows_per_block, len(blocks)) + ends.tobytes())
    for block in blocks:
        result += block
    result += bytes(-len(result) % 8)
    return torch.frombuffer(result, dtype=torch.uint8)


class CorrectionReader:
    """Random access to the blocks of an encoded correction; thread-safe.

    Args:
        data: the bytes of ``assemble``, from a file that may be damaged.
        m, n: shape of the weight.
        width: bytes per entry of the weight, 2 or 4.

    Attributes:
        rows_per_block: how many rows each block has but the last.
        width: as given.

    Raises:
        CorruptCorrection: the directory does not fit; ``block`` raises it too.
    """

    def __init__(self, data: memoryview, m: int, n: int, width: int) -> None:
        self._data, self._m, self._n, self.width = data, m, n, width
        self._dtype: np.dtype[Any] = np.dtype({2: "<i2", 4: "<i4"}[width])
        if len(data) < 16:
            raise CorruptCorrection("it is cut off")
        step, count = struct.unpack_from("<2Q", data)
        if (step < 1 and m > 0) or count != -(-m // max(step, 1)) or len(data) < 16 + 8 * count:
            raise CorruptCorrection(f"its directory does not fit {m} rows")
        self.rows_per_block = max(step, 1)
        base = 16 + 8 * count
        bounds = [base, *(base + end for end in struct.unpack_from(f"<{count}Q", data, 16))]
        self._spans = list(pairwise(bounds))
        if any(start > stop for start, stop in self._spans) or bounds[-1] + -bounds[-1] % 8 != len(data):
            raise CorruptCorrection("its directory does not fit its length")

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._spans)

    def block(self, index: int) -> CorrectionBlock:
        """One of the blocks. In any thread; zlib leaves the interpreter to others meanwhile."""
        mask, rest = self._mask(index)
        if beyond := self._entries(index) % 8:  # what the last byte has more bits for than there are entries
            mask = mask.copy()
            mask[-1] &= (1 << beyond) - 1
        return CorrectionBlock(mask, *self._values(rest, int(_ONES[mask].sum(dtype=np.int64))))

    def units(self, first_row: int) -> tuple[npt.NDArray[np.int64], Integers]:
        """Where the block that begins at ``first_row`` differs from its prediction, and by how much: (d,), (d,)."""
        index = first_row // self.rows_per_block
        mask, rest = self._mask(index)
        # Searching bytes of 0 and 1 as booleans is many times faster than searching numbers.
        positions = np.flatnonzero(np.unpackbits(mask, count=self._entries(index), bitorder="little").view(np.bool_))
        short, escapes = self._values(rest, len(positions))
        units = short.astype(self._dtype)
        units[short == ESCAPE] = escapes
        return positions, units

    def _entries(self, index: int) -> int:
        return int(min(self.rows_per_block, self._m - index * self.rows_per_block) * self._n)

    def _mask(self, index: int) -> tuple[npt.NDArray[np.uint8], tuple[memoryview, memoryview]]:
        """The mask of a block, and what is stored of its values and its escapes."""
        start, stop = self._spans[index]
        data = self._data[start:stop]
        if len(data) < _BLOCK_HEADER.size:
            raise CorruptCorrection("a block is cut off")
        n_mask, n_values, n_escapes = _BLOCK_HEADER.unpack_from(data)
        a = _BLOCK_HEADER.size
        b, c = a + n_mask, a + n_mask + n_values
        if c + n_escapes * self._dtype.itemsize != len(data):
            raise CorruptCorrection("a block's lengths do not fit")
        mask = np.frombuffer(_inflate(data[a:b], (self._entries(index) + 7) // 8), np.uint8)
        return mask, (data[b:c], data[c:])

    def _values(self, stored: tuple[memoryview, memoryview], count: int) -> tuple[npt.NDArray[np.int8], Integers]:
        """So many values of a block, and its escapes."""
        values, escapes = np.frombuffer(_inflate(stored[0], count), np.int8), np.frombuffer(stored[1], self._dtype)
        if np.count_nonzero(values == ESCAPE) != len(escapes):
            raise CorruptCorrection("a block's escapes do not fit")
        return values, escapes


def _deflate(data: memoryview) -> bytes:
    # Entropy coding only: there are no repeated strings to find, and searching for them takes four times as long.
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _inflate(data: memoryview, size: int) -> bytes:
    """Decompress a stream that must give exactly ``size`` bytes. Raises CorruptCorrection, MemoryError."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        result = decoder.decompress(data, size + 1)
    except zlib.error as error:
        if str(error).startswith(_NO_MEMORY):
            raise MemoryError("no room to unpack a correction") from None
        raise CorruptCorrection(str(error)) from None
    if len(result) != size or not decoder.eof:
        raise CorruptCorrection(f"a stream gives {len(result)} bytes where {size} belong")
    return result
