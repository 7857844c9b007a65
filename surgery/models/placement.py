"""Placement: where the tensors of a checkpoint are in a loaded model.

Names and shapes in a file differ from those in memory: transformers renames tensors, stacks the experts of a layer, joins
separate tensors and splits fused ones. Here its own conversion runs on symbols that stand for tensors and keep track of
positions, so that no model family needs a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.format.views import Slice
from surgery.models.packed import packed_weights
from surgery.models.peft_api import own_name
from surgery.models.transformers_api import converted, is_from_transformers, loaded_by, reordered_axis

#: Indices along an axis; a range where they are consecutive, which is nearly always.
Positions = range | torch.Tensor


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A part of a checkpoint's tensor, and where it is in a parameter.

    Attributes:
        tensor: its name in the checkpoint.
        axes: for each axis of the parameter the axis of the tensor; None where the parameter stacks several tensors.
        at: for each axis of the parameter, positions in it.
        of: for each axis of the parameter, the positions in the tensor that are there; ``range(1)`` where ``axes`` is None.
    """

    tensor: str
    axes: tuple[int | None, ...]
    at: tuple[Positions, ...]
    of: tuple[Positions, ...]

    @classmethod
    def whole(cls, tensor: str, shape: Sequence[int]) -> TensorPart:
        """All of a tensor, in a parameter of the same shape."""
        every = tuple(range(size) for size in shape)
        return cls(tensor, tuple(range(len(shape))), every, every)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece of a tensor is.

    Attributes:
        parameter: the full name of the parameter.
        shape: that the parameter must have.
        part: of the tensor, and its positions in the parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    part: TensorPart


class Placed(Protocol):
    """What is needed of a tensor, or of a slice of one, to follow its matrices into a model."""

    @property
    def tensor(self) -> str:
        """Its name in the checkpoint."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole tensor."""

    @property
    def view(self) -> str:
        """How it is seen: ``matrix``, ``stack`` or ``convolution``."""

    @property
    def slice(self) -> Slice | None:
        """The rows or columns that are meant; None for whole matrices."""

    @property
    def rank(self) -> int:
        """How many directions each matrix has."""


def locate(model: nn.Module, tensors: Mapping[str, Sequence[int] | None]) -> dict[str, list[Place]]:
    """Find the tensors of a checkpoint among the parameters of a model.

    Args:
        model: any module. Names are converted as by ``from_pretrained`` for a model of transformers; in any other model they
            have to be those of the checkpoint.
        tensors: name in the checkpoint -> shape, for all of its tensors; None where the shape is not known.

    Returns:
        Name in the checkpoint -> places, for the tensors whose shapes are known and that are in the model.

    Raises:
        OptionError: transformers converts a tensor in a way that cannot be followed.
        MissingExtra: the installed release of transformers has no known interface for its conversion.
    """
    names = parameter_names(model)
    found: dict[str, list[Place]] = {}
    for parameter, symbol in _loaded(model, names, tensors):
        if parameter not in names:  # a part of a fused tensor that this model does not use
            continue
        for piece in symbol.pieces:
            found.setdefault(piece.tensor, []).append(Place(names[parameter], tuple(symbol.shape), piece))
    return found


def homes(model: nn.Module, tensors: Iterable[str]) -> dict[str, str]:
    """Tensor of a checkpoint -> full name of the parameter that it is loaded into, alone or with others.

    Tensors that are not in the model are left out. Unlike for ``locate``, no shapes are needed.
    """
    names = parameter_names(model)
    if not is_from_transformers(model):
        return {name: names[name] for name in tensors if name in names}
    groups = _groups(model, names, tensors)
    return {
        name: names[renamed] for renamed, (_, sources) in groups.items() for members in sources.values() for name in members
    }


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter as without PEFT's wrappers of layers -> its full name in the model; also of packed weights."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {own_name(name): name for name in [*names, *packed_weights(model)]}


def _loaded(
    model: nn.Module, names: dict[str, str], tensors: Mapping[str, Sequence[int] | None]
) -> Iterator[tuple[str, _Symbol]]:
    """Each parameter with the symbol that is loaded into it, for parameters that tensors of known shapes are loaded into."""
    if not is_from_transformers(model):
        for name, shape in tensors.items():
            if name in names and shape is not None:
                yield name, _Symbol.of_tensor(name, shape)
        return
    for renamed, (converter, sources) in _groups(model, names, tensors).items():
        known = [shape for members in sources.values() for name in members if (shape := tensors[name]) is not None]
        if not known:
            continue
        # A tensor of unknown shape keeps the positions of others right. Its shape is taken from its neighbours; if that is
        # wrong, the result has another shape than the parameter, or other bytes, which is noticed later.
        symbols = {
            pattern: [
                _Symbol.of_tensor(name, shape) if (shape := tensors[name]) is not None else _Symbol(tuple(known[0]), ())
                for name in members
            ]
            for pattern, members in sources.items()
        }
        if converter is None:
            several = [name for members in sources.values() for name in members]
            if len(several) > 1:
                raise OptionError(f"two tensors of the checkpoint are loaded as {renamed!r}", got=several)
            ((_, (symbol,)),) = symbols.items()
            yield renamed, symbol
        else:
            yield from _converted(model, converter, renamed, symbols).items()


def _groups(model: nn.Module, names: dict[str, str], tensors: Iterable[str]) -> dict[str, tuple[Any, dict[str, list[str]]]]:
    """Parameter of a transformers model -> the converter for it, or None, and the tensors that it takes, by pattern."""
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for loaded in loaded_by(model, names, tensors):
        _, sources = groups.setdefault(loaded.parameter, (loaded.converter, {}))
        sources.setdefault(loaded.pattern or loaded.tensor, []).append(loaded.tensor)
    return groups


def _converted(model: nn.Module, converter: Any, name: str, symbols: dict[str, list[_Symbol]]) -> dict[str, _Symbol]:
    """Run a converter of transformers on the symbols of the tensors that it collects for a parameter.

    Returns:
        Parameter -> the symbol that is loaded into it.
    """
    names = [symbol.pieces[0].tensor for members in symbols.values() for symbol in members if symbol.pieces]
    try:
        made: dict[str, _Symbol] = converted(converter, [_followed(op) for op in converter.operations], model, name, symbols)
        return made
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        operations = ", ".join(type(op).__name__ for op in converter.operations)
        raise OptionError(
            f"{names[0]!r} cannot be followed into the model: transformers loads it by {operations}",
            got=error,
            hint="leave it out with --exclude, or fold the scales instead",
        ) from error


class _Symbol:
    """Stands for a tensor without data, and knows which entries of which checkpoint tensors are where in it.

    It has those methods of a tensor that transformers' conversions call.
    """

    def __init__(self, shape: tuple[int, ...], pieces: tuple[TensorPart, ...]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = pieces

    @classmethod
    def of_tensor(cls, name: str, shape: Sequence[int]) -> _Symbol:
        return cls(tuple(shape), (TensorPart.whole(name, shape),))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> _Symbol:
        return self

    def data_ptr(self) -> int:
        return 0  # conversions look at the alignment only

    def squeeze(self, dim: int) -> _Symbol:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        if any(piece.axes[dim] is not None for piece in self.pieces):
            raise NotImplementedError("an axis of one matrix is dropped")
        return _Symbol(
            _without(self.shape, dim), tuple(_every(piece, lambda axis: _without(axis, dim)) for piece in self.pieces)
        )

    def transpose(self, dim0: int, dim1: int) -> _Symbol:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]

        def moved(axis: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(axis[i] for i in order)

        return _Symbol(moved(self.shape), tuple(_every(piece, moved) for piece in self.pieces))

    def narrow(self, dim: int, start: int, length: int) -> _Symbol:
        dim %= self.ndim
        pieces = []
        for piece in self.pieces:
            at, of = piece.at[dim], piece.of[dim]
            if isinstance(at, range):
                first, last = max(at.start, start), min(at.stop, start + length)
                kept: Any = slice(first - at.start, last - at.start)
                moved: Positions = range(first - start, last - start)
                some = last > first
            else:
                kept = (at >= start) & (at < start + length)
                moved = at[kept] - start
                some = bool(kept.any())
                of = torch.as_tensor(of)
            if some:
                pieces.append(replace(piece, at=_with(piece.at, dim, moved), of=_with(piece.of, dim, of[kept])))
        return _Symbol(_with(tuple(self.shape), dim, length), tuple(pieces))

    def permuted(self, dim: int, order: torch.Tensor) -> _Symbol:
        """Reorder an axis: position j then has what was at ``order[j]``."""
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return _Symbol(
            tuple(self.shape),
            tuple(replace(piece, at=_with(piece.at, dim, places[torch.as_tensor(piece.at[dim])])) for piece in self.pieces),
        )

    def _moved(self, dim: int, offset: int) -> tuple[TensorPart, ...]:
        def shifted(at: Positions) -> Positions:
            return range(at.start + offset, at.stop + offset) if isinstance(at, range) else at + offset

        return tuple(replace(piece, at=_with(piece.at, dim, shifted(piece.at[dim]))) for piece in self.pieces)

    @staticmethod
    def _cat(symbols: Sequence[_Symbol], dim: int = 0) -> _Symbol:
        dim %= symbols[0].ndim
        if len({_without(symbol.shape, dim) for symbol in symbols}) > 1:
            raise ValueError(f"shapes {[list(symbol.shape) for symbol in symbols]} are joined along axis {dim}")
        pieces: list[TensorPart] = []
        length = 0
        for symbol in symbols:
            pieces += symbol._moved(dim, length)
            length += symbol.shape[dim]
        return _Symbol(_with(tuple(symbols[0].shape), dim, length), tuple(pieces))

    @staticmethod
    def _stack(symbols: Sequence[_Symbol], dim: int = 0) -> _Symbol:
        def grown(piece: TensorPart) -> TensorPart:
            return TensorPart(
                piece.tensor,
                (*piece.axes[:dim], None, *piece.axes[dim:]),
                (*piece.at[:dim], range(1), *piece.at[dim:]),
                (*piece.of[:dim], range(1), *piece.of[dim:]),
            )

        return _Symbol._cat(
            [_Symbol((*symbol.shape[:dim], 1, *symbol.shape[dim:]), tuple(map(grown, symbol.pieces))) for symbol in symbols],
            dim,
        )

    @staticmethod
    def _chunk(symbol: _Symbol, chunks: int, dim: int = 0) -> tuple[_Symbol, ...]:
        return _Symbol._split(symbol, -(-symbol.shape[dim] // chunks), dim)

    @staticmethod
    def _split(symbol: _Symbol, sizes: int | Sequence[int], dim: int = 0) -> tuple[_Symbol, ...]:
        if isinstance(sizes, int):
            sizes = [min(sizes, symbol.shape[dim] - start) for start in range(0, symbol.shape[dim], sizes)]
        return tuple(symbol.narrow(dim, sum(sizes[:i]), size) for i, size in enumerate(sizes))

    @staticmethod
    def _transpose(symbol: _Symbol, dim0: int, dim1: int) -> _Symbol:
        return symbol.transpose(dim0, dim1)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: dict[Any, Callable[..., Any]] = {
            torch.cat: cls._cat,
            torch.stack: cls._stack,
            torch.chunk: cls._chunk,
            torch.split: cls._split,
            torch.transpose: cls._transpose,
        }
        if function not in known:
            return NotImplemented
        return known[function](*args, **(kwargs or {}))


def _followed(op: Any) -> Any:
    """An operation of a conversion that works on symbols: itself, or a ``_Reordering`` if it permutes the rows of a matrix."""
    axis = reordered_axis(op)
    return op if axis is None else _Reordering(op, axis)


class _Reordering:
    """Applies an operation that permutes one axis; the permutation is found by giving it the numbers 0, 1, 2 ..."""

    def __init__(self, op: Any, axis: int) -> None:
        self._op = op
        self._axis = axis

    def convert(self, input_dict: Mapping[str, Any], **known: Any) -> dict[str, _Symbol]:
        done = {}
        for pattern, symbols in input_dict.items():
            symbol: _Symbol = symbols[0] if isinstance(symbols, list) else symbols
            shape = _with((1,) * symbol.ndim, self._axis, symbol.shape[self._axis])
            numbers = {pattern: torch.arange(symbol.shape[self._axis]).view(shape)}
            ((name, order),) = self._op.convert(numbers, **known).items()
            done[name] = symbol.permuted(self._axis, order.flatten())
        return done


def _every(piece: TensorPart, change: Any) -> TensorPart:
    """A piece with the same change made to its ``axes``, ``at`` and ``of``."""
    return TensorPart(piece.tensor, change(piece.axes), change(piece.at), change(piece.of))


def _with(values: tuple[Any, ...], dim: int, value: Any) -> tuple[Any, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _without(values: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    return (*values[:dim], *values[dim + 1 :])
