"""A fine-tuned model, read tensor by tensor as the original one has them, whatever it calls and however it stores them."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError, MissingExtra, OptionError, SourceError, WeightError
from surgery.format.name_map import NameMap, find_names, note_renamed, without_wrappers
from surgery.format.safetensors import TORCH_DTYPES, same_bytes
from surgery.lossless.rounding import all_finite
from surgery.names import CONFIG_FILE, FACTORIZABLE_DTYPES, is_of_lora
from surgery.progress import note
from surgery.source.protocol import Source
from surgery.weights.conversion import Converted, Part, StoredModel, convert
from surgery.weights.model import StudiedWeights
from surgery.weights.quantization import read_quantization

#: A fine-tuned matrix is at less than 60 degrees to the original, and has half to twice its norm: changes of up to half of
#: the norm, which are large ones, leave it within 30 degrees. Two models of other seeds are at 90.
_RELATED, _SIZES = 0.5, (0.5, 2.0)
#: By this PEFT calls the module that an adapter wraps, inside the module that takes its place.
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True, slots=True)
class Norms:
    """Frobenius norms of an original matrix, of the tuned one, and of their difference.

    Attributes:
        key: of the target that the matrix belongs to.
        before, after, change: the three norms.
    """

    key: str
    before: float
    after: float
    change: float

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two matrices, as vectors of their entries; None where one is 0."""
        if not self.before or not self.after:
            return None
        ratio = self.after / self.before
        return (1 + ratio**2 - (self.change / self.before) ** 2) / (2 * ratio)


def note_what_is_unlikely(name: str, found: Sequence[Norms]) -> None:
    """Tell a note where a model does not look like a fine-tuned version of the original.

    That is so if no matrix has changed, if matrices are hardly related to the original ones, or if they are much larger or
    smaller.

    Args:
        name: of the model.
        found: the norms of each matrix that was compared.
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
    """What has to be known of the original model to find its tensors in a tuned one.

    Attributes:
        wanted: name of a tensor that is compared -> its aliases, which the tuned model may have as well, or instead.
        shapes: name of each tensor of the model -> shape.
        folder: returns the folder of its ``config.json``, or None if it has none. Called only where names do not fit.
    """

    wanted: Mapping[str, Sequence[str]]
    shapes: Mapping[str, Sequence[int]]
    folder: Callable[[], Path | None]


def config_folder(source: Source) -> Path | None:
    """The folder on this machine with the ``config.json`` of a model; None if it has none."""
    return source.fetch(CONFIG_FILE).parent if CONFIG_FILE in source.selection.others else None


def has_adapter_beside(names: Iterable[str]) -> bool:
    """Whether any module that is wrapped as ``X.base_layer`` has other tensors in ``X``: those of some PEFT adapter."""
    inside, others = set[str](), list[str]()
    for name in names:
        module, is_wrapped, _ = name.partition(_BASE_LAYER)
        if is_wrapped:
            inside.add(module)
        else:
            others.append(name)
    return bool(inside) and any(module in inside for name in others for module in _modules_around(name))


def _modules_around(name: str) -> Iterator[str]:
    """The modules that a tensor is in, from the innermost one on."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


class TunedModel:
    """A tuned model whose tensors are asked for by the names of the original. A context manager that threads may share.

    Its tensors may have other names (``surgery.format.name_map``), or be stored in another way
    (``surgery.weights.conversion``); a note says so. Another note says if it has layers that the original does not have.

    Args:
        source: the tuned model.
        original: the model that it is compared with.

    Raises:
        SourceError: a tensor is missing, has another shape or a dtype that weights cannot have, could be either of two in the
            file, or is stored under two names with different bytes.
    """

    def __init__(self, source: Source, original: Original) -> None:
        self._name = source.name
        self._original = original
        headers = {shard: source.header(shard) for shard in source.selection.shards}
        quantized = read_quantization(source.config(), headers, source.name)
        self._weights = StudiedWeights(source, lambda: quantized)
        self._places = {entry.name: (shard, entry) for shard, header in headers.items() for entry in header.tensors}
        #: Tensor of the original -> the stored tensors that hold it, it and its aliases; empty where ``_parts`` is used.
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
        """Whether every wanted tensor is there with its shape, and no name had to be changed that might mean something else."""
        alike = all(self._is_alike(name, there) for name, there in names.given.items())
        return names.is_complete and alike and (names.renamed is None or not self._is_adapted())

    def _is_adapted(self) -> bool:
        """Whether the files hold an adapter beside the weights, so that the weights alone are not the tuned ones."""
        return any(map(is_of_lora, self._places)) or has_adapter_beside(self._places)

    def _converted(self, source: Source, names: NameMap) -> Converted:
        """Find the wanted tensors through transformers' conversion, where names do not fit.

        Raises:
            SourceError: they are not found that way either; tells the names of both sides.
        """
        why = ""
        try:
            folder, own = self._original.folder(), config_folder(source)
            if folder is not None and own is not None and not self._is_adapted():
                # Of wrapped modules transformers knows nothing. Names that would be the same without them stay as they are.
                shorter = Counter(map(without_wrappers, self._places))
                full = {one if shorter[one := without_wrappers(name)] == 1 else name: name for name in self._places}
                shapes = {name: self._places[stored][1].shape for name, stored in full.items()}
                found = convert(StoredModel(folder, self._original.shapes), StoredModel(own, shapes), self._original.wanted)
                if found is not None and found.parts.keys() == self._original.wanted.keys():
                    found = found.renamed(full)
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
        """The stored tensors of the tuned model that are read for one of the original."""
        return [part.stored for part in self._parts[name]] if name in self._parts else self._stored[name][:1]

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The weight files of the tuned model that hold these tensors of the original."""
        return sorted({self._places[stored][0] for name in names for stored in self._stored_of(name)})

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is stored in, as safetensors names it; the least precise one if it consists of several."""
        dtypes = {self._places[stored][1].dtype for stored in self._stored_of(name)}
        return max(sorted(dtypes), key=lambda dtype: torch.finfo(TORCH_DTYPES[dtype]).eps)

    def weight(self, piece: TargetPiece) -> torch.Tensor:
        """The tuned weights for a piece of the original.

        Returns:
            In the shape of the piece, on the CPU, in the dtype that is stored; float32 where that is FP8.

        Raises:
            WeightError: they hold NaN or infinity.
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
        """Read a stored tensor, of a stack only the matrices ``rows``; and the index of the first row that was read."""
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
    """A tensor's name with ``#`` in the place of the numbers of layers and experts."""
    return re.sub(r"(?:(?<=\.)|^)\d+\.", "#.", name)
