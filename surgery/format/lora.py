"""LoRA adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source of the format: PEFT 0.21, ``LoraConfig`` and ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.errors import FormatError, OptionError, SourceError
from surgery.format.files import read_json_object
from surgery.format.safetensors import ShardReader
from surgery.names import ATTACHED_NAME

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

#: Entries of the config that do not change what the adapter adds to a weight, or are read here.
_HARMLESS = frozenset(
    [
        *("alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"),
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
        *("ensure_weight_tying", "fan_in_fan_out", "lora_dropout", "megatron_core", "qalora_group_size", "eva_config"),
    ]
)
#: Ways to begin that leave the weights under the adapter as they are.
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")
#: What adapters call their matrices: PEFT, diffusers, kohya.
_OF_LORA = re.compile(r"(^|[._])lora[._](embedding_)?(a|b|up|down)([._]|$)", re.IGNORECASE)


def is_of_lora(name: str) -> bool:
    """Whether a tensor is part of a LoRA adapter, by its name."""
    return _OF_LORA.search(name) is not None


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """What an adapter adds to the weight of a module: ``scaling B A``.

    Attributes:
        A: float32 (r, in), or (r, in / groups, kernel...) for a convolution.
        B: float32 (out, r).
        scaling: a number.
        embedding: whether the module is an embedding, whose weight is (in, out).
        transposed: whether the adapter says that the weight is (in, out); not to be relied on where the module is known.
        base: shape of the module's own weight, where PEFT has kept a copy of it.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    embedding: bool
    transposed: bool
    base: tuple[int, ...] | None


def read_lora(folder: Path) -> dict[str, LoraUpdate]:
    """Name of a module -> what a LoRA adapter adds to its weight.

    Raises:
        SourceError: there is no adapter in the folder.
        OptionError: an adapter of another kind, or with features that change more than weights by ``B A``.
        FormatError: a file is damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise SourceError(f"there is no {name} in {folder}", expected="a LoRA adapter as PEFT saves it")
    config = read_json_object(folder / CONFIG, str(folder / CONFIG))
    _check(config, folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    bases: dict[str, tuple[int, ...]] = {}
    with ShardReader(folder / WEIGHTS, name=str(folder / WEIGHTS)) as reader:
        for entry in reader.header.tensors:
            found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_(?:embedding_)?([AB]))(?:\.weight)?", entry.name)
            copied = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.base_layer\.(weight|{ATTACHED_NAME}\..+)", entry.name)
            if found is None and copied is not None:  # PEFT keeps a copy of an embedding that it adapts, and of its scales
                if copied[2] == "weight":
                    bases[copied[1]] = tuple(entry.shape)
                continue
            if found is None or ".base_layer" in entry.name or entry.dtype not in ("F32", "F16", "BF16"):
                raise OptionError(
                    f"{folder}: {entry.name!r} is no part of a LoRA update of a module's weight",
                    got=entry.dtype,
                    hint="merge the adapter with PEFT into the folded model",
                )
            pairs.setdefault(found[1], {})[found[2]] = reader.read(entry).float()
    if not pairs:
        raise OptionError(f"{folder} is an adapter that changes nothing", got="no LoRA matrices")
    return {module: _update(module, parts, config, folder, bases.get(module)) for module, parts in pairs.items()}


def _check(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise OptionError(f"{folder} is no LoRA adapter", got=config.get("peft_type"), expected="LORA")
    odd = {key: value for key, value in config.items() if key not in _HARMLESS and value not in (None, False, [], {}, "")}
    odd.pop("peft_type")
    if odd.get("bias") == "none":
        odd.pop("bias")
    if odd.get("init_lora_weights") in _INITIAL:
        odd.pop("init_lora_weights", None)  # false and null are not among the odd ones
    if odd:
        key, value = sorted(odd.items())[0]
        raise OptionError(
            f"{folder}: a LoRA adapter with {key} cannot be folded",
            got=f"{key} = {value!r}",
            expected="weights that change by B A alone",
            hint="merge it with PEFT into the folded model",
        )


def _update(
    module: str,
    parts: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    folder: Path,
    base: tuple[int, ...] | None,
) -> LoraUpdate:
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(parts) != set(names):
        raise FormatError(f"{folder}: {module!r} lacks a half of its update", got=sorted(parts), expected=list(names))
    A, B = parts[names[0]], parts[names[1]]
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1:
        raise FormatError(f"{folder}: the halves of {module!r} do not fit", got=[list(A.shape), list(B.shape)])
    r = _of_module(config.get("rank_pattern"), module, config.get("r"), folder)
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha"), folder)
    if not _is_number(alpha) or r != A.shape[0] or r == 0:
        raise FormatError(f"{folder}: rank or alpha of {module!r} contradicts its config", got=[r, alpha], expected=A.shape[0])
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise FormatError(f"{folder}: the update of {module!r} holds NaN or infinity", hint="take an earlier checkpoint")
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return LoraUpdate(A, B.reshape(B.shape[:2]), scaling, embedding, config.get("fan_in_fan_out") is True, base)


def _is_number(value: Any) -> bool:
    """One that float32 has, and so many tensors could be multiplied by."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _of_module(patterns: Any, module: str, default: Any, folder: Path) -> Any:
    """The entry of a rank or alpha pattern for a module, as PEFT looks it up."""
    if patterns is None:
        return default
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except (AttributeError, re.error) as error:
        raise FormatError(
            f"{folder}: its pattern of ranks or alphas makes no sense", got=patterns, expected="regular expression -> number"
        ) from error
    return default
