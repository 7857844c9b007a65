"""Scales files by themselves: what one holds, and where a new one may be written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.format.scales import read_scales_alone


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
class ScalesSummary:
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
def show_scales(path: str | Path, *, top: int = 20) -> ScalesSummary:
    """Sum up a scales file; the factorized checkpoint is not needed.

    Args:
        path: the file.
        top: how many of the changed directions to list.

    Returns:
        How many numbers there are, how they are spread, and which are furthest from 1.

    Raises:
        OptionError: ``top`` is negative.
        SurgeryError: see ``surgery.format.scales.read_scales_alone``.

    Warns:
        SurgeryWarning: the file holds half-precision values, or numbers that do not look like multipliers.
    """
    if top < 0:
        raise OptionError("a negative number of directions", got=top, expected="0 or more")
    file = read_scales_alone(Path(path))
    flat = torch.cat([value.flatten() for value in file.values.values()]).double().numpy()
    distance = np.abs(flat - 1)
    changed = int(np.count_nonzero(distance))
    # A stable sort: of equal ones the first in the file comes first.
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
