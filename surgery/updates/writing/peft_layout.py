"""PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source of the format: PEFT 0.21, ``LoraConfig``, ``get_peft_model_state_dict`` and ``set_peft_model_state_dict``; for stacks of
experts, which PEFT adapts as parameters, ``ParamWrapper``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from surgery.names import ADAPTER_WEIGHTS, PEFT_PREFIX, RESIDUAL_OF
from surgery.updates.writing.adapter import AdapterToWrite, Pair, module_key
from surgery.updates.writing.low_rank import AdapterForm
from surgery.updates.writing.modules import AdaptedModule, AdaptedModules
from surgery.updates.writing.whole import Whole

#: The release of PEFT whose layout of stacks this is; it tells readers which side of square matrices is the input.
_LAYOUT_OF_STACKS = "0.21.0"


def in_peft_layout(
    adapted: AdaptedModules, form: AdapterForm, names: Iterable[str] = (), whole: Whole | None = None
) -> AdapterToWrite:
    """The adapter in PEFT's layout.

    Args:
        adapted: the modules that it changes.
        form: what it is written as.
        names: of all modules of the model, among which PEFT is to find those that are adapted and no others.
        whole: what it holds whole; None for nothing.
    """
    depths = _depths(adapted.modules)
    pairs = []
    for module in adapted.modules:
        rank = adapted.rank if form.uniform_rank else module.rank
        # One alpha for all: llama.cpp's converter reads no other, and divides it by the rank that a module has, as PEFT does.
        pairs.append(Pair(module, rank, _keys(module, depths.get(module_key(module), 0)), adapted.rank / rank))
    whole = whole or Whole()
    config = json.dumps(_config(pairs, form, names, whole), indent=1).encode() + b"\n"
    return AdapterToWrite(adapted, pairs, form.dtype, ADAPTER_WEIGHTS, config, {"format": "pt"}, {}, whole.keys, whole.tied)


def _keys(module: AdaptedModule, depth: int) -> tuple[str, str]:
    name = f"{PEFT_PREFIX}{module.name}{'.base_layer' * depth}"
    if module.kind == "embedding":
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _depths(modules: Sequence[AdaptedModule]) -> dict[str, int]:
    """Parameter -> how many of PEFT's layers are around its own: the first that a module defines is innermost."""
    by_module: dict[str, list[AdaptedModule]] = {}
    for module in modules:
        if module.kind == "parameter":
            by_module.setdefault(module.name, []).append(module)
    depths: dict[str, int] = {}
    for several in by_module.values():
        carrier = several[0].carrier
        order = [] if carrier is None else [name for name, _ in carrier.layers[0].module.named_parameters(recurse=False)]
        several.sort(key=lambda module: order.index(module.parameter))
        depths |= {module_key(module): len(several) - 1 - place for place, module in enumerate(several)}
    return depths


def _config(pairs: Sequence[Pair], form: AdapterForm, every: Iterable[str], whole: Whole) -> dict[str, Any]:
    """What PEFT is told of the adapter. With alpha equal to the largest rank, ``B A`` of that rank is added as it is."""
    layers = [pair.module for pair in pairs if pair.module.kind != "parameter"]
    parameters = sorted(module_key(pair.module) for pair in pairs if pair.module.kind == "parameter")
    # Experts by the last part of their names, which is what PEFT looks at; there may be tens of thousands.
    names = {module.name.rsplit(".", 1)[-1] if module.kind == "expert" else module.name for module in layers}
    rank = max(pair.rank for pair in pairs)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": form.base,
        "revision": form.revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targeted(names, every),
        "fan_in_fan_out": any(module.kind == "transposed" for module in layers),
        "bias": whole.bias,
        "modules_to_save": whole.modules or None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": form.residual_of is None,
        "task_type": form.task,
    }
    if form.residual_of is not None:
        first = min(map(module_key, (pair.module for pair in pairs)))
        config["alpha_pattern"] = {f"{RESIDUAL_OF}{form.residual_of}){re.escape(first)}": rank}
    if parameters:
        config |= {"target_parameters": parameters, "peft_version": _LAYOUT_OF_STACKS}
    if whole.tied:
        config["ensure_weight_tying"] = True
    if len({pair.rank for pair in pairs}) > 1:
        config["rank_pattern"] = rank_patterns({module_key(pair.module): pair.rank for pair in pairs})
    return config


def targeted(names: Collection[str], every: Iterable[str]) -> list[str] | str:
    """What PEFT is to be told so that it finds these modules and no others: their names, or one regular expression.

    Args:
        names: of the modules.
        every: the names of all modules of the model.
    """
    return sorted(names) if _is_exact(names, every) else "|".join(map(re.escape, sorted(names)))


def _is_exact(names: Collection[str], every: Iterable[str]) -> bool:
    """Whether PEFT, to which names are also the ends of others, finds no more by them."""
    for name in every:
        words = name.split(".")
        if name not in names and any(".".join(words[first:]) in names for first in range(1, len(words))):
            return False
    return True


def rank_patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Patterns by which PEFT finds the rank of each module: it takes the first that fits the end of a name.

    A dot in a pattern fits any character. Of two names of which one fits the other's pattern, that one is longer, or it is as
    long and has fewer dots: it comes first.
    """
    order = sorted(ranks, key=lambda name: (-len(name), name.count("."), name))
    return {name if re.fullmatch(r"[\w.-]+", name) else re.escape(name): ranks[name] for name in order}
