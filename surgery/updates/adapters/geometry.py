"""Updates as matrices: whether they fit a weight, and what they are in the tensor that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.errors import OptionError
from surgery.models.placement import TensorPart
from surgery.updates.adapters.content import ModuleUpdate
from surgery.updates.adapters.homes import Home, Wanted
from surgery.updates.changes import LowRankPart, ReplacedRows, TensorChange


@dataclass(frozen=True, slots=True)
class Sides:
    """``left right^T`` without its scaling, and the magnitude of DoRA along an axis."""

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None
    axis: int

    def scaled(self, scaling: float, weight: float) -> LowRankPart:
        axis = 0 if self.magnitude is None else self.axis
        return LowRankPart(self.left, self.right, scaling, weight, self.magnitude, axis)


def in_tensor(piece: TensorPart, shape: Sequence[int], sides: Sides, name: str, home: Home) -> Sides:
    """What is added to a tensor if ``sides`` is added to the parameter that holds it as ``piece``.

    Rows and columns of the tensor that the parameter does not hold are zero.

    Raises:
        OptionError: the tensor is no matrix; or it has a part only of what a magnitude is for, or its norms are over.
    """
    if piece.axes not in ((0, 1), (1, 0)):
        raise OptionError(f"{name!r} is stored in a way that is not followed", got=f"{piece.tensor!r}, {list(shape)}")
    both: list[torch.Tensor] = []
    for axis, factor in enumerate((sides.left, sides.right)):
        part = factor.new_zeros(shape[piece.axes[axis] or 0], factor.shape[1])
        part[torch.as_tensor(piece.of[axis])] = factor[torch.as_tensor(piece.at[axis])]
        both.append(part)
    magnitude, axis = sides.magnitude, sides.axis
    if magnitude is not None:
        along, across = shape[piece.axes[axis] or 0], shape[piece.axes[1 - axis] or 0]
        if len(piece.of[axis]) != along or not len(piece.at[1 - axis]) == across == home.shape[1 - axis]:
            raise OptionError(
                f"{name!r} has a magnitude of DoRA, and the checkpoint stores its weight in parts or within another",
                got=f"{piece.tensor!r}, {list(shape)}",
                hint="merge_and_unload() of PEFT, on a model in memory",
            )
        placed = magnitude.new_zeros(along)
        placed[torch.as_tensor(piece.of[axis])] = magnitude[torch.as_tensor(piece.at[axis])]
        magnitude = placed
    if piece.axes == (1, 0):
        both.reverse()
        axis = 1 - axis
    return Sides(both[0], both[1], magnitude, axis)


def is_targeted(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _core(shape: Sequence[int]) -> list[int]:
    """A shape without the kernel of a convolution of one point."""
    return [*shape[:2], *(shape[2:] if any(size != 1 for size in shape[2:]) else ())]


def is_straight(one: ModuleUpdate, shape: Sequence[int]) -> bool:
    """Whether the update fits a weight (out, in...)."""
    return [len(one.B), *one.A.shape[1:]] == [*shape] or _core([len(one.B), *one.A.shape[1:]]) == _core(shape)


def wanted_weight(one: ModuleUpdate) -> Wanted:
    """A weight that an update fits, in either orientation."""
    turned = (one.A.shape[1], len(one.B))
    if one.embedding:
        return Wanted(turned, lambda shape: tuple(shape) == turned, True)
    shape = (len(one.B), *one.A.shape[1:])
    return Wanted(shape, lambda there: is_straight(one, there) or (one.A.ndim == 2 and tuple(there) == turned))


def wanted_as(shape: Sequence[int]) -> Wanted:
    """A parameter of this very shape."""
    return Wanted(shape, lambda there: tuple(there) == tuple(shape))


def wanted_with(rows: ReplacedRows) -> Wanted:
    """The weight of an embedding that has these rows."""
    most, columns = int(rows.indices[-1]) + 1, rows.values.shape[1]
    return Wanted((most, columns), lambda there: len(there) == 2 and there[1] == columns and there[0] >= most, True)


def is_nothing(change: TensorChange) -> bool:
    """Whether a change leaves every tensor as it is."""
    if change.replacement is not None or (change.rows is not None and len(change.rows.indices)):
        return False
    if change.offset is not None and bool(change.offset.any()):
        return False
    return all(map(adds_nothing, (part for parts in change.parts.values() for part in parts)))


def adds_nothing(part: LowRankPart) -> bool:
    """Whether a part leaves every matrix as it is."""
    return part.magnitude is None and not (part.scaling and bool(part.left.any()) and bool(part.right.any()))
