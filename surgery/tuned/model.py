"""A fine-tuned model, read tensor by tensor as the original one has them, whatever it calls and however it stores them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from types import TracebackType
from typing import Self

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError, SourceError, WeightError
from surgery.format.header import TensorEntry
from surgery.format.safetensors import TORCH_DTYPES, same_bytes, spacing_of
from surgery.lossless.rounding import all_finite
from surgery.quantized.recognize import Quantization
from surgery.quantized.weight import Quantized
from surgery.source.protocol import WeightFiles
from surgery.tuned.conversion import Part
from surgery.weights.model import ModelWeights
from surgery.weights.protocol import Weights


@dataclass(frozen=True, slots=True)
class FoundTensors:
    """Where the tensors of an original model are in the files of a tuned one.

    Attributes:
        places: each stored tensor -> the weight file that it is in, and its entry there.
        stored: tensor of the original -> the stored tensors that hold it, it and its aliases.
        parts: tensor of the original that is put together -> the parts that it consists of.
        further: stored tensors that are none of the original's.
    """

    places: Mapping[str, tuple[str, TensorEntry]]
    stored: Mapping[str, Sequence[str]]
    parts: Mapping[str, tuple[Part, ...]]
    further: tuple[str, ...] = ()

    def stored_of(self, name: str) -> list[str]:
        """The stored tensors that are read for one of the original."""
        return [part.stored for part in self.parts[name]] if name in self.parts else list(self.stored[name][:1])

    def only(self, names: Iterable[str]) -> FoundTensors:
        """What is known of these tensors of the original alone."""
        some = [name for name in names if name in self.parts or name in self.stored]
        stored = {name: self.stored_of(name) for name in some if name not in self.parts}
        parts = {name: self.parts[name] for name in some if name in self.parts}
        read = {one for name in some for one in self.stored_of(name)}
        return FoundTensors({name: self.places[name] for name in read}, stored, parts)


class TunedModel:
    """A tuned model whose tensors are asked for by the names of the original. A context manager that threads may share.

    ``surgery.tuned.search.find_tuned`` makes one.

    Args:
        name: of the model, for messages.
        weights: of it.
        found: where its tensors are.

    Attributes:
        name, weights, found: as given.

    Raises:
        SourceError: on entering, a tensor is stored under two names with different bytes.
    """

    def __init__(self, name: str, weights: Weights, found: FoundTensors) -> None:
        self.name = name
        self.weights = weights
        self.found = found

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.weights)
            for name, *others in self.found.stored.values():
                for other in others:
                    self._check_same(name, other)
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.weights.__exit__(kind, error, trace)

    def _check_same(self, name: str, other: str) -> None:
        (shard, entry), (other_shard, other_entry) = self.found.places[name], self.found.places[other]
        with self.weights.reader(shard) as here, self.weights.reader(other_shard) as there:
            same = same_bytes(here, entry, there, other_entry)
        if not same:
            raise SourceError(
                f"{self.name} holds other weights in {other!r} than in {name!r}",
                got="two parameters",
                expected="one, as in the model that was factorized",
                hint="fine-tune with tied weights, or factorize with --exclude of both",
            )

    def has(self, name: str) -> bool:
        """Whether it has a tensor of the original; of those that are wanted it has all."""
        return name in self.found.parts or name in self.found.stored

    def entry(self, name: str) -> TensorEntry | None:
        """The stored tensor that one of the original is, as it is stored; None if it is put together from several."""
        return None if name in self.found.parts else self.found.places[self.found.stored[name][0]][1]

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor of the original is stored quantized, or put together from tensors of which one is."""
        return any(stored in self.weights.quantized for stored in self.found.stored_of(name))

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The weight files that hold these tensors of the original, and the parts of those that are quantized."""
        stored = [one for name in names for one in self.found.stored_of(name)]
        quantized = self.weights.quantized_among(stored)
        return sorted({self.found.places[one][0] for one in stored}.union(*(one.shards for one in quantized.values())))

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is stored in; the least precise one if it consists of several."""
        dtypes = {self.found.places[stored][1].dtype for stored in self.found.stored_of(name)}
        return max(sorted(dtypes), key=spacing_of)

    def dtype_of_numbers(self, name: str) -> torch.dtype:
        """The dtype in which ``weight`` gives a tensor."""
        return reduce(torch.promote_types, map(self._dtype_read, self.found.stored_of(name)))

    def weight(self, piece: TargetPiece, *, check: bool = True) -> torch.Tensor:
        """The tuned weights for a piece of the original.

        Args:
            piece: a whole tensor, or some of its rows.
            check: whether to refuse NaN and infinity.

        Returns:
            In the shape of the piece, on the CPU, in the dtype that is stored; float32 where it is quantized.

        Raises:
            WeightError: they hold NaN or infinity.
        """
        name, shape = piece.entry.name, (*piece.tensor.shape[:1], *piece.entry.shape[1:])
        rows = range(piece.first, piece.first + (len(piece.tensor) if piece.tensor.ndim else 1))
        if name not in self.found.parts:
            return self._read(self.found.stored[name][0], rows, check)[0]
        parts = [part for whole in self.found.parts[name] if (part := whole.within(rows.start, len(rows))) is not None]
        tensor = torch.empty(shape, dtype=reduce(torch.promote_types, (self._dtype_read(part.stored) for part in parts)))
        for part in parts:
            stored, first = self._read(part.stored, part.rows(), check)
            part.copy(stored, first, tensor)
        return tensor

    def _dtype_read(self, stored: str) -> torch.dtype:
        return torch.float32 if stored in self.weights.quantized else TORCH_DTYPES[self.found.places[stored][1].dtype]

    def _read(self, stored: str, rows: range, check: bool) -> tuple[torch.Tensor, int]:
        """Read a stored tensor, of a stack only the matrices ``rows``, and of another tensor that is not quantized only these
        rows; and the index of the first row that was read."""
        shard, known = self.found.places[stored]
        with self.weights.reader(shard) as reader:
            entry = reader.entries.get(stored)
            if entry != known:
                raise FormatError(f"{self.name}/{shard} has changed since its header was read")
            assert entry is not None
            in_rows = len(entry.shape) == 3 or (len(entry.shape) > 0 and stored not in self.weights.quantized)
            is_some = in_rows and len(rows) < entry.shape[0]
            first = rows.start if is_some else 0
            tensor = reader.read(entry, first, len(rows)) if is_some else reader.read(entry)
        tensor = self.weights.exact(stored, tensor, first)
        if check and not all_finite(tensor):
            raise WeightError(
                f"{self.name}: {stored!r} holds NaN or infinity", hint="the fine-tuning diverged: take an earlier checkpoint"
            )
        return tensor, first

    def sent(self, names: Collection[str]) -> SentTuned:
        """The part of it that holds these tensors of the original, to be sent to another process."""
        found = self.found.only(names)
        return SentTuned(self.name, found, self.weights.quantized_among(found.places))


@dataclass(frozen=True, slots=True)
class SentTuned:
    """A part of a tuned model on its way to another process.

    Attributes:
        name: of the model.
        found: where its tensors are.
        quantized: those that are quantized -> how they are stored.
    """

    name: str
    found: FoundTensors
    quantized: Mapping[str, Quantized]

    def open(self, files: WeightFiles) -> TunedModel:
        return TunedModel(self.name, ModelWeights(files, lambda: Quantization(self.quantized), self.name), self.found)
