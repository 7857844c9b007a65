"""Put the scales of a factorized checkpoint into a loaded model as its only trainable parameters."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError, SourceError, SurgeryWarning
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest, TargetRecord
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.scales import read_scales, write_scales
from surgery.linalg.lossless import Factors
from surgery.memory import bytes_of
from surgery.names import FACTORIZABLE_DTYPES
from surgery.training.carriers import Carrier, Layer, carriers_of, is_sharded, places_of, terms_of, unwrapped
from surgery.training.lowrank import Adding, LowRankPath, Shadow, Term
from surgery.training.placement import Place, Positions

_NAME = "surgery_scale"

#: By how much the leading part of a quantized weight may be off: in four bits 1 % of a large matrix, 16 % of one of 24 rows;
#: of a residual or another model it is 100 % or more.
_QUANTIZATION_ERROR = 0.3


class Scales:
    """The scales attached to a model; made by ``attach``."""

    def __init__(
        self,
        manifest: Manifest,
        homes: dict[str, tuple[LowRankPath, int]],
        handles: list[Any],
        owners: list[tuple[nn.Module, str]],
    ) -> None:
        self._manifest = manifest
        self._homes = homes
        self._handles = handles
        self._owners = owners

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to hand to an optimizer: ``g - 1`` of each target, float32 (B k,). Use no weight decay."""
        return (path.delta(i) for path, i in self._homes.values())

    def values(self) -> dict[str, torch.Tensor]:
        """Key of a target -> ``g``, float32 (k,), or (B, k) for a stack, on the CPU.

        Where they are sharded over processes, all of these must ask together.
        """
        shapes = {target.key: target.scales_shape for target in self._manifest.targets}
        return {key: 1 + _whole(path.delta(i)).reshape(shapes[key]) for key, (path, i) in self._homes.items()}

    def save(self, path: str | Path) -> None:
        """Write the scales file that ``surgery fold`` takes.

        In a distributed run all processes must call it, and the first one writes.

        Warns:
            SurgeryWarning: the model was run, and some scales had no part in it.
        """
        unused = sorted(key for key, (home, _) in self._homes.items() if not home.used)
        if unused and len(unused) < len(self._homes):
            warnings.warn(
                f"the scales of {unused[0]!r} and of {len(unused) - 1} other targets were never used: "
                "the model does not run these layers, or not by calling them",
                SurgeryWarning,
                stacklevel=2,
            )
        values = self.values()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            write_scales(Path(path), values, self._manifest.fingerprint)

    def load(self, path: str | Path) -> None:
        """Take the values of a scales file; errors as for ``surgery.format.scales.read_scales``."""
        values = read_scales(Path(path), self._manifest)
        with torch.no_grad():
            for key, (home, i) in self._homes.items():
                delta: Any = home.delta(i)
                value = values[key].flatten() - 1
                if is_sharded(delta):
                    from torch.distributed.tensor import distribute_tensor

                    value = distribute_tensor(value.to(delta.device), delta.device_mesh, delta.placements)
                delta.copy_(value)

    def detach(self) -> None:
        """Take the scales out of the model again. Its weights are what they were; they stay frozen."""
        for handle in self._handles:
            handle.remove()
        for owner, name in self._owners:
            delattr(owner, name)
        self._handles.clear()
        self._owners.clear()


def _whole(delta: nn.Parameter) -> torch.Tensor:
    """A parameter's values on the CPU, gathered if it is sharded over processes."""
    value: Any = delta.detach()
    gathered: torch.Tensor = value.full_tensor() if is_sharded(value) else value
    return gathered.float().cpu()


def attach(model: nn.Module, factorized: str | Path) -> Scales:
    """Freeze a model and make the scales of a factorized checkpoint its only trainable parameters.

    The model may have been loaded from the factorized folder (residual layout) or from the original weights; which,
    is told by the bytes of its weights, target by target. A weight that is quantized in memory is told by its leading
    singular values, which quantization hardly changes. Untouched scales on the original weights change no bit of what
    the model computes.

    Names and shapes of a transformers model are followed through its own conversion: experts that it stacks, and weights
    that it joins or takes apart. In a model with PEFT's adapters, these stay as trainable as they are.

    Args:
        model: in the dtype of the checkpoint or a wider one, or quantized, on any device or several. Not yet sharded.
        factorized: a folder written by ``surgery.factorize``.

    Raises:
        SourceError: the model's weights are neither the original nor the residual.
        OptionError: a target is not in the model, or not in a way that scales can be attached to, or scales are
            attached already.
        FormatError: the factorized folder is damaged.
    """
    factorized = Path(factorized)
    manifest = Manifest.read(factorized)
    bare = unwrapped(model)
    if any(isinstance(module, LowRankPath) for module in bare.modules()):
        raise OptionError("scales are attached to this model already", hint="detach() them first")
    places = places_of(bare, manifest)
    carriers = carriers_of(bare, {place.parameter for found in places.values() for place in found})
    dtype = _activations(bare)
    planned: dict[int, _Planned] = {}
    homes = {}
    for shard in manifest.shards:
        if shard.factors is not None:
            with FactorsReader(factorized, shard) as reader:
                for target in manifest.targets_of(shard.source.file):
                    homes[target.key] = _add(target, places[target.tensor], carriers, reader, dtype, planned)
    paths = {key: plan.path() for key, plan in planned.items()}
    if not any(hasattr(module, "adapter_layer_names") for module in bare.modules()):  # else PEFT has done it
        model.requires_grad_(False)
    handles: list[Any] = []
    owners = []
    for key, path in paths.items():
        for layer in planned[key].carrier.layers:
            handles += _hook(layer, path)
            name = _NAME if layer.name == "weight" else f"{_NAME}_{layer.name}"
            layer.module.add_module(name, path)
            owners.append((layer.module, name))
        path.requires_grad_(True)
    return Scales(manifest, {key: (paths[home], i) for key, (home, i) in homes.items()}, handles, owners)


def _activations(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of what is not quantized."""
    kinds = (parameter.dtype for parameter in model.parameters())
    return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), torch.float32)


@dataclass(slots=True)
class _Planned:
    """A path in the making: the parameter that it is for, and for each target in it its delta, its singular values, 1 if the
    residual is in the model, else 0, and its terms."""

    carrier: Carrier
    entries: list[tuple[nn.Parameter, torch.Tensor, int, list[Term]]] = field(default_factory=list)

    def path(self) -> LowRankPath:
        deltas, values, offsets, terms = zip(*self.entries, strict=True)
        carrier = self.carrier
        with carrier.present():
            weight = carrier.weight()
        like = torch.empty(0, device=weight.device, dtype=torch.float32 if carrier.quantized else weight.dtype)
        return LowRankPath(deltas, values, offsets, terms, carrier.shape[0] if carrier.stack else None, like)


def _add(
    target: TargetRecord,
    places: list[Place],
    carriers: dict[str, Carrier],
    reader: FactorsReader,
    dtype: torch.dtype,
    planned: dict[int, _Planned],
) -> tuple[int, int]:
    """Give a target's directions to the paths of the parameters that it is in.

    Returns:
        a key of ``planned``, and which of its entries this is.
    """
    factors = [reader.factors(target, i) for i in range(target.matrices[0])]
    terms: dict[int, list[Term]] = {}
    for carrier, term in terms_of(target, places, carriers, factors):
        planned.setdefault(id(carrier), _Planned(carrier))
        terms.setdefault(id(carrier), []).append(term)
    offset = _offset(target, places, carriers, [term for group in terms.values() for term in group], factors, dtype)
    s = torch.cat([factor.s for factor in factors])
    first = next(iter(terms))
    home = first, len(planned[first].entries)
    with planned[first].carrier.present():
        delta = nn.Parameter(torch.zeros_like(s, device=planned[first].carrier.weight().device))
    for key, group in terms.items():
        planned[key].entries.append((delta, s, offset, group))
    return home


def _hook(layer: Layer, path: LowRankPath) -> list[Any]:
    """Make the module use the path as well."""
    if layer.kind == "unknown":
        shadow = Shadow(path, layer.module, layer.name)
        # Also after an exception, with which a recomputation under gradient checkpointing may end.
        return [
            layer.caller.register_forward_pre_hook(shadow.enter),
            layer.caller.register_forward_hook(shadow.leave, always_call=True),
        ]
    return [layer.module.register_forward_hook(Adding(path, layer.kind), with_kwargs=True)]


def _offset(
    target: TargetRecord,
    places: list[Place],
    carriers: dict[str, Carrier],
    terms: list[Term],
    factors: list[Factors],
    dtype: torch.dtype,
) -> int:
    """0 if the original weight is in the model, 1 if the residual is.

    Raises:
        SourceError: it is neither.
    """
    quantized = any(carriers[place.parameter].quantized for place in places)
    if quantized:
        if len(terms) > 1:
            raise OptionError(f"{target.tensor!r} is not one weight in this model, and quantized", hint="load it unquantized")
        got = [_asked_of_layer(carriers[places[0].parameter].layers[0].module, terms[0], dtype)]
    else:
        matrices = target.seen_as.matrices(_gathered(target, places, carriers))
        if target.dtype in FACTORIZABLE_DTYPES:
            digest = _hash_as(matrices, TORCH_DTYPES[target.dtype])
            if digest is not None and digest in (target.sha256, target.residual_sha256):
                return int(digest != target.sha256)
            raise _neither(target, f"{str(matrices.dtype).removeprefix('torch.')} {target.shape}", "bytes")
        got = [f.U.T.to(w.device) @ w.float() @ f.V.to(w.device) for f, w in zip(factors, matrices, strict=True)]
    expected = torch.stack([factor.s.diag() for factor in factors])
    found = torch.stack(got).float().cpu()
    size = expected.norm().item()
    errors = [(found - offset_of * expected).norm().item() for offset_of in (1, 0)]  # the original has them, the residual not
    if size == 0 or errors[0] <= _QUANTIZATION_ERROR * size:
        return 0
    if target.residual_sha256 is not None and errors[1] <= _QUANTIZATION_ERROR * size:
        return 1
    raise _neither(target, f"leading singular values that are off by {errors[0] / size:.0%}", "leading singular values")


def _neither(target: TargetRecord, got: str, what: str) -> SourceError:
    return SourceError(
        f"{target.key!r} of the model is neither the original weight nor its residual",
        got=got,
        expected=f"the {what} of {target.dtype} {target.shape}",
        hint="load the model from the original or the factorized folder, and attach before training",
    )


def _asked_of_layer(layer: nn.Module, term: Term, dtype: torch.dtype) -> torch.Tensor:
    """``left^T W right``, (k, k), of a linear layer whose weight only it can read."""
    device = layer.get_parameter("weight").device
    right = torch.cat([term.right.T, term.right.new_zeros(1, len(term.right))]).to(device, dtype)
    # As in training: without a gradient to compute, bitsandbytes packs the weight for inference, for good.
    with torch.enable_grad():
        images: torch.Tensor = layer(right.requires_grad_()).detach().float()
    return term.left.to(device).T @ (images[:-1] - images[-1:]).T


def _gathered(target: TargetRecord, places: list[Place], carriers: dict[str, Carrier]) -> torch.Tensor:
    """A target's tensor, put together from where it is in the model; in the dtype of that, on its device.

    Raises:
        OptionError: some of it is not in the model.
    """
    whole: torch.Tensor | None = None
    count = 0
    for place in places:
        carrier, piece = carriers[place.parameter], place.piece
        with carrier.present():
            weight = carrier.weight()
            for axis, at in enumerate(piece.at):
                weight = _selected(weight, axis, at)
        count += weight.numel()
        if list(weight.shape) == target.shape and piece.axes == tuple(range(len(target.shape))) and count == weight.numel():
            in_order = all(list(of) == list(range(size)) for of, size in zip(piece.of, target.shape, strict=True))
            if in_order and len(places) == 1:
                return weight.contiguous()
        if whole is None:
            whole = torch.empty(target.shape, dtype=weight.dtype, device=weight.device)
        stacked = [axis for axis, of in enumerate(piece.axes) if of is None]
        kept = [axis for axis in range(weight.ndim) if axis not in stacked]
        order = sorted(kept, key=lambda axis: piece.axes[axis] or 0)
        values = weight.permute(*stacked, *order)[(0,) * len(stacked)]
        index = [torch.as_tensor(piece.of[axis]).to(whole.device) for axis in order]
        whole[torch.meshgrid(*index, indexing="ij")] = values.to(whole.device)
    if whole is None or count != whole.numel():
        raise OptionError(f"only a part of {target.tensor!r} is in this model", got=count, expected=math.prod(target.shape))
    return whole


def _selected(tensor: torch.Tensor, axis: int, at: Positions) -> torch.Tensor:
    if isinstance(at, range):
        return tensor.narrow(axis, at.start, len(at))
    return tensor.index_select(axis, at.to(tensor.device))


def _hash_as(matrices: torch.Tensor, dtype: torch.dtype) -> str | None:
    """sha256 of the bytes of matrices (B, m, n) in the dtype of the checkpoint; None if they hold values that it cannot."""
    digest = hashlib.sha256()
    for matrix in matrices:
        cast = matrix.to(dtype)
        if not torch.equal(cast.to(matrix.dtype), matrix):
            return None
        digest.update(bytes_of(cast.cpu().contiguous()))
    return digest.hexdigest()
