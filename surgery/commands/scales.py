"""Scales files without their checkpoint: ``read_scales``, ``write_scales`` and the verb ``scales show``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from surgery.commands.figures import (
    ChosenDirections,
    Direction,
    ShownCore,
    changes_in,
    chosen_directions,
    figures_of_cores,
    furthest_directions,
)
from surgery.device import on_its_own_terms
from surgery.errors import OptionError, ScalesError
from surgery.format.scales import reading as files
from surgery.format.scales import writing
from surgery.format.scales.entries import SHAPES, can_have_shape
from surgery.format.scales.reading import ScalesFile
from surgery.lossless.rounding import check_dense
from surgery.names import Train
from surgery.progress import Progress
from surgery.reports import Report
from surgery.trained.reading import read_alone, trained_path


@dataclass(frozen=True, slots=True)
class ScalesSummary(Report):
    """What a scales file holds.

    Attributes:
        train: ``scales``, or ``core`` for cores.
        targets: how many targets there are.
        matrices: how many matrices the targets have: a stack has several.
        matrices_changed: how many matrices have a scale other than 1, or a core other than the identity.
        trainable: how many numbers the file holds.
        changed: how many of these numbers differ from an untouched file: from 1 for scales, from the identity for
            cores.
        least: the smallest of all scales, or of the singular values of all cores.
        median: their median.
        most: the largest of them.
        largest_angle: the largest angle by which a core turns directions, in degrees; None if there are no cores.
        fingerprint: the fingerprint of the factors that the numbers belong to; None if the file does not say.
        orthogonal: whether the file also holds the parameters of orthogonal cores.
        chosen: the directions that a training has chosen of each matrix; empty if it has not chosen any.
        directions: the directions whose scales are furthest from 1, the furthest first; without those that are 1.
        cores: the cores that are furthest from the identity, the furthest first; without those that are the identity.
    """

    train: Train
    targets: int
    matrices: int
    matrices_changed: int
    trainable: int
    changed: int
    least: float
    median: float
    most: float
    largest_angle: float | None
    fingerprint: str | None
    orthogonal: bool
    chosen: tuple[ChosenDirections, ...]
    directions: tuple[Direction, ...]
    cores: tuple[ShownCore, ...]


@on_its_own_terms
def read_scales(path: str | Path, *, progress: Progress | None = None) -> ScalesFile:
    """Read a scales file. The factorized checkpoint is not needed.

    Args:
        path: the file, or a folder that holds one.
        progress: receives the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        The contents of the file. ``values`` maps the key of each target to ``g``, float32 (k,), or (B, k) for a stack;
        or to its core ``C``, (k, k), or (B, k, k) for a stack. All are finite and on the CPU. ``train`` says which of
        the two it is. ``fingerprint`` is that of the factors that the numbers belong to; None if the file does not say.

    Raises:
        FormatError: the file is not a safetensors file, or is damaged.
        ScalesError: there is no such file, or it has no scales; or its metadata is damaged, or a tensor has a dtype,
            shape or numbers that scales cannot have.

    Warns:
        SurgeryWarning: the path is a folder. Or the file holds half-precision values, float64 values that float32
            cannot represent, numbers that do not look like multipliers, or other things than scales. Or nothing tells
            whether square matrices are scales of stacks or cores.
    """
    return files.read_scales_alone(Path(path))


@on_its_own_terms
def write_scales(
    path: str | Path, scales: Mapping[str, torch.Tensor], fingerprint: str | None, *, train: Train = "scales"
) -> None:
    """Write a scales file that ``fold``, ``export`` and ``blend`` take, and that ``read_scales`` reads.

    Args:
        path: the file. An existing file is replaced as a whole.
        scales: maps the key of each target to ``g``, (k,), or (B, k) for a stack; or to its core ``C``, (k, k), or (B,
            k, k) for a stack. Real floating dtype, on any device; written as float32.
        fingerprint: the fingerprint of the factors that the scales belong to, as in ``read_scales(...).fingerprint``,
            ``inspect(...).fingerprint`` and the report of ``factorize``. With None the file does not say, and later
            checks use names and shapes only.
        train: what the tensors are: ``scales``, or ``core`` for cores.

    Raises:
        OptionError: ``scales`` is not a mapping of names to dense tensors of real floating-point numbers; or
            ``fingerprint`` is not a sha256.
        ScalesError: there are no scales; or some have another number of dimensions, or hold NaN, infinity or numbers
            outside the range of float32; or cores are not square.
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
        if not can_have_shape(value.shape, train):
            what = "scales" if train == "scales" else "a core"
            raise ScalesError(f"{key!r} has a shape that {what} cannot have", got=list(value.shape), expected=SHAPES[train])
        if not bool(torch.isfinite(value.detach().float()).all()):
            raise ScalesError(f"{key!r} holds NaN or infinity, or what is beyond float32")
    writing.write_scales(Path(path), scales, fingerprint, train)


@on_its_own_terms
def show_scales(
    path: str | Path, *, top: int = 20, factorized: str | Path | None = None, progress: Progress | None = None
) -> ScalesSummary:
    """Summarize a scales file. The factorized checkpoint is not needed.

    Args:
        path: the file, or a folder that holds one; or the folder of an adapter of ``surgery.peft``, or of one that
            ``export`` has written as ``peft-trainable``.
        top: how many of the changed directions, or of the changed cores, to list.
        factorized: the checkpoint that such an exported adapter belongs to, because the adapter does not name the
            weights itself.
        progress: receives the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        How many numbers there are, how they are distributed, and which are furthest from 1. For cores: how they stretch
        and turn directions, and which are furthest from the identity.

    Raises:
        OptionError: ``top`` is negative; or an adapter needs ``factorized``.
        SurgeryError: see ``read_scales``.

    Warns:
        SurgeryWarning: see ``read_scales``.
    """
    if top < 0:
        raise OptionError("a negative number of directions", got=top, expected="0 or more")
    file = read_alone(trained_path(Path(path)), None if factorized is None else Path(factorized))
    train, values = file.train, file.values
    numbers = sum(value.numel() for value in values.values())
    changed, matrices_changed, matrices = changes_in(values, train)
    figures = figures_of_cores(values, top) if train == "core" else None
    if figures is not None:
        spread, angle = figures.singular_values, figures.largest_angle
    else:
        spread, angle = np.concatenate([value.double().flatten().numpy() for value in values.values()]), None
    return ScalesSummary(
        train=train,
        targets=len(values),
        matrices=matrices,
        matrices_changed=matrices_changed,
        trainable=numbers,
        changed=changed,
        least=float(spread.min()),
        median=float(np.median(spread)),
        most=float(spread.max()),
        largest_angle=angle,
        fingerprint=file.fingerprint,
        orthogonal="orthogonal" in file.beside,
        chosen=chosen_directions(file.beside.get("chosen", {})),
        directions=furthest_directions(values, top) if figures is None else (),
        cores=() if figures is None else figures.furthest,
    )
