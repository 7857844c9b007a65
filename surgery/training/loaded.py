"""What a scales file holds, as the parameters of a way to train it."""

from __future__ import annotations

import torch

from surgery.errors import ScalesError
from surgery.format.manifest_records import TargetRecord
from surgery.format.scales.reading import Trained
from surgery.format.scales.writing import as_cores, distance
from surgery.training.ways import Way, change_from, numbers_of_way, saved_as

#: By how much, relative to a core, the core that parameters amount to may differ from it: both were rounded to float32.
_TOLERANCE = 1e-4


def values_for(file: Trained, target: TargetRecord, way: Way) -> torch.Tensor:
    """The scales or core of a target, as ``surgery.training.ways.saved_as`` says which.

    Args:
        file: read with the manifest of the target.
        target: any of these.
        way: to train it.

    Raises:
        ScalesError: scales are wanted, and it is a core that turns directions.
    """
    value = file.values[target.key]
    if saved_as(way) == file.train:
        return value
    if file.train == "scales":
        return as_cores(value)
    scales = value.diagonal(dim1=-2, dim2=-1)
    if not torch.equal(as_cores(scales), value):
        raise ScalesError(
            f"the core of {target.key!r} turns directions, which scales do not",
            got="a file of cores",
            expected="scales, or cores that are diagonal",
            hint='attach with train="core"',
        )
    return scales


def parameters_for(file: Trained, target: TargetRecord, way: Way) -> torch.Tensor:
    """The parameters of all directions of a target, float32 (B, numbers).

    Args:
        file, target, way: as for ``values_for``.

    Raises:
        ScalesError: the file has a core that this way cannot train, or parameters that are damaged or amount to another core.
    """
    value = values_for(file, target, way)
    k, count = target.rank, target.matrices[0]
    if way != "orthogonal":
        return distance(value, saved_as(way)).reshape(count, -1)
    given = file.beside.get("orthogonal", {}).get(target.key)
    if given is not None:
        return _checked(given, value, target)
    scales = value.diagonal(dim1=-2, dim2=-1)
    if not torch.equal(as_cores(scales), value):
        raise ScalesError(
            f"the core of {target.key!r} has not been trained as an orthogonal one",
            expected="a file that was saved by such a training, or one of scales",
            hint='attach with train="core", which takes any core',
        )
    below = k * (k - 1) // 2
    parameters = value.new_zeros(count, numbers_of_way(way, k))
    parameters[:, below : below + k] = scales.reshape(count, k) - 1
    return parameters


def _checked(given: torch.Tensor, core: torch.Tensor, target: TargetRecord) -> torch.Tensor:
    """Parameters that a file keeps beside a core, held against it."""
    k, count = target.rank, target.matrices[0]
    shape = [*target.scales_shape[:-1], numbers_of_way("orthogonal", k)]
    if list(given.shape) != shape:
        raise ScalesError(f"the orthogonal parameters of {target.key!r} are misshapen", got=list(given.shape), expected=shape)
    parameters = given.float().reshape(count, -1)
    apart = change_from("orthogonal", parameters.double(), k) - distance(core.reshape(count, k, k).double(), "core")
    if not bool(apart.norm() <= _TOLERANCE * core.double().norm()):  # NaN is not either
        raise ScalesError(
            f"the orthogonal parameters of {target.key!r} do not amount to its core",
            hint='the file has been changed; train="core" passes over them',
        )
    return parameters


def chosen_in(file: Trained, target: TargetRecord) -> torch.Tensor:
    """Which directions of a target are trained, bool (B, k): all where the file does not say.

    Raises:
        ScalesError: that is damaged, or a direction that is not chosen has been changed.
    """
    k, count = target.rank, target.matrices[0]
    given = file.beside.get("chosen", {}).get(target.key)
    if given is None:
        return torch.ones(count, k, dtype=torch.bool)
    fits = tuple(given.shape) == target.scales_shape and bool(((given == 0) | (given == 1)).all())
    chosen = given.reshape(count, -1).bool()
    if not fits or len(set(chosen.sum(dim=1).tolist())) != 1 or not bool(chosen.any()):
        raise ScalesError(
            f"the choice of directions of {target.key!r} is damaged",
            got=list(given.shape),
            expected=f"1 for each that is trained, else 0, of shape {list(target.scales_shape)}; as many in each matrix",
        )
    if not is_untouched_outside(distance(file.values[target.key], file.train), chosen):
        raise ScalesError(f"directions of {target.key!r} have been changed that are not among those chosen")
    return chosen


def is_untouched_outside(change: torch.Tensor, chosen: torch.Tensor) -> bool:
    """Whether a change is zero but in the directions (B, k) that are chosen; ``g - 1`` or ``C - I`` of B matrices."""
    count = len(chosen)
    outside = ~chosen if change.numel() == chosen.numel() else ~(chosen.unsqueeze(2) & chosen.unsqueeze(1)).view(count, -1)
    return not bool(change.reshape(count, -1)[outside].any())
