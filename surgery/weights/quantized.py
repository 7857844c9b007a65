"""FP8 weights as the rest of the operations need them: in float32, with scales from whichever shard has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.files.json_files import read_json_object
from surgery.files.pool import Pool
from surgery.files.watch import Watch
from surgery.format.safetensors import ShardReader
from surgery.source.weight_files import index_entries
from surgery.weights.fp8 import dequantize
from surgery.weights.quantization import QUANTIZATION_KEYS, Scaled


class Dequantizer:
    """Reads scales and applies them. A context manager, for any number of threads.

    Args:
        path: from the name of a weight file of the source to where it is on this machine.
        watch: of the source.
    """

    def __init__(self, path: Callable[[str], Path], watch: Watch) -> None:
        self._files = Pool(lambda shard: ShardReader(path(shard), name=shard, watch=watch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind, error, trace)

    def reader(self, shard: str) -> AbstractContextManager[ShardReader]:
        """A weight file, open for as long as the context lasts."""
        return self._files.of(shard)

    def forget(self, shard: str) -> None:
        """A weight file may be dropped, unless somebody reads it just now."""
        self._files.forget(shard)

    def scales(self, scaled: Scaled, first: int = 0, count: int | None = None) -> torch.Tensor:
        """The scales of a weight, or of ``count`` matrices of a stack."""
        with self.reader(scaled.shard) as reader:
            return reader.read(reader.entries[scaled.scale], first, count)

    def weight(self, tensor: torch.Tensor, first: int, scaled: Scaled | None) -> torch.Tensor:
        """A weight, or some matrices of a stack from ``first`` on, float32 if it is FP8, else as it is."""
        if scaled is None:
            return tensor
        count = len(tensor) if tensor.ndim > 2 else None
        return dequantize(tensor, self.scales(scaled, first, count), scaled.block)


def without_quantization(config: Path) -> bytes:
    """A ``config.json`` that says nothing of a quantization."""
    parsed = read_json_object(config, config.name)
    for part in (parsed, *(value for value in parsed.values() if isinstance(value, dict))):
        for key in QUANTIZATION_KEYS:
            part.pop(key, None)
    return json.dumps(parsed, indent=2, ensure_ascii=False).encode() + b"\n"


def index_of(folder: Path, before: Path) -> bytes:
    """The index of the weight files in a folder that were written in the place of those that ``before`` names."""
    parsed = read_json_object(before, before.name)
    weight_map, total = {}, 0
    for shard in sorted(set(index_entries(json.dumps(parsed), before.name).values())):
        if (folder / shard).is_file():
            with ShardReader(folder / shard) as reader:
                weight_map.update({entry.name: shard for entry in reader.header.tensors})
                total += reader.header.data_bytes
    metadata = parsed.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2).encode() + b"\n"
