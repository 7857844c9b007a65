"""Weights + update -> what is written: the dense tensors of a fold, with their dtypes, their FP8 scales and their headers."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from surgery.engine.walk import TargetPiece
from surgery.errors import OptionError, WeightError
from surgery.format.header import Header, TensorEntry, make_header, resized
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord
from surgery.format.views import View
from surgery.linalg.rounding import all_finite
from surgery.names import FACTORIZABLE_DTYPES
from surgery.updates.apply import UpdatedWeights
from surgery.updates.protocol import Update
from surgery.weights.checkpoint import FactorizedWeights
from surgery.weights.fp8 import block_scales, quantize
from surgery.weights.quantization import Scaled

#: What FP8 weights become when they are dequantized.
DENSE_DTYPE = "BF16"


class DenseTensors:
    """What each tensor of a factorized checkpoint becomes under an update. For any number of threads.

    A changed FP8 weight is quantized again with fresh scales. Those may stand before it, or in another shard, so they
    are computed when they are first asked for, from the whole weight, and kept.

    Args:
        checkpoint: the weights and their factors.
        update: what is added to them.
        to_dense: turn every FP8 weight into bfloat16.

    Attributes:
        to_dense: as given.
    """

    def __init__(self, checkpoint: FactorizedWeights, update: Update, *, to_dense: bool) -> None:
        self._manifest = checkpoint.manifest
        self._weights = checkpoint.weights
        self._updated = UpdatedWeights(checkpoint, update)
        self.to_dense = to_dense
        quantized = self._weights.quantized
        self._weight_of = {scaled.scale: name for name, scaled in quantized.items()}
        self._together = _together(self._manifest, quantized)
        self._dropped: set[str] = set()
        if to_dense:
            self._dropped.update(self._weight_of, *(scaled.activations for scaled in quantized.values()))
        self._fresh: dict[str, torch.Tensor] = {}
        self._one = threading.Lock()

    def files(self, shard: ShardRecord) -> list[str]:
        """The weight files of the source that one of them takes: itself, and those that FP8 weights share with it."""
        name = shard.source.file
        return [name, *sorted(self._together.get(name, set()) - {name})]

    def check(self, headers: Iterable[Header]) -> None:
        """Find out before any work what ``touched`` would find out of the shards with these headers."""
        for header in headers:
            self.touched(header)

    def keeps(self, header: Header) -> bool:
        """Whether the weight file with this header comes out as it was in the source."""
        names = [entry.name for entry in header.tensors]
        if any(map(self._updated.is_added_to, names)):
            return False
        # Scales of FP8 weights in another file change with these.
        weights = {*names, *(self._weight_of[name] for name in names if name in self._weight_of)}
        return self._manifest.lossless and not self.to_dense and not any(map(self._updated.is_scaled, weights))

    def touched(self, header: Header) -> dict[str, int | None]:
        """The tensors of a shard that do not keep their bytes, and how many matrices of each to hold at a time.

        Raises:
            OptionError: the adapter changes one whose dtype it cannot change.
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

    def missing(self, shard: ShardRecord, header: Header) -> list[str]:
        """The targets of a shard, and their aliases there, that it does not have."""
        there = {entry.name for entry in header.tensors}
        return sorted(self._manifest.edited_in(shard.source.file).keys() - there)

    def header(self, header: Header) -> bytes:
        """The header of what is written for a shard with this one."""
        if not self.to_dense:
            return header.raw
        return make_header(self._written(header), header.metadata)

    def size(self, header: Header) -> int | None:
        """How long the weight file is that is written for a shard with this header; None if nothing is left of it."""
        written = self._written(header)
        if header.tensors and not written:
            return None
        return len(self.header(header)) + sum(entry.nbytes for entry in written)

    def _written(self, header: Header) -> list[TensorEntry]:
        """The tensors of a shard that are written, not the scales of what is dequantized and of its activations."""
        kept = [entry for entry in header.tensors if entry.name not in self._dropped]
        to_dense = self._weights.quantized if self.to_dense else {}
        return [resized(entry, DENSE_DTYPE if entry.name in to_dense else entry.dtype) for entry in kept]

    def of(self, piece: TargetPiece, device: torch.device) -> torch.Tensor | None:
        """What is written for a tensor, or for some matrices of a stack, on the CPU; None for nothing.

        Args:
            piece: its memory may be used for the result, and is not to be read any more.
            device: where the arithmetic runs; it must have float64.
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
        """An FP8 weight after its change, float32, as FP8 with its fresh scales."""
        name = piece.entry.name
        scales, block = self._fresh_scales(name, device), self._weights.quantized[name].block
        result = quantize(weight, scales[piece.first : piece.first + len(weight)] if weight.ndim == 3 else scales, block)
        if weight.ndim == 3:  # a stack: matrices whose scales are all 1 keep their bytes
            for i in range(len(weight)):
                if not self._updated.is_matrix_scaled(name, piece.first + i):
                    result[i] = piece.tensor[i]
        return result

    def _fresh_scales(self, tensor: str, device: torch.device) -> torch.Tensor:
        """The scales of an FP8 weight after its change, as a whole, in the dtype and shape of those before."""
        with self._one:
            known = self._fresh.get(tensor)
        if known is not None:
            return known
        # Two threads that find them missing at once both compute them: the same.
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


def _together(manifest: Manifest, quantized: Mapping[str, Scaled]) -> dict[str, set[str]]:
    """Weight file -> those that hold scales of its FP8 weights, or the weights of its scales."""
    homes = {target.tensor: target.shard for target in manifest.targets}
    homes |= {skipped.tensor: skipped.shard for skipped in manifest.skipped}
    found: dict[str, set[str]] = {}
    for tensor, scaled in quantized.items():
        if tensor in homes:
            found.setdefault(homes[tensor], set()).add(scaled.shard)
            found.setdefault(scaled.shard, set()).add(homes[tensor])
    return found
