"""What is written for each tensor and weight file with an update: values, dtypes, FP8 scales, and headers."""

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
from surgery.updates.apply import Updated, UpdatedWeights, WrittenAs
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint
from surgery.weights.fp8 import Fp8Grid, block_maxima, block_scales, quantize, scales_that_hold

#: What FP8 weights become when they are dequantized.
DENSE_DTYPE = "BF16"


@dataclass(frozen=True, slots=True)
class Writing:
    """How weights are written.

    Attributes:
        rounding: of changed matrices: ``nearest``, ``directions`` (``surgery.lossless.directions``), or None for the one that
            keeps their update: ``directions`` for FP8, and for 16-bit weights where ``nearest`` would keep less than 99 %.
        to_dense: whether every FP8 weight becomes bfloat16, without its scales.
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

    A changed FP8 weight is quantized again, with new scales for the blocks that need them. These may be stored before the
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
        self._weight_of = {scaled.scale: name for name, scaled in quantized.items()}
        self._together = _together(checkpoint)
        self._dropped: set[str] = set()
        if writing.to_dense:
            self._dropped.update(self._weight_of, *(scaled.activations for scaled in quantized.values()))
        self._new_scales: dict[str, torch.Tensor] = {}
        self._one = threading.Lock()

    def files(self, shard: str) -> list[str]:
        """The weight files that the fold of a shard reads: itself, and those that share FP8 weights with it."""
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
        """Whether the numbers of a tensor change. Scales of an FP8 weight do with the weight, which may be in another file."""
        return self._updated.is_changed(self._weight_of.get(tensor, tensor))

    def _dtype_of(self, entry: TensorEntry) -> str:
        """The dtype that a tensor is written in, as safetensors names it."""
        if entry.name in self._weights.quantized:
            return (self.writing.dtype or DENSE_DTYPE) if self.writing.to_dense else entry.dtype
        is_scale = entry.name in self._weight_of
        return (self.writing.dtype or entry.dtype) if entry.dtype in FACTORIZABLE_DTYPES and not is_scale else entry.dtype

    def touched(self, header: Header) -> dict[str, int | None]:
        """The tensors of a shard whose stored bytes are not copied unchanged.

        Returns:
            Tensor -> how many matrices of a stack to hold at a time; None for the whole tensor.

        Raises:
            OptionError: the update changes a tensor of a dtype that cannot be changed.
        """
        touched: dict[str, int | None] = {}
        for entry in header.tensors:
            name, is_fp8 = entry.name, entry.name in self._weights.quantized
            targets, is_changed = self._updated.targets(name), self._is_changed(name)
            if self._updated.change(name) is not None and entry.dtype not in FACTORIZABLE_DTYPES and not is_fp8:
                raise OptionError(
                    f"the adapter changes {name!r}, which is {entry.dtype}",
                    expected=", ".join(FACTORIZABLE_DTYPES) + ", or FP8 with scales",
                )
            if name in self._dropped or name in self._weight_of:
                if name in self._dropped or is_changed:
                    touched[name] = None
            elif is_changed or self._dtype_of(entry) != entry.dtype or (targets and self._updated.is_residual(name)):
                touched[name] = self._at_a_time(entry, is_fp8)
        return touched

    def _at_a_time(self, entry: TensorEntry, is_fp8: bool) -> int | None:
        """How many matrices of a stack to hold at a time; None for the whole tensor."""
        targets, change = self._updated.targets(entry.name), self._updated.change(entry.name)
        if change is not None and not change.is_stack:
            return None
        if targets and not is_fp8:
            return targets[0].at_a_time
        return View("stack").at_a_time(entry.shape, 4) if len(entry.shape) == 3 else None

    def header(self, header: Header) -> bytes:
        """The bytes of the header that is written for a shard with this header."""
        written = self._written(header)
        if written == list(header.tensors):
            return header.raw
        return make_header(written, header.metadata)

    def size(self, header: Header) -> int | None:
        """Bytes of the weight file that is written for a shard with this header; None if no tensor of it is left."""
        written = self._written(header)
        if header.tensors and not written:
            return None
        return len(self.header(header)) + sum(entry.nbytes for entry in written)

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
        if entry.name in self._weight_of:
            return Updated(self._scales_of(self._weight_of[entry.name], device))
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
        """An FP8 weight with the update, quantized again.

        Args:
            piece: what is stored of it.
            weight: the numbers that this stands for, float32.
        """
        name, first = piece.entry.name, piece.first
        scales, block = self._scales_of(name, device), self._weights.quantized[name].block
        is_stack, (m, n) = weight.ndim == 3, weight.shape[-2:]

        def grid(index: int, part: Slice | None) -> Grid:
            return Fp8Grid(scales[index] if is_stack else scales, block, (m, n), part)

        written = WrittenAs(torch.float32, self.writing.rounding or "directions", grid)
        updated = self._updated.tensor(weight, piece.entry, first, device, written)
        updated.check()
        result = quantize(updated.tensor, scales[first : first + len(weight)] if is_stack else scales, block)
        if is_stack:  # matrices that do not change keep their bytes
            for i in range(len(weight)):
                if not self._updated.is_matrix_changed(name, first + i):
                    result[i] = piece.tensor[i]
        return Updated(result, updated.kept)

    def _scales_of(self, tensor: str, device: torch.device) -> torch.Tensor:
        """All scales of an FP8 weight with the update, in the dtype and shape of the stored ones."""
        with self._one:
            known = self._new_scales.get(tensor)
        if known is not None:
            return known
        # Two threads that need them at the same time both compute them, with the same result.
        block, old = self._weights.quantized[tensor].block, self._weights.scales(tensor)
        new = old.clone()
        shard = self._checkpoint.shard_of(tensor)
        assert shard is not None  # the walk has met it
        with self._weights.reader(shard) as reader:
            entry = reader.entries[tensor]
            stack = len(entry.shape) == 3
            for first in range(entry.shape[0]) if stack else [0]:
                if stack and not self._updated.is_matrix_changed(tensor, first):
                    continue
                stored = reader.read(entry, first, 1) if stack else reader.read(entry)
                exact = self._weights.exact(tensor, stored, first)
                weight = self._updated.tensor(exact, entry, first, device, WrittenAs(torch.float32, "nearest")).tensor
                where = slice(first, first + 1) if stack else ...
                if self.writing.rounding == "nearest":
                    new[where] = block_scales(weight, block, old[where])
                else:
                    new[where] = scales_that_hold(block_maxima(weight, block), old[where])
        with self._one:
            self._new_scales[tensor] = new
        return new


def _together(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Weight file -> the weight files that hold scales of its FP8 weights, or weights of its scales."""
    found: dict[str, set[str]] = {}
    for tensor, scaled in checkpoint.weights.quantized.items():
        if (home := checkpoint.shard_of(tensor)) is not None:
            found.setdefault(home, set()).add(scaled.shard)
            found.setdefault(scaled.shard, set()).add(home)
    return found
