"""A merge as a whole: a model and adapters, held against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.engine.resources import Memory, Resources
from surgery.engine.sharing import share_out
from surgery.errors import OptionError, few
from surgery.format.header import Header
from surgery.lossless.update import Rounding
from surgery.names import DTYPES, Dtype
from surgery.planning.memory import known_bytes, need_to_merge
from surgery.progress import listening, note, phase
from surgery.quantized.weight import packed_in
from surgery.source.adapter import local_adapter
from surgery.source.component import component_of, config_folder
from surgery.source.protocol import Source, check_index
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.reading import read_adapters
from surgery.updates.changes import LowRankPart
from surgery.updates.dense import DenseTensors, Writing
from surgery.updates.kept_updates import KeptUpdate
from surgery.updates.protocol import Update
from surgery.version import __version__
from surgery.weights.checkpoint import PlainWeights, SourceShard
from surgery.weights.model import ModelWeights
from surgery.weights.recognition import (
    check_dequantizable,
    check_not_unread,
    finding_unread,
    original,
    quantization_in,
    with_unread,
)


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor that adapters change.

    Attributes:
        tensor: its name.
        shard: the weight file that it is in.
        dtype: its dtype, as stored.
        shape: its shape, as stored.
        change: what the adapters do: ``added`` (low-rank matrices or a bias are added), ``replaced`` (the tensor is
            replaced), or ``rows`` (some of its rows are replaced).
        rank: rank of the addition; for a stack of matrices, the largest rank; 0 if nothing is added.
        size: size of the addition relative to the weight, in Frobenius norms; None if nothing is added, and before the
            merge.
        kept: share of the addition that is in the weight after rounding; None if nothing is added, and before the
            merge.
    """

    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    change: str
    rank: int
    size: float | None
    kept: float | None


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What is merged, and how: what the bytes of the result depend on besides the model and the adapters.

    Attributes:
        adapters: folders of adapters, with the weight that each counts with.
        writing: how weights are written.
    """

    adapters: Sequence[tuple[Path, float]]
    writing: Writing

    @classmethod
    def of(
        cls,
        adapters: str | Path | Sequence[str | Path],
        weights: Sequence[float] | None,
        rounding: Rounding | None,
        dtype: Dtype | None,
        dequantize: bool,
    ) -> MergeOptions:
        """The options as a caller gives them.

        Raises:
            OptionError: there is no adapter, or another number of weights.
        """
        given = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
        paths = [local_adapter(one) for one in given]
        if twice := [path for number, path in enumerate(paths) if path.resolve() in {one.resolve() for one in paths[:number]}]:
            note(f"these adapters are given more than once, and each time is counted: {few(twice)}")
        factors = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
        if not paths:
            raise OptionError("there is nothing to merge", got="no adapter")
        if len(factors) != len(paths):
            raise OptionError(
                "there must be one weight for each adapter",
                got=f"{len(factors)} weights",
                expected=f"{len(paths)}, one for each adapter",
            )
        return cls(
            list(zip(paths, factors, strict=True)), Writing(rounding, dequantize, None if dtype is None else DTYPES[dtype])
        )


class Merging:
    """A model and adapters, opened and held against each other.

    Args:
        source: the model.
        options: what is merged into it, and how.

    Attributes:
        source, options: as given.
        headers: of its weight files; packed weights stand for the tensors that hold their numbers.
        update: what the adapters do to it.
        checkpoint: its weights.
        dense: what its tensors become.

    Raises:
        OptionError, SourceError, FormatError, ReadError: see ``merge``.
    """

    def __init__(self, source: Source, options: MergeOptions) -> None:
        self.source = source
        self.options = options
        progress = listening()
        with phase(progress, "reading headers"):
            headers = {shard: source.header(shard) for shard in source.selection.shards}
        for one in check_index(source, dict(headers)):
            progress.note(one)
        self._quantization = quantization = quantization_in(source, headers)
        if options.writing.to_dense:
            check_dequantizable(source.name, quantization, original(source) if quantization.unread else "")
        packed = packed_in(quantization.weights.values())
        self.headers: Mapping[str, Header] = {shard: header.unpacked(packed) for shard, header in headers.items()}
        weights = ModelWeights(source, lambda: quantization, source.name)
        if options.writing.to_dense and not weights.quantized:
            raise OptionError("there is nothing to dequantize: no weight of this model is quantized", hint="drop --dequantize")
        shards = [SourceShard(file, source.size(file), source.sha256(file)) for file in self.headers]
        self.checkpoint = PlainWeights(weights, shards)
        self.update = self._read()
        self.dense = DenseTensors(self.checkpoint, self.update, options.writing)
        self.dense.check(self.headers.values())

    def _read(self) -> AdapterUpdate:
        stored = {entry.name: entry for header in self.headers.values() for entry in header.tensors}
        entries = with_unread(stored, self._quantization)
        hint = f"surgery merge takes {original(self.source)}" if self._quantization.unread else ""
        with phase(listening(), "reading adapters"), finding_unread(self._quantization, hint):
            update = read_adapters(self.options.adapters, config_folder(self.source), entries, component_of(self.source))
        check_not_unread(update.changed, self._quantization, hint)
        return update

    def memory(self, resources: Resources) -> Memory:
        """What the run may use of the memory.

        Raises:
            OptionError: a strict limit is too small for one tensor at a time.
        """
        needs = []
        for shard, header in self.headers.items():
            entries = {entry.name: entry for entry in header.tensors}
            for name, at_a_time in self.dense.touched(header).items():
                change = self.update.change(name)
                rank = 0 if change is None else max(map(_rank, change.parts.values()), default=0)
                needs.append(need_to_merge(entries[name], shard, at_a_time, rank))
        numbers = sum(change.nbytes for change in self.update.changed.values())
        return share_out(
            needs, resources, kept=numbers + known_bytes([], sum(len(one.tensors) for one in self.headers.values()))
        )

    def tensors(self, kept: Iterable[KeptUpdate] = ()) -> tuple[MergedTensor, ...]:
        """The tensors that change; after the merge with what was ``kept`` of the update of each."""
        return merged_tensors(self.headers, self.update, kept)

    def identity(self, device: str) -> dict[str, Any]:
        """All that the bytes of the result depend on, as JSON."""
        return {
            "command": "merge",
            "tool": f"surgery {__version__}",
            "torch": torch.__version__,
            "device": device,
            "source": {**asdict(self.source.record), "files": self.source.stamps()},
            **self.update.digests(),
            **asdict(self.options.writing),
        }


def merged_tensors(headers: Mapping[str, Header], update: Update, kept: Iterable[KeptUpdate]) -> tuple[MergedTensor, ...]:
    """The tensors that adapters change.

    Args:
        headers: of all weight files.
        update: what the adapters do.
        kept: what was kept of the update of each tensor, or of each slice of one; nothing before the merge.
    """
    tensors = {entry.name for header in headers.values() for entry in header.tensors}
    known: dict[str, KeptUpdate] = {}
    for part in kept:
        tensor = part.name if part.name in tensors else part.name.rpartition("[")[0]
        known[tensor] = known[tensor] + part if tensor in known else part
    found = []
    for shard, header in headers.items():
        for entry in header.tensors:
            if (change := update.change(entry.name)) is None:
                continue
            how = "replaced" if change.replacement is not None else "rows" if change.rows is not None else "added"
            one = known.get(entry.name)
            found.append(
                MergedTensor(
                    entry.name,
                    shard,
                    entry.dtype,
                    entry.shape,
                    how,
                    max(map(_rank, change.parts.values()), default=0),
                    None if one is None else one.size,
                    None if one is None or not one.kept.asked else one.kept.share,
                )
            )
    return tuple(found)


def _rank(parts: Sequence[LowRankPart]) -> int:
    return sum(part.left.shape[1] for part in parts)
