"""A second model, tensor by tensor beside the first."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError, SourceError, WeightError
from surgery.format.safetensors import same_bytes
from surgery.linalg.rounding import all_finite
from surgery.names import FACTORIZABLE_DTYPES
from surgery.progress import note
from surgery.source.protocol import Source
from surgery.weights.quantization import read_quantization
from surgery.weights.quantized import Dequantizer

#: A fine-tuned matrix is at less than 60 degrees to the original, and has half to twice its norm: changes of up to half of
#: the norm, which are large ones, leave it within 30 degrees. Two models of other seeds are at 90.
_RELATED, _SIZES = 0.5, (0.5, 2.0)


@dataclass(frozen=True, slots=True)
class Norms:
    """Frobenius norms of a matrix, of what it became, and of the difference."""

    key: str
    before: float
    after: float
    change: float

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two, as vectors; None where one is 0."""
        if not self.before or not self.after:
            return None
        ratio = self.after / self.before
        return (1 + ratio**2 - (self.change / self.before) ** 2) / (2 * ratio)


def note_what_is_unlikely(name: str, found: Sequence[Norms]) -> None:
    """Say so where a model does not look like a fine-tuned one.

    That is where no matrix has changed, and where most, or some, are hardly related to the original ones.

    Args:
        name: of the model.
        found: for each matrix that was compared.
    """
    if all(norms.change == 0 for norms in found):
        note(
            f"{name} has the same weights as the original in all {len(found)} matrices that were compared: the original was "
            "given twice, nothing was trained, or its steps were smaller than the rounding of the dtype it was saved in",
        )
        return
    known = [norms for norms in found if norms.before]
    apart = [norms for norms in known if norms.cosine is not None and norms.cosine < _RELATED]
    if len(apart) > len(known) / 2:
        change = statistics.median(norms.change / norms.before for norms in apart)
        note(
            f"{name} has hardly anything in common with the original in {len(apart)} of {len(known)} matrices: the change is "
            f"{change:.3g} times the weights' norm, and 1.41 between unrelated models of one size. It looks like a model of "
            "another seed, one that was trained from nothing, or one whose weights are in another order",
        )
    elif apart:
        note(
            f"{name} has hardly anything in common with the original in {len(apart)} of {len(known)} matrices, first "
            f"{apart[0].key!r}: they look as if they had been made anew, and not fine-tuned",
        )
    low, high = _SIZES
    scaled = [norms for norms in known if norms not in apart and not low <= norms.after / norms.before <= high]
    if scaled:
        ratio = statistics.median(norms.after / norms.before for norms in scaled)
        note(
            f"{name} has {ratio:.3g} times the norm of the original in {len(scaled)} of {len(known)} matrices, first "
            f"{scaled[0].key!r}: it looks like weights without their quantization scales, or a merge with a wrong factor",
        )


class TunedModel:
    """A model with the tensors of another one, such as a fine-tuned one. A context manager, for any number of threads.

    A note says so if it has layers that the other model has not.

    Args:
        source: the model.
        shapes: of the tensors that it must have, by their names.
        names: of all tensors of the other model.
        aliases: for some of the shapes the names under which it may have the tensor as well, or instead.

    Raises:
        SourceError: one is not there, or with another shape, or in a dtype that weights cannot have; or it is there twice, with
            other bytes.
    """

    def __init__(
        self,
        source: Source,
        shapes: Mapping[str, Sequence[int]],
        names: Collection[str],
        aliases: Mapping[str, Sequence[str]] | None = None,
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
        kinds = {_kind(name) for name in shapes}
        if more := [name for name in self._places.keys() - set(names) if _kind(name) in kinds]:
            note(
                f"{source.name} has {len(more)} weights of the kinds that are compared, such as {min(more)!r}, that the "
                "original does not have: it looks like a model of another size, of which only some layers are compared",
            )
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

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The weight files that hold these tensors."""
        return sorted({self._places[self._stored[name][0]][0] for name in names})

    def dtype(self, name: str) -> str:
        """What a tensor is stored in, as safetensors names it."""
        return self._places[self._stored[name][0]][1].dtype

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


def _kind(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"(?:(?<=\.)|^)\d+\.", "#.", name)
