"""Put the scales of a factorized checkpoint into a loaded model as its only trainable parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError, SourceError
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest, TargetRecord
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.scales import read_scales, write_scales
from surgery.linalg.lossless import Factors
from surgery.memory import bytes_of
from surgery.names import FACTORIZABLE_DTYPES

_NAME = "surgery_scale"


class _Scale(nn.Module):
    """One target's scales, as ``delta = g - 1``, and the low-rank path they act on.

    Adds ``((x V) (s d)) U^T`` to the layer's output, with ``d = delta`` where the layer holds the original weight
    and ``d = 1 + delta`` where it holds the residual.
    """

    s: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, factors: Factors, *, on_residual: bool, transposed: bool, like: torch.Tensor) -> None:
        super().__init__()
        left, right = (factors.V, factors.U) if transposed else (factors.U, factors.V)
        self.delta = nn.Parameter(torch.zeros_like(factors.s, device=like.device))
        self.register_buffer("s", factors.s.to(like.device), persistent=False)
        self.register_buffer("left", left.to(like), persistent=False)
        self.register_buffer("right", right.to(like), persistent=False)
        self.on_residual = on_residual

    def hook(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0] if inputs else next(iter(named.values()))
        scale = (self.s * (1 + self.delta if self.on_residual else self.delta)).to(x.dtype)
        update: torch.Tensor = ((x @ self.right) * scale) @ self.left.T
        return output + update


class Scales:
    """The scales attached to a model; made by ``attach``."""

    def __init__(self, manifest: Manifest, modules: dict[str, _Scale], handles: list[Any], owners: list[nn.Module]) -> None:
        self._manifest = manifest
        self._modules = modules
        self._handles = handles
        self._owners = owners

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to hand to an optimizer: ``g - 1`` of each target, float32 (k,). Use no weight decay."""
        return (module.delta for module in self._modules.values())

    def values(self) -> dict[str, torch.Tensor]:
        """Tensor name -> ``g``, float32 (k,), on the CPU."""
        return {name: 1 + module.delta.detach().float().cpu() for name, module in self._modules.items()}

    def save(self, path: str | Path) -> None:
        """Write the scales file that ``surgery fold`` takes."""
        write_scales(Path(path), self.values(), self._manifest.fingerprint)

    def load(self, path: str | Path) -> None:
        """Take the values of a scales file; errors as for ``surgery.format.scales.read_scales``."""
        for name, value in read_scales(Path(path), self._manifest).items():
            self._modules[name].delta.data.copy_(value - 1)

    def detach(self) -> None:
        """Take the scales out of the model again. Its weights are what they were; they stay frozen."""
        for handle in self._handles:
            handle.remove()
        for owner in self._owners:
            delattr(owner, _NAME)
        self._handles.clear()
        self._owners.clear()


def attach(model: nn.Module, factorized: str | Path) -> Scales:
    """Freeze a model and make the scales of a factorized checkpoint its only trainable parameters.

    The model may have been loaded from the factorized folder (residual layout) or from the original weights; which,
    is told by the bytes of its weights, target by target. Each target must be the ``weight`` of a linear layer
    whose name in the model is its name in the checkpoint.

    Args:
        model: in the dtype of the checkpoint or a wider one, on any device.
        factorized: a folder written by ``surgery.factorize``.

    Raises:
        SourceError: the model's weights are neither the original nor the residual.
        OptionError: a target has no linear layer in the model, or scales are attached already.
        FormatError: the factorized folder is damaged.
    """
    factorized = Path(factorized)
    manifest = Manifest.read(factorized)
    layers = {target.tensor: _layer(model, target) for target in manifest.targets}
    modules: dict[str, _Scale] = {}
    for shard in manifest.shards:
        if shard.factors is None:
            continue
        with FactorsReader(factorized, shard) as reader:
            for target in manifest.targets_of(shard.source.file):
                factors = reader.factors(target)
                layer = layers[target.tensor]
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                digest = _hash_as(weight.detach(), TORCH_DTYPES[target.dtype])
                if digest is None or digest not in (target.sha256, target.residual_sha256):
                    raise SourceError(
                        f"{target.tensor!r} of the model is neither the original weight nor its residual",
                        got=f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}",
                        expected=f"the bytes of {target.dtype} {target.shape}",
                        hint="load the model from the original or the factorized folder, and attach before training",
                    )
                modules[target.tensor] = _Scale(
                    factors,
                    on_residual=digest != target.sha256,
                    transposed=not isinstance(layer, nn.Linear),
                    like=weight,
                )
    model.requires_grad_(False)
    handles = []
    for name, module in modules.items():
        layers[name].add_module(_NAME, module)
        handles.append(layers[name].register_forward_hook(module.hook, with_kwargs=True))
    return Scales(manifest, modules, handles, list(layers.values()))


def _layer(model: nn.Module, target: TargetRecord) -> nn.Module:
    """The linear layer that a target is the weight of."""
    if target.dtype not in FACTORIZABLE_DTYPES:
        raise OptionError(
            f"{target.key!r} is {target.dtype}, and cannot be attached",
            hint="fold with --dequantize, factorize that, and train on it",
        )
    if target.view != "matrix" or target.slice is not None:
        raise OptionError(
            f"{target.key!r} is no whole matrix, and cannot be attached",
            got=target.view if target.slice is None else f"the slice {target.slice.name!r}",
            hint="train its scales by other means, or factorize with --include for the layers that can be attached",
        )
    name, _, last = target.tensor.rpartition(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    # Conv1D is GPT-2's linear layer with the weight stored [in, out]; known by name, as transformers is optional.
    if layer is None or last != "weight" or not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
        raise OptionError(
            f"{target.tensor!r} is not the weight of a linear layer of this model",
            got="no such module" if layer is None else type(layer).__name__,
            hint="fold the scales instead, or factorize with --include for the layers that can be attached",
        )
    if hasattr(layer, _NAME):
        raise OptionError("scales are attached to this model already", hint="detach() them first")
    return layer


def _hash_as(weight: torch.Tensor, dtype: torch.dtype) -> str | None:
    """sha256 of a weight's bytes in the dtype of the checkpoint; None if it holds values that dtype cannot."""
    cast = weight.to(dtype)
    if not torch.equal(cast.to(weight.dtype), weight):
        return None
    return hashlib.sha256(bytes_of(cast.cpu().contiguous())).hexdigest()
