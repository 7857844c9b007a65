"""Adapters of another rank: each update approximated as well as can be, all else of the file as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError, few
from surgery.files.file_writer import CHUNK_BYTES, FileWriter, write_file
from surgery.files.json_files import read_json_object
from surgery.files.watch import Watch
from surgery.format.header import TensorEntry, make_header
from surgery.format.safetensors import DTYPE_NAMES, TORCH_DTYPES, ShardReader
from surgery.lossless.rounding import all_finite, round_once
from surgery.memory import bytes_of
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPE_BITS
from surgery.progress import listening, note, phase
from surgery.torch_threads import one_thread
from surgery.updates.adapters.content import AdapterContent, ModuleUpdate
from surgery.updates.adapters.diffusion_lora import metadata_with_ranks, read_diffusion_alone
from surgery.updates.adapters.geometry import is_targeted
from surgery.updates.adapters.patterns import ByModule, with_ranks
from surgery.updates.adapters.peft_lora import read_peft
from surgery.updates.adapters.reading import diffusion_file
from surgery.updates.reranked import Reranked, WantedRank, reranked

#: An expert's own module. PEFT stacks those of a model, and takes one rank for all, that of the config.
_EXPERT = re.compile(r"(.*\.)?experts\.\d+\..+")


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """What an adapter is to become.

    Attributes:
        wanted: the rank of each module's update.
        uniform: whether all modules get the largest of these ranks, with zeros.
        dtype: of the new matrices, as safetensors names it; None for that of each before.
    """

    wanted: WantedRank
    uniform: bool
    dtype: str | None


@dataclass(frozen=True, slots=True)
class ResizedModule:
    """The update of one module, before and after.

    Attributes:
        module: its name; in a file in the layout of kohya, its name in that file.
        rank_before: rank of its matrices before; for a stack of experts, the rank of each expert.
        rank: rank of its new matrices; for a stack of experts, the rank of each expert.
        kept: share of the update's squared norm that is in the kept directions; None for an update of zeros.
    """

    module: str
    rank_before: int
    rank: int
    kept: float | None


@dataclass(frozen=True, slots=True)
class ResizedAdapter:
    """An adapter of another rank, ready to be written.

    Attributes:
        weights: the file of the original.
        watch: of the original's files.
        config: the text of the new ``adapter_config.json``; None in a layout without one.
        header: of the new file.
        entries: of its tensors, in the order of their data.
        changed: tensor of the file -> what takes its place, on the CPU. All others are copied.
        modules: in the order of the file.
        norm, kept, error: squared Frobenius norms, of all updates, of their kept directions, and of what is different now.
    """

    weights: Path
    watch: Watch
    config: bytes | None
    header: bytes
    entries: Sequence[TensorEntry]
    changed: Mapping[str, torch.Tensor]
    modules: tuple[ResizedModule, ...]
    norm: float
    kept: float
    error: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files that ``write`` makes."""
        return (self.weights.name,) if self.config is None else (self.weights.name, ADAPTER_CONFIG)

    @property
    def size(self) -> int:
        """Bytes of the new file of weights."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)

    def write(self, folder: Path) -> None:
        """The weights, and the config if there is one. Raises as ``write_weights``."""
        self.write_weights(folder / self.weights.name)
        if self.config is not None:
            write_file(folder / ADAPTER_CONFIG, self.config)

    def write_weights(self, path: Path) -> None:
        """The file of weights, whole or not at all.

        Raises:
            FormatError: the original has changed.
            ReadError: it cannot be read.
            OutputError: the disk is full or fails.
        """
        with ShardReader(self.weights, name=str(self.weights), watch=self.watch) as reader, FileWriter(path) as writer:
            with phase(listening(), "writing", self.size):
                writer.write(self.header)
                for entry in self.entries:
                    if entry.name in self.changed:
                        writer.write(bytes_of(self.changed[entry.name]))
                    else:
                        _copy(reader, reader.entries[entry.name], writer)
                    listening().advance(entry.nbytes)
            self.watch.check()
            writer.commit(path.name)


def resized_adapter(path: Path, options: ResizeOptions) -> ResizedAdapter:
    """Approximate all updates of an adapter. Its matrices are in memory meanwhile, as float32, and all new ones.

    Args:
        path: folder, or file of a layout of diffusion models.
        options: what it is to become.

    Raises:
        SourceError: there is no adapter, or in a format that has to be converted first.
        OptionError: an adapter of another kind or without low-rank updates, or a dtype whose range is too small.
        FormatError: a file is damaged, contradicts itself, or has changed.
        ReadError: a file cannot be read.
    """
    file = diffusion_file(path, of_any_name=True)
    weights, watch = path / ADAPTER_WEIGHTS if file is None else file, Watch()
    for one in (weights, path / ADAPTER_CONFIG):
        if one.is_file():
            watch.see(one, str(one))
    content = read_peft(path) if file is None else read_diffusion_alone(file)
    config = read_json_object(path / ADAPTER_CONFIG, str(path / ADAPTER_CONFIG)) if file is None else None
    with ShardReader(weights, name=str(weights), watch=watch) as reader:
        resizing = _Resizing(content, config, reader, options)
        del content  # so that the matrices of a module are gone when it is done
        resizing.modules()
        watch.check()
        ranks = {name: one.rank for one in resizing.found for name in one.names}
        metadata = reader.header.metadata
        if config is None:
            metadata, text = metadata_with_ranks(metadata, ranks, weights), None
        else:
            text = json.dumps(with_ranks(config, ranks, path), indent=2, sort_keys=True).encode() + b"\n"
        changed = {name: tensor for one in resizing.found for name, tensor in one.tensors().items()}
        # As the library has them, so that each tensor begins at a multiple of the size of its numbers.
        entries = [_entry(entry, changed.get(entry.name)) for entry in reader.header.tensors]
        entries.sort(key=lambda entry: -DTYPE_BITS[entry.dtype])
    return ResizedAdapter(
        weights,
        watch,
        text,
        make_header(entries, metadata),
        entries,
        changed,
        tuple(one.told() for one in resizing.found),
        sum(one.new.norm for one in resizing.found),
        sum(one.new.kept for one in resizing.found),
        sum(one.new.error for one in resizing.found),
    )


@dataclass(frozen=True, slots=True)
class _Module:
    """A module with its new update.

    Attributes:
        update: the old one, without its numbers.
        entries: of its tensors in the file, as ``ModuleUpdate.parts`` calls them.
        names: by which its rank is looked up: several for one of a module's parameters, as it is not known which it is.
        rank_before, rank: of its matrices.
        bias: the new one, where it changes.
        new: the matrices, perhaps of a smaller rank.
    """

    update: ModuleUpdate
    entries: Mapping[str, TensorEntry]
    names: tuple[str, ...]
    rank_before: int
    rank: int
    bias: torch.Tensor | None
    new: Reranked

    def told(self) -> ResizedModule:
        kept = self.new.kept / self.new.norm if self.new.norm else None
        return ResizedModule(self.update.module, self.rank_before, self.rank, kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensor of the file -> what takes its place."""
        missing = self.rank - self.new.A.shape[1]
        A, B = nn.functional.pad(self.new.A, (0, 0, 0, missing)), nn.functional.pad(self.new.B, (0, missing))
        shapes = {part: entry.shape for part, entry in self.entries.items()}
        found = {
            "A": A.reshape(-1, *shapes["A"][1:]),
            "B": B.permute(1, 2, 0).reshape(len(B[0]), -1, *shapes["B"][2:]),
        }
        if self.bias is not None:
            found["bias"] = self.bias.view(shapes["bias"])
        if "alpha" in self.entries:
            alpha = torch.full(shapes["alpha"], float(self.rank))
            rounded = alpha.to(TORCH_DTYPES[self.entries["alpha"].dtype])
            found["alpha"] = rounded if torch.equal(rounded.float(), alpha) else alpha
        return {self.entries[part].name: tensor.contiguous() for part, tensor in found.items()}


class _Resizing:
    """The updates of one adapter, approximated one after the other."""

    def __init__(
        self, content: AdapterContent, config: Mapping[str, Any] | None, reader: ShardReader, options: ResizeOptions
    ) -> None:
        self._where, self._stacked, self._reader, self._options = content.where, content.stacked, reader, options
        self._updates = list(content.updates)
        self.found: list[_Module] = []
        if not self._updates:
            raise OptionError(f"{self._where} has no low-rank updates", expected="a LoRA adapter with matrices A and B")
        deep = [one.module for one in self._updates if one.depth and not self._parameters(one.module)]
        if deep:
            raise OptionError(f"{self._where}: an adapter inside another", got=few(deep))
        stacks = [name for one in self._updates for name in self._parameters(one.module)]
        self._ranks = ByModule(config, "rank_pattern", "r", stacks, Path(content.where)) if config and stacks else None

    def modules(self) -> None:
        """Fill ``found``."""
        self._updates.reverse()
        progress = listening()
        total = sum(one.A.nbytes + one.B.nbytes for one in self._updates)
        with phase(progress, "re-ranking", total), one_thread():  # LAPACK's QR of tall matrices is slower with several
            while self._updates:
                update = self._updates.pop()
                progress.item(update.module)
                self.found.append(self._module(update))
                progress.advance(update.A.nbytes + update.B.nbytes)
        self._tell_of_smaller()
        self._level()

    def _module(self, update: ModuleUpdate) -> _Module:
        names, rows = self._parameters(update.module) or (update.module,), len(update.A)
        known = {(count := self._matrices(name, rows), update.scaling(name, rows, count)) for name in names}
        if len(known) > 1:
            raise OptionError(
                f"{self._where}: it cannot be told which parameter of {update.module!r} an update is for",
                got=f"ranks or alphas of their own for some of {few(names)}",
                expected="one rank and one alpha for all parameters of a module",
            )
        ((count, scaling),) = known
        entries = {part: self._reader.entries[name] for part, name in update.parts.items()}
        dtypes = [TORCH_DTYPES[self._options.dtype or entries[part].dtype] for part in ("A", "B")]
        A = update.A.reshape(count, rows // count, -1)
        B = update.B.view(len(update.B), -1, count).permute(2, 0, 1)
        new = reranked(A, B, scaling, self._options.wanted, dtypes, update.module)
        bias = None
        if update.bias is not None and scaling != 1:
            bias = round_once(scaling * update.bias.double(), TORCH_DTYPES[entries["bias"].dtype])
            if not all_finite(bias):
                raise OptionError(f"the bias of {update.module!r} times its scaling is beyond the range of {bias.dtype}")
        empty = update.A.new_empty(0)
        update = replace(update, A=empty, B=empty, magnitude=None, bias=None)
        return _Module(update, entries, names, rows // count, new.A.shape[1] or 1, bias, new)

    def _parameters(self, module: str) -> tuple[str, ...]:
        """The parameters of a module that PEFT may have adapted without it, by ``target_parameters``."""
        names = (f"{module}.{target.rpartition('.')[2]}" for target in self._stacked)
        return tuple(dict.fromkeys(name for name in names if is_targeted(name, self._stacked)))

    def _matrices(self, name: str, rows: int) -> int:
        """Of how many matrices an A with so many rows is, by the rank in the config."""
        rank = self._ranks.of(name) if self._ranks is not None else None
        return rows // rank if type(rank) is int and 0 < rank <= rows else 1  # what is no rank is refused with its alpha

    def _tell_of_smaller(self) -> None:
        if zeros := [one.update.module for one in self.found if not one.new.own]:
            note(f"{len(zeros)} of {len(self.found)} updates are zero, and have rank 1 in the file: {few(zeros)}")
        most = self._options.wanted.most
        if most is None or self._options.wanted.energy is not None:
            return
        smaller = [one for one in self.found if 0 < one.new.own < most]
        if smaller:
            lowest = min(smaller, key=lambda one: one.new.own)
            note(
                f"{len(smaller)} of {len(self.found)} updates have a rank below {most} and keep their own "
                f"(least: {lowest.rank}, {lowest.update.module})"
            )

    def _level(self) -> None:
        """Give one rank to all updates that have to have one."""
        largest, by_names = max(one.rank for one in self.found), dict[tuple[str, ...], int]()
        for one in self.found:
            by_names[one.names] = max(by_names.get(one.names, 1), one.rank)
        self.found = [
            replace(one, rank=largest if self._options.uniform or _EXPERT.fullmatch(one.update.module) else by_names[one.names])
            for one in self.found
        ]


def _entry(entry: TensorEntry, changed: torch.Tensor | None) -> TensorEntry:
    """The entry of a tensor in the new file; of its offsets only the size counts."""
    if changed is None:
        return entry
    dtype = DTYPE_NAMES[changed.dtype]
    return TensorEntry(entry.name, dtype, tuple(changed.shape), 0, changed.nbytes)


def _copy(reader: ShardReader, entry: TensorEntry, writer: FileWriter) -> None:
    """Copy the bytes of a tensor, some at a time."""
    for start in range(entry.start, entry.end, CHUNK_BYTES):
        data = bytes_of(reader.empty(min(CHUNK_BYTES, entry.end - start)))
        reader.read_into(data, start)
        writer.write(data)
