"""The tiny trainable file: one multiplier per kept singular direction."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from surgery.errors import ScalesError, SurgeryWarning
from surgery.format.files import write_file
from surgery.format.manifest import Manifest
from surgery.format.safetensors import ShardReader
from surgery.names import FORMAT_VERSION, SCALES_METADATA_KEY


def write_scales(path: Path, scales: Mapping[str, torch.Tensor], fingerprint: str) -> None:
    """Write scales with what ties them to their factors.

    Args:
        path: the file, replaced as a whole.
        scales: key of a target -> (k,), or (B, k) for a stack, written as float32.
        fingerprint: that of the manifest of the factorized checkpoint.
    """
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in sorted(scales.items())}
    belongs_to = json.dumps({"format_version": FORMAT_VERSION, "fingerprint": fingerprint})
    write_file(path, safetensors.torch.save(tensors, metadata={SCALES_METADATA_KEY: belongs_to}))


def read_scales(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read the scales of a factorized checkpoint.

    Returns:
        Key of a target -> float32 (k,), or (B, k) for a stack, on the CPU, for each target of the manifest.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: made for other factors, or a tensor is missing, unknown, misshapen or not finite.

    Warns:
        SurgeryWarning: the file says nothing about its factors, or holds half-precision values.
    """
    if not path.is_file():
        raise ScalesError(
            f"there is no scales file {path}", hint="a fresh one is surgery/scales.safetensors in the factorized folder"
        )
    with ShardReader(path, name=str(path)) as reader:
        _check_owner(reader.header.metadata, manifest, path)
        half = sorted({entry.dtype for entry in reader.header.tensors} & {"BF16", "F16"})
        if half:
            warnings.warn(
                f"{path} holds {' and '.join(half)} scales: next to 1 they are spaced by "
                f"{'2^-7' if 'BF16' in half else '2^-10'}; train them in float32",
                SurgeryWarning,
                stacklevel=2,
            )
        for entry in reader.header.tensors:
            if entry.dtype not in ("F32", "F16", "BF16"):
                raise ScalesError(
                    f"{path}: {entry.name!r} has a dtype that scales cannot have", got=entry.dtype, expected="F32"
                )
        _check_shapes({entry.name: list(entry.shape) for entry in reader.header.tensors}, manifest, str(path))
        values = {entry.name: reader.read(entry).float() for entry in reader.header.tensors}
    return check_scales(values, manifest, str(path))


def _check_owner(metadata: Mapping[str, str], manifest: Manifest, path: Path) -> None:
    """Refuse scales that say they belong to other factors."""
    if SCALES_METADATA_KEY not in metadata:
        warnings.warn(
            f"{path} does not say which factors it belongs to (its metadata is missing); checked by names and shapes only",
            SurgeryWarning,
            stacklevel=3,
        )
        return
    try:
        owner = json.loads(metadata[SCALES_METADATA_KEY])
    except (ValueError, RecursionError):
        owner = None
    if not isinstance(owner, dict):
        raise ScalesError(f"{path}: its metadata is damaged", got=metadata[SCALES_METADATA_KEY][:80], expected="a JSON object")
    for what, expected in (("format_version", FORMAT_VERSION), ("fingerprint", manifest.fingerprint)):
        if owner.get(what) != expected:
            raise ScalesError(
                f"{path} belongs to other factors",
                got=f"{what} {owner.get(what)!r}",
                expected=f"{what} {expected!r}",
                hint="use the factorized folder these scales were trained with",
            )


def check_scales(values: Mapping[str, torch.Tensor], manifest: Manifest, where: str = "scales") -> dict[str, torch.Tensor]:
    """Check scales against the targets of a manifest; arguments, result and errors as for ``read_scales``."""
    shapes = _check_shapes({name: list(value.shape) for name, value in values.items()}, manifest, where)
    checked = {}
    for name in shapes:
        value = values[name].detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(value).all()):
            raise ScalesError(
                f"{where}: {name!r} holds NaN or infinity", hint="the training diverged: take an earlier checkpoint"
            )
        checked[name] = value
    return checked


def _check_shapes(values: Mapping[str, list[int]], manifest: Manifest, where: str) -> dict[str, list[int]]:
    """The shapes that scales must have, if these names and shapes are those."""
    shapes = {target.key: target.scales_shape for target in manifest.targets}
    unknown = sorted(values.keys() - shapes.keys())
    missing = sorted(shapes.keys() - values.keys())
    if unknown:
        raise ScalesError(
            f"{where}: {unknown[0]!r} is no target of this checkpoint" + _and_more(unknown),
            hint="use the factorized folder these scales were trained with",
        )
    if missing:
        raise ScalesError(
            f"{where}: the scales of {missing[0]!r} are missing" + _and_more(missing), expected="one entry per target"
        )
    for name, shape in shapes.items():
        if values[name] != shape:
            raise ScalesError(f"{where}: {name!r} has the wrong shape", got=values[name], expected=shape)
    return shapes


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
