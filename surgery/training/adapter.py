"""A LoRA adapter's updates in terms of the tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.format.lora import LoraUpdate
from surgery.linalg.lossless import Addition
from surgery.training.carriers import carriers_of
from surgery.training.placement import Piece, locate, parameter_names
from surgery.training.skeleton import skeleton


def additions_of(folder: Path, shapes: Mapping[str, Sequence[int]], updates: Mapping[str, LoraUpdate]) -> dict[str, Addition]:
    """What an adapter adds to each tensor.

    Args:
        folder: of the checkpoint, with its ``config.json``.
        shapes: of all its tensors.
        updates: by the name of a module, see ``surgery.format.lora.read_lora``.

    Raises:
        OptionError: a module is not in the checkpoint, or not in a way that can be followed.
        MissingExtra, SourceError: see ``surgery.training.skeleton``.
    """
    model = skeleton(folder)
    pieces: dict[str, list[Piece]] = {}
    if model is None:
        for name, shape in shapes.items():
            every = tuple(range(size) for size in shape)
            pieces[name] = [Piece(name, tuple(range(len(shape))), every, every)]
    else:
        for places in locate(model, shapes).values():
            for place in places:
                pieces.setdefault(place.parameter, []).append(place.piece)
    added: dict[str, list[Addition]] = {}
    for module, update in updates.items():
        parameter = _parameter(model, module, pieces)
        kind = "embedding" if update.embedding else "linear"
        if model is not None:
            kind = carriers_of(model, {parameter})[parameter].layers[0].kind
        left, right = update.B.double() * update.scaling, update.A.flatten(1).T
        if kind in ("transposed", "embedding"):
            left, right = right, left
        for piece in pieces[parameter]:
            added.setdefault(piece.tensor, []).append(_in_tensor(piece, shapes[piece.tensor], left, right, module))
    return {
        tensor: Addition(torch.cat([one.left for one in several], dim=1), torch.cat([one.right for one in several], dim=1))
        for tensor, several in added.items()
    }


def _parameter(model: nn.Module | None, module: str, pieces: Mapping[str, Any]) -> str:
    """Name of the weight of a module, also if the adapter was made with or without a head around the model."""
    prefix = "" if model is None else str(getattr(model, "base_model_prefix", ""))
    names = [f"{module}.weight", f"{prefix}.{module}.weight", f"{module.removeprefix(prefix + '.')}.weight"]
    found = next((name for name in names if name in pieces), None)
    if found is None:
        there = model is not None and f"{module}.weight" in parameter_names(model)
        raise OptionError(
            f"the adapter changes {module!r}, which is no module with a weight in this checkpoint",
            got="a weight that is not in the checkpoint's files" if there else "no such module",
            hint="merge the adapter with PEFT into the folded model",
        )
    return found


def _in_tensor(piece: Piece, shape: Sequence[int], left: torch.Tensor, right: torch.Tensor, module: str) -> Addition:
    """``left right^T`` of a parameter as it is in a tensor; zero where the tensor is not in that parameter."""
    whole = tuple(range(len(shape)))
    rows, columns = len(left), len(right)
    if len(shape) > 2 and piece.axes == whole and (rows, columns) == (shape[0], math.prod(shape[1:])):
        return Addition(left, right)  # a convolution
    fits = piece.axes in ((0, 1), (1, 0)) and all(
        len(at) == 0 or int(max(at[0], at[-1])) < size for at, size in zip(piece.at, (rows, columns), strict=True)
    )
    if not fits:
        raise OptionError(
            f"the adapter's update of {module!r} does not fit its weight",
            got=[rows, columns],
            expected=list(shape),
            hint="merge the adapter with PEFT into the folded model",
        )
    parts = []
    for axis, factor in enumerate((left, right)):
        size = shape[piece.axes[axis] or 0]
        part = factor.new_zeros(size, factor.shape[1])
        part[torch.as_tensor(piece.of[axis])] = factor[torch.as_tensor(piece.at[axis])]
        parts.append(part)
    return Addition(*parts) if piece.axes == (0, 1) else Addition(parts[1], parts[0])
