"""Encoding and decoding corrections (docs/format.md): mostly zeros, the rest mostly -1 and 1. In NumPy, on the CPU."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.lossless.rounding import flipped

_ESCAPE = -128
#: zlib's message when it cannot allocate memory (Z_MEM_ERROR), which does not mean that the data is damaged.
_NO_MEMORY = "Error -4 "
_BLOCK_HEADER = struct.Struct("<III")  # bytes of the mask, bytes of the values, number of escapes

Integers = npt.NDArray[Any]


class CorruptCorrection(ValueError):
    """A correction that cannot be decoded. Callers add the names of the file and the tensor."""


def differences(exact: Integers, guess: Integers) -> tuple[npt.NDArray[np.bool_], Integers]:
    """Where two blocks of floats differ, bool (entries,), and by how many units in the last place there, (d,).

    Args:
        exact, guess: the bits of the floats, int16 or int32 (entries,).
    """
    differs = exact != guess
    positions = np.flatnonzero(differs)
    return differs, flipped(exact[positions]) - flipped(guess[positions])


def encode_block(differs: npt.NDArray[np.bool_], values: Integers) -> bytes:
    """Encode the result of ``differences`` for one block."""
    escaped = (values > 127) | (values < -127)
    short = np.where(escaped, _ESCAPE, values).astype(np.int8)
    mask = _deflate(np.packbits(differs, bitorder="little").tobytes())
    numbers = _deflate(short.tobytes())
    escapes = values[escaped]
    header = _BLOCK_HEADER.pack(len(mask), len(numbers), len(escapes))
    return header + mask + numbers + escapes.tobytes()


def assemble(blocks: list[bytes], rows_per_block: int) -> bytearray:
    """The whole encoded correction: the directory, then the blocks, padded to a multiple of 8 bytes."""
    ends = np.cumsum([len(block) for block in blocks], dtype=np.uint64)
    result = bytearray(struct.pack("<2Q", rows_per_block, len(blocks)) + ends.tobytes())
    for block in blocks:
        result += block
    result += bytes(-len(result) % 8)
    return result


class CorrectionReader:
    """Random access to the blocks of an encoded correction; thread-safe.

    Args:
        data: the bytes of ``assemble``, from a file that may be damaged.
        m, n: shape of the weight.
        width: bytes per entry of the weight, 2 or 4.

    Raises:
        CorruptCorrection: the directory does not fit; ``block`` raises it too.
    """

    def __init__(self, data: memoryview, m: int, n: int, width: int) -> None:
        self._data, self._m, self._n = data, m, n
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

    def block(self, first_row: int) -> tuple[npt.NDArray[np.int64], Integers]:
        """Where the block that begins at ``first_row`` differs from its prediction, and by how much: (d,), (d,)."""
        start, stop = self._spans[first_row // self.rows_per_block]
        data = self._data[start:stop]
        if len(data) < _BLOCK_HEADER.size:
            raise CorruptCorrection("a block is cut off")
        n_mask, n_values, n_escapes = _BLOCK_HEADER.unpack_from(data)
        a = _BLOCK_HEADER.size
        b, c = a + n_mask, a + n_mask + n_values
        if c + n_escapes * self._dtype.itemsize != len(data):
            raise CorruptCorrection("a block's lengths do not fit")
        entries = min(self.rows_per_block, self._m - first_row) * self._n
        packed = np.frombuffer(_inflate(data[a:b], (entries + 7) // 8), np.uint8)
        # Searching bytes of 0 and 1 as booleans is many times faster than searching numbers.
        positions = np.flatnonzero(np.unpackbits(packed, count=entries, bitorder="little").view(np.bool_))
        values = np.frombuffer(_inflate(data[b:c], len(positions)), np.int8).astype(self._dtype)
        escaped = np.flatnonzero(values == _ESCAPE)
        if len(escaped) != n_escapes:
            raise CorruptCorrection("a block's escapes do not fit")
        values[escaped] = np.frombuffer(data[c:], self._dtype)
        return positions, values


def _deflate(data: bytes) -> bytes:
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
