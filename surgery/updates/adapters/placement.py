"""From what an adapter holds to the tensors of a checkpoint: which change is made to which tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from surgery.errors import OptionError, few
from surgery.format.safetensors import ShardReader, same_bytes
from surgery.models.placement import Place, TensorPart
from surgery.updates.adapters.content import AdapterContent, ModuleUpdate, changes_nothing
from surgery.updates.adapters.experts import places_in_stacks
from surgery.updates.adapters.geometry import (
    Sides,
    adds_nothing,
    in_tensor,
    is_nothing,
    is_straight,
    is_targeted,
    wanted_as,
    wanted_weight,
    wanted_with,
)
from surgery.updates.adapters.homes import Home, Homes
from surgery.updates.adapters.stacks import sides_of_stacks
from surgery.updates.changes import LowRankPart, ReplacedRows, StoredTensor, TensorChange

#: PEFT 0.21 makes one LoRA of both, and then casts each half of it to float32 by itself if the model is in half precision.
_HOW_TO_TIE = (
    "load the adapter beside the model with PEFT; to merge it, train it on a model that was untied before, or with "
    "ensure_weight_tying on one loaded in float32 (in half precision PEFT trains two LoRAs of their own)"
)


@dataclass(slots=True)
class _Change:
    """What has been found for one tensor so far; see ``TensorChange``."""

    parts: dict[int, list[LowRankPart]] = field(default_factory=dict)
    is_stack: bool = False
    offset: torch.Tensor | None = None
    replacement: StoredTensor | None = None
    rows: ReplacedRows | None = None

    def done(self) -> TensorChange:
        """The change, without what adds zeros, as in experts that were never chosen: its weights keep their bytes."""
        kept = ((index, tuple(part for part in parts if not adds_nothing(part))) for index, parts in self.parts.items())
        parts = {index: parts for index, parts in kept if parts}
        return TensorChange(parts, self.is_stack, self.offset, self.replacement, self.rows)


@dataclass(frozen=True, slots=True)
class PlacedAdapter:
    """What one adapter does to the tensors of a checkpoint.

    Attributes:
        changes: by tensor.
        account: tensor of the adapter's file -> the tensors of the checkpoint that it went to.
    """

    changes: Mapping[str, TensorChange]
    account: Mapping[str, tuple[str, ...]]


def placed(content: AdapterContent, homes: Homes, shapes: Mapping[str, Sequence[int]], weight: float) -> PlacedAdapter:
    """Find what an adapter changes.

    Args:
        content: of the adapter.
        homes: of the checkpoint.
        shapes: of all its tensors, by name.
        weight: with which the adapter counts in a sum.

    Raises:
        OptionError: it does not fit the checkpoint, or changes nothing.
        FormatError: it contradicts itself.
        MissingExtra, SourceError: see ``surgery.models.skeleton``.
    """
    return _Placing(content, homes, shapes, weight).all()


def _module(name: str) -> str:
    """The module of a weight, quoted."""
    return repr(name.removesuffix(".weight"))


class _Placing:
    """Places one adapter; arguments as for ``placed``."""

    def __init__(self, content: AdapterContent, homes: Homes, shapes: Mapping[str, Sequence[int]], weight: float) -> None:
        self._content, self._homes, self._shapes, self._weight = content, homes, shapes, weight
        self._changes: dict[str, _Change] = {}
        self._account: dict[str, list[str]] = {}
        self._tied: set[str] = set()

    def all(self) -> PlacedAdapter:
        content = self._content
        whole = content.copied or content.tokens
        if whole and self._weight != 1:
            raise OptionError(
                f"{content.where}: an adapter that replaces whole tensors or rows can only have the weight 1",
                got=f"a weight of {self._weight:g} and {few([*content.copied, *content.tokens])}",
                expected="a weight of 1",
            )
        stacks, updates = self._stacks()
        singles = places_in_stacks(updates, self._homes)
        for one in updates:
            if one.module in singles:
                self._add_single(one, singles[one.module])
        updates = [one for one in updates if one.module not in singles]
        wanted = {f"{one.module}.weight": wanted_weight(one) for one in updates}
        biases = {f"{one.module}.bias": one for one in updates if one.bias is not None}
        wanted |= {name: wanted_as((len(one.B),)) for name, one in biases.items()}
        wanted |= {name: wanted_as(one.shape) for name, one in content.copied.items()}
        for module, (_, rows) in content.tokens.items():
            wanted.setdefault(f"{module}.weight", wanted_with(rows))
        found = self._homes.find(wanted, content.where) if wanted else {}
        self._check_once(found, updates)
        flags = self._orientations(updates, found)
        for one in updates:
            self._add_update(one, found[f"{one.module}.weight"], flags[one.module])
        for name, one in biases.items():
            self._add_bias(one, found[name])
        for name, stored in content.copied.items():
            self._add_copy(name, stored, found[name])
        for module, (source, rows) in content.tokens.items():
            self._add_rows(source, rows, found[f"{module}.weight"])
        sided = sides_of_stacks(stacks, self._homes, content)
        for parameter, one in stacks:
            self._add_stack(parameter, one, *sided[parameter])
        self._compare(found)
        return self._result()

    def _result(self) -> PlacedAdapter:
        where = self._content.where
        changes = {tensor: change.done() for tensor, change in self._changes.items()}
        for tensor, change in changes.items():
            if (change.rows or change.replacement) and change.parts:
                raise OptionError(f"{where}: the adapter both replaces and adds to {tensor!r}")
        changes = {tensor: change for tensor, change in changes.items() if not is_nothing(change)}
        if not changes:
            raise changes_nothing(where, "only zeros in all of its matrices B")
        account = {source: tuple(dict.fromkeys(to)) for source, to in self._account.items()}
        return PlacedAdapter(changes, account)

    def _change(self, tensor: str, sources: Sequence[str]) -> _Change:
        for source in sources:
            self._account.setdefault(source, []).append(tensor)
        return self._changes.setdefault(tensor, _Change())

    def _check_once(self, found: Mapping[str, Home], updates: Sequence[ModuleUpdate]) -> None:
        """Refuse two names for one parameter, and a parameter that other modules share, which were not adapted.

        Where all that share it are adapted, and alike, as PEFT does with ``ensure_weight_tying``, it is changed once.
        """
        names: dict[str, list[str]] = {}
        for name, home in found.items():
            names.setdefault(home.tensor or home.parameter, []).append(name)
        by_name = {f"{one.module}.weight": one for one in updates}
        shared: dict[int, list[str]] = {}
        for name, home in found.items():
            if home.carrier is not None and len(home.carrier.layers) > 1:
                shared.setdefault(id(home.carrier), []).append(name)
            elif len(twice := names[home.tensor or home.parameter]) > 1:
                raise OptionError(f"{self._content.where}: the adapter changes a weight twice, under two names", got=twice)
        for several in shared.values():
            home = found[several[0]]
            layers = [] if home.carrier is None else home.carrier.layers
            first, *others = several
            if all(name.removesuffix(".weight") in self._content.tokens for name in several):
                continue  # PEFT trains the rows of all that are tied
            if len(several) == len(layers) and not all(self._alike(by_name, first, other) for other in others):
                raise OptionError(
                    f"{self._content.where}: the adapter changes {few(map(_module, several), between=' and ')}, which share "
                    "one weight, in ways that do not fit together",
                    got="DoRA" if any(one.magnitude is not None for one in self._content.updates) else "different numbers",
                    expected="the same plain LoRA, or the same copy, for all that share it",
                    hint=_HOW_TO_TIE,
                )
            if len(several) < len(layers):
                raise OptionError(
                    f"{self._content.where}: the adapter changes {_module(first)}, whose weight several modules share",
                    got=[type(layer.module).__name__ for layer in layers],
                    expected="a weight of its own, or the same change of all that share it, as with ensure_weight_tying",
                    hint=_HOW_TO_TIE,
                )
            # With a tensor of its own for another name, both are changed.
            self._tied.update(other for other in others if found[other].parameter == home.parameter)

    def _alike(self, updates: Mapping[str, ModuleUpdate], name: str, other: str) -> bool:
        """Whether an adapter makes the same change under two names."""
        one, two = self._content.copied.get(name), self._content.copied.get(other)
        if one is not None and two is not None:
            with ShardReader(one.path) as reader:
                return same_bytes(reader, reader.entries[one.name], reader, reader.entries[two.name])
        first, second = updates.get(name), updates.get(other)
        if first is None or second is None or first.embedding == second.embedding:
            return False
        if first.magnitude is not None or second.magnitude is not None:
            return False
        scalings = {one.scaling(self._scaled_as(one.module), len(one.A), 1) for one in (first, second)}
        return len(scalings) == 1 and torch.equal(first.B.T, second.A) and torch.equal(first.A, second.B.T)

    # A module's weight and bias.

    def _orientations(self, updates: Sequence[ModuleUpdate], found: Mapping[str, Home]) -> dict[str, bool]:
        """Module -> whether its weight is stored as (in, out)."""
        known: dict[str, bool] = {}
        for one in updates:
            home = found[f"{one.module}.weight"]
            if home.carrier is not None:
                kind = home.carrier.layers[0].kind
                is_embedding = any(layer.kind == "embedding" for layer in home.carrier.layers)
                if one.embedding != is_embedding and len(home.carrier.layers) == 1:
                    raise OptionError(
                        f"{self._content.where}: the adapter's update of {one.module!r} is of another kind than the module",
                        got=type(home.carrier.layers[0].module).__name__,
                    )
                known[one.module] = one.embedding or kind == "transposed"
            elif one.embedding:
                known[one.module] = True
            else:
                known[one.module] = not is_straight(one, home.shape)
        for one in updates:
            home = found[f"{one.module}.weight"]
            if home.carrier is None and not one.embedding and len(home.shape) == 2 and home.shape[0] == home.shape[1]:
                known[one.module] = self._is_transposed(one, home)
        return known

    def _is_transposed(self, one: ModuleUpdate, home: Home) -> bool:
        """Whether a square weight, found by its name, is stored as (in, out): the shape does not tell."""
        if not one.transposed and not self._homes.has_transposed:
            return False
        if self._homes.model is not None and (known := self._homes.of_tensor(home)) is not None:
            return known.carrier is not None and known.carrier.layers[0].kind == "transposed"
        return one.transposed

    def _add_update(self, one: ModuleUpdate, home: Home, transposed: bool) -> None:
        name = f"{one.module}.weight"
        sources = [source for source in one.sources if not source.endswith(".bias")]
        if name in self._tied:
            for piece in home.pieces:
                for source in sources:
                    self._account.setdefault(source, []).append(piece.tensor)
            return
        scaling = one.scaling(self._scaled_as(one.module), len(one.A), 1)
        left, right, axis = one.B, one.A.flatten(1).T, 0
        if transposed:
            left, right, axis = right, left, 1
        for piece in home.pieces:
            shape = self._shapes[piece.tensor]
            part = Sides(left, right, one.magnitude, axis)
            if home.tensor is None:
                part = in_tensor(piece, shape, part, name, home)
            self._put(piece.tensor, sources, None, part.scaled(scaling, self._weight))

    def _scaled_as(self, module: str) -> str:
        """The name by which PEFT looks up ranks and alphas: that of the parameter, where it is adapted without its module."""
        name = f"{module}.weight"
        return name if is_targeted(name, self._content.stacked) else module

    def _put(self, tensor: str, sources: Sequence[str], index: int | None, part: LowRankPart) -> None:
        change = self._change(tensor, sources)
        change.is_stack = index is not None
        change.parts.setdefault(index or 0, []).append(part)

    def _add_bias(self, one: ModuleUpdate, home: Home) -> None:
        assert one.bias is not None
        scaling = one.scaling(self._scaled_as(one.module), len(one.A), 1)
        sources = [source for source in one.sources if source.endswith(".bias")]
        for piece in home.pieces:
            if piece.axes != (0,):
                raise OptionError(f"{self._content.where}: the bias of {one.module!r} is stored in a way that is not followed")
            change = self._change(piece.tensor, sources)
            if change.offset is None:
                change.offset = torch.zeros(tuple(self._shapes[piece.tensor]), dtype=torch.float64)
            added = one.bias.double()[torch.as_tensor(piece.at[0])] * (scaling * self._weight)
            change.offset[torch.as_tensor(piece.of[0])] += added

    # What replaces.

    def _add_copy(self, name: str, stored: StoredTensor, home: Home) -> None:
        if home.tensor is None:
            raise OptionError(
                f"{self._content.where}: {name!r} replaces a parameter that the checkpoint stores otherwise",
                got=few(piece.tensor for piece in home.pieces),
                hint="merge_and_unload() of PEFT, on a model in memory",
            )
        change = self._change(home.tensor, [stored.name])
        if name not in self._tied:
            change.replacement = stored

    def _add_rows(self, source: str, rows: ReplacedRows, home: Home) -> None:
        if home.tensor is None:
            raise OptionError(f"{self._content.where}: the rows of {source!r} are in a weight that is stored otherwise")
        for tensor in (home.tensor, *self._homes.tied(home)):
            change = self._change(tensor, [source])
            if change.rows is not None:
                raise OptionError(f"{self._content.where}: the rows of trained tokens are there twice", got=source)
            change.rows = rows

    def _compare(self, found: Mapping[str, Home]) -> None:
        """Hold the shapes of PEFT's copies of weights under an adapter against the checkpoint's."""
        for source, copy in self._content.compared.items():
            self._account.setdefault(source, [])
            home = None if copy is None else found.get(copy[0]) or self._homes.named(copy[0])
            if copy is None or home is None:
                continue
            if home.shape != copy[1].shape:
                raise OptionError(
                    f"{self._content.where}: the adapter's update of {copy[0]!r} does not fit its weight",
                    got=f"{list(home.shape)} in the checkpoint",
                    expected=list(copy[1].shape),
                    hint="merge onto the model that the adapter was trained on, with the vocabulary that it had",
                )

    # Stacks of experts, which PEFT adapts as parameters (``target_parameters``).

    def _stacks(self) -> tuple[list[tuple[str, ModuleUpdate]], list[ModuleUpdate]]:
        """(parameter, its update) for all stacks, and the other updates."""
        if not self._content.stacked:
            if deep := [one.module for one in self._content.updates if one.depth]:
                raise OptionError(f"{self._content.where}: an adapter inside another", got=few(deep))
            return [], list(self._content.updates)
        groups: dict[str, list[ModuleUpdate]] = {}
        for one in self._content.updates:
            groups.setdefault(one.module, []).append(one)
        stacks, others = [], []
        for module, group in groups.items():
            own = [name for name, _ in self._homes.own_parameters(module) if is_targeted(name, self._content.stacked)]
            if len(group) == 1 and not group[0].depth and self._is_matrix(module, own):
                others += group
                continue
            group.sort(key=lambda one: -one.depth)  # the innermost is that of the first parameter
            if len(own) != len(group) or (len(own) > 1 and self._homes.model is None):
                raise OptionError(
                    f"{self._content.where}: it cannot be told which parameters of {module!r} the adapter changes",
                    got=f"{len(group)} updates for {few(own) or 'none'}",
                    expected="one for each of target_parameters, in a model that transformers knows",
                )
            stacks += list(zip(own, group, strict=True))
        return stacks, others

    def _is_matrix(self, module: str, own: Sequence[str]) -> bool:
        """Whether the only update of a module is that of its weight, and this one matrix, as of a layer or a router."""
        if not own:
            return True
        shapes = dict(self._homes.own_parameters(module))
        return own[0] == f"{module}.weight" and len(shapes[own[0]]) != 3

    def _add_stack(self, parameter: str, one: ModuleUpdate, home: Home, reads_rows: bool) -> None:
        count = home.shape[0]
        scaling = one.scaling(parameter, len(one.A), count)
        inputs, outputs = one.A.view(count, -1, one.A.shape[1]), one.B.view(len(one.B), -1, count).permute(2, 0, 1)
        for piece in home.pieces:
            shape = self._shapes[piece.tensor]
            for position, expert in zip(piece.of[0], piece.at[0], strict=True):
                left, right = outputs[int(expert)], inputs[int(expert)].T
                if reads_rows:
                    left, right = right, left
                inner = TensorPart(piece.tensor, piece.axes[1:], piece.at[1:], piece.of[1:])
                where = int(position) if piece.axes[0] is not None else None
                if piece.axes[0] not in (None, 0):
                    raise OptionError(f"{self._content.where}: {parameter!r} is stored in a way that is not followed")
                sides = Sides(left, right, None, 0)
                if where is not None:
                    inner = TensorPart(piece.tensor, tuple(axis and axis - 1 for axis in inner.axes), inner.at, inner.of)
                    shape = self._shapes[piece.tensor][1:]
                part = in_tensor(inner, shape, sides, parameter, home)
                self._put(piece.tensor, one.sources, where, part.scaled(scaling, self._weight))

    def _add_single(self, one: ModuleUpdate, place: Place) -> None:
        """An update of an expert's own module, in the stack that the checkpoint has."""
        home, part = self._homes.in_model(place.parameter), place.part
        if home is None or home.tensor is None or place.shape != home.shape or part.axes != (None, 0, 1):
            raise OptionError(
                f"{self._content.where}: {one.module!r} is an expert, of a stack that the checkpoint stores otherwise",
                got=None if home is None else f"{place.parameter!r}, {list(home.shape)} for {list(place.shape)}",
                hint="merge_and_unload() of PEFT, on a model in memory",
            )
        # The expert's weight, as the tensor here, is a part of the parameter; the update goes the other way.
        inner = TensorPart(home.tensor, (0, 1), part.of[1:], part.at[1:])
        sides = Sides(one.B, one.A.T, one.magnitude, 0)
        own = Home(one.module, (len(one.B), one.A.shape[1]), [inner], None)
        part_of_stack = in_tensor(inner, home.shape[1:], sides, one.module, own)
        scaling = one.scaling(one.module, len(one.A), 1)
        self._put(home.tensor, one.sources, int(part.at[0][0]), part_of_stack.scaled(scaling, self._weight))
