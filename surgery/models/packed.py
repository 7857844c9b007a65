"""Linear layers whose weight is packed: classes that are no ``nn.Linear`` and hold numbers of few bits.

GPTQ, AWQ, HQQ, GGUF and others have such, each with other names for what it holds. What is common to them is that they say how
many features go in and come out, and compute ``x W^T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_WEIGHT = "weight"
#: Ends of the names of tensors that hold the packed numbers of a weight.
_PACKED = ("_packed", "_blocks")


def is_plain(weight: object) -> bool:
    """Whether this is a weight that is not quantized: those are integers, 8-bit floats, or of a library's own tensor class."""
    kinds = (torch.Tensor, nn.Parameter)
    return (
        isinstance(weight, torch.Tensor) and type(weight) in kinds and weight.is_floating_point() and weight.element_size() > 1
    )


def packed_numbers(module: nn.Module) -> torch.Tensor | None:
    """The largest tensor of a linear layer whose weight is packed, which stands for that weight; None for other modules."""
    weight = getattr(module, _WEIGHT, None)
    if is_plain(weight) or (weight is not None and isinstance(module, nn.Linear)):
        return None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes):
        return None
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return max(own, key=lambda tensor: tensor.numel() * tensor.element_size(), default=None)


def held_in(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module, or what stands for its packed weight.

    Raises:
        AttributeError: it has no such parameter.
    """
    packed = packed_numbers(module) if name == _WEIGHT else None
    return module.get_parameter(name) if packed is None else packed


def held_at(model: nn.Module, name: str) -> torch.Tensor:
    """``held_in`` for the full name of a parameter."""
    owner, _, last = name.rpartition(".")
    return held_in(model.get_submodule(owner), last)


def packed_weights(model: nn.Module) -> list[str]:
    """The full names that the packed weights of a model would have as parameters."""
    modules = model.named_modules(remove_duplicate=False)
    return [f"{name}.{_WEIGHT}" for name, module in modules if packed_numbers(module) is not None]


def loaded_name(tensor: str) -> str:
    """The name under which a loader knows the weight whose packed numbers a tensor of a checkpoint holds; else its own."""
    return next((tensor.removesuffix(end) for end in _PACKED if tensor.endswith(end)), tensor)


def unpack(model: Any) -> None:
    """Unpack a model that compressed-tensors has loaded packed, as it does itself when the model is first run.

    Until then its layers cannot compute, not even one by one.
    """
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)
