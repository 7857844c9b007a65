"""What is written for each tensor and weight file with an update: values, dtypes, parts of quantized weights, and headers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import OptionError, WeightError
from surgery.format.header import Header, TensorEntry, make_header, resized
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.views import Slice, View
from surgery.lossless.grids import DtypeGrid, Grid
from surgery.lossless.rounding import all_finite
from surgery.lossless.update import Rounding
from surgery.names import FACTORIZABLE_DTYPES
from surgery.quantized.codec import Extremes, Role
from surgery.quantized.weight import StoredPart
from surgery.updates.apply import Updated, UpdatedWeights, WrittenAs
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint

#: What quantized weights become when they are dequantized.
DENSE_DTYPE = "BF16"


@dataclass(frozen=True, slots=True)
class Writing:
    """How weights are written.

    Attributes:
        rounding: of changed matrices: ``nearest``, ``directions`` (``surgery.lossless.directions``), or None for the one that
            keeps their update: ``directions`` for quantized ones, and for others where ``nearest`` would keep less than 99.5 %.
        to_dense: whether every quantized weight becomes bfloat16, without its scales.
        dtype: what all weights of 16 and 32 bits become, as safetensors names it; None for what they are.
    """

    rounding: Rounding | None = None
    to_dense: bool = False
    dtype: str | None = None

    @property
    def is_stored_otherwise(self) -> bool:
        """Whether weights that do not change are written in another way than they are stored."""
        return self.to_dense or self.dtype is not None


class DenseTensors:
    """What each tensor of a checkpoint becomes with an update. Any number of threads may use it.

    A changed quantized weight is quantized again, with new scales for the blocks that need them. These may be stored before the
    weight, or in another shard, so they are computed from the whole weight when they are first needed, and kept.

    Args:
        checkpoint: the weights and their factors.
        update: what is added to them.
        writing: how they are written.

    Attributes:
        writing: as given.
    """

    def __init__(self, checkpoint: Checkpoint, update: Update, writing: Writing) -> None:
        self._checkpoint = checkpoint
        self._weights = checkpoint.weights
        self._updated = UpdatedWeights(checkpoint, update)
        self.writing = writing
        quantized = self._weights.quantized
        self._part_of: dict[str, tuple[str, StoredPart]] = {
            part.name: (name, part) for name, one in quantized.items() for part in one.parts
        }
        self._together = _together(checkpoint)
        self._dropped: set[str] = set()
        if writing.to_dense:
            self._dropped.update(self._part_of, *(one.beside for one in quantized.values()))
        self._new_parts: dict[str, dict[Role, torch.Tensor]] = {}
        self._one = threading.Lock()

    def files(self, shard: str) -> list[str]:
        """The weight files that the fold of a shard reads: itself, and those that share quantized weights with it."""
        return [shard, *sorted(self._together.get(shard, set()) - {shard})]

    def check(self, headers: Iterable[Header]) -> None:
        """Refuse, before any work, what ``touched`` would refuse in the shards with these headers.

        Raises:
            OptionError: see ``touched``.
        """
        for header in headers:
            self.touched(header)

    def keeps(self, header: Header) -> bool:
        """Whether the weight file with this header keeps the bytes that it has in the source."""
        return self._checkpoint.lossless and not any(
            self._is_changed(entry.name) or self._dtype_of(entry) != entry.dtype or entry.name in self._dropped
            for entry in header.tensors
        )

    def _is_changed(self, tensor: str) -> bool:
        """Whether the numbers of a tensor change. Parts of a quantized weight do with it, which may be in another file."""
        return self._updated.is_changed(self._part_of[tensor][0] if tensor in self._part_of else tensor)

    def _dtype_of(self, entry: TensorEntry) -> str:
        """The dtype that a tensor is written in, as safetensors names it."""
        if entry.name in self._weights.quantized:
            return (self.writing.dtype or DENSE_DTYPE) if self.writing.to_dense else entry.dtype
        is_part = entry.name in self._part_of
        return (self.writing.dtype or entry.dtype) if entry.dtype in FACTORIZABLE_DTYPES and not is_part else entry.dtype

    def touched(self, header: Header) -> dict[str, int | None]:
        """The tensors of a shard whose stored bytes are not copied unchanged.

        Returns:
            Tensor -> how many matrices of a stack to hold at a time; None for the whole tensor.

        Raises:
            OptionError: the update changes a tensor of a dtype that cannot be changed.
        """
        touched: dict[str, int | None] = {}
        for entry in header.tensors:
            name, is_quantized = entry.name, entry.name in self._weights.quantized
            targets, is_changed = self._updated.targets(name), self._is_changed(name)
            if self._updated.change(name) is not None and entry.dtype not in FACTORIZABLE_DTYPES and not is_quantized:
                raise OptionError(
                    f"the adapter changes {name!r}, which is {entry.dtype}",
                    expected=", ".join(FACTORIZABLE_DTYPES) + ", or quantized with scales",
                )
            if name in self._dropped or name in self._part_of:
                if name in self._dropped or is_changed:
                    touched[name] = None
            elif is_changed or self._dtype_of(entry) != entry.dtype or (targets and self._updated.is_residual(name)):
                touched[name] = self._at_a_time(entry, is_quantized)
        return touched

    def _at_a_time(self, entry: TensorEntry, is_quantized: bool) -> int | None:
        """How many matrices of a stack to hold at a time; None for the whole tensor."""
        targets, change = self._updated.targets(entry.name), self._updated.change(entry.name)
        if change is not None and not change.is_stack:
            return None
        if targets and not is_quantized:
            return targets[0].at_a_time
        return View("stack").at_a_time(entry.shape, 4) if len(entry.shape) == 3 else None

    def header(self, header: Header) -> bytes:
        """The bytes of the header that is written for a shard with this header."""
        written = self._written(header)
        if written == list(header.tensors):
            return header.raw
        return make_header(written, header.metadata)

    def size(self, header: Header) -> int:
        """Bytes of the weight file that is written for a shard with this header.

        If no tensor of it is left, it is written all the same: where one of several numbered files is not there, a model looks
        as if it had not been fetched in full.
        """
        return len(self.header(header)) + sum(entry.nbytes for entry in self._written(header))

    def _written(self, header: Header) -> list[TensorEntry]:
        """The entries of the header that is written."""
        if not self.writing.is_stored_otherwise:
            return list(header.tensors)
        return [resized(entry, self._dtype_of(entry)) for entry in header.tensors if entry.name not in self._dropped]

    def of(self, piece: TargetPiece, device: torch.device) -> Updated | None:
        """What is written for a piece of a weight file, on the CPU; None if it is left out.

        Args:
            piece: a tensor that is ``touched``, or some matrices of it. The result may take its memory, so that ``piece`` must
                not be read after.
            device: where the arithmetic runs; it must have float64.

        Raises:
            WeightError, ScalesError: the result is beyond the range of its dtype.
            FormatError: the tensor is not as the manifest describes it, or its correction is damaged.
        """
        entry = piece.entry
        if entry.name in self._dropped:
            return None
        if entry.name in self._part_of:
            tensor, part = self._part_of[entry.name]
            return Updated(part.stored(self._parts_of(tensor, device)[part.role]))
        weight = self._weights.exact_piece(piece)
        if entry.name in self._weights.quantized and not self.writing.to_dense:
            return self._requantized(piece, weight, device)
        dtype = TORCH_DTYPES[self._dtype_of(entry)]
        grid = None
        if weight.dtype != dtype:
            # In float32 before anything is added: in a narrower dtype the sum would be rounded once more.
            weight = weight.float()
            grid = None if dtype == torch.float32 else DtypeGrid(dtype)
        written = WrittenAs(dtype, self.writing.rounding, lambda index, part: grid)
        updated = self._updated.tensor(weight, entry, piece.first, device, written)
        if dtype != weight.dtype and updated.tensor.numel() and not all_finite(updated.tensor):
            what = "--dequantize" if entry.name in self._weights.quantized else "--dtype"
            raise WeightError(
                f"{entry.name!r} is beyond the range of {str(dtype).removeprefix('torch.')}", hint=f"run it without {what}"
            )
        updated.check()
        return updated

    def _requantized(self, piece: TargetPiece, weight: torch.Tensor, device: torch.device) -> Updated:
        """A quantized weight with the update, quantized again.

        Args:
            piece: what is stored of it.
            weight: the numbers that this stands for, float32.
        """
        name, first = piece.entry.name, piece.first
        quantized, parts = self._weights.quantized[name], self._parts_of(name, device)
        is_stack, (m, n) = weight.ndim == 3, weight.shape[-2:]

        def grid(index: int, part: Slice | None) -> Grid:
            return quantized.codec.grid(quantized.parts_of_matrix(parts, index), (m, n), part)

        written = WrittenAs(torch.float32, self.writing.rounding or "directions", grid)
        updated = self._updated.tensor(weight, piece.entry, first, device, written)
        updated.check()
        some = quantized.parts_of_matrices(parts, first, len(weight)) if is_stack else parts
        result = quantized.quantized(updated.tensor, some, piece.tensor)
        if is_stack:  # matrices that do not change keep their bytes
            for i in range(len(weight)):
                if not self._updated.is_matrix_changed(name, first + i):
                    result[i] = piece.tensor[i]
        return Updated(result, updated.kept)

    def _parts_of(self, tensor: str, device: torch.device) -> dict[Role, torch.Tensor]:
        """All parts of a quantized weight with the update, in the dtype and shape of the stored ones."""
        with self._one:
            known = self._new_parts.get(tensor)
        if known is not None:
            return known
        # Two threads that need them at the same time both compute them, with the same result.
        quantized, old = self._weights.quantized[tensor], self._weights.parts(tensor)
        new = quantized.codec.parts_that_hold(
            self._extremes(tensor, old, device), old, renew=self.writing.rounding == "nearest"
        )
        with self._one:
            self._new_parts[tensor] = new
        return new

    def _extremes(self, tensor: str, parts: dict[Role, torch.Tensor], device: torch.device) -> Extremes:
        """The smallest and the largest number in each block of a quantized weight with the update.

        NaN for a matrix of a stack that does not change.
        """
        quantized = self._weights.quantized[tensor]
        grid = quantized.codec.grid_of(quantized.shape)
        found = Extremes(torch.full(grid, torch.nan), torch.full(grid, torch.nan))
        with self._weights.reader(quantized.shard) as reader:
            entry = reader.entries[tensor]
            stack = len(entry.shape) == 3
            for first in range(entry.shape[0]) if stack else [0]:
                if stack and not self._updated.is_matrix_changed(tensor, first):
                    continue
                stored = reader.read(entry, first, 1) if stack else reader.read(entry)
                exact = self._weights.exact(tensor, stored, first)
                weight = self._updated.tensor(exact, entry, first, device, WrittenAs(torch.float32, "nearest")).tensor
                extremes, where = quantized.codec.extremes(weight, parts), slice(first, first + 1) if stack else ...
                found.lows[where], found.highs[where] = extremes.lows, extremes.highs
        return found


def _together(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Weight file -> the weight files that hold parts of its quantized weights, or weights of its parts."""
    found: dict[str, set[str]] = {}
    for one in checkpoint.weights.quantized.values():
        for shard in one.shards:
            # Fresh scales need the others, and the weight.
            for home in (one.shard, *(one.shards - {shard})):
                found.setdefault(home, set()).add(shard)
                found.setdefault(shard, set()).add(home)
    return found
