"""From the modules of a LoRA adapter to the tensors of a checkpoint: which low-rank matrix is added to which tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.format.name_map import find_names
from surgery.lossless.factors import Addition
from surgery.models.carriers import Carrier, carriers_of
from surgery.models.placement import TensorPart, locate, parameter_names
from surgery.models.skeleton import skeleton
from surgery.progress import note
from surgery.updates.lora import LoraUpdate


def additions_of(folder: Path, shapes: Mapping[str, Sequence[int]], updates: Mapping[str, LoraUpdate]) -> dict[str, Addition]:
    """What an adapter adds to each tensor of a checkpoint.

    Args:
        folder: of the checkpoint, with its ``config.json``.
        shapes: name of each of its tensors -> shape.
        updates: name of a module -> its update, as ``surgery.updates.lora.read_lora`` returns them.

    Returns:
        Tensor -> the sum of all that is added to it, with the adapter's scaling in it.

    Raises:
        OptionError: a module is not in the checkpoint, its shape does not fit, or transformers stores it in a way that
            cannot be followed.
        MissingExtra, SourceError: see ``surgery.models.skeleton``.
    """
    model = skeleton(folder)
    pieces: dict[str, list[TensorPart]] = {}
    if model is None:
        pieces = {name: [TensorPart.whole(name, shape)] for name, shape in shapes.items()}
        stored = {name: tuple(shape) for name, shape in shapes.items()}
    else:
        stored = {}
        for places in locate(model, shapes).values():
            for place in places:
                pieces.setdefault(place.parameter, []).append(place.part)
                stored[place.parameter] = place.shape
    parameters = _parameters(model, updates, stored)
    if len(set(parameters.values())) < len(parameters):
        raise OptionError("the adapter changes a weight twice, under two names", got=sorted(parameters))
    carriers = None if model is None else carriers_of(model, parameters.values())
    added: dict[str, list[Addition]] = {}
    for module, update in updates.items():
        parameter = parameters[module]
        if carriers is None:
            shape, transposed = tuple(shapes[parameter]), update.embedding or update.transposed
        else:
            shape, transposed = _of_layer(carriers[parameter], module, update)
        left, right = update.B, update.A.flatten(1).T
        if transposed:
            left, right = right, left
        sizes = (shape[0], math.prod(shape[1:]))
        if (len(left), len(right)) != sizes or (update.A.ndim > 2 and update.A.shape[1:] != shape[1:]):
            raise _misfit(module, [len(left), len(right)], list(shape))
        if update.base is not None and update.base != shape:
            raise _misfit(module, list(update.base), list(shape))
        for piece in pieces[parameter]:
            added.setdefault(piece.tensor, []).append(
                _in_tensor(piece, shapes[piece.tensor], left, right, update.scaling, module)
            )
    return {
        tensor: Addition(torch.cat([one.left for one in several], dim=1), torch.cat([one.right for one in several], dim=1))
        for tensor, several in added.items()
    }


def _of_layer(carrier: Carrier, module: str, update: LoraUpdate) -> tuple[tuple[int, ...], bool]:
    """The shape of the weight of an adapted module, and whether it is stored as (in, out)."""
    layer = carrier.layers[0]
    if len(carrier.layers) > 1:
        raise OptionError(
            f"the adapter changes {module!r}, whose weight several modules share",
            got=[type(other.module).__name__ for other in carrier.layers],
            expected="a weight of its own: elsewhere the model was not adapted",
            hint="fold without the adapter, and load it beside the folded model",
        )
    if update.embedding != isinstance(layer.module, nn.Embedding):
        raise OptionError(
            f"the adapter's update of {module!r} is of another kind than the module", got=type(layer.module).__name__
        )
    return carrier.shape, update.embedding or layer.kind == "transposed"


def _misfit(module: str, got: list[int], expected: list[int]) -> OptionError:
    return OptionError(
        f"the adapter's update of {module!r} does not fit its weight",
        got=got,
        expected=expected,
        hint="fold onto the model that the adapter was trained on, with the vocabulary that it had",
    )


def _parameters(
    model: nn.Module | None, updates: Mapping[str, LoraUpdate], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Module of the adapter -> the name of its weight, also where adapter and checkpoint have a head or a wrapper in one alone.

    Args:
        model: without weights; None where transformers does not know it.
        updates: name of a module -> its update.
        shapes: of the parameters that the checkpoint holds, by name.

    Raises:
        OptionError: a module has no weight in the checkpoint, or could have any of two.
    """
    prefix = "" if model is None else str(getattr(model, "base_model_prefix", ""))
    found = {}
    for module in updates:
        with_head = (f"{module}.weight", f"{prefix}.{module}.weight", f"{module.removeprefix(prefix + '.')}.weight")
        if (parameter := next((name for name in with_head if name in shapes), None)) is not None:
            found[module] = parameter
    if len(found) == len(updates):
        return found
    modules = {f"{module}.weight": module for module in updates}

    def alike(name: str, parameter: str) -> bool:
        update, shape = updates[modules[name]], shapes[parameter]
        # Whether the weight is (out, in) or (in, out) is not known yet.
        return sorted([len(update.B), math.prod(update.A.shape[1:])]) == sorted([shape[0], math.prod(shape[1:])])

    names = find_names(shapes, dict.fromkeys(modules, ()), alike=alike)
    if names.is_complete and all(alike(name, parameter) for name, parameter in names.given.items()):
        parameters = {module: names.given[name] for name, module in modules.items()}
        renamed = ((module, parameters[module].removesuffix(".weight")) for module in sorted(parameters))
        module, own = next((module, own) for module, own in renamed if module != own)
        note(f"the adapter's names differ from the checkpoint's, and all are found: {module!r} is taken for {own!r}")
        return parameters
    module = next(module for module in updates if module not in found)
    there = model is not None and f"{module}.weight" in parameter_names(model)
    raise names.misfit(
        OptionError,
        f"the adapter changes {module!r}, which is no module with a weight in this checkpoint",
        modules,
        expected="modules of the checkpoint, all of them under its names, or with one prefix or suffix"
        + (": this one's weight is not in its files" if there else ""),
        hint="merge the adapter with PEFT into the folded model",
    )


def _in_tensor(
    piece: TensorPart, shape: Sequence[int], left: torch.Tensor, right: torch.Tensor, scaling: float, module: str
) -> Addition:
    """What is added to a tensor if ``scaling left right^T`` (m, n) is added to the parameter that holds it as ``piece``.

    Rows and columns of the tensor that the parameter does not hold are zero.
    """
    if len(shape) > 2 and piece.axes == tuple(range(len(shape))):
        return Addition(left.double() * scaling, right)  # a convolution
    if piece.axes not in ((0, 1), (1, 0)):
        raise _misfit(module, [len(left), len(right)], list(shape))
    parts = []
    for axis, factor in enumerate((left, right)):
        part = factor.new_zeros(shape[piece.axes[axis] or 0], factor.shape[1])
        part[torch.as_tensor(piece.of[axis])] = factor[torch.as_tensor(piece.at[axis])]
        parts.append(part)
    if piece.axes == (1, 0):
        parts.reverse()
    return Addition(parts[0].double() * scaling, parts[1])
