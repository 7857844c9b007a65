"""What trainings keep for themselves beside the scales or cores of a scales file (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from surgery.errors import ScalesError
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.names import Train


def read_beside(
    reader: ShardReader,
    kept: Mapping[str, Mapping[str, TensorEntry]],
    given: Mapping[str, str],
    values: Mapping[str, torch.Tensor],
    train: Train,
) -> dict[str, dict[str, torch.Tensor]]:
    """Read what a training keeps for itself.

    Args:
        reader: of the file.
        kept: kind -> name of the scales that it belongs to -> entry.
        given: key of a target -> the name that its scales have in the file.
        values: key of a target -> its scales or core.
        train: which of the two they are.

    Returns:
        Kind -> key of a target -> ``chosen``, uint8 (k,), or (B, k) for a stack; or ``orthogonal``, float32
        (k (k - 1) / 2 + 2 k,), or (B, ...) for a stack.

    Raises:
        ScalesError: it belongs to none of the scales, has another shape, or numbers that it cannot have.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind, entries in kept.items():
        if lost := sorted(entries.keys() - set(given.values())):
            raise ScalesError(f"{reader.name}: '{lost[0]}.{kind}' belongs to none of the scales in the file")
        for key, name in given.items():
            if name in entries:
                found.setdefault(kind, {})[key] = _read(reader, kind, entries[name], _shape_of(kind, values[key], train))
    return found


def _shape_of(kind: str, value: torch.Tensor, train: Train) -> tuple[int, ...] | None:
    """The shape of what is kept for scales or a core; None if nothing of the kind is."""
    directions = value.shape if train == "scales" else value.shape[:-1]
    if kind == "chosen":
        return tuple(directions)
    k = value.shape[-1]
    return (*directions[:-1], k * (k - 1) // 2 + 2 * k) if train == "core" else None


def _read(reader: ShardReader, kind: str, entry: TensorEntry, shape: tuple[int, ...] | None) -> torch.Tensor:
    if shape is None or tuple(entry.shape) != shape:
        raise ScalesError(
            f"{reader.name}: {entry.name!r} does not fit what it belongs to",
            got=list(entry.shape),
            expected="only cores can be orthogonal" if shape is None else list(shape),
        )
    if kind == "chosen":
        mask = reader.read_bytes(entry).view(entry.shape)
        if bool((mask > 1).any()):
            raise ScalesError(
                f"{reader.name}: {entry.name!r} is no choice of directions", got=int(mask.max()), expected="0 or 1"
            )
        return mask
    parameters = reader.read(entry)
    if not bool(torch.isfinite(parameters).all()):
        raise ScalesError(f"{reader.name}: {entry.name!r} holds NaN or infinity")
    return parameters
