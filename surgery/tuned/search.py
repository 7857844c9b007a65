"""Where the tensors of a model are in the files of a fine-tuned one, whatever it calls and however it stores them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import MissingExtra, OptionError, SourceError, few
from surgery.format.name_map import NameMap, find_names, note_renamed, without_wrappers
from surgery.names import FACTORIZABLE_DTYPES, is_of_lora
from surgery.progress import note
from surgery.quantized.unread import UnreadWeight
from surgery.quantized.weight import packed_in
from surgery.source.component import config_folder
from surgery.source.copies import copies_of
from surgery.source.protocol import Source
from surgery.tuned.conversion import Converted, Part, StoredModel, convert
from surgery.tuned.model import FoundTensors, TunedModel
from surgery.weights.model import StudiedWeights
from surgery.weights.recognition import not_read, quantization_in

#: By this PEFT calls the module that an adapter wraps, inside the module that takes its place.
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True, slots=True)
class Original:
    """What has to be known of the original model to find its tensors in a tuned one.

    Attributes:
        wanted: name of a tensor that is compared -> its aliases, which the tuned model may have as well, or instead.
        shapes: name of each tensor of the model -> shape.
        folder: returns the folder of its ``config.json``, or None if it has none. Called only where names do not fit.
        optional: names of further tensors of the model, which are looked for as well and need not be there.
    """

    wanted: Mapping[str, Sequence[str]]
    shapes: Mapping[str, Sequence[int]]
    folder: Callable[[], Path | None]
    optional: Sequence[str] = ()


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


def find_tuned(source: Source, original: Original) -> TunedModel:
    """Open a tuned model whose tensors are asked for by the names of the original.

    Its tensors may have other names (``surgery.format.name_map``), or be stored in another way
    (``surgery.tuned.conversion``); a note says so. Another note says if it has layers that the original does not have.

    Args:
        source: the tuned model.
        original: the model that it is compared with.

    Raises:
        SourceError: a tensor is missing, has another shape or a dtype that weights cannot have, or could be either of two in
            the file.
        FormatError: a tensor is in two weight files, and not the same in both.
    """
    return _TunedSearch(source, original).model()


class _TunedSearch:
    """The search for the tensors of ``original`` in ``source``."""

    def __init__(self, source: Source, original: Original) -> None:
        self._source = source
        self._name = source.name
        self._original = original
        headers = {shard: source.header(shard) for shard in source.selection.shards}
        copies_of(source, headers)
        self._quantization = quantization = quantization_in(source, headers)
        packed = packed_in(quantization.weights.values())
        headers = {shard: header.unpacked(packed) for shard, header in headers.items()}
        self._weights = StudiedWeights(source, lambda: quantization)
        # What is not read is not there for a comparison.
        self._places = {
            entry.name: (shard, entry)
            for shard, header in headers.items()
            for entry in header.tensors
            if entry.name not in quantization.unread_tensors
        }

    def model(self) -> TunedModel:
        original = self._original
        if unread := [one for name, one in self._quantization.unread.items() if name in original.wanted]:
            raise self._not_read(unread)
        if unread := [one for name, one in self._quantization.unread.items() if name in original.optional]:
            methods = few(dict.fromkeys(one.method for one in unread), between=" and ")
            note(f"{self._name}: not read, and not compared, in {methods}: {few(one.name for one in unread)}")
        names = find_names(self._places, original.wanted, original.shapes, self._is_alike)
        if self._fits(names):
            stored = {
                name: [names.given[one] for one in (name, *others) if one in names.given]
                for name, others in original.wanted.items()
            }
            stored |= {name: [names.also[name]] for name in original.optional if name in names.also}
            parts = self._parts_of([name for name in original.optional if name not in names.also])
            read = {part.stored for some in parts.values() for part in some}
            found = FoundTensors(self._places, stored, parts, tuple(name for name in names.unknown if name not in read))
            note_renamed(names, self._name, "the original's")
        else:
            converted = self._converted(names)
            # What no conversion finds may be there by its name, with another shape.
            rest = (name for name in original.optional if name not in converted.parts and name in self._places)
            found = FoundTensors(self._places, {name: [name] for name in rest}, converted.parts, converted.further)
        for stored_name in sorted({one for name in original.wanted for one in found.stored_of(name)}):
            self._check_dtype(stored_name)
        kinds = {_kind(one) for name in original.wanted for one in found.stored_of(name)}
        if more := [name for name in found.further if _kind(name) in kinds]:
            note(
                f"{self._name} has {len(more)} weights of the kinds that are compared, such as {min(more)!r}, that the "
                "original does not have: it looks like a model of another size, of which only some layers are compared",
            )
        return TunedModel(self._name, self._weights, found)

    def _is_alike(self, name: str, stored: str) -> bool:
        return list(self._places[stored][1].shape) == list(self._original.shapes[name])

    def _fits(self, names: NameMap) -> bool:
        """Whether every wanted tensor is there with its shape, and no name had to be changed that might mean something else."""
        alike = all(self._is_alike(name, there) for name, there in names.given.items())
        return names.is_complete and alike and (names.renamed is None or not self._is_adapted())

    def _is_adapted(self) -> bool:
        """Whether the files hold an adapter beside the weights, so that the weights alone are not the tuned ones."""
        return any(map(is_of_lora, self._places)) or has_adapter_beside(self._places)

    def _converted(self, names: NameMap) -> Converted:
        """Find the wanted tensors through transformers' conversion, where names do not fit.

        Raises:
            SourceError: they are not found that way either; tells the names of both sides.
        """
        why = ""
        try:
            found = self._as_loaded()
            if found is not None and self._original.wanted.keys() <= found.parts.keys():
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

    def _parts_of(self, missing: Sequence[str]) -> dict[str, tuple[Part, ...]]:
        """Where tensors of the original that need not be there are by no name, but as transformers loads them: a tied head."""
        if not missing:
            return {}
        with suppress(MissingExtra, OptionError, SourceError):
            if (found := self._as_loaded()) is not None:
                return {name: found.parts[name] for name in missing if name in found.parts}
        return {}

    def _as_loaded(self) -> Converted | None:
        """All that the tuned model has of the original as transformers loads both; None where it does not know one of them.

        Raises:
            MissingExtra, OptionError, SourceError: see ``surgery.tuned.conversion.convert``.
        """
        folder, own = self._original.folder(), config_folder(self._source)
        if folder is None or own is None or self._is_adapted():
            return None
        # Of wrapped modules transformers knows nothing. Names that would be the same without them stay as they are.
        shorter = Counter(map(without_wrappers, self._places))
        full = {one if shorter[one := without_wrappers(name)] == 1 else name: name for name in self._places}
        shapes = {name: self._places[stored][1].shape for name, stored in full.items()}
        every = {**dict.fromkeys(self._original.optional, ()), **self._original.wanted}
        found = convert(StoredModel(folder, self._original.shapes), StoredModel(own, shapes), every)
        return None if found is None else found.renamed(full)

    def _not_read(self, weights: Iterable[UnreadWeight]) -> SourceError:
        hint = "give the fine-tuned model as it was before it was quantized"
        return not_read(f"what is compared is in {self._name} in", weights, hint)

    def _misfit(self, names: NameMap, why: str) -> SourceError:
        if self._quantization.unread:
            return self._not_read(self._quantization.unread.values())
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
                expected=", ".join(FACTORIZABLE_DTYPES) + ", or quantized with scales",
            )


def _kind(name: str) -> str:
    """A tensor's name with ``#`` in the place of the numbers of layers and experts."""
    return re.sub(r"(?:(?<=\.)|^)\d+\.", "#.", name)
