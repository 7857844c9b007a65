"""Quantized weights dequantized to float32, and the config and index of a model whose weights have been dequantized."""

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
from surgery.format.safetensors import ShardReader
from surgery.quantized.codec import Role
from surgery.quantized.recognize import QUANTIZATION_FILES, QUANTIZATION_KEYS, parts_of_config
from surgery.quantized.weight import Quantized, read_parts
from surgery.source.weight_files import index_entries

#: Entries of a config that tell the dtype of the weights: of transformers before 4.56, and after.
_DTYPE_KEYS = ("torch_dtype", "dtype")


class Dequantizer:
    """Reads the parts of quantized weights, from whichever weight file has them, and applies them.

    A context manager that any number of threads may use. It keeps the files open that it has read from.

    Args:
        open_shard: opens a weight file, by its name in the source.
    """

    def __init__(self, open_shard: Callable[[str], ShardReader]) -> None:
        self._files = Pool(open_shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind, error, trace)

    def reader(self, shard: str) -> AbstractContextManager[ShardReader]:
        """A reader of a weight file, to be used as a context manager."""
        return self._files.of(shard)

    def forget(self, shard: str) -> None:
        """Close the reader of a weight file that is not needed any more, unless a thread is using it."""
        self._files.forget(shard)

    def parts(self, quantized: Quantized, first: int = 0, count: int | None = None) -> dict[Role, torch.Tensor]:
        """The parts of a weight; of a stack those of ``count`` matrices from ``first`` on, or of all."""
        return read_parts(quantized, self._read, first, count)

    def _read(self, shard: str, name: str, first: int, count: int | None) -> torch.Tensor:
        with self.reader(shard) as reader:
            return reader.read(reader.entries[name], first, count)

    def weight(self, tensor: torch.Tensor, first: int, quantized: Quantized | None) -> torch.Tensor:
        """A stored weight, or some matrices of a stack from ``first`` on, in float32 if it is quantized, else unchanged."""
        if quantized is None:
            return tensor
        count = len(tensor) if len(quantized.shape) > 2 else None
        return quantized.dequantized(tensor, self.parts(quantized, first, count))


def is_kept(file: str, *, dequantized: bool) -> bool:
    """Whether a file that goes along with the weights stays: without quantized weights, not one that describes these."""
    return not dequantized or file not in QUANTIZATION_FILES


def config_of_rewritten(config: Path, dtype: str | None, *, dequantized: bool) -> bytes:
    """The text of a ``config.json`` for weights that are stored in another way.

    Args:
        config: the file as it was.
        dtype: of the weights now, as torch names it, such as ``bfloat16``; None where that is unchanged.
        dequantized: whether the weights are not quantized any more.
    """
    parsed = read_json_object(config, config.name)
    for part in list(parts_of_config(parsed)):
        for key in QUANTIZATION_KEYS if dequantized else ():
            part.pop(key, None)
        for key in _DTYPE_KEYS if dtype is not None else ():
            if key in part:
                part[key] = dtype
    if dtype is not None and parsed.keys().isdisjoint(_DTYPE_KEYS):
        parsed[_DTYPE_KEYS[0]] = dtype
    return json.dumps(parsed, indent=2, ensure_ascii=False).encode() + b"\n"


def index_of(folder: Path, before: Path) -> bytes:
    """The index of the weight files in a folder, as text.

    Args:
        folder: where they are.
        before: the index of the model that they were made from: its metadata is kept, and its weight files are looked for.
    """
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
