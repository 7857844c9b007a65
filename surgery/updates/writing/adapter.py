"""An adapter that is written as a stream: two halves of a module in memory at a time, the weights first, the config last."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.errors import OptionError
from surgery.files.access import write_errors
from surgery.files.file_records import FileRecord
from surgery.files.file_writer import FileWriter, sync_directory
from surgery.format.header import TensorEntry, make_header
from surgery.format.safetensors import TORCH_DTYPES
from surgery.lossless.rounding import all_finite, is_vanished
from surgery.memory import bytes_of
from surgery.names import ADAPTER_CONFIG, DTYPE_BITS
from surgery.progress import Progress, phase
from surgery.updates.writing.low_rank import Copied, Halves, LowRankTensor
from surgery.updates.writing.modules import AdaptedModule, AdaptedModules, Halved

#: What gives the update of a tensor.
Halving = Callable[[LowRankTensor], Halved]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two halves of a module in an adapter's file.

    Attributes:
        module: the module.
        rank: that they have in the file.
        keys: of A and B.
        scaling: what loaders multiply ``B A`` with; each of the halves is divided by the root of it.
    """

    module: AdaptedModule
    rank: int
    keys: tuple[str, str]
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class AdapterToWrite:
    """An adapter that is to be written.

    Attributes:
        adapted: the modules that it changes.
        pairs: what the file holds of them.
        dtype: of the halves, as the format names it.
        file: the name of the file of weights.
        config: the text of ``adapter_config.json``; None in layouts without one.
        metadata: of the file of weights.
        alphas: key -> the number that is there.
        copied: key -> the tensor of the checkpoint whose new numbers are there, whole.
        tied: groups of these tensors that are one parameter, and have to hold the same numbers.
    """

    adapted: AdaptedModules
    pairs: Sequence[Pair]
    dtype: str
    file: str
    config: bytes | None
    metadata: Mapping[str, str]
    alphas: Mapping[str, float]
    copied: Mapping[str, str]
    tied: Sequence[Sequence[str]] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank in the file of each module, by its name, or that of its parameter where it is adapted by that."""
        return {module_key(pair.module): pair.rank for pair in self.pairs}

    @property
    def rank(self) -> int:
        """The largest of them."""
        return max((pair.rank for pair in self.pairs), default=0)

    @property
    def modules(self) -> int:
        """How many there are."""
        return len(self.pairs)

    @property
    def numbers(self) -> int:
        """How many all pairs have, with the zeros that fill them up."""
        return sum(math.prod(shape) for pair in self.pairs for shape in pair.module.shapes(pair.rank))

    @property
    def has_single_experts(self) -> bool:
        """Whether it changes experts that the model stacks, one by one."""
        return any(pair.module.kind == "expert" for pair in self.pairs)

    def write(self, out: Path, halves: Halves, copied: Mapping[str, Copied], progress: Progress) -> list[FileRecord]:
        """Write it into a folder that is there: the weights, then the config, without which there is no adapter.

        Args:
            out: the folder.
            halves: the update of each tensor, float32, on the CPU.
            copied: tensor of the checkpoint -> what the adapter holds of it, for all that ``copied`` names.
            progress: told how far it is.

        Returns:
            The files, with names relative to the folder.

        Raises:
            OutputError: the disk is full or fails.
            OptionError: numbers of the update are too large or too small for the dtype.
        """
        return self.write_halved(out, lambda one: Halved(*halves(one)), copied, progress)

    def write_halved(self, out: Path, halving: Halving, copied: Mapping[str, Copied], progress: Progress) -> list[FileRecord]:
        """``write`` with weights for the columns of B. An earlier adapter is there until the weights are."""
        with FileWriter(out / self.file) as writer:
            for data in self._contents(halving, copied, "exporting", progress):
                writer.write(data)
            if self.config is not None:
                with write_errors(out):
                    (out / ADAPTER_CONFIG).unlink(missing_ok=True)
                    sync_directory(out)
            records = [writer.commit(self.file)]
        return records + self.write_config(out)

    def write_config(self, out: Path) -> list[FileRecord]:
        """The config alone, beside weights that are there."""
        if self.config is None:
            return []
        with FileWriter(out / ADAPTER_CONFIG) as writer:
            writer.write(self.config)
            return [writer.commit(ADAPTER_CONFIG)]

    def is_in(self, out: Path, halving: Halving, copied: Mapping[str, Copied], progress: Progress) -> bool:
        """Whether a folder holds this adapter, byte for byte, perhaps but for the config, which comes last."""
        try:
            if (out / ADAPTER_CONFIG).exists() and (out / ADAPTER_CONFIG).read_bytes() != self.config:
                return False
            contents = self._contents(halving, copied, "comparing", progress)
            with open(out / self.file, "rb") as weights, closing(contents):
                return all(weights.read(len(data)) == data for data in contents) and not weights.read(1)
        except OSError:
            return False

    def _contents(
        self, halving: Halving, copied: Mapping[str, Copied], what: str, progress: Progress
    ) -> Generator[bytes | memoryview]:
        """The file of weights, one tensor at a time, in the order in which the safetensors library has them."""
        entries: list[tuple[TensorEntry, Pair | None]]
        entries = [(entry, pair) for pair in self.pairs for entry in self._entries(pair)]
        entries += [(_entry(key, "F32", ()), None) for key in self.alphas]
        entries += [(_entry(key, copied[name].dtype, copied[name].shape), None) for key, name in self.copied.items()]
        entries.sort(key=lambda one: (-DTYPE_BITS[one[0].dtype], one[0].name))
        held: tuple[Pair, tuple[torch.Tensor, torch.Tensor]] | None = None
        with phase(progress, what, sum(entry.nbytes for entry, _ in entries)):
            yield make_header([entry for entry, _ in entries], self.metadata)
            for entry, pair in entries:
                if pair is None:
                    progress.item(entry.name)
                    data = copied[self.copied[entry.name]].read() if entry.name in self.copied else self._alpha(entry.name)
                else:
                    if held is None or held[0] is not pair:
                        progress.item(pair.module.name)
                        held = None  # so that no two modules are in memory
                        held = (pair, pair.module.halves(pair.rank, self.adapted.carriers, halving))
                    data = self._rounded(held[1][pair.keys.index(entry.name)], pair)
                yield bytes_of(data)
                progress.advance(entry.nbytes)

    def _entries(self, pair: Pair) -> list[TensorEntry]:
        """The two tensors of a module."""
        return [_entry(key, self.dtype, of) for key, of in zip(pair.keys, pair.module.shapes(pair.rank), strict=True)]

    def _alpha(self, key: str) -> torch.Tensor:
        return torch.tensor(self.alphas[key], dtype=torch.float32)

    def _rounded(self, half: torch.Tensor, pair: Pair) -> torch.Tensor:
        if pair.scaling != 1:
            half = half / math.sqrt(pair.scaling)
        rounded = half.to(TORCH_DTYPES[self.dtype])
        is_large = not all_finite(rounded)
        if is_large or is_vanished(half, rounded):
            raise OptionError(
                f"the update of {module_key(pair.module)!r} has numbers that are too {'large' if is_large else 'small'} "
                f"for {self.dtype}",
                got=f"{half.abs().max().item():g}",
                hint="write the adapter in a dtype with a larger range, such as bfloat16 or float32",
            )
        return rounded


def module_key(module: AdaptedModule) -> str:
    """The name by which ranks are looked up: that of the parameter where a module is adapted by one."""
    return f"{module.name}.{module.parameter}" if module.kind == "parameter" else module.name


def _entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)
