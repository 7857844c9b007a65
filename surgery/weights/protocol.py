"""A checkpoint, opened: its weight files with their headers, what is stored in them, and what they must be.

Whoever reads weights does it through ``Weights``, whatever the checkpoint is: a model (``weights.model``), the model under an
overlay (``weights.overlay``), or the residuals of a factorized folder (``weights.residual``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError
from surgery.files.file_records import FileRecord
from surgery.files.watch import Watch
from surgery.format.header import Header, TensorEntry
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.source.protocol import WeightFiles
from surgery.weights.quantization import Scaled
from surgery.weights.quantized import Dequantizer

FindQuantized = Callable[[], Mapping[str, Scaled]]


class Weights:
    """The weights of a checkpoint. A context manager, for any number of threads.

    Args:
        files: where its weight files are.
        find_quantized: gives its FP8 weights and where their scales are; called when that is first asked for, since all
            headers may have to be fetched for it.

    Attributes:
        files: as given.
        holds_residuals: whether what is stored of a target is its residual.
    """

    holds_residuals = False

    def __init__(self, files: WeightFiles, find_quantized: FindQuantized = dict) -> None:
        self.files = files
        self._find_quantized = find_quantized
        self._dequantizer = Dequantizer(self._path_of_scales, files.watch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._dequantizer.__exit__(kind, error, trace)

    def close(self) -> None:
        """Its files are not read any more.

        Raises:
            FormatError: one that is open has changed since it was opened.
        """
        self.__exit__(None, None, None)

    @cached_property
    def quantized(self) -> Mapping[str, Scaled]:
        """FP8 weight -> where its scales are."""
        return self._find_quantized()

    @property
    def watch(self) -> Watch:
        """See ``WeightFiles``."""
        return self.files.watch

    def path(self, shard: str) -> Path:
        """Where a weight file, by its name in the source, is on this machine: fetched if need be, its contents unchecked."""
        return self.files.unchecked(shard)

    def _path_of_scales(self, shard: str) -> Path:
        """The same of one that is read for the scales in it alone."""
        return self.path(shard)

    def header(self, shard: str) -> Header:
        """See ``WeightFiles``."""
        return self.files.header(shard)

    def expected(self, shard: str) -> FileRecord | None:
        """What a manifest says that the weight file is; None where there is no manifest."""
        return None

    def check(self, shard: str, sha256: str) -> None:
        """Refuse a weight file that has been read and is not what it must be.

        Args:
            shard: its name in the source.
            sha256: of all that was read.

        Raises:
            FormatError, SourceError: says what it should be, and what to do.
        """

    def check_files(self) -> None:
        """Refuse weight files that are seen not to be those of a manifest, before any is read; see ``OverlayWeights``."""

    def check_quantized(self) -> None:
        """Refuse weights that are not quantized where the manifest says that they are; see ``OverlayWeights``."""

    def reader(self, shard: str) -> AbstractContextManager[ShardReader]:
        """A weight file, open for as long as the context lasts, and kept open for the next one who asks."""
        return self._dequantizer.reader(shard)

    def forget(self, shard: str) -> None:
        """A weight file may be dropped, unless somebody reads it just now."""
        self._dequantizer.forget(shard)

    def scales(self, tensor: str) -> torch.Tensor:
        """The scales of an FP8 weight, in their own dtype and shape."""
        return self._dequantizer.scales(self.quantized[tensor])

    def exact(self, tensor: str, stored: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The numbers that bytes stand for: float32 where they are FP8, else as stored.

        Args:
            tensor: its name.
            stored: what is stored of it: all, or of a stack some matrices.
            first: the first of these.
        """
        return self._dequantizer.weight(stored, first, self.quantized.get(tensor))

    def exact_piece(self, piece: TargetPiece) -> torch.Tensor:
        """``exact`` of a piece of a walk."""
        return self.exact(piece.entry.name, piece.tensor, piece.first)


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
