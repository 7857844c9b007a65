"""Carriers: the parameters of a model that the targets of a checkpoint are in, how modules use them, and their factors."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.lossless.factors import Factors
from surgery.models.accelerate_api import at_hand, is_kept_elsewhere
from surgery.models.packed import held_at, held_in, is_plain, packed_numbers
from surgery.models.peft_api import is_wrapper
from surgery.models.placement import Place, Placed, Positions
from surgery.models.terms import Term
from surgery.models.transformers_api import is_conv1d


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and PEFT.

    Raises:
        OptionError: it is in a wrapper for several processes or devices, which knows no parameters that are added later.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise OptionError(f"the model is in {type(inner).__name__} already", hint="attach first, then wrap")
        elif is_wrapper(inner):
            inner = inner.get_base_model()
        else:
            unwrapped: nn.Module = inner
            return unwrapped


@dataclass(frozen=True, slots=True)
class Layer:
    """A module that holds a parameter.

    Attributes:
        module: the module.
        name: of the parameter in the module.
        kind: how the module uses it: ``linear``, ``transposed``, ``embedding``, ``convolution``, or in an ``unknown`` way.
        readers: other modules that use the parameter themselves, without calling this module.
    """

    module: nn.Module
    name: str
    kind: str
    readers: tuple[nn.Module, ...] = ()

    @property
    def described(self) -> str:
        """The parameter in words, for a message."""
        text = f"a weight of {type(self.module).__name__}"
        return text + (f", which {type(self.readers[0]).__name__} reads directly" if self.readers else "")


@dataclass(slots=True)
class Carrier:
    """A parameter that targets are in, and the modules that hold it.

    Attributes:
        layers: the modules: one, or several for tied weights.
        shape: of the weight, even if a quantized one is stored in another shape.
        quantized: whether the parameter is quantized.
        stack: whether it is seen as a batch of matrices.
    """

    layers: list[Layer]
    shape: tuple[int, ...]
    quantized: bool
    stack: bool = False

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """The shape of its matrix, or of each matrix of a stack."""
        shape = self.shape[1:] if self.stack else self.shape
        return shape[0], math.prod(shape[1:])

    def present(self) -> AbstractContextManager[Any]:
        """A context in which the weight is in memory, even if accelerate keeps it elsewhere."""
        module = self.layers[0].module
        return at_hand(module) if is_kept_elsewhere(module) and self.weight().is_meta else nullcontext()

    def weight(self) -> torch.Tensor:
        layer = self.layers[0]
        return held_in(layer.module, layer.name).detach()


def carriers_of(model: nn.Module, names: Iterable[str]) -> dict[str, Carrier]:
    """Full name of a parameter -> its carrier; all names of the same parameter have the same carrier."""
    readers = _readers(model)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            holders.setdefault(id(own), []).append((module, name))
        if (packed := packed_numbers(module)) is not None:
            holders[id(packed)] = [(module, "weight")]
    made: dict[int, Carrier] = {}
    carriers = {}
    for name in names:
        parameter = held_at(model, name)
        if id(parameter) not in made:
            made[id(parameter)] = _carrier(name, parameter, holders[id(parameter)], readers)
        carriers[name] = made[id(parameter)]
    return carriers


def _carrier(
    name: str,
    parameter: torch.Tensor,
    holders: Sequence[tuple[nn.Module, str]],
    readers: dict[tuple[int, str], list[nn.Module]],
) -> Carrier:
    first: Any = holders[0][0]
    quantized = _is_quantized(first, parameter, name)
    layers = []
    for module, attribute in holders:
        reading = tuple(readers.get((id(module), attribute), ()))
        layers.append(Layer(module, attribute, _kind(module, attribute, quantized, bool(reading)), reading))
        if quantized and reading:
            raise OptionError(
                f"{name!r} is quantized, and {layers[-1].described}",
                hint="leave it out with --exclude, or load the model without quantization",
            )
    shape = (first.out_features, first.in_features) if quantized else tuple(parameter.shape)
    return Carrier(layers, shape, quantized)


def _readers(model: nn.Module) -> dict[tuple[int, str], list[nn.Module]]:
    """(id of a module, name of its parameter) -> other modules that use the parameter without calling its module.

    Examples are Mamba's mixer with its dt_proj, attention with its out_proj, and DBRX with the weights of its experts. They
    are found in the source of the classes, which is a guess; ``Scales.save`` warns of layers that were never used.
    """
    found: dict[tuple[int, str], list[nn.Module]] = {}
    for reader in model.modules():
        for chain in _chains(type(reader)):  # type: ignore[arg-type]  # types have a hash
            module = reader
            for part, after in zip(chain, (*chain[1:], ""), strict=True):
                if part in module._modules and module._modules[part] is not None:
                    module = module._modules[part]  # type: ignore[assignment]
                    continue
                # A module may use its own parameters; and reading only the dtype of another's is not a use.
                if part in module._parameters and module is not reader and not _METADATA.fullmatch(after):
                    known = found.setdefault((id(module), part), [])
                    if reader not in known:
                        known.append(reader)
                break
    return found


_METADATA = re.compile("dtype|device|shape|size|ndim|dim|numel|requires_grad|is_[a-z]+")


@cache
def _chains(kind: Any) -> frozenset[tuple[str, ...]]:
    """All ``self.a.b.c`` in the source of a class, as (a, b, c), except in ``isinstance(self.a...)``."""
    chains: set[tuple[str, ...]] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with suppress(OSError, TypeError, AttributeError):  # made at run time, or without source
            found = re.findall(r"(?<!isinstance\()\bself((?:\.\w+){2,})", inspect.getsource(base))
            chains.update(tuple(chain[1:].split(".")) for chain in found)
    return frozenset(chains)


def _is_quantized(module: nn.Module, weight: torch.Tensor, name: str) -> bool:
    """Whether a parameter is quantized. Raises OptionError if it is sharded, or quantized and no linear weight."""
    if is_sharded(weight):
        raise OptionError(f"{name!r} is sharded over processes", hint="attach first, then shard the model")
    if packed_numbers(module) is not None:
        return True
    plain = is_plain(weight)
    if not plain and not isinstance(module, nn.Linear):
        raise OptionError(
            f"{name!r} is quantized, and not the weight of a linear layer",
            got=f"{type(weight).__name__} of {weight.dtype} in {type(module).__name__}",
            hint="load the model without quantization",
        )
    return not plain


def _kind(module: Any, name: str, quantized: bool, used_by_parent: bool) -> str:
    """How a module uses a parameter, see ``Layer.kind``: ``unknown`` for a class with its own forward."""
    if isinstance(module, nn.RNNBase):
        raise OptionError("scales cannot be attached to recurrent layers", hint="leave them out with --exclude")
    kind: Any = type(module)
    forward = kind.forward
    if name != "weight" or used_by_parent:
        return "unknown"
    if quantized or forward is nn.Linear.forward:
        return "linear"
    if is_conv1d(module):
        return "transposed"
    if forward is nn.Embedding.forward and module.max_norm is None:
        return "embedding"
    return "convolution" if forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward) else "unknown"


def terms_of(
    target: Placed, places: Sequence[Place], carriers: Mapping[str, Carrier], factors: Sequence[Factors]
) -> Iterator[tuple[Carrier, Term]]:
    """The directions of a target in the coordinates of the parameters that it is in, matrix by matrix.

    Args:
        target: the target.
        places: of its tensor in the model.
        carriers: by full name of the parameter.
        factors: of each matrix of the target.

    Raises:
        OptionError: a parameter has another shape than the checkpoint's tensors give it.
    """
    for place in places:
        carrier = carriers[place.parameter]
        if place.shape != carrier.shape:
            raise OptionError(
                f"{target.tensor!r} does not fit the parameter {place.parameter!r} of the model",
                got=list(carrier.shape),
                expected=list(place.shape),
                hint="give the model that was factorized; bitsandbytes transposes the weights of GPT-2's Conv1D"
                if carrier.quantized
                else "give the model that was factorized, with the vocabulary that it had",
            )
        carrier.stack, region = _region(target, place)
        rows, columns = carrier.rows_and_columns
        for matrix, index in zip(region.matrices, region.of_target, strict=True):
            left, right = factors[index].U, factors[index].V
            if region.transposed:
                left, right = right, left
            left, right = _placed(left, region.rows, rows), _placed(right, region.columns, columns)
            yield carrier, Term(index * target.rank, matrix, left, right, region.transposed)


@dataclass(frozen=True, slots=True)
class _Region:
    """Where matrices of a target are in a parameter.

    Attributes:
        matrices: indices of matrices of the parameter; ``[0]`` unless it is a stack.
        of_target: for each of these the index of the target's matrix that is there.
        rows, columns: pairs of positions in the parameter's matrix, and the positions in the target's that are there.
        transposed: whether rows of the parameter are columns of the target.
    """

    matrices: Sequence[int]
    of_target: Sequence[int]
    rows: tuple[Positions, Positions]
    columns: tuple[Positions, Positions]
    transposed: bool


def _region(target: Placed, place: Place) -> tuple[bool, _Region]:
    """Whether the parameter is a stack, and where the target's matrices are in it. Raises OptionError if that is unknown."""
    piece = place.part
    if target.view == "convolution":
        whole = tuple(range(len(target.shape)))
        if piece.axes != whole or any(
            len(piece.of[i]) != target.shape[i] or place.shape[i] != target.shape[i] for i in whole[1:]
        ):
            raise _unknown_place(target, place)
        every = range(math.prod(target.shape[1:]))
        rows = _in_slice(target, 0, piece.at[0], piece.of[0])
        return False, _Region([0], [0], rows, _in_slice(target, 1, every, every), transposed=False)
    row, column = (1, 2) if target.view == "stack" else (0, 1)
    stack = len(piece.axes) == 3
    if piece.axes[-2:] not in ((row, column), (column, row)) or len(piece.axes) - stack != 2:
        raise _unknown_place(target, place)
    transposed = piece.axes[-2] == column
    cut = [_in_slice(target, 0 if piece.axes[axis] == row else 1, piece.at[axis], piece.of[axis]) for axis in (-2, -1)]
    if not stack:
        return False, _Region([0], [0], cut[0], cut[1], transposed)
    matrices, of_target = ([int(i) for i in positions[0]] for positions in (piece.at, piece.of))
    return True, _Region(
        matrices, of_target if piece.axes[0] == 0 and target.view == "stack" else [0], cut[0], cut[1], transposed
    )


def _unknown_place(target: Placed, place: Place) -> OptionError:
    return OptionError(
        f"{target.tensor!r} lies in the parameter {place.parameter!r} of the model in a way that scales cannot follow",
        got=f"axes {place.part.axes} of a {target.view}",
        hint="fold the scales instead, or leave it out with --exclude",
    )


def _in_slice(target: Placed, axis: int, at: Positions, of: Positions) -> tuple[Positions, Positions]:
    """Pairs of positions in a parameter and a tensor along an axis -> those inside the target's slice, relative to it."""
    part = target.slice
    if part is None or part.axis != axis:
        return at, of
    index = torch.as_tensor(of)
    inside = part.holds(index)
    local = index // part.period * (part.stop - part.start) + index % part.period - part.start
    return torch.as_tensor(at)[inside], local[inside]


def _placed(factor: torch.Tensor, positions: tuple[Positions, Positions], length: int) -> torch.Tensor:
    """The rows of a factor (any, k), moved to their positions in (length, k); the other rows are zero."""
    at, of = positions
    # The positions alone do not tell: the first part of a tensor that is cut fills a whole parameter, but not from all rows.
    if len(factor) == length and isinstance(at, range) and isinstance(of, range) and at == of == range(length):
        return factor
    placed = factor.new_zeros(length, factor.shape[1])
    placed[torch.as_tensor(at)] = factor[torch.as_tensor(of)]
    return placed


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a DTensor, without importing its module, which is slow."""
    return hasattr(parameter, "device_mesh")
