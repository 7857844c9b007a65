"""From what is stored to what is written: the dense weights of a fold, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from surgery.device import as_memory_allows
from surgery.engine.pipeline import TargetPiece
from surgery.errors import FormatError, OptionError, ScalesError, SourceError
from surgery.format.factors import FactorsReaders
from surgery.format.manifest import Manifest, ShardRecord, TargetRecord
from surgery.format.safetensors import Header, make_header, resized
from surgery.linalg.correction import CorruptCorrection
from surgery.linalg.fp8 import block_scales, quantize
from surgery.linalg.lossless import Addition, approximate, join, rescale
from surgery.linalg.views import View
from surgery.names import FACTORIZABLE_DTYPES
from surgery.operations.base import BaseWeights, OwnWeights, check_entry, own_config, shard_path
from surgery.operations.quantized import Dequantizer
from surgery.planning.quantization import FP8, Scaled

#: What FP8 weights become when they are dequantized.
DENSE_DTYPE = "BF16"


class DenseWeights:
    """What each tensor of a factorized checkpoint becomes. A context manager, for one thread.

    A changed FP8 weight is quantized again with fresh scales. Those may stand before it, or in another shard, so they
    are computed when they are first asked for, from the whole weight, and kept.

    Args:
        manifest, factorized: of the checkpoint.
        weights: where its weight files are.
        scales: by the key of a target.
        device: where the arithmetic runs; it must have float64.
        to_dense: turn every FP8 weight into bfloat16.
        additions: by the name of a tensor, what else is added to it before the rounding.
    """

    def __init__(
        self,
        manifest: Manifest,
        factorized: Path,
        weights: OwnWeights | BaseWeights,
        scales: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        to_dense: bool,
        additions: Mapping[str, Addition],
    ) -> None:
        self._manifest = manifest
        self._scales = scales
        self._device = device
        self._to_dense = to_dense
        self._additions = additions
        self._shards = {shard.source.file: shard for shard in manifest.shards}
        self._targets: dict[str, list[TargetRecord]] = {}
        for target in manifest.targets:
            self._targets.setdefault(target.tensor, []).append(target)
        fp8 = isinstance(weights, BaseWeights) and (to_dense or any(target.dtype == FP8 for target in manifest.targets))
        self._quantized: Mapping[str, Scaled] = {}
        if fp8 and isinstance(weights, BaseWeights):
            self._quantized = weights.quantized(own_config(factorized, manifest))
        if lost := [
            target.tensor for target in manifest.targets if target.dtype == FP8 and target.tensor not in self._quantized
        ]:
            raise SourceError(f"the base is not that of this overlay: {lost[0]!r} is not FP8 there")
        self._weight_of = {scaled.scale: name for name, scaled in self._quantized.items()}
        self._fresh: dict[str, torch.Tensor] = {}
        self._open = ExitStack()
        self._dequantizer = self._open.enter_context(Dequantizer(lambda shard: shard_path(weights, self._shards, shard)))
        self._factors = self._open.enter_context(FactorsReaders(factorized, manifest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    @property
    def quantized(self) -> bool:
        """Whether any weight is FP8."""
        return bool(self._quantized)

    def keeps(self, shard: ShardRecord, header: Header) -> bool:
        """Whether a weight file, with this header, comes out as it was in the source."""
        if any(entry.name in self._additions for entry in header.tensors):
            return False
        weights = [tensor for tensor, scaled in self._quantized.items() if scaled.shard == shard.source.file]
        targets = [target for tensor in weights for target in self._targets.get(tensor, [])]
        targets += self._manifest.targets_of(shard.source.file)
        return self._manifest.lossless and not self._to_dense and not any(map(self._changed, targets))

    def touched(self, header: Header) -> dict[str, int | None]:
        """The tensors of a shard that do not keep their bytes, and how many matrices of each to hold at a time."""
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
            elif entry.name in self._weight_of:
                weight = self._weight_of[entry.name]
                if self._to_dense or any(self._changed(target) for target in self._targets.get(weight, [])):
                    touched[entry.name] = None
            elif targets and (changed or self._manifest.layout == "residual"):
                touched[entry.name] = targets[0].at_a_time
            elif added:
                touched[entry.name] = None
        return touched

    def missing(self, shard: ShardRecord, header: Header) -> list[str]:
        """The targets of a shard that it does not have."""
        there = {entry.name for entry in header.tensors}
        return sorted({t.tensor for t in self._manifest.targets_of(shard.source.file)} - there)

    def header(self, header: Header) -> bytes:
        """The header of what is written for a shard with this one."""
        if not self._to_dense:
            return header.raw
        kept = [entry for entry in header.tensors if entry.name not in self._weight_of]
        dtypes = {entry.name: DENSE_DTYPE if entry.name in self._quantized else entry.dtype for entry in kept}
        return make_header([resized(entry, dtypes[entry.name]) for entry in kept], header.metadata)

    def drops(self, tensor: str) -> bool:
        """Whether a tensor is not written at all: scales of what is dequantized."""
        return self._to_dense and tensor in self._weight_of

    def folded(self, piece: TargetPiece) -> torch.Tensor | None:
        """What is written for a tensor, or for some matrices of a stack, on the CPU; None for nothing."""
        name = piece.entry.name
        if name in self._weight_of:
            return None if self._to_dense else self._fresh_scales(self._weight_of[name])
        if name not in self._quantized:
            return self._dense(piece.tensor, piece)
        scaled = self._quantized[name]
        weight = self._dense(self._dequantizer.weight(piece.tensor, piece.first, scaled), piece)
        if self._to_dense:
            return weight.to(torch.bfloat16)
        scales = self._fresh_scales(name)
        result = quantize(weight, scales[piece.first : piece.first + len(weight)] if weight.ndim == 3 else scales, scaled.block)
        if weight.ndim == 3:  # a stack: matrices whose scales are all 1 keep their bytes
            for i in range(len(weight)):
                if not self._matrix_changed(name, piece.first + i):
                    result[i] = piece.tensor[i]
        return result

    def _changed(self, target: TargetRecord) -> bool:
        return bool((self._scales[target.key] != 1).any())

    def _matrix_changed(self, tensor: str, index: int) -> bool:
        return any(
            bool((self._scales[target.key].view(-1, target.rank)[index] != 1).any()) for target in self._targets.get(tensor, [])
        )

    def _fresh_scales(self, tensor: str) -> torch.Tensor:
        """The scales of an FP8 weight after its change, as a whole, in the dtype and shape of those before."""
        if tensor not in self._fresh:
            scaled = self._quantized[tensor]
            old = self._dequantizer.scales(scaled)
            reader, entries = self._dequantizer.reader(self._targets[tensor][0].shard)
            entry = entries[tensor]
            fresh = old.clone()
            for first in range(entry.shape[0]) if len(entry.shape) == 3 else [0]:
                stack = len(entry.shape) == 3
                if stack and not self._matrix_changed(tensor, first):
                    continue
                stored = reader.read(entry, first, 1) if stack else reader.read(entry)
                piece = TargetPiece(entry, first, stored)
                weight = self._dense(self._dequantizer.weight(stored, first, scaled), piece)
                where = slice(first, first + 1) if stack and scaled.block else slice(None)
                fresh[where] = block_scales(weight, scaled.block, old[where])
            self._fresh[tensor] = fresh
        return self._fresh[tensor]

    def _dense(self, weight: torch.Tensor, piece: TargetPiece) -> torch.Tensor:
        """``weight``, that of the piece in working precision, with the scaled directions of its targets."""
        addition = self._additions.get(piece.entry.name)
        result: torch.Tensor | None = None
        targets = self._targets.get(piece.entry.name, [])
        if addition is not None and not (len(targets) == 1 and targets[0].slice is None):
            # What is in no slice; the slices are computed from the weight below.
            flat = weight.view(len(weight), -1)
            result = self._computed([flat], lambda w, to: rescale(w, None, None, addition.to(to))).view(weight.shape)
            _check_finite(result, f"the adapter pushes {piece.entry.name!r}", None)
        for target in targets:
            check_entry(piece.entry, target)
            if self._manifest.layout == "overlay" and not self._changed(target) and addition is None:
                continue
            view = target.seen_as
            part = None if addition is None else _of_slice(addition, target)
            matrices = enumerate(view.matrices(weight))
            dense = [self._dense_matrix(matrix, target, piece.first + i, part) for i, matrix in matrices]
            if view.slice is None and len(dense) == 1:
                return dense[0].view(weight.shape)
            result = weight.clone() if result is None else result
            view.store(torch.stack(dense), result)
        return weight if result is None else result

    def _computed(
        self, weights: list[torch.Tensor], compute: Callable[[torch.Tensor, torch.device], torch.Tensor]
    ) -> torch.Tensor:
        """Of one weight, on the CPU; worked on where there is memory for it."""

        def on(some: Sequence[torch.Tensor], where: torch.device) -> list[torch.Tensor]:
            return [compute(some[0].to(where), where).cpu()]

        return as_memory_allows(on, weights, self._device)[0]

    def _dense_matrix(
        self, weight: torch.Tensor, target: TargetRecord, index: int, addition: Addition | None = None
    ) -> torch.Tensor:
        """One dense matrix (m, n), on the CPU, from its residual or, for an overlay, from its weight."""
        scales = self._scales[target.key].view(-1, target.rank)[index]
        overlay, changed = self._manifest.layout == "overlay", bool((scales != 1).any())
        if overlay and not changed and addition is None:
            return weight
        reader = self._factors.of(target)
        parts = reader.factors(target, index)
        correction = reader.correction(target, index) if not overlay and self._manifest.lossless else None

        def compute(there: torch.Tensor, where: torch.device) -> torch.Tensor:
            kept, new = parts.to(where), scales if changed else None
            added = None if addition is None else addition.to(where)
            if overlay:
                return rescale(there, kept, new, added)
            if correction is None:
                return approximate(there, kept, new, added)
            return join(there, kept, correction, new, added)

        try:
            result = self._computed([weight], compute)
        except CorruptCorrection as error:
            raise FormatError(f"{target.shard}: the correction of {target.key!r} is damaged ({error})") from error
        if changed or addition is not None:
            what = f"the scales of {target.key!r} push" if addition is None else f"scales and adapter push {target.key!r}"
            _check_finite(result, what, scales)
        return result


def _check_finite(weight: torch.Tensor, what: str, scales: torch.Tensor | None) -> None:
    # A minimum or maximum of NaN is NaN: one pass, many times faster than asking each number.
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight)):
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
