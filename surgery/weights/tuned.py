"""A second model, tensor by tensor beside the first."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError, MissingExtra, OptionError, SourceError, WeightError
from surgery.format.name_map import NameMap, find_names, note_renamed
from surgery.format.safetensors import TORCH_DTYPES, same_bytes
from surgery.linalg.rounding import all_finite
from surgery.names import CONFIG_FILE, FACTORIZABLE_DTYPES, is_of_lora
from surgery.progress import note
from surgery.source.protocol import Source
from surgery.weights.conversion import Converted, Part, StoredModel, convert
from surgery.weights.model import StudiedWeights
from surgery.weights.quantization import read_quantization

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


@dataclass(frozen=True, slots=True)
class Original:
    """The model that a tuned one is held against.

    Attributes:
        wanted: name of a tensor that is compared -> those under which the tuned model may have it as well, or instead.
        shapes: of all its tensors, by their names.
        folder: gives the folder of its ``config.json``; None if there is none. Called where names do not fit.
    """

    wanted: Mapping[str, Sequence[str]]
    shapes: Mapping[str, Sequence[int]]
    folder: Callable[[], Path | None]


def config_folder(source: Source) -> Path | None:
    """The folder on this machine with the ``config.json`` of a model; None if it has none."""
    return source.fetch(CONFIG_FILE).parent if CONFIG_FILE in source.selection.others else None


class TunedModel:
    """A model with the tensors of another one, such as a fine-tuned one. A context manager, for any number of threads.

    Its tensors may have other names, see ``surgery.format.name_map``, or be stored in another way, see
    ``surgery.weights.conversion``: a note says so. Another says if it has layers that the other model has not.

    Args:
        source: the model.
        original: the other one.

    Raises:
        SourceError: a tensor is not there, or with another shape, or in a dtype that weights cannot have; it may be any of two
            that are there; or it is there twice, with other bytes.
    """

    def __init__(self, source: Source, original: Original) -> None:
        self._name = source.name
        self._original = original
        headers = {shard: source.header(shard) for shard in source.selection.shards}
        quantized = read_quantization(source.config(), headers, source.name)
        self._weights = StudiedWeights(source, lambda: quantized)
        self._places = {entry.name: (shard, entry) for shard, header in headers.items() for entry in header.tensors}
        #: Where names fit: tensor -> those that are stored of it, its own and aliases. Else what each consists of.
        self._stored: dict[str, list[str]] = {}
        self._parts: dict[str, tuple[Part, ...]] = {}
        names = find_names(self._places, original.wanted, original.shapes, self._is_alike)
        further: Iterable[str] = names.unknown
        if self._fits(names):
            self._stored = {
                name: [names.given[one] for one in (name, *others) if one in names.given]
                for name, others in original.wanted.items()
            }
            note_renamed(names, source.name, "the original's")
        else:
            converted = self._converted(source, names)
            self._parts, further = converted.parts, converted.further
        for stored in sorted({stored for name in original.wanted for stored in self._stored_of(name)}):
            self._check_dtype(stored)
        kinds = {_kind(stored) for name in original.wanted for stored in self._stored_of(name)}
        if more := [name for name in further if _kind(name) in kinds]:
            note(
                f"{source.name} has {len(more)} weights of the kinds that are compared, such as {min(more)!r}, that the "
                "original does not have: it looks like a model of another size, of which only some layers are compared",
            )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._weights)
            for name, *others in self._stored.values():
                for other in others:
                    self._check_same(name, other)
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._weights.__exit__(kind, error, trace)

    def _is_alike(self, name: str, stored: str) -> bool:
        return list(self._places[stored][1].shape) == list(self._original.shapes[name])

    def _fits(self, names: NameMap) -> bool:
        """Whether all that is wanted is there, under names that can be trusted, in its shape."""
        alike = all(self._is_alike(name, there) for name, there in names.given.items())
        return names.is_complete and alike and (names.renamed is None or not self._is_adapted())

    def _is_adapted(self) -> bool:
        """Whether it has an adapter beside its weights, which these alone would leave out."""
        return any(map(is_of_lora, self._places))

    def _converted(self, source: Source, names: NameMap) -> Converted:
        """What the tensors that are wanted consist of, where names do not fit."""
        why = ""
        try:
            folder, own = self._original.folder(), config_folder(source)
            if folder is not None and own is not None and not self._is_adapted():
                shapes = {name: entry.shape for name, (_, entry) in self._places.items()}
                found = convert(StoredModel(folder, self._original.shapes), StoredModel(own, shapes), self._original.wanted)
                if found is not None and found.parts.keys() == self._original.wanted.keys():
                    renamed = ((name, found.parts[name][0].stored) for name in sorted(found.parts))
                    examples = (f": {stored!r} is taken for {name!r}" for name, stored in renamed if name != stored)
                    note(
                        f"{self._name} is stored in another way than the original, and is read as transformers loads it"
                        + next(examples, "")
                    )
                    return found
        except (MissingExtra, OptionError, SourceError) as error:
            why = f"; it was not looked for as transformers loads it: {error.what}"
        raise self._misfit(names, why)

    def _misfit(self, names: NameMap, why: str) -> SourceError:
        for name, others in self._original.wanted.items():
            for stored in [names.given[one] for one in (name, *others) if one in names.given]:
                if names.is_complete and not self._is_alike(name, stored):
                    got = list(self._places[stored][1].shape)
                    what = f"{self._name}: {stored!r} has another shape than in the original"
                    return SourceError(what, got=got, expected=list(self._original.shapes[name]))
        if names.is_complete:
            name = min(self._original.wanted)
            what = f"{self._name} has no tensor {name!r}, but weights with an adapter beside them"
        elif names.doubtful is not None:
            name, what = names.doubtful[0], f"{self._name} may have {names.doubtful[0]!r} under two names"
        else:
            name = names.missing[0]
            what = f"{self._name} has no tensor {name!r}"
        hint = "give the whole fine-tuned model, saved under the names of the original; merge adapters first" + why
        expected = f"one of shape {list(self._original.shapes[name])}"
        return names.misfit(SourceError, what, self._original.wanted, expected=expected, hint=hint)

    def _check_dtype(self, stored: str) -> None:
        dtype = self._places[stored][1].dtype
        if dtype not in FACTORIZABLE_DTYPES and stored not in self._weights.quantized:
            raise SourceError(
                f"{self._name}: {stored!r} has a dtype that is not supported",
                got=dtype,
                expected=", ".join(FACTORIZABLE_DTYPES) + ", or FP8 with scales",
            )

    def _check_same(self, name: str, other: str) -> None:
        (shard, entry), (other_shard, other_entry) = self._places[name], self._places[other]
        with self._weights.reader(shard) as here, self._weights.reader(other_shard) as there:
            same = same_bytes(here, entry, there, other_entry)
        if not same:
            raise SourceError(
                f"{self._name} holds other weights in {other!r} than in {name!r}",
                got="two parameters",
                expected="one, as in the model that was factorized",
                hint="fine-tune with tied weights, or factorize with --exclude of both",
            )

    def _stored_of(self, name: str) -> list[str]:
        """The tensors of the model that are read for one of the original."""
        return [part.stored for part in self._parts[name]] if name in self._parts else self._stored[name][:1]

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The weight files that hold these tensors."""
        return sorted({self._places[stored][0] for name in names for stored in self._stored_of(name)})

    def dtype(self, name: str) -> str:
        """What a tensor is stored in, as safetensors names it; the coarsest where it consists of several."""
        dtypes = {self._places[stored][1].dtype for stored in self._stored_of(name)}
        return max(sorted(dtypes), key=lambda dtype: torch.finfo(TORCH_DTYPES[dtype]).eps)

    def weight(self, piece: TargetPiece) -> torch.Tensor:
        """What the tensor of a piece has become, with as many matrices; float32 if it is FP8, else as it is; on the CPU.

        Raises:
            WeightError: NaN or infinity in it.
        """
        name, rows = piece.entry.name, range(piece.first, piece.first + len(piece.tensor))
        if name not in self._parts:
            return self._read(self._stored[name][0], rows)[0]
        parts = [part for whole in self._parts[name] if (part := whole.within(rows.start, len(rows))) is not None]
        tensor = torch.empty(piece.tensor.shape, dtype=reduce(torch.promote_types, map(self._dtype_read, parts)))
        for part in parts:
            stored, first = self._read(part.stored, part.rows())
            part.copy(stored, first, tensor)
        return tensor

    def _dtype_read(self, part: Part) -> torch.dtype:
        return torch.float32 if part.stored in self._weights.quantized else TORCH_DTYPES[self._places[part.stored][1].dtype]

    def _read(self, stored: str, rows: range) -> tuple[torch.Tensor, int]:
        """A tensor of the model with these of its rows along the first axis, and which is the first of them.

        Those that are read are all of a matrix, and of a stack the matrices that are needed.
        """
        shard = self._places[stored][0]
        with self._weights.reader(shard) as reader:
            entry = reader.entries.get(stored)
            if entry != self._places[stored][1]:
                raise FormatError(f"{self._name}/{shard} has changed since its header was read")
            assert entry is not None
            is_some = len(entry.shape) == 3 and len(rows) < entry.shape[0]
            first = rows.start if is_some else 0
            tensor = reader.read(entry, first, len(rows)) if is_some else reader.read(entry)
        tensor = self._weights.exact(stored, tensor, first)
        if not all_finite(tensor):
            raise WeightError(
                f"{self._name}: {stored!r} holds NaN or infinity", hint="the fine-tuning diverged: take an earlier checkpoint"
            )
        return tensor, first


def _kind(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"(?:(?<=\.)|^)\d+\.", "#.", name)
