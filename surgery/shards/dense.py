"""From what is stored to what is written: the dense weights of a fold, tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.device import as_memory_allows
from surgery.engine.walk import TargetPiece
from surgery.errors import FormatError, OptionError, ScalesError, WeightError
from surgery.format.factors import DAMAGED_HINT, FactorsReaders
from surgery.format.header import Header, TensorEntry, make_header, resized
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.views import View
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.lossless import Addition, approximate, join, rescale
from surgery.linalg.rounding import all_finite
from surgery.names import FACTORIZABLE_DTYPES
from surgery.timing import timed
from surgery.weights.base import Weights, check_entry, shard_path
from surgery.weights.fp8 import block_scales, quantize
from surgery.weights.quantization import Scaled
from surgery.weights.quantized import Dequantizer

#: What FP8 weights become when they are dequantized.
DENSE_DTYPE = "BF16"


class DenseWeights:
    """What each tensor of a factorized checkpoint becomes. A context manager, for any number of threads.

    A changed FP8 weight is quantized again with fresh scales. Those may stand before it, or in another shard, so they
    are computed when they are first asked for, from the whole weight, and kept.

    Args:
        manifest, factorized: of the checkpoint.
        weights: where its weight files are.
        quantized: its FP8 weights and where their scales are, see ``quantized_weights``.
        scales: by the key of a target.
        to_dense: turn every FP8 weight into bfloat16.
        additions: by the name of a tensor, what else is added to it before the rounding.
    """

    def __init__(
        self,
        manifest: Manifest,
        factorized: Path,
        weights: Weights,
        quantized: Mapping[str, Scaled],
        scales: Mapping[str, torch.Tensor],
        *,
        to_dense: bool,
        additions: Mapping[str, Addition],
    ) -> None:
        self._manifest = manifest
        self._scales = scales
        self._to_dense = to_dense
        self._additions = additions
        self._shards = {shard.source.file: shard for shard in manifest.shards}
        self._targets: dict[str, list[TargetRecord]] = {}
        for target in manifest.targets:
            for tensor in target.tensors:
                self._targets.setdefault(tensor, []).append(target)
        self._quantized = quantized
        self._weight_of = {scaled.scale: name for name, scaled in self._quantized.items()}
        self._together = _together(manifest, quantized)
        self._dropped: set[str] = set()
        if to_dense:
            self._dropped.update(self._weight_of, *(scaled.activations for scaled in self._quantized.values()))
        self._fresh: dict[str, torch.Tensor] = {}
        self._one = threading.Lock()
        self._open = ExitStack()
        self._dequantizer = self._open.enter_context(
            Dequantizer(lambda shard: shard_path(weights, self._shards, shard), weights.watch)
        )
        self._factors = self._open.enter_context(FactorsReaders(factorized, manifest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    @property
    def quantized(self) -> bool:
        """Whether any weight is FP8."""
        return bool(self._quantized)

    def files(self, shard: ShardRecord) -> list[str]:
        """The weight files of the source that one of them takes: itself, and those that FP8 weights share with it."""
        name = shard.source.file
        return [name, *sorted(self._together.get(name, set()) - {name})]

    def forget(self, file: str) -> None:
        """A weight file of the source may not be there any more."""
        self._dequantizer.forget(file)

    def check(self, headers: Iterable[Header]) -> None:
        """Find out before any work what ``touched`` would find out of the shards with these headers."""
        for header in headers:
            self.touched(header)

    def keeps(self, shard: ShardRecord, header: Header) -> bool:
        """Whether a weight file, with this header, comes out as it was in the source."""
        if any(entry.name in self._additions for entry in header.tensors):
            return False
        names = [entry.name for entry in header.tensors]
        # Scales of FP8 weights in another file change with these.
        weights = {*names, *(self._weight_of[name] for name in names if name in self._weight_of)}
        targets = [target for tensor in weights for target in self._targets.get(tensor, [])]
        return self._manifest.lossless and not self._to_dense and not any(map(self._changed, targets))

    def touched(self, header: Header) -> dict[str, int | None]:
        """The tensors of a shard that do not keep their bytes, and how many matrices of each to hold at a time.

        Raises:
            OptionError: the adapter changes one whose dtype it cannot change.
        """
        touched: dict[str, int | None] = {}
        for entry in header.tensors:
            targets = self._targets.get(entry.name, [])
            added = entry.name in self._additions
            changed = added or any(self._changed(target) for target in targets)
            if added and entry.dtype not in FACTORIZABLE_DTYPES and not (self._to_dense and entry.name in self._quantized):
                raise OptionError(
                    f"the adapter changes {entry.name!r}, which is {entry.dtype}", hint="--dequantize, if that is FP8"
                )
            if entry.name in self._quantized:
                if changed or self._to_dense:
                    touched[entry.name] = View("stack").at_a_time(entry.shape, 4) if len(entry.shape) == 3 else None
            elif entry.name in self._dropped:
                touched[entry.name] = None
            elif entry.name in self._weight_of:
                if any(self._changed(target) for target in self._targets.get(self._weight_of[entry.name], [])):
                    touched[entry.name] = None
            elif targets and (changed or self._is_residual(entry.name)):
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
        if not self._to_dense:
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
        to_dense = self._quantized if self._to_dense else {}
        return [resized(entry, DENSE_DTYPE if entry.name in to_dense else entry.dtype) for entry in kept]

    def folded(self, piece: TargetPiece, device: torch.device) -> torch.Tensor | None:
        """What is written for a tensor, or for some matrices of a stack, on the CPU; None for nothing.

        Args:
            piece: its memory may be used for the result.
            device: where the arithmetic runs; it must have float64.
        """
        name = piece.entry.name
        if name in self._dropped:
            return None
        if name in self._weight_of:
            return self._fresh_scales(self._weight_of[name], device)
        if name not in self._quantized:
            return self._dense(piece.tensor, piece.entry, piece.first, device)
        scaled = self._quantized[name]
        weight = self._dense(self._dequantizer.weight(piece.tensor, piece.first, scaled), piece.entry, piece.first, device)
        if self._to_dense:
            dense = weight.to(torch.bfloat16)
            if not all_finite(dense):
                raise WeightError(f"{name!r} is beyond the range of bfloat16", hint="fold without --dequantize")
            return dense
        scales = self._fresh_scales(name, device)
        result = quantize(weight, scales[piece.first : piece.first + len(weight)] if weight.ndim == 3 else scales, scaled.block)
        if weight.ndim == 3:  # a stack: matrices whose scales are all 1 keep their bytes
            for i in range(len(weight)):
                if not self._matrix_changed(name, piece.first + i):
                    result[i] = piece.tensor[i]
        return result

    def _is_residual(self, tensor: str) -> bool:
        """Whether a tensor of a target is stored as its residual; an alias is stored as it was."""
        return self._manifest.layout == "residual" and self._targets[tensor][0].tensor == tensor

    def _changed(self, target: TargetRecord) -> bool:
        return bool((self._scales[target.key] != 1).any())

    def _matrix_changed(self, tensor: str, index: int) -> bool:
        return any(
            bool((self._scales[target.key].view(-1, target.rank)[index] != 1).any()) for target in self._targets.get(tensor, [])
        )

    def _fresh_scales(self, tensor: str, device: torch.device) -> torch.Tensor:
        """The scales of an FP8 weight after its change, as a whole, in the dtype and shape of those before."""
        with self._one:
            known = self._fresh.get(tensor)
        if known is not None:
            return known
        # Two threads that find them missing at once both compute them: the same.
        scaled = self._quantized[tensor]
        old = self._dequantizer.scales(scaled)
        fresh = old.clone()
        with self._dequantizer.reader(self._targets[tensor][0].shard) as reader:
            entry = reader.entries[tensor]
            stack = len(entry.shape) == 3
            for first in range(entry.shape[0]) if stack else [0]:
                if stack and not self._matrix_changed(tensor, first):
                    continue
                stored = reader.read(entry, first, 1) if stack else reader.read(entry)
                weight = self._dense(self._dequantizer.weight(stored, first, scaled), entry, first, device)
                where = slice(first, first + 1) if stack else ...
                fresh[where] = block_scales(weight, scaled.block, old[where])
        with self._one:
            self._fresh[tensor] = fresh
        return fresh

    def _dense(self, weight: torch.Tensor, entry: TensorEntry, first: int, device: torch.device) -> torch.Tensor:
        """``weight``, that of a tensor or of its matrices from ``first`` on, in working precision, with the scaled
        directions of its targets. Its memory may be used for the result."""
        addition = self._additions.get(entry.name)
        result = weight
        targets = self._targets.get(entry.name, [])
        if addition is not None and not (len(targets) == 1 and targets[0].slice is None):
            # What is in no slice; the slices are computed from the weight below.
            flat = weight.view(len(weight), -1)
            result = self._computed(flat, device, lambda w, to: rescale(w, None, None, addition.to(to))).view(weight.shape)
            _check_finite(result, f"the adapter pushes {entry.name!r}", None)
        for target in targets:
            check_entry(entry, target)
            if not self._is_residual(entry.name) and not self._changed(target) and addition is None:
                continue
            view = target.seen_as
            part, residual = None if addition is None else _of_slice(addition, target), self._is_residual(entry.name)
            matrices = list(view.matrices(weight))
            dense = [
                self._dense_matrix(matrix, target, i, device, part, residual=residual)
                for i, matrix in enumerate(matrices, first)
            ]
            if view.slice is not None:
                view.store(torch.stack(dense), result)
            elif len(dense) == 1:
                return dense[0].view(weight.shape)
            else:
                for matrix, new in zip(matrices, dense, strict=True):
                    if new is not matrix:  # computed elsewhere
                        matrix.copy_(new)
        return result

    @staticmethod
    def _computed(
        weight: torch.Tensor, device: torch.device, compute: Callable[[torch.Tensor, torch.device], torch.Tensor]
    ) -> torch.Tensor:
        """Of one weight, on the CPU; worked on where there is memory for it."""

        def on(some: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
            with timed("copy"):
                there = some[0].to(where, non_blocking=True)
            with timed("fold"):
                result = compute(there, where)
            with timed("copy"):
                return [result.cpu()]

        return as_memory_allows(on, [weight], device)[0]

    def _dense_matrix(
        self,
        weight: torch.Tensor,
        target: TargetRecord,
        index: int,
        device: torch.device,
        addition: Addition | None = None,
        *,
        residual: bool,
    ) -> torch.Tensor:
        """One dense matrix (m, n), on the CPU, from its residual or from its weight, in whose memory it may be."""
        scales = self._scales[target.key].view(-1, target.rank)[index]
        changed = bool((scales != 1).any())
        if not residual and not changed and addition is None:
            return weight
        with self._factors.of(target) as reader:
            parts = reader.factors(target, index)
            correction = reader.correction(target, index) if residual and self._manifest.lossless else None

        def compute(there: torch.Tensor, where: torch.device) -> torch.Tensor:
            kept, new = parts.to(where), scales if changed else None
            added = None if addition is None else addition.to(where)
            # On a GPU the weight here stays as it was until the result comes over, should the memory not suffice.
            if not residual:
                return rescale(there, kept, new, added, out=there)
            if correction is None:
                return approximate(there, kept, new, added, out=there)
            return join(there, kept, correction, new, added, out=there)

        try:
            result = self._computed(weight, device, compute)
        except CorruptCorrection as error:
            what = f"{target.shard}: the correction of {target.key!r} is damaged ({error})"
            raise FormatError(what, hint=DAMAGED_HINT) from error
        if changed or addition is not None:
            what = f"the scales of {target.key!r} push" if addition is None else f"scales and adapter push {target.key!r}"
            _check_finite(result, what, scales)
        elif correction is None and not all_finite(result):
            raise WeightError(
                f"{target.shard}: without its correction {target.key!r} is beyond the range of its dtype",
                hint="factorize again, without --no-correction",
            )
        return result


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


def _check_finite(weight: torch.Tensor, what: str, scales: torch.Tensor | None) -> None:
    if not all_finite(weight):
        raise ScalesError(
            f"{what} weights beyond the range of {str(weight.dtype).removeprefix('torch.')}",
            got=None if scales is None else f"scales of up to {scales.abs().max().item():.3g}",
            hint="the training diverged: take an earlier checkpoint",
        )


def _of_slice(addition: Addition, target: TargetRecord) -> Addition:
    """The part of what is added to a tensor that concerns a target."""
    part = target.slice
    if part is None:
        return addition
    sides = [addition.left, addition.right]
    phase = torch.arange(len(sides[part.axis])) % part.period
    sides[part.axis] = sides[part.axis][(phase >= part.start) & (phase < part.stop)]
    return Addition(*sides)
