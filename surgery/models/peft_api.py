"""The parts of PEFT that are used beyond its documented interface: how its adapters are placed in a model.

Tried with PEFT 0.18.0 to 0.21.2 (docs/compatibility.md has which). PEFT itself is not imported: it is optional.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from torch import nn

from surgery.models.transformers_api import family_of_conversion, is_from_transformers, renamed_on_loading

#: The first release that merges adapters of single experts, as transformers stacks these.
LOADS_EXPERTS = (0, 20)

#: Families of transformers' conversion -> last parts of names by which PEFT takes a layer for the router or one of the experts
#: that the model stacks, wherever it is. Not for the family after which the rules for others are called, qwen2_moe itself.
_TAKEN_FOR_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def taken_for_experts(model: nn.Module | None) -> tuple[str, ...]:
    """Last parts of names of which PEFT makes other targets when it loads an adapter for a model, since 0.19."""
    if model is None or not is_from_transformers(model):
        return ()
    config: Any = model.config
    family = family_of_conversion(model)
    is_itself = family == getattr(config, "model_type", None) == "qwen2_moe"
    return () if is_itself else _TAKEN_FOR_EXPERTS.get(family, ())


def lost_layer(model: nn.Module | None, modules: Iterable[str]) -> tuple[str, str] | None:
    """(module, the name by which PEFT looks for it) of the first that is not found when an adapter is loaded; None if all are.

    Since 0.19 PEFT renames the keys of an adapter as transformers does those of a checkpoint, but for a prefix that is lost.
    """
    if model is None or not is_from_transformers(model):
        return None
    keys = {f"{module}.lora_A.default.weight": module for module in modules}
    for key, other in renamed_on_loading(model, keys):
        if not key.endswith(other):
            return keys[key], other.partition(".lora_A.")[0]
    return None


def too_old_for_experts() -> str | None:
    """The installed version, if it cannot load adapters of single experts: 0.18 loads them wrongly, 0.19 fails. Else None."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)", version)
    return version if found is not None and (int(found[1]), int(found[2])) < LOADS_EXPERTS else None


def is_wrapper(model: nn.Module) -> bool:
    """Whether a model is PEFT's wrapper or of a subclass of it; then ``get_base_model()`` gives the model inside."""
    return any(kind.__module__ == "peft.peft_model" for kind in type(model).__mro__)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into any layer, with or without its wrapper."""
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


def own_name(parameter: str) -> str:
    """The name that a parameter had before PEFT wrapped its layer with adapters."""
    return parameter.replace(".base_layer.", ".")


def unfitting_adapter(model: nn.Module) -> tuple[str, str] | None:
    """(name, kind) of an adapter whose effect depends on the layer's weight, as for DoRA and HRA; None if there is none."""
    configs: Any = getattr(model, "peft_config", {})
    for name, config in configs.items():
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        if getattr(config, "use_dora", False) or kind == "HRA":
            return name, "DoRA" if kind == "LORA" else kind
    return None
