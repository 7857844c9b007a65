"""Splitting a weight into residual, factors and correction, and putting it together again bit for bit.

A residual in the weight's own dtype cannot give the weight back: where the residual lies in a higher binade than
the weight, none of its values rounds to it (8-18 % of entries differ). So the difference between the weight and
its prediction from residual and factors is kept as well, counted in units in the last place: zero for some nine
entries in ten, and almost always one byte otherwise.

The prediction must come out the same on every device, thread count and library. Floating-point products do not,
so the factors are first rounded to integers short enough that every partial sum of their product is an integer
of at most 53 bits: float64 then computes it exactly, in whatever order.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from surgery.linalg.rounding import from_ordinals, ordinals, round_once
from surgery.memory import bytes_of

#: Entries that are worked on at a time: float64 temporaries of this size stay in a core's cache.
BLOCK_ENTRIES = 1 << 18
#: On a GPU fewer, larger steps are better.
DEVICE_BLOCK_ENTRIES = 1 << 24

_T = TypeVar("_T")

_ESCAPE = -128
_BLOCK_HEADER = struct.Struct("<III")  # bytes of the mask, bytes of the values, number of escapes


class CorruptCorrection(ValueError):
    """A correction that does not decode. The caller knows the file and the tensor."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The kept part of one matrix: ``U diag(s) V^T``.

    Attributes:
        U: float32 (m, k), orthonormal columns.
        s: float32 (k,), descending, not negative.
        V: float32 (n, k), orthonormal columns.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor

    def to(self, device: torch.device | str) -> Factors:
        return Factors(self.U.to(device), self.s.to(device), self.V.to(device))


class _Prediction:
    """Rows of ``U diag(s) V^T`` in fixed-point arithmetic, the same bits everywhere.

    With k columns the integers have ``b = (53 - log2 k) / 2`` bits (24 at k = 16), so the result is off by at
    most about ``k 2^-b max|U s| max|V|``: as good as float32 factors can be.
    """

    def __init__(self, factors: Factors) -> None:
        k = factors.s.numel()
        bits = (53 - math.ceil(math.log2(max(k, 1)))) // 2
        self._left, left_exponent = _to_integers(factors.U * factors.s, bits)
        right, right_exponent = _to_integers(factors.V, bits)
        self._right = right.T.contiguous()
        self._unit = 2.0 ** (left_exponent + right_exponent - 2 * bits)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """float64 (stop - start, n)."""
        return (self._left[start:stop] @ self._right).mul_(self._unit)


def _to_integers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """``x`` as float64 integers of at most ``bits`` bits, and the exponent e such that x = integers 2^(e - bits)."""
    largest = x.abs().max().item() if x.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return torch.ldexp(x.double(), torch.tensor(bits - exponent, device=x.device)).round_(), exponent


def split(weight: torch.Tensor, factors: Factors, *, correct: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Residual of a weight, and the correction that makes it lossless.

    Args:
        weight: (m, n), bfloat16, float16 or float32, finite, on a device with float64.
        factors: on the same device.
        correct: whether to compute the correction.

    Returns:
        The residual ``round(W - U diag(s) V^T)``, same shape, dtype and device as ``weight``, and the encoded
        correction, uint8 (bytes,) on the CPU, a multiple of 8 bytes; None without ``correct``. ``join`` undoes it.
    """
    prediction = _Prediction(factors)
    residual = torch.empty_like(weight)

    def work(rows: slice) -> bytes:
        block = weight[rows]
        low_rank = prediction.rows(rows.start, rows.stop)
        residual[rows] = round_once(block.double().sub_(low_rank), weight.dtype)
        if not correct:
            return b""
        return _encode(ordinals(block) - ordinals(_predict(residual[rows], low_rank)))

    blocks = _row_blocks(weight)
    encoded = _for_each_block(work, blocks, weight.device)
    if not correct:
        return residual, None
    # Row count of a block, number of blocks, where each block ends; then the blocks.
    ends, position = [], 0
    for data in encoded:
        position += len(data)
        ends.append(position)
    directory = struct.pack(f"<{2 + len(ends)}Q", blocks[0].stop if blocks else 0, len(ends), *ends)
    payload = bytearray(b"".join([directory, *encoded]))
    payload.extend(bytes(-len(payload) % 8))
    return residual, torch.frombuffer(payload, dtype=torch.uint8)


def join(
    residual: torch.Tensor, factors: Factors, correction: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight that ``split`` took apart, with its directions scaled.

    ``round(W + U diag(s (g - 1)) V^T)`` with W recovered exactly, in float64, rounded once. Without ``correction``
    W is only ``residual + U diag(s) V^T``, rounded together with the update.

    Args:
        residual: (m, n), the weight's dtype, on a device with float64.
        factors: on the same device.
        correction: as returned by ``split``, on the CPU, or None.
        scales: ``g``, float32 (k,), on the CPU; None for all ones, which gives W itself.

    Returns:
        (m, n), dtype and device of ``residual``.

    Raises:
        CorruptCorrection: the correction is damaged.
    """
    prediction = _Prediction(factors)
    decoder = None if correction is None else _Decoder(correction, residual)
    update = None if scales is None else _Update(factors, scales)
    weight = torch.empty_like(residual)

    def work(rows: slice) -> None:
        block = residual[rows]
        low_rank = prediction.rows(rows.start, rows.stop)
        if decoder is None:
            total = block.double().add_(low_rank)
            weight[rows] = round_once(total if update is None else update.add_to(total, rows), weight.dtype)
            return
        units = ordinals(_predict(block, low_rank)).add_(decoder.block(rows))
        exact = from_ordinals(units, weight.dtype)
        weight[rows] = exact if update is None else round_once(update.add_to(exact.double(), rows), weight.dtype)

    blocks = decoder.blocks if decoder else _row_blocks(residual)
    _for_each_block(work, blocks, residual.device)
    return weight


def rescale(weight: torch.Tensor, factors: Factors, scales: torch.Tensor) -> torch.Tensor:
    """``round(W + U diag(s (g - 1)) V^T)`` from the weight itself: the fold of an overlay.

    Args and result as for ``join``; gives the same bits.
    """
    update = _Update(factors, scales)
    result = torch.empty_like(weight)

    def work(rows: slice) -> None:
        result[rows] = round_once(update.add_to(weight[rows].double(), rows), weight.dtype)

    _for_each_block(work, _row_blocks(weight), weight.device)
    return result


class _Update:
    """``U diag(s (g - 1)) V^T`` in float64, a few rows at a time."""

    def __init__(self, factors: Factors, scales: torch.Tensor) -> None:
        change = factors.s.double() * (scales.to(factors.s.device).double() - 1.0)
        self._left = factors.U.double() * change
        self._right = factors.V.double().T.contiguous()

    def add_to(self, block: torch.Tensor, rows: slice) -> torch.Tensor:
        return block.addmm_(self._left[rows], self._right)


def _predict(residual: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
    """The weight as residual and factors have it. Any rounding will do, as long as it is the same everywhere."""
    return low_rank.add_(residual).to(torch.float32).to(residual.dtype)


def _row_blocks(matrix: torch.Tensor) -> list[slice]:
    m, n = matrix.shape
    entries = BLOCK_ENTRIES if matrix.device.type == "cpu" else DEVICE_BLOCK_ENTRIES
    return _blocks_of(m, max(1, entries // max(n, 1)))


def _blocks_of(m: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def _for_each_block(work: Callable[[slice], _T], blocks: list[slice], device: torch.device) -> list[_T]:
    """Run ``work`` on each block; on a CPU with one single-threaded worker per core, so that temporaries stay in cache."""
    workers = min(len(blocks), torch.get_num_threads())
    if device.type != "cpu" or workers < 2:
        return [work(block) for block in blocks]
    with _one_thread_each(workers) as pool:
        return list(pool.map(work, blocks))


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


# --- the correction's encoding (docs/format.md) ---------------------------------------------------------------

_PACK = 0x0102_0408_1020_4080


def _pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool (8 n,) -> uint8 (n,): the first of each eight in the lowest bit."""
    # Eight bools are eight bytes of 0 or 1: one multiplication gathers them in the top byte.
    return (mask.view(torch.int64) * _PACK >> 56).to(torch.uint8)


_UNPACK = torch.tensor(
    [int.from_bytes(bytes(byte >> bit & 1 for bit in range(8)), "little") for byte in range(256)], dtype=torch.int64
)


def _unpack_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (n,) -> bool (8 n,), undoing ``_pack_bits``."""
    return _UNPACK[packed.int()].view(torch.bool)


def _encode(units: torch.Tensor) -> bytes:
    """One block: int16 or int32 differences in units in the last place, wrapped to their width -> bytes."""
    units = units.flatten()
    nonzero = units != 0
    values = units[nonzero]
    escaped = (values > 127) | (values < -127)
    short = torch.where(escaped, _ESCAPE, values).to(torch.int8)
    padded = torch.nn.functional.pad(nonzero, (0, -len(nonzero) % 8))
    mask = _deflate(_raw(_pack_bits(padded)))
    numbers = _deflate(_raw(short))
    escapes = _raw(values[escaped])
    return _BLOCK_HEADER.pack(len(mask), len(numbers), int(escaped.sum())) + mask + numbers + bytes(escapes)


def _raw(tensor: torch.Tensor) -> memoryview:
    return bytes_of(tensor.cpu().contiguous())


def _deflate(data: memoryview) -> bytes:
    # Entropy coding alone: there are no repeated strings in here, and looking for them costs four times the time.
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _inflate(data: memoryview, size: int) -> bytearray:
    """Exactly ``size`` bytes, whatever the stream claims."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        result = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise CorruptCorrection(str(error)) from None
    if len(result) != size or not decoder.eof:
        raise CorruptCorrection(f"a stream gives {len(result)} bytes where {size} belong")
    return bytearray(result)


class _Decoder:
    """Random access to the blocks of an encoded correction; thread-safe."""

    def __init__(self, encoded: torch.Tensor, matrix: torch.Tensor) -> None:
        m, self._columns = matrix.shape
        self._dtype = {2: torch.int16, 4: torch.int32}[matrix.element_size()]
        self._device = matrix.device
        self._bytes = _raw(encoded)
        if len(self._bytes) < 16:
            raise CorruptCorrection("it is cut off")
        step, count = struct.unpack_from("<2Q", self._bytes)
        if (step < 1 and m > 0) or count != -(-m // max(step, 1)) or len(self._bytes) < 16 + 8 * count:
            raise CorruptCorrection(f"its directory does not fit {m} rows")
        ends = struct.unpack_from(f"<{count}Q", self._bytes, 16)
        base = 16 + 8 * count
        starts = (0, *ends[:-1])
        end = base + (ends[-1] if ends else 0)
        if any(start > stop for start, stop in zip(starts, ends, strict=True)) or end + -end % 8 != len(self._bytes):
            raise CorruptCorrection("its directory does not fit its length")
        self.blocks = _blocks_of(m, max(step, 1))
        self._step = max(step, 1)
        self._spans = [(base + start, base + end) for start, end in zip(starts, ends, strict=True)]

    def block(self, rows: slice) -> torch.Tensor:
        """Differences for the rows of one of ``blocks``: integers of the weight's width, (rows, n)."""
        start, stop = self._spans[rows.start // self._step]
        data = self._bytes[start:stop]
        if len(data) < _BLOCK_HEADER.size:
            raise CorruptCorrection("a block is cut off")
        n_mask, n_values, n_escapes = _BLOCK_HEADER.unpack_from(data)
        width = torch.iinfo(self._dtype).bits // 8
        a = _BLOCK_HEADER.size
        b, c = a + n_mask, a + n_mask + n_values
        if c + n_escapes * width != len(data):
            raise CorruptCorrection("a block's lengths do not fit")
        entries = (rows.stop - rows.start) * self._columns
        mask_bytes = (entries + 7) // 8
        packed = (
            torch.frombuffer(_inflate(data[a:b], mask_bytes), dtype=torch.uint8)
            if entries
            else torch.empty(0, dtype=torch.uint8)
        )
        nonzero = _unpack_bits(packed)[:entries]
        count = int(nonzero.sum())
        units = torch.zeros(entries, dtype=self._dtype)
        if count:
            values = torch.frombuffer(_inflate(data[b:c], count), dtype=torch.int8).to(self._dtype)
            escaped = values == _ESCAPE
            if int(escaped.sum()) != n_escapes:
                raise CorruptCorrection("a block's escapes do not fit")
            if n_escapes:
                values[escaped] = torch.frombuffer(bytearray(data[c:]), dtype=self._dtype)
            units.masked_scatter_(nonzero, values)
        return units.reshape(rows.stop - rows.start, self._columns).to(self._device)
