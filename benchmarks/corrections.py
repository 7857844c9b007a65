"""Codes for corrections: bytes for each weight, and core-seconds to write and to read them for each GB of weights.

    python benchmarks/corrections.py
    python benchmarks/corrections.py --model FOLDER            the matrices of a model, such as the demonstration's
    pip install isal zstandard lz4                             for the rows of these, in an environment of their own

The blocks are those that surgery makes of the weights at rank 16. Each code gets the same bytes: the mask of a block, and its
values of one byte. Seconds are those of the thread's processor, medians over repeats in which the codes take turns. Finding the
differences, which is done before, and applying them, which is done after, have a row of their own.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import llm_like
from safetensors.torch import load_file

from surgery import truncated_svd
from surgery.lossless.blocks import row_slices, rows_at_a_time
from surgery.lossless.correction import CorrectionBlock, CorrectionReader
from surgery.lossless.factors import Factors
from surgery.lossless.prediction import Prediction
from surgery.lossless.rounding import bits_of, flipped
from surgery.lossless.split import split
from surgery.memory import bytes_of

RANK = 16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Code:
    """A code for bytes: ``read(write(data), len(data))`` is data."""

    name: str
    write: Callable[[bytes], bytes]
    read: Callable[[bytes, int], bytes]


def deflate(level: int, strategy: int) -> Callable[[bytes], bytes]:
    def write(data: bytes) -> bytes:
        coder = zlib.compressobj(level, zlib.DEFLATED, -15, zlib.DEF_MEM_LEVEL, strategy)
        return coder.compress(data) + coder.flush()

    return write


def codes() -> Iterator[Code]:
    """Those of Python, and those whose packages are there."""

    def inflate(data: bytes, size: int) -> bytes:
        return zlib.decompress(data, -15, size)

    yield Code("zlib, Huffman only", deflate(1, zlib.Z_HUFFMAN_ONLY), inflate)
    yield Code("zlib, level 1", deflate(1, zlib.Z_DEFAULT_STRATEGY), inflate)
    yield Code("zlib, run lengths", deflate(1, zlib.Z_RLE), inflate)
    if igzip := module("isal.isal_zlib"):

        def by_igzip(data: bytes, size: int) -> bytes:
            return igzip.decompress(data, -15, size)

        yield Code("zlib writes, igzip reads", deflate(1, zlib.Z_HUFFMAN_ONLY), by_igzip)
        for level in range(4):
            yield Code(f"igzip, level {level}", lambda data, level=level: igzip.compress(data, level, -15), by_igzip)
    if zstd := module("zstandard"):
        reader = zstd.ZstdDecompressor()
        for level in (-5, 1, 3):
            yield Code(f"zstd, level {level}", zstd.ZstdCompressor(level=level).compress, reader.decompress)
        # There are no repeated strings; with the shortest ones and a large table of them it finds some by chance.
        few = zstd.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
        yield Code("zstd, level 1, few matches", zstd.ZstdCompressor(compression_params=few).compress, reader.decompress)
    if lz4 := module("lz4.block"):
        yield Code(
            "lz4",
            lambda data: lz4.compress(data, store_size=False),
            lambda data, size: lz4.decompress(data, uncompressed_size=size),
        )
    yield Code("as they are", lambda data: data, lambda data, size: data)


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Samples:
    """The corrections of some weights.

    Attributes:
        blocks: of all corrections.
        weights, bytes: how many weights, and their bytes.
        finding, applying: core-seconds of what is done before a block is written, and after it has been read.
    """

    def __init__(self, matrices: list[torch.Tensor], dtype: torch.dtype) -> None:
        self.blocks: list[CorrectionBlock] = []
        self.weights = self.bytes = 0
        self.finding = self.applying = 0.0
        for matrix in matrices:
            self._add(matrix.to(dtype))

    def _add(self, weight: torch.Tensor) -> None:
        svd = truncated_svd(weight, min(RANK, *weight.shape))
        factors = Factors(svd.U.contiguous(), svd.s, svd.V.contiguous())
        parts = split(weight, factors)
        assert parts.correction is not None
        self.weights += weight.numel()
        self.bytes += weight.nbytes
        low_rank = Prediction(factors, weight.dtype).worker(len(weight))(slice(0, len(weight)))
        guess = bits_of((parts.residual.to(low_rank.dtype) + low_rank).to(weight.dtype)).numpy()
        exact = bits_of(weight).numpy()
        m, n = weight.shape
        reader = CorrectionReader(bytes_of(parts.correction), m, n, weight.itemsize)
        for i, rows in enumerate(row_slices(len(weight), rows_at_a_time(weight.shape[1]))):
            start = time.thread_time()
            block = CorrectionBlock.of(exact[rows].ravel(), guess[rows].ravel())
            self.finding += time.thread_time() - start
            self.blocks.append(block)
            start = time.thread_time()
            positions, units = reader.units(i * reader.rows_per_block)
            flat = guess[rows].ravel()
            flat[positions] = flipped(flipped(flat[positions]) + units)
            self.applying += time.thread_time() - start - reading(block)
            assert np.array_equal(flat, exact[rows].ravel())


def reading(block: CorrectionBlock) -> float:
    """Core-seconds in which zlib reads a block."""
    stored = [deflate(1, zlib.Z_HUFFMAN_ONLY)(part.tobytes()) for part in (block.mask, block.values)]
    start = time.thread_time()
    for data in stored:
        zlib.decompress(data, -15)
    return time.thread_time() - start


def measured(code: Code, samples: Samples) -> tuple[float, float, int]:
    """Core-seconds to write all blocks and to read them, and bytes."""
    written = read = 0.0
    size = 0
    for block in samples.blocks:
        for part in (block.mask.tobytes(), block.values.tobytes()):
            start = time.thread_time()
            data = code.write(part)
            middle = time.thread_time()
            back = code.read(data, len(part))
            read += time.thread_time() - middle
            written += middle - start
            size += len(data)
            assert back == part
    return written, read, size + sum(block.escapes.nbytes for block in samples.blocks)


def matrices_of(model: Path | None) -> list[torch.Tensor]:
    if model is None:
        generator = torch.Generator().manual_seed(0)
        return [llm_like(m, n, generator) for m, n in ((2048, 2048), (7168, 2048), (512, 2048))]
    tensors = [tensor for path in sorted(model.glob("*.safetensors")) for tensor in load_file(path).values()]
    return [tensor for tensor in tensors if tensor.ndim == 2 and min(tensor.shape) > RANK]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with weights (default: three LLM-like matrices)")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    matrices = matrices_of(args.model)
    weights = sum(matrix.numel() for matrix in matrices)
    print(f"zlib {zlib.ZLIB_RUNTIME_VERSION}, {weights / 1e6:.1f} million weights, rank {RANK}")
    print("| dtype | code | bytes per weight | of today's | write, core-s/GB | of today's | read, core-s/GB | of today's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.dtypes.split(","):
        samples = Samples(matrices, DTYPES[name])
        every = list(codes())
        found: dict[str, list[tuple[float, float, int]]] = {code.name: [] for code in every}
        for _ in range(args.repeats):
            for code in every:
                found[code.name].append(measured(code, samples))
        medians = [[statistics.median(column) for column in zip(*found[code.name], strict=True)] for code in every]
        gigabytes = samples.bytes / 1e9
        for code, (written, read, size) in zip(every, medians, strict=True):
            (first_written, first_read, first_size) = medians[0]
            cells = [f"{size / samples.weights:.4f}", f"{size / first_size:.2f}"]
            for seconds, first in ((written, first_written), (read, first_read)):
                cells += [f"{seconds / gigabytes:.2f}", f"{seconds / first:.2f}"]
            print(f"| {name} | {code.name} | {' | '.join(cells)} |")
        around = f"{samples.finding / gigabytes:.2f} | | {samples.applying / gigabytes:.2f}"
        print(f"| {name} | (finding, applying) | | | {around} | |", flush=True)


if __name__ == "__main__":
    main()
