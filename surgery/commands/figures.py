"""What a scales file does, in numbers: which directions its scales change most, and what its cores do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from surgery.format.scales.writing import distance
from surgery.linalg.turns import stretches_and_angles
from surgery.names import Train
from surgery.progress import listening, phase

#: How many entries of a core are named.
_ENTRIES = 5
#: Where the dimensions of one matrix's scales, or of its core, begin.
_BATCH: Mapping[Train, int] = {"scales": -1, "core": -2}


@dataclass(frozen=True, slots=True)
class Direction:
    """One number of a scales file.

    Attributes:
        target: the key of the target.
        matrix: which matrix of a stack, from 0; None if the target is not a stack.
        direction: number of the direction, from 1, in the order of the singular values.
        g: the scale.
    """

    target: str
    matrix: int | None
    direction: int
    g: float


@dataclass(frozen=True, slots=True)
class CoreEntry:
    """One entry of ``C - I``.

    Attributes:
        row: row of the entry, from 1, in the order of the singular values.
        column: column of the entry, from 1, in the same order.
        value: the value of the entry.
    """

    row: int
    column: int
    value: float


@dataclass(frozen=True, slots=True)
class ShownCore:
    """What one core does.

    Attributes:
        target: the key of the target.
        matrix: which matrix of a stack, from 0; None if the target is not a stack.
        distance: ``||C - I||`` in the Frobenius norm.
        least: the smallest singular value of the core.
        most: the largest singular value of the core.
        angles: by which angles the core turns, in degrees, the largest first: the angles of the eigenvalues of its
            polar factor, one for each pair.
        entries: the largest entries of ``C - I``, the largest first; without entries that are 0.
    """

    target: str
    matrix: int | None
    distance: float
    least: float
    most: float
    angles: tuple[float, ...]
    entries: tuple[CoreEntry, ...]


@dataclass(frozen=True, slots=True)
class ChosenDirections:
    """The kept directions of one matrix that are trained.

    Attributes:
        target: the key of the target.
        matrix: which matrix of a stack, from 0; None if the target is not a stack.
        rank: how many directions are kept.
        directions: the numbers of the trained directions, from 1, ascending.
    """

    target: str
    matrix: int | None
    rank: int
    directions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CoreFigures:
    """What the cores of a file do.

    Attributes:
        singular_values: of all of them, float64.
        largest_angle: of any, in degrees.
        furthest: those that are furthest from the identity, first the furthest; none that are the identity.
    """

    singular_values: np.ndarray
    largest_angle: float
    furthest: tuple[ShownCore, ...]


def changes_in(values: Mapping[str, torch.Tensor], train: Train) -> tuple[int, int, int]:
    """How many numbers are not as in an untouched file; of how many matrices any is not; and how many matrices there are."""
    changes = [
        distance(value.double(), train).reshape(-1, math.prod(value.shape[_BATCH[train] :])) for value in values.values()
    ]
    return (
        sum(int(change.count_nonzero()) for change in changes),
        sum(int(change.any(dim=1).sum()) for change in changes),
        sum(map(len, changes)),
    )


def furthest_directions(values: Mapping[str, torch.Tensor], top: int) -> tuple[Direction, ...]:
    """The directions whose scales, float32 (k,), or (B, k) for a stack, by key, are furthest from 1; none that are 1."""
    flat = torch.cat([value.flatten() for value in values.values()]).double().numpy()
    distances = np.abs(flat - 1)
    # A stable sort: of equal distances the first in the file comes first.
    furthest = np.argsort(-distances, kind="stable")[: min(top, int(np.count_nonzero(distances)))]
    keys = list(values)
    starts = np.cumsum([0, *(value.numel() for value in values.values())])
    directions = []
    for position in furthest.tolist():
        owner = int(np.searchsorted(starts, position, side="right")) - 1
        key = keys[owner]
        value = values[key]
        matrix, index = divmod(position - int(starts[owner]), value.shape[-1])
        directions.append(Direction(key, matrix if value.ndim == 2 else None, index + 1, float(flat[position])))
    return tuple(directions)


def figures_of_cores(cores: Mapping[str, torch.Tensor], top: int) -> CoreFigures:
    """Measure cores, float32 (k, k), or (B, k, k) for a stack, by key; ``top`` of them are looked at more closely."""
    stretches, largest = [], 0.0
    found: list[tuple[float, str, int]] = []
    angles: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    progress = listening()
    with phase(progress, "measuring", sum(value.nbytes for value in cores.values())):
        for key, value in cores.items():
            progress.item(key)
            every = value.double().reshape(-1, *value.shape[-2:])
            far = torch.linalg.matrix_norm(distance(every, "core"))
            changed = torch.nonzero(far).flatten()
            stretched = torch.ones(every.shape[:2], dtype=torch.float64)
            if len(changed):
                stretched[changed], turned = stretches_and_angles(every[changed])
                largest = max(largest, float(turned.max()))
                for i, at in enumerate(changed.tolist()):
                    found.append((float(far[at]), key, at))
                    angles[key, at] = (stretched[at].numpy(), turned[i].numpy())
            stretches.append(stretched.flatten().numpy())
            progress.advance(value.nbytes)
    found.sort(key=lambda one: -one[0])  # stable: of equal distances the first in the file comes first
    furthest = [
        _shown(
            key, at if cores[key].ndim == 3 else None, far, cores[key].reshape(-1, *cores[key].shape[-2:])[at], angles[key, at]
        )
        for far, key, at in found[:top]
    ]
    return CoreFigures(np.concatenate(stretches), largest, tuple(furthest))


def _shown(key: str, matrix: int | None, far: float, core: torch.Tensor, figures: tuple[np.ndarray, np.ndarray]) -> ShownCore:
    stretched, angles = figures
    change = distance(core.double(), "core").numpy()
    order = np.argsort(-np.abs(change), axis=None, kind="stable")[:_ENTRIES]
    places = [divmod(position, len(change)) for position in order.tolist()]
    entries = tuple(CoreEntry(row + 1, column + 1, float(change[row, column])) for row, column in places if change[row, column])
    return ShownCore(key, matrix, far, float(stretched[-1]), float(stretched[0]), tuple(angles.tolist()), entries)


def chosen_directions(masks: Mapping[str, torch.Tensor]) -> tuple[ChosenDirections, ...]:
    """What masks of chosen directions say, uint8 (k,), or (B, k) for a stack, by key."""
    return tuple(
        ChosenDirections(key, i if mask.ndim == 2 else None, len(row), tuple((torch.nonzero(row).flatten() + 1).tolist()))
        for key, mask in masks.items()
        for i, row in enumerate(mask.reshape(-1, mask.shape[-1]))
    )
