"""Tensors of one model in terms of another's, where the two are stored in different ways.

A model as transformers saves it and the same as its modules hold it differ in more than names: experts one by one or stacked,
projections apart or joined, transposed, interleaved. Both are located in the model that they load as
(``surgery.models.placement``); what lies at the same place of the same parameter is the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from surgery.format.name_map import find_names
from surgery.models.placement import Place, Positions, TensorPart, locate, parameter_names
from surgery.models.skeleton import skeleton

#: Tensor -> shape.
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Part:
    """The entries of a wanted tensor that one stored tensor holds, and where in both they are.

    Attributes:
        stored: the name of the stored tensor.
        to: for each axis of the wanted tensor, positions along it.
        of: for each axis of the stored tensor, the positions of the same entries there, in the same order.
        order: for each axis of the wanted tensor, the axis of the stored one that it is; None for the axis of a stack whose
            matrices are stored as tensors of their own.
    """

    stored: str
    to: tuple[Positions, ...]
    of: tuple[Positions, ...]
    order: tuple[int | None, ...]

    @property
    def entries(self) -> int:
        """How many entries of the wanted tensor it covers."""
        return math.prod(map(len, self.to))

    def within(self, first: int, count: int) -> Part | None:
        """The part restricted to ``count`` rows of the wanted tensor from ``first`` on; None if it has nothing in them.

        Rows are positions along the first axis. In the result ``to`` counts them from ``first``.
        """
        rows = self.to[0]
        if isinstance(rows, range):
            low, high = max(rows.start, first), min(rows.stop, first + count)
            kept: slice | torch.Tensor = slice(low - rows.start, max(low, high) - rows.start)
            moved: Positions = range(low - first, max(low, high) - first)
        else:
            kept = (rows >= first) & (rows < first + count)
            moved = rows[kept] - first
        if not len(moved):
            return None
        axis, of = self.order[0], self.of
        if axis is not None:
            along = of[axis][kept] if isinstance(kept, slice) else torch.as_tensor(of[axis])[kept]
            of = (*of[:axis], along, *of[axis + 1 :])
        return Part(self.stored, (moved, *self.to[1:]), of, self.order)

    def rows(self) -> range:
        """The rows of the stored tensor that have to be read: a range along its first axis that holds all of them."""
        of = self.of[0]
        return of if isinstance(of, range) else range(int(of.min()), int(of.max()) + 1)

    def copy(self, stored: torch.Tensor, first: int, wanted: torch.Tensor) -> None:
        """Copy these entries from the stored tensor into the wanted one.

        Args:
            stored: the stored tensor, from its row ``first`` on.
            first: that row.
            wanted: written to; its dtype may be another.
        """
        block = stored
        for axis, positions in enumerate(self.of):
            shift = first if axis == 0 else 0
            if isinstance(positions, range):
                block = block.narrow(axis, positions.start - shift, len(positions))
            else:
                block = block.index_select(axis, positions - shift)
        # An axis that only the stored tensor has is that of a stack, with a single matrix in it.
        kept = [axis for axis in self.order if axis is not None]
        block = block.permute(*kept, *(axis for axis in range(block.ndim) if axis not in kept))
        block = block.reshape([len(positions) for positions in self.to])
        wanted[_mesh(self.to)] = block


def _mesh(positions: Sequence[Positions]) -> tuple[slice | torch.Tensor, ...]:
    """The index of a tensor that selects these positions along each axis, as ``numpy.ix_`` does; slices where they suffice."""
    if all(isinstance(one, range) for one in positions):
        return tuple(slice(one.start, one.stop) for one in positions if isinstance(one, range))
    count = len(positions)
    return tuple(
        torch.as_tensor(one).view([-1 if axis == other else 1 for other in range(count)]) for axis, one in enumerate(positions)
    )


@dataclass(frozen=True, slots=True)
class Converted:
    """How the wanted tensors of one model are put together from the stored ones of another.

    Attributes:
        parts: wanted tensor -> the parts it consists of; without tensors of which an entry is missing.
        further: stored tensors that belong to parameters which the model of the wanted tensors does not have.
    """

    parts: dict[str, tuple[Part, ...]]
    further: tuple[str, ...]

    def renamed(self, names: Mapping[str, str]) -> Converted:
        """The same with other names of the stored tensors: ``names`` has the new one for each."""
        return Converted(
            {name: tuple(replace(part, stored=names[part.stored]) for part in parts) for name, parts in self.parts.items()},
            tuple(sorted(names[stored] for stored in self.further)),
        )


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model by what its files say of it.

    Attributes:
        folder: the one with its ``config.json``.
        shapes: of all tensors in its files.
    """

    folder: Path
    shapes: Shapes

    def located(self) -> Located | None:
        """Find the tensors of the files in the parameters of the model that transformers loads from them.

        Returns:
            Where they are; None if transformers does not know the model.

        Raises:
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
            OptionError: see ``surgery.models.placement``.
        """
        model = skeleton(self.folder)
        if model is None:
            return None
        names = parameter_names(model)
        shapes = {full: tuple(model.get_parameter(full).shape) for full in names.values()}
        found: dict[str, list[Place]] = {}
        for tensor, places in locate(model, self.shapes).items():
            if all(place.shape == shapes[place.parameter] for place in places):
                found[tensor] = places
            elif (place := _unconverted(model, names, tensor, self.shapes[tensor])) is not None:
                found[tensor] = [place]
        return Located(shapes, found, _tied(model, names.values()))


@dataclass(frozen=True, slots=True)
class Located:
    """The tensors of a model's files, found in its parameters.

    Attributes:
        shapes: parameter -> shape.
        places: tensor -> its places in parameters.
        ties: name of a parameter that has several -> the others.
    """

    shapes: Shapes
    places: dict[str, list[Place]]
    ties: Mapping[str, frozenset[str]]


def _tied(model: nn.Module, names: Iterable[str]) -> dict[str, frozenset[str]]:
    by_parameter: dict[int, set[str]] = {}
    for name in names:
        by_parameter.setdefault(id(model.get_parameter(name)), set()).add(name)
    return {name: frozenset(group - {name}) for group in by_parameter.values() if len(group) > 1 for name in group}


def _unconverted(model: nn.Module, names: Mapping[str, str], tensor: str, shape: Sequence[int]) -> Place | None:
    """The place of a tensor that is a whole parameter, although transformers would convert one of its name; None if it is not.

    So it is in a file that was saved with torch from the modules of a model, and not with ``save_pretrained``.
    """
    if tensor not in names or model.get_parameter(names[tensor]).shape != torch.Size(shape):
        return None
    return Place(names[tensor], tuple(shape), TensorPart.whole(tensor, shape))


def convert(original: StoredModel, tuned: StoredModel, wanted: Mapping[str, Collection[str]]) -> Converted | None:
    """Find tensors of a model in the files of another one that transformers loads as the same architecture.

    Args:
        original: the model whose tensors are wanted.
        tuned: the model in whose files they are looked for.
        wanted: tensor of the original -> its aliases, which hold the same parameter: each of them will do as well.

    Returns:
        Which stored tensors they consist of; None where transformers does not know one of the models.

    Raises:
        MissingExtra, SourceError, OptionError: the tensors of one model cannot be located, see ``StoredModel.located``.
    """
    one, other = original.located(), tuned.located()
    if one is None or other is None:
        return None
    stored: dict[str, list[TensorPart]] = {}
    for found in other.places.values():
        for place in found:
            stored.setdefault(place.parameter, []).append(place.part)

    def alike(name: str, there: str) -> bool:
        return one.shapes[name] == other.shapes[there]

    def called(parameter: str) -> list[str]:
        """A parameter under all its names that both models have it by, its own first."""
        return [parameter, *sorted(one.ties.get(parameter, frozenset()) & other.ties.get(parameter, frozenset()))]

    needed = {
        place.parameter: {
            *called(place.parameter)[1:],
            *(other.parameter for name in others for other in one.places.get(name, ())),
        }
        for tensor, others in wanted.items()
        for place in one.places.get(tensor, ())
    }
    known = {place.parameter for found in one.places.values() for place in found}
    names = find_names(stored, needed, known, alike)
    pairs = names.given.items() if names.doubtful is None else ()
    by_slot = {parameter: _by_slot(stored[there]) for parameter, there in pairs if alike(parameter, there)}

    def slots(parameter: str) -> Mapping[int | None, Sequence[TensorPart]]:
        return next((by_slot[name] for name in called(parameter) if name in by_slot), {})

    parts = {}
    for tensor, others in wanted.items():
        for name in (tensor, *others):
            met = tuple(part for place in one.places.get(name, ()) for part in _met(place, slots(place.parameter)))
            if met and sum(part.entries for part in met) == math.prod(original.shapes[tensor]):
                parts[tensor] = met
                break
        outside = tensor not in one.places and tensor not in other.places  # such as layers that loaders pass over
        if outside and tuple(tuned.shapes.get(tensor, ())) == tuple(original.shapes[tensor]):
            every = tuple(range(size) for size in original.shapes[tensor])
            parts[tensor] = (Part(tensor, every, every, tuple(range(len(every)))),)
    further = {piece.tensor for name in names.unknown for piece in stored[name]}
    return Converted(parts, tuple(sorted(further)))


def _by_slot(pieces: Sequence[TensorPart]) -> dict[int | None, list[TensorPart]]:
    """Group the pieces of a parameter by the expert that they belong to; None for pieces with several.

    The expert is the position along the parameter's first axis. Without this each of hundreds of experts would be compared
    with each other one.
    """
    found: dict[int | None, list[TensorPart]] = {}
    for piece in pieces:
        found.setdefault(_slot(piece), []).append(piece)
    return found


def _slot(piece: TensorPart) -> int | None:
    at = piece.at[0]
    return at.start if isinstance(at, range) and len(at) == 1 else None


def _met(place: Place, stored: Mapping[int | None, Sequence[TensorPart]]) -> Iterator[Part]:
    """The parts of the piece at ``place`` that stored pieces of the same parameter cover."""
    slot = _slot(place.part)
    slots: Collection[int | None] = stored if slot is None else {slot, None}
    for one in slots:
        for piece in stored.get(one, ()):
            if (part := _meeting(place.part, piece)) is not None:
                yield part


def _meeting(wanted: TensorPart, stored: TensorPart) -> Part | None:
    """The entries that two pieces of one parameter have in common; None if there are none."""
    common = [_common(*axes) for axes in zip(wanted.at, wanted.of, stored.at, stored.of, strict=True)]
    if not all(len(to) for to, _ in common):
        return None
    to: dict[int, tuple[Positions, int | None]] = {}
    of: dict[int, Positions] = {}
    for (target, source), axis, stored_axis in zip(common, wanted.axes, stored.axes, strict=True):
        if stored_axis is not None:
            of[stored_axis] = source
        if axis is not None:
            to[axis] = (target, stored_axis)
    return Part(
        stored.tensor,
        tuple(to[axis][0] for axis in range(len(to))),
        tuple(of[axis] for axis in range(len(of))),
        tuple(to[axis][1] for axis in range(len(to))),
    )


def _common(at: Positions, of: Positions, other_at: Positions, other_of: Positions) -> tuple[Positions, Positions]:
    """Where two pieces overlap along one axis of their parameter: the positions in the tensor of each, in the same order.

    Args:
        at, other_at: positions of each piece in the parameter.
        of, other_of: the positions in its own tensor, in the same order.
    """
    if isinstance(at, range) and isinstance(other_at, range):
        low = max(at.start, other_at.start)
        high = max(low, min(at.stop, other_at.stop))
        return of[low - at.start : high - at.start], other_of[low - other_at.start : high - other_at.start]
    mine, theirs = torch.as_tensor(at), torch.as_tensor(other_at)
    where = torch.full((1 + int(max(mine.max(), theirs.max())),), -1)
    where[theirs] = torch.arange(len(theirs))
    index = where[mine]
    kept = index >= 0
    return _positions(torch.as_tensor(of)[kept]), _positions(torch.as_tensor(other_of)[index[kept]])


def _positions(found: torch.Tensor) -> Positions:
    """Positions as a range where they are consecutive, else unchanged."""
    if len(found) and bool((found.diff() == 1).all()):
        return range(int(found[0]), int(found[-1]) + 1)
    return found if len(found) else range(0)
