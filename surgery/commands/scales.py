"""Scales files without their checkpoint: ``read_scales``, ``write_scales`` and the verb ``scales show``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError, ScalesError
from surgery.format.scales import reading as files
from surgery.format.scales import writing
from surgery.format.scales.reading import ScalesFile
from surgery.lossless.rounding import check_dense
from surgery.progress import Progress
from surgery.reports import Report


@dataclass(frozen=True, slots=True)
class Direction:
    """One number of a scales file.

    Attributes:
        target: its key.
        matrix: which matrix of a stack, from 0; None where the target is no stack.
        direction: from 1, as singular values are counted.
        g: the scale.
    """

    target: str
    matrix: int | None
    direction: int
    g: float


@dataclass(frozen=True, slots=True)
class ScalesSummary(Report):
    """What a scales file holds.

    Attributes:
        targets: how many there are.
        trainable: how many numbers.
        changed: how many of them are not 1.
        least, median, most: of all numbers.
        fingerprint: of the factors that they belong to; None where the file does not say.
        directions: those that are furthest from 1, first the furthest; none that are 1.
    """

    targets: int
    trainable: int
    changed: int
    least: float
    median: float
    most: float
    fingerprint: str | None
    directions: tuple[Direction, ...]


@on_its_own_terms
def read_scales(path: str | Path, *, progress: Progress | None = None) -> ScalesFile:
    """Read a scales file; the factorized checkpoint is not needed.

    Args:
        path: the file, or a folder that holds one.
        progress: told what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        ``values``: key of a target -> ``g``, float32 (k,), or (B, k) for a stack, on the CPU, finite. ``fingerprint``: of the
        factors that they belong to; None where the file does not say.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: no such file, no scales in it, damaged metadata, or a tensor whose dtype, shape or numbers scales
            cannot have.

    Warns:
        SurgeryWarning: the path is a folder; or the file holds half-precision values, float64 values that float32 has not,
            numbers that do not look like multipliers, or more than scales.
    """
    return files.read_scales_alone(Path(path))


@on_its_own_terms
def write_scales(path: str | Path, scales: Mapping[str, torch.Tensor], fingerprint: str | None) -> None:
    """Write a scales file that ``fold``, ``export`` and ``blend`` take, and that ``read_scales`` reads.

    Args:
        path: the file; one that is there is replaced as a whole.
        scales: key of a target -> ``g``, (k,), or (B, k) for a stack, real floating, on any device; written as float32.
        fingerprint: of the factors that they belong to, as in ``read_scales(...).fingerprint``, ``inspect(...).fingerprint``
            and the report of ``factorize``; with None the file does not say, and is checked by names and shapes only.

    Raises:
        OptionError: no mapping of names to dense tensors of real floating-point numbers; no fingerprint, which is a sha256.
        ScalesError: no scales, or some that have another number of dimensions, or hold NaN, infinity or what is beyond float32.
        OutputError: the file cannot be written.
    """
    if not scales:
        raise ScalesError("there are no scales to write", expected="those of at least one target")
    if fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise OptionError(
            "this is no fingerprint of factors", got=repr(fingerprint)[:80], expected="a sha256, or None where it is not known"
        )
    for key, value in scales.items():
        check_dense(value, f"scales: {key!r}")
        if value.ndim not in (1, 2) or not value.numel():
            raise ScalesError(
                f"{key!r} has a shape that scales cannot have", got=list(value.shape), expected="(k,), or (B, k) for a stack"
            )
        if not bool(torch.isfinite(value.detach().float()).all()):
            raise ScalesError(f"{key!r} holds NaN or infinity, or what is beyond float32")
    writing.write_scales(Path(path), scales, fingerprint)


@on_its_own_terms
def show_scales(path: str | Path, *, top: int = 20, progress: Progress | None = None) -> ScalesSummary:
    """Sum up a scales file; the factorized checkpoint is not needed.

    Args:
        path: the file, or a folder that holds one.
        top: how many of the changed directions to list.
        progress: told what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        How many numbers there are, how they are spread, and which are furthest from 1.

    Raises:
        OptionError: ``top`` is negative.
        SurgeryError: see ``read_scales``.

    Warns:
        SurgeryWarning: see ``read_scales``.
    """
    if top < 0:
        raise OptionError("a negative number of directions", got=top, expected="0 or more")
    file = files.read_scales_alone(Path(path))
    flat = torch.cat([value.flatten() for value in file.values.values()]).double().numpy()
    distance = np.abs(flat - 1)
    changed = int(np.count_nonzero(distance))
    # A stable sort: of equal distances the first in the file comes first.
    furthest = np.argsort(-distance, kind="stable")[: min(top, changed)]
    keys = list(file.values)
    starts = np.cumsum([0, *(value.numel() for value in file.values.values())])
    directions = []
    for position in furthest.tolist():
        owner = int(np.searchsorted(starts, position, side="right")) - 1
        key = keys[owner]
        value = file.values[key]
        matrix, index = divmod(position - int(starts[owner]), value.shape[-1])
        directions.append(Direction(key, matrix if value.ndim == 2 else None, index + 1, float(flat[position])))
    return ScalesSummary(
        len(keys),
        len(flat),
        changed,
        float(flat.min()),
        float(np.median(flat)),
        float(flat.max()),
        file.fingerprint,
        tuple(directions),
    )
