"""``Weights``: an opened checkpoint, through which all weights are read, whatever kind of checkpoint it is.

The kinds: a model (``weights.model``), the base under an overlay (``weights.overlay``), and the residuals of a factorized
folder (``weights.residual``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.device import as_memory_allows
from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError
from surgery.files.file_records import FileRecord
from surgery.files.watch import Watch
from surgery.format.header import Header, Stored, TensorEntry
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.quantized.codec import Role
from surgery.quantized.recognize import Quantization
from surgery.quantized.weight import Quantized, packed_in
from surgery.source.protocol import WeightFiles
from surgery.weights.quantized import Dequantizer

_CPU = torch.device("cpu")

FindQuantization = Callable[[], Quantization]


class Weights:
    """The weight files of a checkpoint, opened for reading. A context manager that any number of threads may use.

    It gives headers, paths and readers of the weight files, the exact numbers of what is stored in them, and checks that the
    files are the expected ones. Weight files are known by their names in the source model.

    Args:
        files: the weight files.
        find_quantization: tells what is quantized. Called when that is first needed, as it may have to fetch the headers of
            all weight files.

    Attributes:
        files: as given.
        holds_residuals: whether what is stored of a target is its residual.
    """

    holds_residuals = False

    def __init__(self, files: WeightFiles, find_quantization: FindQuantization = Quantization) -> None:
        self.files = files
        self._find_quantization = find_quantization
        self._dequantizer = Dequantizer(lambda shard: self.opened(shard, self._path_of_parts(shard)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._dequantizer.__exit__(kind, error, trace)

    def close(self) -> None:
        """Close the files that are open.

        Raises:
            FormatError: one that is open has changed since it was opened.
        """
        self.__exit__(None, None, None)

    @cached_property
    def quantization(self) -> Quantization:
        """What is quantized among them, as far as that was looked for."""
        return self._find_quantization()

    @property
    def quantized(self) -> Mapping[str, Quantized]:
        """Quantized weight that is read -> how it is stored."""
        return self.quantization.weights

    def quantized_among(self, tensors: Iterable[str]) -> dict[str, Quantized]:
        """``quantized`` for those weights of which any part is among ``tensors``: they, or what is stored beside them."""
        parts = self._weight_of_part
        return {parts[one]: self.quantized[parts[one]] for one in tensors if one in parts}

    @cached_property
    def _weight_of_part(self) -> Mapping[str, str]:
        """Each quantized weight, its parts, and what is stored beside them -> the name of the weight."""
        every = self.quantized.items()
        return {name: weight for weight, one in every for name in (weight, *(part.name for part in one.parts), *one.beside)}

    @cached_property
    def _packed(self) -> Mapping[str, Stored]:
        return packed_in(self.quantized.values())

    def opened(self, shard: str, path: Path | None = None, name: str | None = None) -> ShardReader:
        """A new reader of a weight file, in whose header packed weights stand for the tensors that hold their numbers.

        Args:
            shard: the weight file.
            path: where it is on this machine, if that is known.
            name: for messages; None: that of the weight file.
        """
        path = self.path(shard) if path is None else path
        return ShardReader(path, name=name or shard, watch=self.watch, packed=self._packed)

    @property
    def watch(self) -> Watch:
        """What notices that a file changes while it is in use."""
        return self.files.watch

    def path(self, shard: str) -> Path:
        """The local path of a weight file, fetched if it is not here. Its contents are not checked: ``check`` does that."""
        return self.files.unchecked(shard)

    def _path_of_parts(self, shard: str) -> Path:
        """The local path of a weight file that is read for parts of quantized weights in it alone."""
        return self.path(shard)

    def header(self, shard: str) -> Header:
        """The header of a weight file, in which packed weights stand for the tensors that hold their numbers."""
        return self.files.header(shard).unpacked(self._packed)

    def expected(self, shard: str) -> FileRecord | None:
        """Name, size and sha256 of a weight file by the manifest; None where there is no manifest."""
        return None

    def check(self, shard: str, sha256: str) -> None:
        """Refuse a weight file that has been read as a whole, if its contents are not the expected ones.

        Args:
            shard: its name in the source.
            sha256: of the whole file, as it was read.

        Raises:
            FormatError, SourceError: says what it should be, and what to do.
        """

    def check_files(self) -> None:
        """Refuse weight files whose names or sizes differ from the manifest's, before any is read. For a base alone."""

    def check_quantized(self) -> None:
        """Refuse weights that are not quantized although the manifest says that they are. For a base alone."""

    def reader(self, shard: str) -> AbstractContextManager[ShardReader]:
        """A reader of a weight file, to be used as a context manager. It stays open after that, for the next caller."""
        return self._dequantizer.reader(shard)

    def forget(self, shard: str) -> None:
        """Close the reader of a weight file that is not needed any more, unless a thread is using it."""
        self._dequantizer.forget(shard)

    def release(self, shard: str) -> None:
        """``forget`` a weight file that has been acquired, and let it go: a streamed one is removed with its last user."""
        try:
            self.forget(shard)
        finally:
            self.files.release(shard)

    def parts(self, tensor: str) -> dict[Role, torch.Tensor]:
        """The parts of a quantized weight."""
        return self._dequantizer.parts(self.quantized[tensor])

    def exact(self, tensor: str, stored: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The numbers of a stored tensor: a quantized weight dequantized to float32, any other unchanged.

        Args:
            tensor: its name.
            stored: the whole tensor, or some consecutive matrices of a stack; on the CPU or on a GPU, which then computes them.
            first: the index of the first of these matrices.
        """
        return self._dequantizer.weight(stored, first, self.quantized.get(tensor))

    def exact_piece(self, piece: TargetPiece, device: torch.device = _CPU) -> torch.Tensor:
        """``exact`` of a piece of a walk.

        Args:
            piece: of any tensor.
            device: a GPU gets what is stored of a quantized weight, and computes its numbers, which take four bytes each.

        Returns:
            A quantized weight on that GPU, on the CPU if the memory of the GPU does not suffice; any other where it was.
        """
        name, first = piece.entry.name, piece.first
        if device.type != "cuda" or name not in self.quantized:
            return self.exact(name, piece.tensor, first)

        def compute(some: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
            return [self.exact(name, some[0].to(where, non_blocking=True), first)]

        return as_memory_allows(compute, [piece.tensor], device)[0]


def check_entry(entry: TensorEntry, target: TargetRecord) -> None:
    """Refuse a tensor that is not what the manifest says.

    Raises:
        FormatError: another dtype or shape.
    """
    if entry.dtype != target.dtype or list(entry.shape) != list(target.shape):
        raise FormatError(
            f"{target.shard}: {target.tensor!r} is not as the manifest describes it",
            got=f"{entry.dtype} {list(entry.shape)}",
            expected=f"{target.dtype} {list(target.shape)}",
        )
