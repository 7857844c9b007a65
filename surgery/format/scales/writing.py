"""Writing the tiny trainable file: one multiplier per kept singular direction, or one small matrix between them, the core."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from surgery.errors import ScalesError
from surgery.files.file_writer import FileWriter
from surgery.format.header import TensorEntry, make_header
from surgery.format.manifest_records import TargetRecord
from surgery.memory import bytes_of
from surgery.names import FORMAT_VERSION, SCALES_METADATA_KEY, Train


def write_scales(
    path: Path,
    scales: Mapping[str, torch.Tensor],
    fingerprint: str | None,
    train: Train = "scales",
    beside: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
) -> None:
    """Write scales, with the fingerprint of the factors that they belong to.

    Args:
        path: the file, replaced as a whole.
        scales: key of a target -> (k,), or (B, k) for a stack; cores (k, k) or (B, k, k). Written as float32.
        fingerprint: that of the manifest of the factorized checkpoint; None, where it is not known, leaves it out.
        train: which of the two they are.
        beside: what a training keeps for itself -> key of a target -> tensor, float32 or uint8.

    Raises:
        ScalesError: a target is called as what is kept beside another one.
        OutputError: the file cannot be written.
    """
    said: dict[str, Any] = {} if fingerprint is None else {"format_version": FORMAT_VERSION, "fingerprint": fingerprint}
    if train != "scales":  # files of scales are what they have always been
        said["train"] = train
    if beside:
        said["beside"] = sorted(beside)
    tensors = {key: value.detach().to("cpu", torch.float32) for key, value in scales.items()}
    for kind, values in beside.items():
        kept = {f"{key}.{kind}": value.detach().cpu() for key, value in values.items()}
        if taken := sorted(kept.keys() & tensors.keys()):
            raise ScalesError(f"{path}: {taken[0]!r} is the name of scales, and of other tensors that are saved with scales")
        tensors |= kept
    named = sorted(tensors.items(), key=lambda one: (one[1].dtype == torch.uint8, one[0]))  # numbers lie on multiples of 4
    entries = [
        TensorEntry(name, "U8" if value.dtype == torch.uint8 else "F32", tuple(value.shape), 0, value.nbytes)
        for name, value in named
    ]
    with FileWriter(path) as writer:
        writer.write(make_header(entries, {SCALES_METADATA_KEY: json.dumps(said)} if said else {}))
        for _, value in named:
            # A copy: one number that was expanded counts as contiguous whatever its stride.
            writer.write(bytes_of(value.clone(memory_format=torch.contiguous_format)))
        writer.commit(path.name)


def write_untouched(path: Path, targets: Collection[TargetRecord], fingerprint: str, train: Train = "scales") -> None:
    """Write the scales of all targets, each 1, or their cores, each the identity, as ``write_scales`` does."""
    # There may be many.
    shared = {shape: untouched(torch.empty(shape), train).expand(shape) for shape in {one.shape_of(train) for one in targets}}
    write_scales(path, {target.key: shared[target.shape_of(train)] for target in targets}, fingerprint, train)


def untouched(values: torch.Tensor, train: Train) -> torch.Tensor:
    """What these would be if they were untouched: 1, or the identity (k, k), in their dtype, on their device."""
    kind: Any = {"dtype": values.dtype, "device": values.device}
    return torch.ones((), **kind) if train == "scales" else torch.eye(values.shape[-1], **kind)


def distance(values: torch.Tensor, train: Train) -> torch.Tensor:
    """``g - 1`` of scales, ``C - I`` of cores, in their shape and dtype."""
    return values - untouched(values, train)


def as_cores(scales: torch.Tensor) -> torch.Tensor:
    """The cores ``diag(g)`` (k, k), or (B, k, k) for a stack, that scales (k,), or (B, k), amount to."""
    return torch.diag_embed(scales)
