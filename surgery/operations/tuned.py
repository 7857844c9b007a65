"""A second model, tensor by tensor beside the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError, SourceError, WeightError
from surgery.format.safetensors import same_bytes
from surgery.linalg.rounding import all_finite
from surgery.names import FACTORIZABLE_DTYPES
from surgery.operations.quantized import Dequantizer
from surgery.planning.quantization import read_quantization
from surgery.source.model import Source


class TunedModel:
    """A model with the tensors of another one, such as a fine-tuned one. A context manager, for one thread.

    Args:
        source: the model.
        shapes: of the tensors that it must have, by their names.
        aliases: for some of them the names under which it may have them as well, or instead.

    Raises:
        SourceError: one is not there, or with another shape, or in a dtype that weights cannot have; or it is there twice, with
            other bytes.
    """

    def __init__(
        self, source: Source, shapes: Mapping[str, Sequence[int]], aliases: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._name = source.name
        headers = {shard: source.header(shard) for shard in source.selection.shards}
        self._quantized = read_quantization(source.config(), headers, source.name)
        self._places = {entry.name: (shard, entry) for shard, header in headers.items() for entry in header.tensors}
        self._stored = {
            name: [one for one in (name, *(aliases or {}).get(name, ())) if one in self._places] or [name] for name in shapes
        }
        for name, shape in shapes.items():
            for stored in self._stored[name]:
                self._check(stored, list(shape))
        self._files = Dequantizer(source.fetch, source.watch)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._files)
            for name, *others in self._stored.values():
                for other in others:
                    self._check_same(name, other)
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind, error, trace)

    def _check(self, name: str, shape: list[int]) -> None:
        if name not in self._places:
            raise SourceError(
                f"{self._name} has no tensor {name!r}",
                expected=f"one of shape {shape}",
                hint="give the whole fine-tuned model, saved under the names of the original; merge adapters first",
            )
        entry = self._places[name][1]
        if list(entry.shape) != shape:
            raise SourceError(
                f"{self._name}: {name!r} has another shape than in the original", got=list(entry.shape), expected=shape
            )
        if entry.dtype not in FACTORIZABLE_DTYPES and name not in self._quantized:
            raise SourceError(
                f"{self._name}: {name!r} has a dtype that is not supported",
                got=entry.dtype,
                expected=", ".join(FACTORIZABLE_DTYPES) + ", or FP8 with scales",
            )

    def _check_same(self, name: str, other: str) -> None:
        (shard, entry), (other_shard, other_entry) = self._places[name], self._places[other]
        with self._files.reader(shard) as here, self._files.reader(other_shard) as there:
            same = same_bytes(here, entry, there, other_entry)
        if not same:
            raise SourceError(
                f"{self._name} holds other weights in {other!r} than in {name!r}",
                got="two parameters",
                expected="one, as in the model that was factorized",
                hint="fine-tune with tied weights, or factorize with --exclude of both",
            )

    def weight(self, piece: TargetPiece) -> torch.Tensor:
        """What the tensor of a piece has become, with as many matrices; float32 if it is FP8, else as it is; on the CPU.

        Raises:
            WeightError: NaN or infinity in it.
        """
        name = self._stored[piece.entry.name][0]
        shard = self._places[name][0]
        with self._files.reader(shard) as reader:
            entry = reader.entries.get(name)
            if entry != self._places[name][1]:
                raise FormatError(f"{self._name}/{shard} has changed since its header was read")
            assert entry is not None
            some = len(entry.shape) == 3 and len(piece.tensor) < entry.shape[0]
            tensor = reader.read(entry, piece.first, len(piece.tensor)) if some else reader.read(entry)
        tensor = self._files.weight(tensor, piece.first, self._quantized.get(name))
        if not all_finite(tensor):
            raise WeightError(
                f"{self._name}: {name!r} holds NaN or infinity", hint="the fine-tuning diverged: take an earlier checkpoint"
            )
        return tensor
