"""Adding adapters to the weights of a loaded model, with one rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.models.accelerate_api import is_kept_elsewhere
from surgery.models.carriers import is_sharded
from surgery.models.packed import is_plain
from surgery.peft.adapter_scales import AdapterScales
from surgery.peft.layer import SpectralLayer, layers_of
from surgery.training.attach_plan import plan_attach
from surgery.training.attached_path import name_in
from surgery.training.lowrank import LowRankPath


def check_mergeable(layers: Sequence[SpectralLayer]) -> None:
    """Refuse weights that a sum cannot be written to. Raises OptionError."""
    for layer in layers:
        owner, weight = layer.place.modules[0], layer.place.weight()
        if not is_plain(layer.place.parameter()) or is_sharded(weight) or weight.is_meta or is_kept_elsewhere(owner):
            raise OptionError(
                f"scales cannot be added to {layer.place.described}",
                got="a weight that is quantized, sharded or offloaded",
                hint="surgery fold FACTORIZED ADAPTER_DIR writes the model with them",
            )


def merge_adapters(model: nn.Module, adapters: Mapping[str, AdapterScales], *, check: bool, keep: bool) -> None:
    """Add adapters, and what residuals lack, to the weights of a model, in float64 and rounded once.

    The factors are read again, since those in the model have been rounded to the dtype of its weights.

    Args:
        model: without wrappers.
        adapters: by name, in the order in which they are summed; none for what residuals lack alone.
        check: whether to refuse sums that are not finite.
        keep: whether the weights are kept, to be put back.

    Raises:
        OptionError: a sum is not finite.
    """
    layers = layers_of(model)
    paths: dict[int, list[LowRankPath]] = {id(layer): [] for layer in layers}
    for layer in layers:
        layer.pause()
    for adapter in adapters.values():
        plan = plan_attach(model, adapter.config.folder, adapter.train, torch.float32)
        for key, (number, i) in plan.homes.items():
            delta = plan.paths[number][0].delta(i)
            delta.data.copy_(adapter.whole(key).flatten())
        for path, places in plan.paths:
            sums = paths[id(getattr(places[0].module, name_in(places[0])))]
            path.restores = not sums
            sums.append(path)
    for layer in layers:
        added = paths[id(layer)] or layer.restoring()
        if added:
            weight = layer.place.weight()
            total = _sum(weight, added)
            if check and not bool(torch.isfinite(total).all()):
                raise OptionError(f"the sum is not finite in {layer.place.described}")
            if keep:
                layer.unmerged = weight.clone()
            weight.copy_(total)
        layer.merged_adapters = list(adapters)
        layer.refresh()


@torch.no_grad()
def _sum(weight: torch.Tensor, paths: Sequence[LowRankPath]) -> torch.Tensor:
    """``weight + sum left M right^T`` in the dtype of the weight, each matrix computed in float64."""
    total = torch.empty_like(weight, memory_format=torch.contiguous_format)
    is_stack = paths[0].left.ndim == 3
    inners = [path.inner() for path in paths]
    for m in range(len(weight)) if is_stack else [...]:
        exact = weight[m].double()
        for path, inner in zip(paths, inners, strict=True):
            one = (inner[m] if is_stack else inner).to(torch.float64)
            update = one.after(path.left[m].double()) @ path.right[m].double().mT
            exact += update.reshape(exact.shape)
        total[m] = exact.to(weight.dtype)
    return total
