"""The parts of PEFT that are used beyond its documented interface: how its adapters are placed in a model.

Tried with PEFT 0.18.0 to 0.21.2 (docs/compatibility.md has which). PEFT itself is not imported: it is optional.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from torch import nn

#: The first release that merges adapters of single experts, as transformers stacks these.
LOADS_EXPERTS = (0, 20)


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
