"""Whether PEFT finds the modules of an adapter again when it loads it.

Of experts that a checkpoint has one by one and the model stacks: whether it puts adapters of them together rightly.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.models.peft_api import lost_layer, too_old_for_experts
from surgery.progress import note
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.modules import AdaptedModules

#: Families whose experts PEFT takes one by one and puts together as transformers does; measured (docs/attach.md).
_ONE_BY_ONE = ("mixtral", "olmoe", "qwen3_moe")


def wrong_experts(model: nn.Module, adapted: AdaptedModules) -> tuple[str, str] | None:
    """(key of a tensor, why) of an expert that PEFT would load wrongly from an adapter of single experts; None if of none.

    PEFT puts the updates of experts together by the last part of their names, for some families. A dense or shared MLP beside
    them has the same names and is lost without a word (deepseek_v3, qwen2_moe).
    """
    if not adapted.experts:
        return None
    first = next(iter(adapted.experts.values()))[0].key
    config: Any = model.config
    family = str(getattr(config, "model_type", None))
    if family not in _ONE_BY_ONE:
        return first, f"experts of {family}, which PEFT does not load as they are"
    projections = {one.tensor.rsplit(".", 2)[-2] for tensors in adapted.experts.values() for one in tensors}
    names = (module.name for module in adapted.modules if module.kind not in ("expert", "parameter"))
    beside = next((name for name in names if name.rsplit(".", 1)[-1] in projections), None)
    if beside is not None:
        return first, f"experts beside {beside!r}, which PEFT would take for one of them"
    for parameter, tensors in adapted.experts.items():
        size = model.get_parameter(parameter).shape[0]
        parts = 2 if "gate_up" in parameter else 1
        if len(tensors) != parts * size:
            return first, f"{len(tensors)} of the {parts * size} matrices in {parameter!r}"
    return None


def note_older_peft(adapter: AdapterToWrite) -> None:
    """Tell the user if the installed PEFT ignores the experts that an adapter changes, or cannot load them.

    Older releases take A and B of a stack the other way round; that is right for stacks whose matrices are (in, out).
    """
    stacks = any(pair.module.is_stack and not pair.module.is_turned for pair in adapter.pairs)
    if (adapter.has_single_experts or stacks) and (older := too_old_for_experts()) is not None:
        note(f"the adapter changes experts: PEFT loads it from 0.20 on, and here is {older}")


def lost_module(model: nn.Module | None, adapted: AdaptedModules) -> tuple[str, str] | None:
    """(key of a tensor, why) of a module that PEFT would leave as it is, with no more than a warning; None if of none."""
    modules = {module.name: module for module in adapted.modules if module.kind != "expert"}
    lost = lost_layer(model, modules)
    if lost is None:
        return None
    name, other = lost
    return modules[name].tensors[0][0].key, f"in {name!r}, which PEFT takes for {other!r} when it loads an adapter"
