"""Put the scales of a factorized checkpoint into a loaded model as its only trainable parameters."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
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
from surgery.training.lowrank import (
    LowRankPath,
    Shadow,
    Term,
    convolution_hook,
    embedding_hook,
    linear_hook,
    transposed_linear_hook,
)
from surgery.training.placement import Place, Positions, locate

_NAME = "surgery_scale"

#: By how much the leading singular values of a quantized weight may be off: some 1 % in four bits, 100 % of a residual.
_QUANTIZATION_ERROR = 0.1


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
                if _is_sharded(delta):
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


def _is_sharded(parameter: torch.Tensor) -> bool:
    """Whether it is a DTensor, asked without importing what these are."""
    return hasattr(parameter, "device_mesh")


def _whole(delta: nn.Parameter) -> torch.Tensor:
    """A parameter's values on the CPU, gathered if it is sharded over processes."""
    value: Any = delta.detach()
    gathered: torch.Tensor = value.full_tensor() if _is_sharded(value) else value
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
    bare = _unwrapped(model)
    if any(isinstance(module, LowRankPath) for module in bare.modules()):
        raise OptionError("scales are attached to this model already", hint="detach() them first")
    places = _places(bare, manifest)
    carriers = _carriers(bare, {place.parameter for found in places.values() for place in found})
    dtype = _activations(bare)
    homes = {}
    for shard in manifest.shards:
        if shard.factors is not None:
            with FactorsReader(factorized, shard) as reader:
                for target in manifest.targets_of(shard.source.file):
                    homes[target.key] = _add(target, places[target.tensor], carriers, reader, dtype)
    used = {id(carrier): carrier for carrier in carriers.values() if carrier.entries}
    paths = {key: carrier.path() for key, carrier in used.items()}
    if not any(hasattr(module, "adapter_layer_names") for module in bare.modules()):  # else PEFT has done it
        model.requires_grad_(False)
    handles: list[Any] = []
    owners = []
    for key, carrier in used.items():
        for layer in carrier.layers:
            handles += layer.hook(paths[key])
            layer.module.add_module(layer.path_name, paths[key])
            owners.append((layer.module, layer.path_name))
    for path in paths.values():
        path.requires_grad_(True)
    return Scales(manifest, {key: (paths[home], i) for key, (home, i) in homes.items()}, handles, owners)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's and PEFT's wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = inner.module
        elif type(inner).__module__ == "peft.peft_model":
            inner = inner.get_base_model()
        else:
            unwrapped: nn.Module = inner
            return unwrapped


def _activations(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of what is not quantized."""
    kinds = (parameter.dtype for parameter in model.parameters())
    return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), torch.float32)


def _places(model: nn.Module, manifest: Manifest) -> dict[str, list[Place]]:
    """Tensor of a target -> where it is."""
    shapes: dict[str, Sequence[int] | None] = {skipped.tensor: None for skipped in manifest.skipped}
    shapes |= {target.tensor: target.shape for target in manifest.targets}
    places = locate(model, shapes)
    for target in manifest.targets:
        if target.tensor not in places:
            raise OptionError(
                f"{target.tensor!r} is not in this model",
                got=type(model).__name__,
                expected="the model that the checkpoint loads as",
                hint="fold the scales instead, or factorize with --include for the layers that the model has",
            )
    return places


@dataclass(frozen=True, slots=True)
class _Layer:
    """A module that holds a parameter.

    Attributes:
        module, name: where it is.
        kind: how it is used: ``linear``, ``transposed``, ``embedding``, ``convolution``, or in an unknown way.
        caller: whose forward uses it.
    """

    module: nn.Module
    name: str
    kind: str
    caller: nn.Module

    @property
    def path_name(self) -> str:
        return _NAME if self.name == "weight" else f"{_NAME}_{self.name}"

    def hook(self, path: LowRankPath) -> list[Any]:
        """Make the module use the path as well."""
        if self.kind == "unknown":
            shadow = Shadow(path, self.module, self.name)
            # Also after an exception, with which a recomputation under gradient checkpointing may end.
            return [
                self.caller.register_forward_pre_hook(shadow.enter),
                self.caller.register_forward_hook(shadow.leave, always_call=True),
            ]
        hooks = {"linear": linear_hook, "transposed": transposed_linear_hook, "embedding": embedding_hook}
        hook = convolution_hook(path, self.module) if self.kind == "convolution" else hooks[self.kind](path)
        return [self.module.register_forward_hook(hook, with_kwargs=True)]


@dataclass(slots=True)
class _Carrier:
    """A parameter, all modules that hold it, and what it gets.

    Attributes:
        layers: one, or several for tied weights.
        shape: of the weight, also where that is stored in another way.
        quantized: whether it is.
        stack: whether it is seen as a batch of matrices.
        entries: for each target in it: its delta, its singular values, and 1 if the residual is in it, else 0.
        terms: of all of them.
    """

    layers: list[_Layer]
    shape: tuple[int, ...]
    quantized: bool
    stack: bool = False
    entries: list[tuple[nn.Parameter, torch.Tensor, int]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        shape = self.shape[1:] if self.stack else self.shape
        return shape[0], math.prod(shape[1:])

    def present(self) -> AbstractContextManager[Any]:
        """The weight is where it is computed with, even if accelerate keeps it elsewhere."""
        module = self.layers[0].module
        if hasattr(module, "_hf_hook") and self.weight().is_meta:
            from accelerate.utils import align_module_device  # type: ignore[import-untyped]

            aligned: AbstractContextManager[Any] = align_module_device(module)
            return aligned
        return nullcontext()

    def weight(self) -> torch.Tensor:
        layer = self.layers[0]
        return layer.module.get_parameter(layer.name).detach()

    def path(self) -> LowRankPath:
        deltas, values, offsets = zip(*self.entries, strict=True)
        with self.present():
            weight = self.weight()
        like = torch.empty(0, device=weight.device, dtype=torch.float32 if self.quantized else weight.dtype)
        return LowRankPath(deltas, values, offsets, self.terms, self.shape[0] if self.stack else None, like)


def _carriers(model: nn.Module, names: set[str]) -> dict[str, _Carrier]:
    """Full name of a parameter -> its carrier, the same for all names of one parameter."""
    callers = {
        child: parent
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in _read_by_parent(type(parent))  # type: ignore[arg-type]  # types have a hash
    }
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((module, name))
    made: dict[int, _Carrier] = {}
    carriers = {}
    for name in names:
        parameter = model.get_parameter(name)
        if id(parameter) not in made:
            first = holders[id(parameter)][0][0]
            quantized = _is_quantized(first, parameter, name)
            layers = [
                _Layer(module, attribute, _kind(module, attribute, quantized, module in callers), callers.get(module, module))
                for module, attribute in holders[id(parameter)]
            ]
            shape = (first.out_features, first.in_features) if quantized else tuple(parameter.shape)
            made[id(parameter)] = _Carrier(layers, shape, quantized)  # type: ignore[arg-type]
        carriers[name] = made[id(parameter)]
    return carriers


@cache
def _read_by_parent(kind: Any) -> frozenset[str]:
    """Names of children whose weight a module uses by itself, past their forward: Mamba's dt_proj, attention's out_proj.

    Told by its source, in want of anything better; ``Scales.save`` warns of a layer that was never called.
    """
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with suppress(OSError, TypeError):  # made at run time, or without source
            names.update(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|is_\w+))", inspect.getsource(base)))
    return frozenset(names)


def _is_quantized(module: nn.Module, weight: nn.Parameter, name: str) -> bool:
    if _is_sharded(weight):
        raise OptionError(f"{name!r} is sharded over processes", hint="attach first, then shard the model")
    # Libraries store integers, 8-bit floats, or a kind of tensor of their own.
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
    if not plain and not isinstance(module, nn.Linear):
        raise OptionError(
            f"{name!r} is quantized, and not the weight of a linear layer",
            got=f"{type(weight).__name__} of {weight.dtype} in {type(module).__name__}",
            hint="load the model without quantization",
        )
    return not plain


def _kind(module: Any, name: str, quantized: bool, used_by_parent: bool) -> str:
    """How a module uses a parameter. A subclass with a forward of its own may do anything with it."""
    if isinstance(module, nn.RNNBase):
        raise OptionError("scales cannot be attached to recurrent layers", hint="leave them out with --exclude")
    kind: Any = type(module)
    forward = kind.forward
    if name != "weight" or used_by_parent:
        return "unknown"
    if quantized or forward is nn.Linear.forward:
        return "linear"
    if kind.__qualname__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return "transposed"
    if forward is nn.Embedding.forward and module.max_norm is None:
        return "embedding"
    return "convolution" if forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward) else "unknown"


def _add(
    target: TargetRecord, places: list[Place], carriers: dict[str, _Carrier], reader: FactorsReader, dtype: torch.dtype
) -> tuple[int, int]:
    """Give a target's directions to the parameters that it is in.

    Returns:
        the first of their carriers, by identity, and which of its entries this is.
    """
    regions: dict[int, list[_Region]] = {}
    for place in places:
        carrier = carriers[place.parameter]
        if place.shape != carrier.shape:
            raise OptionError(
                f"{target.tensor!r} does not fit the parameter {place.parameter!r} of the model",
                got=list(carrier.shape),
                expected=list(place.shape),
            )
        carrier.stack, region = _region(target, place)
        regions.setdefault(id(carrier), []).append(region)
    by_id = {id(carriers[place.parameter]): carriers[place.parameter] for place in places}
    count, _, _ = target.matrices
    factors = [reader.factors(target, i) for i in range(count)]
    found: dict[int, list[Term]] = {}
    for key, carrier in by_id.items():
        rows, columns = carrier.rows_and_columns
        for region in regions[key]:
            for matrix, index in zip(region.matrices, region.of_target, strict=True):
                left, right = factors[index].U, factors[index].V
                if region.transposed:
                    left, right = right, left
                term = Term(
                    len(carrier.entries),
                    index * target.rank,
                    matrix,
                    _placed(left, region.rows, rows),
                    _placed(right, region.columns, columns),
                )
                found.setdefault(key, []).append(term)
    terms = [term for group in found.values() for term in group]
    offset = _offset(target, places, carriers, terms, factors, dtype)
    first = next(iter(by_id))
    home = first, len(by_id[first].entries)
    s = torch.cat([factor.s for factor in factors])
    with by_id[first].present():
        delta = nn.Parameter(torch.zeros_like(s, device=by_id[first].weight().device))
    for key, carrier in by_id.items():
        carrier.entries.append((delta, s, offset))
        carrier.terms += found[key]
    return home


@dataclass(frozen=True, slots=True)
class _Region:
    """Where matrices of a target are in a parameter.

    Attributes:
        matrices: which of the parameter's, ``[0]`` unless it is a stack.
        of_target: which of the target's are there.
        rows, columns: positions in the matrix of the parameter, and those in the target's that are there.
        transposed: whether rows of the parameter are columns of the target.
    """

    matrices: Sequence[int]
    of_target: Sequence[int]
    rows: tuple[Positions, Positions]
    columns: tuple[Positions, Positions]
    transposed: bool


def _region(target: TargetRecord, place: Place) -> tuple[bool, _Region]:
    """And whether the parameter is a stack."""
    piece = place.piece
    if target.view == "convolution":
        whole = tuple(range(len(target.shape)))
        if piece.axes != whole or any(len(piece.of[axis]) != target.shape[axis] for axis in whole[1:]):
            raise _unknown_place(target, place)
        every = range(math.prod(target.shape[1:]))
        rows = _in_slice(target, 0, piece.at[0], piece.of[0])
        return False, _Region([0], [0], rows, _in_slice(target, 1, every, every), transposed=False)
    row, column = (1, 2) if target.view == "stack" else (0, 1)
    stack = len(piece.axes) == 3
    if piece.axes[-2:] not in ((row, column), (column, row)) or len(piece.axes) - stack != 2:
        raise _unknown_place(target, place)
    transposed = piece.axes[-2] == column
    cut = [_in_slice(target, 0 if piece.axes[axis] == row else 1, piece.at[axis], piece.of[axis]) for axis in (-2, -1)]
    if not stack:
        return False, _Region([0], [0], cut[0], cut[1], transposed)
    matrices, of_target = ([int(i) for i in positions[0]] for positions in (piece.at, piece.of))
    return True, _Region(
        matrices, of_target if piece.axes[0] == 0 and target.view == "stack" else [0], cut[0], cut[1], transposed
    )


def _unknown_place(target: TargetRecord, place: Place) -> OptionError:
    return OptionError(
        f"{target.tensor!r} lies in the parameter {place.parameter!r} of the model in a way that scales cannot follow",
        got=f"axes {place.piece.axes} of a {target.view}",
        hint="fold the scales instead, or leave it out with --exclude",
    )


def _in_slice(target: TargetRecord, axis: int, at: Positions, of: Positions) -> tuple[Positions, Positions]:
    """Positions in a parameter, and in the target's matrix instead of the whole tensor's."""
    part = target.slice
    if part is None or part.axis != axis:
        return at, of
    index = torch.as_tensor(of)
    phase = index % part.period
    inside = (phase >= part.start) & (phase < part.stop)
    local = index // part.period * (part.stop - part.start) + phase - part.start
    return torch.as_tensor(at)[inside], local[inside]


def _placed(factor: torch.Tensor, positions: tuple[Positions, Positions], length: int) -> torch.Tensor:
    """Rows of a factor (any, k) where they belong among ``length``, zero elsewhere."""
    at, of = positions
    if isinstance(at, range) and isinstance(of, range) and at == of == range(length):
        return factor
    placed = factor.new_zeros(length, factor.shape[1])
    placed[torch.as_tensor(at)] = factor[torch.as_tensor(of)]
    return placed


def _offset(
    target: TargetRecord,
    places: list[Place],
    carriers: dict[str, _Carrier],
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
    with torch.no_grad():
        right = torch.cat([term.right.T, term.right.new_zeros(1, len(term.right))]).to(device, dtype)
        images: torch.Tensor = layer(right).float()
        return term.left.to(device).T @ (images[:-1] - images[-1:]).T


def _gathered(target: TargetRecord, places: list[Place], carriers: dict[str, _Carrier]) -> torch.Tensor:
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
