"""The tiny trainable file: one multiplier per kept singular direction."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from surgery.errors import ScalesError
from surgery.format.files import write_file
from surgery.format.manifest import Manifest
from surgery.format.safetensors import Header, ShardReader
from surgery.linalg.rounding import check_dense
from surgery.names import FORMAT_VERSION, SCALES_METADATA_KEY
from surgery.progress import note

#: Multipliers are 1 before a training, and stay nearer to it than to 0 but for a few. Of fewer than four nothing is said.
_NEAR_ZERO, _NEARLY_ALL, _FEW = 0.5, 0.9, 4


@dataclass(frozen=True, slots=True)
class ScalesFile:
    """A scales file as it is, without the factorized checkpoint.

    Attributes:
        values: key of a target -> float32 (k,), or (B, k) for a stack, on the CPU, finite; sorted by name.
        fingerprint: of the factors that they belong to; None where the file does not say.
    """

    values: dict[str, torch.Tensor]
    fingerprint: str | None


def write_scales(path: Path, scales: Mapping[str, torch.Tensor], fingerprint: str | None) -> None:
    """Write scales with what ties them to their factors.

    Args:
        path: the file, replaced as a whole.
        scales: key of a target -> (k,), or (B, k) for a stack, written as float32.
        fingerprint: that of the manifest of the factorized checkpoint; None, where it is not known, leaves it out.
    """
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in sorted(scales.items())}
    belongs_to = json.dumps({"format_version": FORMAT_VERSION, "fingerprint": fingerprint})
    metadata = None if fingerprint is None else {SCALES_METADATA_KEY: belongs_to}
    write_file(path, safetensors.torch.save(tensors, metadata=metadata))


def read_scales_alone(path: Path) -> ScalesFile:
    """Read a scales file without the checkpoint that it belongs to. Names are taken as they are.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: no such file, no scales in it, damaged metadata, or a tensor whose dtype, shape or numbers scales
            cannot have.

    Warns:
        SurgeryWarning, or a note of the operation that reads it: it holds half-precision values, or numbers that do not look
            like multipliers.
    """
    with _open(path) as reader:
        fingerprint = _fingerprint(reader.header.metadata, path)
        _check_dtypes(reader.header, path)
        if not reader.header.tensors:
            raise ScalesError(f"{path} holds no scales")
        for entry in reader.header.tensors:
            if len(entry.shape) not in (1, 2) or 0 in entry.shape:
                raise ScalesError(
                    f"{path}: {entry.name!r} has a shape that scales cannot have",
                    got=list(entry.shape),
                    expected="(k,), or (B, k) for a stack",
                )
        values = {entry.name: reader.read(entry) for entry in reader.header.tensors}
    return ScalesFile(_checked(values, sorted(values), path), fingerprint)


def read_scales(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read the scales of a factorized checkpoint.

    Returns:
        Key of a target -> float32 (k,), or (B, k) for a stack, on the CPU, for each target of the manifest.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: made for other factors, or a tensor is missing, unknown, misshapen or not finite.

    Warns:
        SurgeryWarning, or a note of the operation that reads them: the file says nothing about its factors, or holds
            half-precision values, or numbers that do not look like multipliers.
    """
    with _open(path) as reader:
        _check_owner(reader.header.metadata, manifest, path)
        _check_dtypes(reader.header, path)
        _check_shapes({entry.name: list(entry.shape) for entry in reader.header.tensors}, manifest, str(path))
        values = {entry.name: reader.read(entry).float() for entry in reader.header.tensors}
    return check_scales(values, manifest, path)


def _open(path: Path) -> ShardReader:
    if not path.is_file():
        raise ScalesError(
            f"there is no scales file {path}", hint="a fresh one is surgery/scales.safetensors in the factorized folder"
        )
    return ShardReader(path, name=str(path))


def _check_dtypes(header: Header, path: Path) -> None:
    """Refuse what is no float of scales, and say so of half precision."""
    half = sorted({entry.dtype for entry in header.tensors} & {"BF16", "F16"})
    if half:
        note(
            f"{path} holds {' and '.join(half)} scales: next to 1 they are spaced by "
            f"{'2^-7' if 'BF16' in half else '2^-10'}; train them in float32"
        )
    for entry in header.tensors:
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise ScalesError(f"{path}: {entry.name!r} has a dtype that scales cannot have", got=entry.dtype, expected="F32")


def _owner(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What a scales file says it belongs to; None if nothing."""
    if SCALES_METADATA_KEY not in metadata:
        return None
    try:
        owner = json.loads(metadata[SCALES_METADATA_KEY])
    except (ValueError, RecursionError):
        owner = None
    if not isinstance(owner, dict):
        raise ScalesError(f"{path}: its metadata is damaged", got=metadata[SCALES_METADATA_KEY][:80], expected="a JSON object")
    return owner


def _fingerprint(metadata: Mapping[str, str], path: Path) -> str | None:
    owner = _owner(metadata, path)
    if owner is None:
        return None
    fingerprint = owner.get("fingerprint")
    if owner.get("format_version") != FORMAT_VERSION or not re.fullmatch("[0-9a-f]{64}", str(fingerprint)):
        raise ScalesError(
            f"{path}: its metadata is damaged, or of another version",
            got=ascii(metadata[SCALES_METADATA_KEY])[:120],
            expected=f"format_version {FORMAT_VERSION} and a fingerprint, a sha256",
        )
    return str(fingerprint)


def note_without_owner(path: Path) -> None:
    """Say that a scales file could not be told to belong to the factors."""
    note(f"{path} does not say which factors it belongs to (its metadata is missing); checked by names and shapes only")


def _check_owner(metadata: Mapping[str, str], manifest: Manifest, path: Path) -> None:
    """Refuse scales that say they belong to other factors."""
    owner = _owner(metadata, path)
    if owner is None:
        note_without_owner(path)
        return
    for what, expected in (("format_version", FORMAT_VERSION), ("fingerprint", manifest.fingerprint)):
        if owner.get(what) != expected:
            raise ScalesError(
                f"{path} belongs to other factors",
                got=f"{what} {owner.get(what)!r}",
                expected=f"{what} {expected!r}",
                hint="use the factorized folder these scales were trained with",
            )


def check_scales(values: Mapping[str, torch.Tensor], manifest: Manifest, file: Path | None = None) -> dict[str, torch.Tensor]:
    """Check scales against the targets of a manifest; arguments, result, errors and notes as for ``read_scales``."""
    for name, value in values.items():
        check_dense(value, f"{file or 'scales'}: {name!r}")
    shapes = _check_shapes({name: list(value.shape) for name, value in values.items()}, manifest, str(file or "scales"))
    return _checked(values, shapes, file)


def _checked(values: Mapping[str, torch.Tensor], names: Iterable[str], file: Path | None) -> dict[str, torch.Tensor]:
    """Those of these names, float32 on the CPU; a note where they cannot be meant."""
    where = str(file or "scales")
    checked = {name: _finite(name, values[name], where) for name in names}
    # Somebody's own tensors that are all 0 are meant: they take the kept directions out.
    if _look_like_changes(checked.values()) and (file is not None or any(value.any() for value in checked.values())):
        note(
            f"{where}: nearly all scales are near 0: they look like changes g - 1, or logarithms, and not like the multipliers "
            "g, which are 1 where nothing has changed"
        )
    return checked


def _look_like_changes(scales: Iterable[torch.Tensor]) -> bool:
    """Whether numbers that are meant as multipliers, which are 1 where nothing has changed, nearly all lie near 0."""
    sizes = torch.cat([value.flatten() for value in scales]).abs()
    return len(sizes) >= _FEW and bool((sizes < _NEAR_ZERO).double().mean() >= _NEARLY_ALL)


def _finite(name: str, value: torch.Tensor, where: str) -> torch.Tensor:
    """float32 on the CPU, if all of it is finite."""
    value = value.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise ScalesError(f"{where}: {name!r} holds NaN or infinity", hint="the training diverged: take an earlier checkpoint")
    return value


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
