"""Choosing the weight files of a model among those in its folder, as transformers and diffusers do, and none missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from surgery.errors import FormatError, SourceError
from surgery.files.json_files import decode_json
from surgery.files.paths import check_relative_path

#: Stems of the names that transformers and diffusers look for, in this order.
STANDARD_STEMS = ("model", "diffusion_pytorch_model")
#: Stem of the same weights in Mistral's own format, which may lie beside transformers' files.
CONSOLIDATED = "consolidated"
SUFFIX = ".safetensors"

_INDEX = re.compile(r"(?P<stem>[^/]+)\.safetensors\.index(?P<variant>\.[^./]+)?\.json")
_NUMBERED = re.compile(
    r"(?:(?P<stem>.+)[-_.])?(?P<number>\d{1,12})[-_.]of[-_.](?P<count>\d{1,12})(?P<variant>[-_.][^./-]+)?\.safetensors"
    r"|(?P<parts>.+)[-_.](?P<part>\d{1,12})\.safetensors"
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The weight files of a model.

    Attributes:
        shards: in name order; empty if there are no weights.
        index: the index that names them; None if there is none.
        left_out: each other weight file and index -> why it is not read.
        unread: the weight files among these, except the publisher's own copy (``CONSOLIDATED``).
        rivals: those of ``unread`` that have the same stem as the shards, so they may be another save of the model.
    """

    shards: tuple[str, ...]
    index: str | None
    left_out: dict[str, str]
    unread: tuple[str, ...]
    rivals: tuple[str, ...]


@dataclass(slots=True)
class _Set:
    """Weight files that belong together by their names: ``stem.safetensors``, ``stem-00001-of-0000N.safetensors``, or
    ``stem-1.safetensors`` and so on.

    Attributes:
        stem: as above.
        count: the number N in their names; 0 if they are numbered without it, None if they have no numbers.
        files: number -> file name.
    """

    stem: str
    count: int | None
    files: dict[int, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether no number is missing."""
        return self.missing is None

    @property
    def missing(self) -> int | None:
        """The first number that is missing; None if none is."""
        if self.count is None:
            return None
        first = min(self.files) if self.count == 0 else 0 if 0 in self.files else 1
        count = self.count or max(self.files) + 1 - first
        return next((number for number in range(first, first + count) if number not in self.files), None)

    @property
    def label(self) -> str:
        """What messages call the set: its only file, or a glob."""
        return (
            next(iter(self.files.values()))
            if len(self.files) == 1
            else f"{self.stem}-*{f'-of-{self.count}' if self.count else ''}{SUFFIX}"
        )


def is_index(name: str) -> bool:
    """Whether a file is, by its name, an index of weight files, or of a variant of them (``.index.fp16.json``)."""
    return _INDEX.fullmatch(name) is not None


def choose_shards(
    weights: Sequence[str], indexes: Sequence[str], named: str | None, read_text: Callable[[str], str], where: str
) -> Chosen:
    """Choose the weight files of a model.

    Args:
        weights: safetensors files in one folder.
        indexes: the indexes there.
        named: a weight file or index that the model's config names.
        read_text: gives the text of an index.
        where: the model, for messages.

    Raises:
        SourceError: they belong to several models or variants, and nothing says which is meant.
        FormatError: an index is damaged, or names a file that is missing or elsewhere; a numbered file is missing.
    """
    shards, index = _choose(weights, indexes, named, read_text, where)
    if shards:
        _check_numbers(shards, weights, index, where)
    stems = {one.stem for one in _sets(shards)}
    taken = {*shards, index}
    chosen = (index or shards[0]) if shards else None
    left_out = {name: _reason(name, stems, chosen) for name in (*weights, *indexes) if name not in taken}
    unread = tuple(name for name in weights if name in left_out and not name.startswith(CONSOLIDATED))
    rivals = tuple(name for name in unread if _sets([name])[0].stem in stems)
    return Chosen(tuple(shards), index, left_out, unread, rivals)


def _choose(
    weights: Sequence[str], indexes: Sequence[str], named: str | None, read_text: Callable[[str], str], where: str
) -> tuple[list[str], str | None]:
    """The shards of a model and the index that names them, if any; arguments and errors as for ``choose_shards``."""

    def from_index(name: str) -> tuple[list[str], str]:
        return _named_by(name, read_text(name), weights, where), name

    if named in weights:
        return [str(named)], None
    if named in indexes:
        return from_index(str(named))
    sets = _sets(weights)
    stems = {one.stem for one in sets} | {_stem_of_index(name) for name in indexes}
    if standard := [stem for stem in STANDARD_STEMS if stem in stems]:
        if f"{standard[0]}{SUFFIX}" in weights and len(standard) == 1:
            is_indexed = any(_stem_of_index(name) == standard[0] for name in indexes)
            if standard[0] == STANDARD_STEMS[0] or not is_indexed:  # diffusers looks for the index first
                return [f"{standard[0]}{SUFFIX}"], None  # a single file first, then the index, as in transformers
        sets = [one for one in sets if one.stem in standard]
        indexes = [name for name in indexes if _stem_of_index(name) in standard]
    elif any(not stem.startswith(CONSOLIDATED) for stem in stems):
        sets = [one for one in sets if not one.stem.startswith(CONSOLIDATED)]
    if len(indexes) == 1 and len(standard) < 2:
        shards, index = from_index(indexes[0])
        base = _stem_of_index(index).split(".")[0]
        taken = {*shards}
        rivals = [
            one for one in sets if one.stem.split(".")[0] == base and not standard and taken.isdisjoint(one.files.values())
        ]
        if not rivals:
            return shards, index
        sets = rivals
    elif len(sets) <= 1 and not indexes:
        return [file for one in sets for file in one.files.values()], None
    raise SourceError(
        f"{where} holds the weights of several models or variants side by side",
        got=", ".join(sorted({*indexes, *(one.label for one in sets)})[:6]),
        expected=f"those of one, such as {STANDARD_STEMS[0]}{SUFFIX}",
        hint="give a folder with the files that are meant and their config.json; "
        "from the hub: hf download ID --include FILES config.json --local-dir FOLDER",
    )


def _sets(weights: Iterable[str]) -> list[_Set]:
    """Group weight files into sets by their names."""
    sets: dict[tuple[str, int | None], _Set] = {}
    for name in weights:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            stem, count, number = name.removesuffix(SUFFIX), None, 0
        elif match["number"] is None:
            stem, count, number = match["parts"], 0, int(match["part"])
        else:
            stem = (match["stem"] or "") + (match["variant"] or "")
            count, number = int(match["count"]), int(match["number"])
        one = sets.setdefault((stem, count), _Set(stem, count))
        if number in one.files:  # a_1 beside a-1: these are not two shards of one model
            one = sets[name, None] = _Set(name.removesuffix(SUFFIX), None)
        one.files[number] = name
    return list(sets.values())


def _stem_of_index(name: str) -> str:
    match = _INDEX.fullmatch(name)
    return match["stem"] + (match["variant"] or "") if match else name


def _named_by(index: str, text: str, weights: Sequence[str], where: str) -> list[str]:
    """The shards that an index names. Raises FormatError if one is not beside the index."""
    named = sorted(set(index_entries(text, f"{where}/{index}").values()))
    there = {*weights}
    for name in named:
        if name not in there:
            is_elsewhere = "/" in name
            others = [one for one in _sets(weights) if one.is_whole] if there.isdisjoint(named) else []
            if others and not is_elsewhere:
                raise FormatError(
                    f"{where}/{index} names a shard that is not there",
                    got=f"{name!r}, and beside the index all of {others[0].label}, which it does not name",
                    expected="an index of the files beside it, or none",
                    hint=f"the index looks like one of an earlier save, and loaders fail on it: remove it to take "
                    f"{others[0].label}",
                )
            raise FormatError(
                f"{where}/{index} names a shard that is not " + ("beside it" if is_elsewhere else "there"),
                got=repr(name)[:200],
                expected=f"one of the {len(weights)} safetensors files beside it",
                hint="put the weight files beside the index, and name them so in a copy of it"
                if is_elsewhere
                else "the model is incomplete: fetch the missing file",
            )
    return named


def _check_numbers(shards: Sequence[str], weights: Sequence[str], index: str | None, where: str) -> None:
    """Refuse a model that lacks one of its numbered files, whether or not an index names it.

    Files whose names do not tell how many there are must have no gap in their numbers, unless there is an index.
    """
    taken = {*shards}
    for one in _sets(weights):
        if one.count is None or (one.count == 0 and index is not None) or taken.isdisjoint(one.files.values()):
            continue
        if (missing := one.missing) is not None:
            raise FormatError(
                f"{where} lacks the weight file {_with_number(next(iter(one.files.values())), missing)}",
                got=f"{len(one.files)}{f' of {one.count}' if one.count else ''} numbered files",
                expected=f"all {one.count}" if one.count else "no gap in their numbers",
                hint="the model is incomplete: fetch the missing file",
            )


def _with_number(name: str, number: int) -> str:
    """The name of another file of a numbered set: ``name`` with another number."""
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    start, end = match.span("part" if match["number"] is None else "number")
    return f"{name[:start]}{number:0{end - start}d}{name[end:]}"


def _reason(name: str, taken: Collection[str], chosen: str | None) -> str:
    """Why a weight file or index is not read.

    Args:
        name: of the file.
        taken: the stems of the shards that are read.
        chosen: the index or first file of these, for messages; None if there are none.
    """
    if name.startswith(CONSOLIDATED):
        return "the publisher's own copy of the weights"
    stem = _stem_of_index(name) if is_index(name) else _sets([name])[0].stem
    if any(stem.startswith(f"{other}.") for other in taken):
        return "a variant of the weights"
    return "not read" if chosen is None else f"not among the weights that {chosen} stands for"


def index_entries(text: str, where: str) -> dict[str, str]:
    """Tensor name -> shard, from the text of an index; a ``./`` before the name of a shard is dropped.

    Raises:
        FormatError: it is no index, or a path leads out of the folder.
    """
    try:
        parsed = decode_json(text)
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from None
    entries = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(shard, str) for shard in entries.values()):
        raise FormatError(f"{where}: no weight_map of tensor names to shards")
    named = {shard: PurePosixPath(shard).as_posix() for shard in set(entries.values())}
    for shard in named.values():
        check_relative_path(shard, where)
    return {tensor: named[shard] for tensor, shard in entries.items()}
