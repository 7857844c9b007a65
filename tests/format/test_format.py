"""An independent reader, written from docs/format.md alone with NumPy and zlib, recovers the source's weights."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgery
from tests.models import save_llama

Array = Any


def _load(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    return {
        name: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for name, v in header.items() if name != "__metadata__"
    }


def _to_float64(data: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float64)


def _predicted(low_rank: Array, residual: Array, dtype: str) -> Array:
    """Rounded to nearest even where the format says so; as signed integers."""
    single = (low_rank + residual).astype(np.float32)
    if dtype != "F32":
        single = low_rank.astype(np.float32) + residual.astype(np.float32)
    if dtype == "F32":
        return single.view(np.int32)
    if dtype == "F16":
        return single.astype(np.float16).view(np.int16)
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def _integers(x: Array, bits: int) -> tuple[Array, int]:
    largest = float(np.abs(x).max())
    exponent = math.frexp(largest)[1] if largest else 0
    return np.rint(x.astype(np.float64) * 2.0 ** (bits - exponent)), exponent


def _ordinal(i: Array) -> Array:
    return np.where(i >= 0, i, i ^ np.iinfo(i.dtype).max)


def _decode(data: bytes, m: int, n: int, dtype: Any) -> Array:
    rows, count = struct.unpack_from("<2Q", data)
    ends = struct.unpack_from(f"<{count}Q", data, 16)
    base, start, result, row = 16 + 8 * count, 0, [], 0
    for end in ends:
        block, start = data[base + start : base + end], end
        entries = min(rows, m - row) * n
        row += rows
        a, v, x = struct.unpack_from("<3I", block)
        mask = np.unpackbits(np.frombuffer(zlib.decompress(block[12 : 12 + a], -15), np.uint8), bitorder="little")[
            :entries
        ].astype(bool)
        values = np.frombuffer(zlib.decompress(block[12 + a : 12 + a + v], -15), np.int8).astype(dtype)
        escapes = np.frombuffer(block[12 + a + v :], dtype)
        assert len(escapes) == x
        values[values == -128] = escapes
        units = np.zeros(entries, dtype)
        units[mask[:entries].astype(bool)] = values
        result.append(units)
    return np.concatenate(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reader_made_from_the_documentation_gets_the_weights_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", dtype, hidden_size=64, intermediate_size=9000, num_hidden_layers=1, shard_size="1GB")
    manifest = surgery.factorize(model, tmp_path / "f", rank=6).manifest
    source, residual = _load(model / "model.safetensors"), _load(tmp_path / "f/model.safetensors")
    factors = _load(tmp_path / "f/surgery/factors-00001-of-00001.safetensors")
    several_blocks = 0
    for target in manifest.targets:
        name, (m, n) = target.tensor, target.shape
        U, s, V = (np.frombuffer(factors[f"{name}.{part}"][2], "<f4").reshape(factors[f"{name}.{part}"][1]) for part in "UsV")
        bits = (53 - math.ceil(math.log2(len(s)))) // 2
        (P, eP), (Q, eQ) = _integers(U * s, bits), _integers(V, bits)
        low_rank = P @ Q.T * 2.0 ** (eP + eQ - 2 * bits)
        predicted = _ordinal(_predicted(low_rank, _to_float64(residual[name][2], target.dtype).reshape(m, n), target.dtype))
        correction = factors[f"{name}.correction"][2]
        several_blocks += struct.unpack_from("<2Q", correction)[1] > 1
        units = _decode(correction, m, n, predicted.dtype.newbyteorder("<"))
        assert _ordinal(predicted.ravel() + units).tobytes() == source[name][2], name
    assert several_blocks
