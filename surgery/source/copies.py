"""Tensors that are in several weight files of a model."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import FormatError
from surgery.format.header import Header, TensorEntry
from surgery.format.safetensors import ShardReader, same_bytes
from surgery.source.protocol import Source


def copies_of(source: Source, headers: Mapping[str, Header]) -> dict[str, list[str]]:
    """The weight files of each tensor of a model; those of one name are equal.

    Their bytes are compared if all files are on this machine, else what the headers say of them.

    Args:
        source: the model.
        headers: of its weight files.

    Raises:
        FormatError: copies of a tensor differ; nothing tells which one is meant.
    """
    places: dict[str, dict[str, TensorEntry]] = {}
    for shard, header in headers.items():
        for entry in header.tensors:
            places.setdefault(entry.name, {})[shard] = entry
    for name, copies in places.items():
        (first, one), *others = copies.items()
        for shard, other in others:
            alike = (one.dtype, one.shape) == (other.dtype, other.shape)
            if not alike or (source.bytes_to_fetch() == 0 and not _equal(source, first, one, shard, other)):
                raise FormatError(
                    f"{source.name}: {name!r} is in two shards, and not the same in both",
                    got=f"{first} and {shard}",
                    hint="remove it from the file that should not have it",
                )
    return {name: list(copies) for name, copies in places.items()}


def _equal(source: Source, first: str, one: TensorEntry, second: str, other: TensorEntry) -> bool:
    with ShardReader(source.fetch(first), name=first) as left, ShardReader(source.fetch(second), name=second) as right:
        return same_bytes(left, one, right, other)
