"""Aliases: tensors that hold one parameter more than once, as a tied embedding and its head, or blocks that a model shares.

A loader makes one parameter of them. So they are one target, and a fold has to edit them together. A loader does so only if
their bytes are the same; else each is a parameter of its own, whatever the config says (transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import MissingExtra, OptionError, SourceError
from surgery.escapes import quoted_glob
from surgery.files.pool import Pool
from surgery.format.header import Header, TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import Alias
from surgery.format.safetensors import ShardReader, same_bytes
from surgery.models.placement import Place, Positions, locate
from surgery.models.skeleton import skeleton
from surgery.names import CONFIG_FILE
from surgery.planning.roles import in_block, is_embedding
from surgery.planning.targets import Target
from surgery.planning.unloaded import why_unloaded
from surgery.source.protocol import Source

#: Tensors are first compared by a few stretches of their bytes: how many, and how long each is.
_STRETCHES = 3
_STRETCH_BYTES = 64

#: Ends of the keys of those parts of a config that describe a language model, and may say whether it ties its head.
_LANGUAGE_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")

#: A tensor and the weight file that it is in.
_Stored = tuple[TensorEntry, str]


def find_aliases(
    source: Source, headers: Mapping[str, Header], targets: Sequence[Target], *, fetch: bool
) -> tuple[dict[str, tuple[Alias, ...]], list[str]]:
    """Find the tensors that hold the same parameter as the tensor of a target.

    Embeddings are compared with all tensors of their shape and dtype. In a local model every other target is as well, first by
    a few of its bytes.

    Args:
        source, headers: the model, and the headers of its weight files.
        targets: those chosen in it.
        fetch: whether weight files may be fetched to compare embeddings.

    Returns:
        Tensor of a target -> its aliases, which must not be targets themselves; and notes of what could not be known.

    Raises:
        OptionError: an embedding and another tensor are equal, and it cannot be known whether the model ties them; or tied
            tensors are quantized.
    """
    chosen = {target.tensor: target for target in targets}
    config = source.config()
    alike: dict[tuple[str, tuple[int, ...]], list[_Stored]] = {}
    for shard, header in headers.items():
        for entry in header.tensors:
            # Tensors that loaders leave out are no parameters, such as the embedding that comes with multi-token prediction.
            if why_unloaded(entry.name, config) is None:
                alike.setdefault((entry.dtype, entry.shape), []).append((entry, shard))
    groups = [places for places in alike.values() if len(places) > 1 and any(entry.name in chosen for entry, _ in places)]
    # A hub model in the cache does not count as local: a run that continues must find the same as when it began.
    local = source.record.kind == "folder"
    found: dict[str, tuple[Alias, ...]] = {}
    notes: list[str] = []
    unknown: list[tuple[str, str, str]] = []
    ties = _Ties(source, headers)
    with Pool(lambda shard: _Acquired(source, shard)) as readers:
        for candidates in _candidates(groups, readers, chosen, local=local):
            if not local and not fetch and source.bytes_to_fetch():
                first, second = (entry.name for entry, _ in candidates[:2])
                notes.append(
                    f"{first} and {second} may be one parameter, stored twice: factorize compares them when it has them"
                )
                continue
            for together in _equal(readers, candidates, ties, unknown):
                # A target first, the others in the order of the files, as the sort is stable.
                kept, *others = sorted(together, key=lambda place: place[0].name not in chosen)
                if kept[0].name not in chosen:
                    continue
                if chosen[kept[0].name].quantized is not None:
                    names = [entry.name for entry, _ in together]
                    raise _refused(source, names, "a quantized weight that is stored twice cannot be edited", None)
                found[kept[0].name] = tuple(Alias(entry.name, shard) for entry, shard in others)
            if not local:  # a streamed file that was fetched for this may have to make room for others
                for _, shard in candidates:
                    readers.forget(shard)
    pairs = [(first, second, why) for first, second, why in unknown if first in chosen or second in chosen]
    for *pair, why in pairs:
        if any(map(is_embedding, pair)):
            raise _refused(source, pair, "they hold the same weights, and it cannot be known whether the model ties them", why)
    if pairs:
        notes.append(_note_of_equal(len(pairs), *pairs[0][:2]))
    return found, notes


def notes_of_equal(source: Source, headers: Mapping[str, Header], manifest: Manifest) -> list[str]:
    """Notes on targets of a hub model with equal weights, which the plan could not compare before the run read them."""
    if manifest.source.kind == "folder":
        return []
    first_with: dict[tuple[str, str], str] = {}
    pairs = [
        (first, target.tensor)
        for target in manifest.targets
        if target.s_first
        and (first := first_with.setdefault((target.dtype, target.sample_sha256), target.tensor)) != target.tensor
    ]
    ties = _Ties(source, headers)
    pairs = [pair for pair in pairs if ties.between(*pair)[0] is not False]
    return [_note_of_equal(len(pairs), *pairs[0])] if pairs else []


def _note_of_equal(count: int, first: str, second: str) -> str:
    """The note that targets have equal weights, and that it is not known whether they are copies or one parameter."""
    return (
        f"{second} holds the same weights as {first}"
        + (f" ({count} such pairs)" if count > 1 else "")
        + ", and the model may make one parameter of them: attach refuses them if it does, and --exclude leaves them out"
    )


def _candidates(
    groups: Sequence[Sequence[_Stored]], readers: Pool[_Acquired], chosen: Mapping[str, Target], *, local: bool
) -> Iterator[list[_Stored]]:
    """Groups of tensors that may hold one parameter, with a target among them."""
    if not local:
        for places in groups:
            # Of a hub model only embeddings are compared, with what may be a head: a tensor in no block.
            outside = [place for place in places if is_embedding(place[0].name) or not in_block(place[0].name)]
            names = [entry.name for entry, _ in outside]
            if len(names) > 1 and any(map(is_embedding, names)) and not chosen.keys().isdisjoint(names):
                yield outside
        return
    by_shard: dict[str, list[tuple[TensorEntry, bool]]] = {}
    for places in groups:
        embeddings = any(is_embedding(entry.name) for entry, _ in places)
        for entry, shard in places:
            by_shard.setdefault(shard, []).append((entry, embeddings))
    alike: dict[tuple[str, tuple[int, ...], bytes], list[_Stored]] = {}
    for shard, members in by_shard.items():
        with readers.of(shard) as reader:
            for entry, embeddings in members:
                some = _some_bytes(reader, entry)
                # A weight of zeros has no directions to train. In an embedding, zeros may be the rows for padding.
                if embeddings or any(some):
                    alike.setdefault((entry.dtype, entry.shape, some), []).append((entry, shard))
    for places in alike.values():
        if len(places) > 1 and any(entry.name in chosen for entry, _ in places):
            yield places


def _some_bytes(reader: ShardReader, entry: TensorEntry) -> bytes:
    length = min(_STRETCH_BYTES, entry.nbytes)
    starts = {entry.start + (entry.nbytes - length) * i // (_STRETCHES - 1) for i in range(_STRETCHES)}
    found = bytearray(length * len(starts))
    for i, start in enumerate(sorted(starts)):
        reader.read_into(memoryview(found)[i * length : (i + 1) * length], start)
    return bytes(found)


class _Acquired(ShardReader):
    """The reader of a weight file that is acquired from the source until the reader is closed."""

    def __init__(self, source: Source, shard: str) -> None:
        self._source, self._shard = source, shard
        super().__init__(source.acquire(shard), name=f"{source.name}/{shard}", watch=source.watch)

    def close(self) -> None:
        super().close()
        self._source.release(self._shard)


def _equal(
    readers: Pool[_Acquired], candidates: Sequence[_Stored], ties: _Ties, unknown: list[tuple[str, str, str]]
) -> Iterator[list[_Stored]]:
    """Groups of two or more candidates that are one parameter.

    Args:
        readers: of the weight files.
        candidates: tensors of one dtype and shape.
        ties: tells which tensors the model takes for one parameter.
        unknown: receives pairs with equal bytes of which that is not known, and why it is not.
    """
    for left in ties.parted(candidates):
        while len(left) > 1:
            first, *rest = left
            same, left = [first], []
            for place in rest:
                # Reading comes last: of a model with copied blocks it would be half of all weights.
                tied, why = ties.between(first[0].name, place[0].name)
                if tied is False or not _same_bytes(readers, first, place):
                    left.append(place)
                elif tied is None:
                    unknown.append((first[0].name, place[0].name, why))
                    # A copy is told as a pair with the first one only. An embedding or head is also compared with the others.
                    if is_embedding(first[0].name) or is_embedding(place[0].name):
                        left.append(place)
                else:
                    same.append(place)
            if len(same) > 1:
                yield same


def _refused(source: Source, names: Sequence[str], what: str, why: str | None) -> OptionError:
    return OptionError(
        f"{source.name}: {names[0]} and {names[1]}: {what}",
        got=why,
        expected="one parameter, edited together, or two" if why else None,
        hint=f"--exclude {quoted_glob(names[0])} --exclude {quoted_glob(names[1])}"
        + ("; or say it in config.json: tie_word_embeddings" if why else ""),
    )


def _same_bytes(readers: Pool[_Acquired], first: _Stored, second: _Stored) -> bool:
    (one, shard), (other, other_shard) = first, second
    with readers.of(shard) as here, readers.of(other_shard) as there:
        return same_bytes(here, one, there, other)


class _Ties:
    """Tells which tensors a model takes for one parameter if their bytes are equal: by its class, else by its config."""

    def __init__(self, source: Source, headers: Mapping[str, Header]) -> None:
        self._source = source
        self._shapes = {entry.name: entry.shape for header in headers.values() for entry in header.tensors}
        self._model: nn.Module | None = None
        self._places: dict[str, list[Place]] | None = None
        self._why = ""

    @property
    def _known(self) -> dict[str, list[Place]]:
        if self._places is None:
            self._places = self._located()
        return self._places

    def parted(self, candidates: Sequence[_Stored]) -> list[list[_Stored]]:
        """Group candidates by the parameter that the model's class puts them in; one group where that is not known of all.

        So hundreds of experts with equal weights, each a parameter of its own, are not compared pair by pair.
        """
        if any(entry.name not in self._known for entry, _ in candidates):
            return [list(candidates)]
        parts: dict[frozenset[tuple[Any, ...]], list[_Stored]] = {}
        for entry, shard in candidates:
            parts.setdefault(frozenset(self._spots(entry.name)), []).append((entry, shard))
        return list(parts.values())

    def between(self, first: str, second: str) -> tuple[bool | None, str]:
        """Whether the model takes two tensors for one parameter, or None where that is not known; and why."""
        # The class comes first: where a config has several parts, the class may go by any of them, or by none.
        if first in self._known and second in self._known:
            return self._spots(first) == self._spots(second), "the model's class says it"
        if is_embedding(first) != is_embedding(second):  # an embedding and a head
            config = self._source.config()
            parts = [config, *(value for key, value in config.items() if key.endswith(_LANGUAGE_PARTS))]
            said = [part["tie_word_embeddings"] for part in parts if isinstance(part, dict) and "tie_word_embeddings" in part]
            if said and all(isinstance(one, bool) for one in said) and len(set(said)) == 1:
                return said[0], "config.json says it"
        return None, self._why or "the model's class does not have both"

    def _located(self) -> dict[str, list[Place]]:
        """Tensor -> its places in the model's parameters. Empty, with the reason in ``_why``, if its class is not known."""
        if CONFIG_FILE not in self._source.selection.others:
            self._why = f"there is no {CONFIG_FILE}"
            return {}
        folder: Path = self._source.fetch(CONFIG_FILE).parent
        try:
            self._model = skeleton(folder)
        except (MissingExtra, SourceError) as error:
            self._why = error.what
            return {}
        if self._model is None:
            self._why = f"{CONFIG_FILE} does not say what class the model is"
            return {}
        try:
            return locate(self._model, self._shapes)
        except (MissingExtra, OptionError) as error:  # a conversion that cannot be followed
            self._why = error.what
            return {}

    def _spots(self, tensor: str) -> set[tuple[Any, ...]]:
        """The parameters that a tensor is in, and its positions in them, as several experts may be stacked in one parameter."""
        assert self._model is not None
        return {
            (
                id(self._model.get_parameter(place.parameter)),
                *(_hashable(one) for one in (place.part.axes, *place.part.at, *place.part.of)),
            )
            for place in self._known[tensor]
        }


def _hashable(positions: Positions | tuple[int | None, ...]) -> Any:
    return tuple(positions.tolist()) if isinstance(positions, torch.Tensor) else positions
