"""What a fold writes for each tensor and weight file: values with the update, dtypes, fresh FP8 scales, and headers."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import OptionError, WeightError
from surgery.format.header import Header, TensorEntry, make_header, resized
from surgery.format.views import View
from surgery.lossless.rounding import all_finite
from surgery.names import FACTORIZABLE_DTYPES
from surgery.updates.apply import UpdatedWeights
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import Checkpoint
from surgery.weights.fp8 import block_scales, quantize

#: What FP8 weights become when they are dequantized.
DENSE_DTYPE = "BF16"


class DenseTensors:
    """What each tensor of a checkpoint becomes with an update. Any number of threads may use it.

    A changed FP8 weight is quantized again with fresh scales. These may be stored before the weight, or in another shard, so
    they are computed from the whole weight when they are first needed, and kept.

    Args:
        checkpoint: the weights and their factors.
        update: what is added to them.
        to_dense: whether to write every FP8 weight as bfloat16, without its scales.

    Attributes:
        to_dense: as given.
    """

    def __init__(self, checkpoint: Checkpoint, update: Update, *, to_dense: bool) -> None:
        self._lossless = checkpoint.lossless
        self._weights = checkpoint.weights
        self._updated = UpdatedWeights(checkpoint, update)
        self.to_dense = to_dense
        quantized = self._weights.quantized
        self._weight_of = {scaled.scale: name for name, scaled in quantized.items()}
        self._together = _together(checkpoint)
        self._dropped: set[str] = set()
        if to_dense:
            self._dropped.update(self._weight_of, *(scaled.activations for scaled in quantized.values()))
        self._fresh: dict[str, torch.Tensor] = {}
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
        names = [entry.name for entry in header.tensors]
        if any(map(self._updated.is_added_to, names)):
            return False
        # Scales of an FP8 weight change with the weight, which may be in another file.
        weights = {*names, *(self._weight_of[name] for name in names if name in self._weight_of)}
        return self._lossless and not self.to_dense and not any(map(self._updated.is_scaled, weights))

    def touched(self, header: Header) -> dict[str, int | None]:
        """The tensors of a shard whose stored bytes are not copied unchanged.

        Returns:
            Tensor -> how many matrices of a stack to hold at a time; None for the whole tensor.

        Raises:
            OptionError: the adapter changes a tensor of a dtype that cannot be changed.
        """
        touched: dict[str, int | None] = {}
        updated, quantized = self._updated, self._weights.quantized
        for entry in header.tensors:
            targets, added = updated.targets(entry.name), updated.is_added_to(entry.name)
            changed = added or updated.is_scaled(entry.name)
            if added and entry.dtype not in FACTORIZABLE_DTYPES and not (self.to_dense and entry.name in quantized):
                raise OptionError(
                    f"the adapter changes {entry.name!r}, which is {entry.dtype}", hint="--dequantize, if that is FP8"
                )
            if entry.name in quantized:
                if changed or self.to_dense:
                    touched[entry.name] = View("stack").at_a_time(entry.shape, 4) if len(entry.shape) == 3 else None
            elif entry.name in self._dropped:
                touched[entry.name] = None
            elif entry.name in self._weight_of:
                if updated.is_scaled(self._weight_of[entry.name]):
                    touched[entry.name] = None
            elif targets and (changed or updated.is_residual(entry.name)):
                touched[entry.name] = targets[0].at_a_time
            elif added:
                touched[entry.name] = None
        return touched

    def header(self, header: Header) -> bytes:
        """The bytes of the header that is written for a shard with this header."""
        if not self.to_dense:
            return header.raw
        return make_header(self._written(header), header.metadata)

    def size(self, header: Header) -> int | None:
        """Bytes of the weight file that is written for a shard with this header; None if no tensor of it is left."""
        written = self._written(header)
        if header.tensors and not written:
            return None
        return len(self.header(header)) + sum(entry.nbytes for entry in written)

    def _written(self, header: Header) -> list[TensorEntry]:
        """The entries of the header that is written: dequantized weights in bfloat16, and without the scales of these."""
        kept = [entry for entry in header.tensors if entry.name not in self._dropped]
        to_dense = self._weights.quantized if self.to_dense else {}
        return [resized(entry, DENSE_DTYPE if entry.name in to_dense else entry.dtype) for entry in kept]

    def of(self, piece: TargetPiece, device: torch.device) -> torch.Tensor | None:
        """What is written for a piece of a weight file, on the CPU; None if it is left out.

        Args:
            piece: a tensor that is ``touched``, or some matrices of it. The result may take its memory, so that ``piece`` must
                not be read after.
            device: where the arithmetic runs; it must have float64.

        Raises:
            WeightError, ScalesError: the result is beyond the range of its dtype.
            FormatError: the tensor is not as the manifest describes it, or its correction is damaged.
        """
        name, quantized = piece.entry.name, self._weights.quantized
        if name in self._dropped:
            return None
        if name in self._weight_of:
            return self._fresh_scales(self._weight_of[name], device)
        if name not in quantized:
            return self._updated.tensor(piece.tensor, piece.entry, piece.first, device)
        weight = self._updated.tensor(self._weights.exact_piece(piece), piece.entry, piece.first, device)
        if self.to_dense:
            dense = weight.to(torch.bfloat16)
            if not all_finite(dense):
                raise WeightError(f"{name!r} is beyond the range of bfloat16", hint="fold without --dequantize")
            return dense
        return self._requantized(piece, weight, device)

    def _requantized(self, piece: TargetPiece, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Quantize an updated weight, float32, to FP8 with its fresh scales; ``piece`` is what it was made from."""
        name = piece.entry.name
        scales, block = self._fresh_scales(name, device), self._weights.quantized[name].block
        result = quantize(weight, scales[piece.first : piece.first + len(weight)] if weight.ndim == 3 else scales, block)
        if weight.ndim == 3:  # matrices of a stack that no scale changes keep their bytes
            for i in range(len(weight)):
                if not self._updated.is_matrix_scaled(name, piece.first + i):
                    result[i] = piece.tensor[i]
        return result

    def _fresh_scales(self, tensor: str, device: torch.device) -> torch.Tensor:
        """All scales of an FP8 weight with the update, in the dtype and shape of the stored ones."""
        with self._one:
            known = self._fresh.get(tensor)
        if known is not None:
            return known
        # Two threads that need them at the same time both compute them, with the same result.
        block, old = self._weights.quantized[tensor].block, self._weights.scales(tensor)
        fresh = old.clone()
        with self._weights.reader(self._updated.targets(tensor)[0].shard) as reader:
            entry = reader.entries[tensor]
            stack = len(entry.shape) == 3
            for first in range(entry.shape[0]) if stack else [0]:
                if stack and not self._updated.is_matrix_scaled(tensor, first):
                    continue
                stored = reader.read(entry, first, 1) if stack else reader.read(entry)
                weight = self._updated.tensor(self._weights.exact(tensor, stored, first), entry, first, device)
                where = slice(first, first + 1) if stack else ...
                fresh[where] = block_scales(weight, block, old[where])
        with self._one:
            self._fresh[tensor] = fresh
        return fresh


def _together(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Weight file -> the weight files that hold scales of its FP8 weights, or weights of its scales."""
    found: dict[str, set[str]] = {}
    for tensor, scaled in checkpoint.weights.quantized.items():
        if (home := checkpoint.shard_of(tensor)) is not None:
            found.setdefault(home, set()).add(scaled.shard)
            found.setdefault(scaled.shard, set()).add(home)
    return found
