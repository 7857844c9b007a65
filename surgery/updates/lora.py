"""LoRA adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source of the format: PEFT 0.21, ``LoraConfig`` and ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.errors import FormatError, OptionError, SourceError
from surgery.escapes import quoted
from surgery.files.json_files import read_json_object
from surgery.format.safetensors import ShardReader
from surgery.names import ADAPTER_CONFIG, ATTACHED_NAME
from surgery.updates.adapters.patterns import ByModule

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLED = "adapter_model.bin"

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
_MERGE = "merge the adapter with PEFT into the folded model"
#: Half of an update: of an embedding PEFT keeps parameters, of any other module layers.
_HALF = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.((?P<layer>lora_[AB])\.weight|(?P<parameter>lora_embedding_[AB]))")
_COPIED = re.compile(rf"{re.escape(PREFIX)}(.+)\.base_layer\.(weight|{ATTACHED_NAME}\..+)")


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
    """Read a LoRA adapter: name of a module -> what is added to its weight.

    Raises:
        SourceError: there is no adapter in the folder.
        OptionError: an adapter of another kind, or with features that change more than weights by ``B A``.
        FormatError: a file is damaged.
    """
    for name in (ADAPTER_CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise SourceError(
                f"there is no {name} in {folder}", expected="a LoRA adapter as PEFT saves it", hint=_how_to_have_it(folder)
            )
    config = read_json_object(folder / ADAPTER_CONFIG, str(folder / ADAPTER_CONFIG))
    _check(config, folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    bases: dict[str, tuple[int, ...]] = {}
    with ShardReader(folder / WEIGHTS, name=str(folder / WEIGHTS)) as reader:
        for entry in reader.header.tensors:
            found = _HALF.fullmatch(entry.name)
            copied = _COPIED.fullmatch(entry.name)
            if found is None and copied is not None:  # PEFT keeps a copy of an embedding that it adapts, and of its scales
                if copied[2] == "weight":
                    bases[copied[1]] = tuple(entry.shape)
                continue
            if found is None or ".base_layer" in entry.name or entry.dtype not in ("F32", "F16", "BF16"):
                raise OptionError(
                    f"{folder}: {entry.name!r} is no part of a LoRA update of a module's weight",
                    got=entry.dtype,
                    hint=_MERGE,
                )
            pairs.setdefault(found["module"], {})[found["layer"] or found["parameter"]] = reader.read(entry).float()
    if not pairs:
        raise OptionError(f"{folder} is an adapter that changes nothing", got="no LoRA matrices")
    ranks = ByModule(config, "rank_pattern", "r", pairs, folder)
    alphas = ByModule(config, "alpha_pattern", "lora_alpha", pairs, folder)
    stored = [
        _StoredUpdate(module, parts, ranks.of(module), alphas.of(module), bases.get(module)) for module, parts in pairs.items()
    ]
    return {one.module: _update(one, config, folder) for one in stored}


def _how_to_have_it(folder: Path) -> str | None:
    """The hint for a path that is no folder with the files that PEFT writes today."""
    if folder.is_file():
        return f"give its folder, {quoted(folder.parent)}"
    if not folder.is_dir():
        return "give a folder of this machine; hf download ID --local-dir FOLDER fetches an adapter of the hub into one"
    if (folder / _PICKLED).is_file():
        return f"load it with PEFT, which reads {_PICKLED}, and save it again: save_pretrained writes {WEIGHTS}"
    return None


def _check(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise OptionError(f"{folder} is no LoRA adapter", got=reprlib.repr(config.get("peft_type")), expected="LORA")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise FormatError(
            f"{folder}: use_rslora makes no sense", got=reprlib.repr(config["use_rslora"]), expected="true or false"
        )
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
            got=f"{key} = {reprlib.repr(value)}",
            expected="weights that change by B A alone",
            hint=_MERGE,
        )


@dataclass(frozen=True, slots=True)
class _StoredUpdate:
    """What an adapter's files have of the update of a module, not yet checked.

    Attributes:
        module: its name.
        parts: the halves of the update by their names.
        r, alpha: what the config has of it, whatever that is.
        base: shape of the module's own weight, where PEFT has kept a copy of it.
    """

    module: str
    parts: Mapping[str, torch.Tensor]
    r: Any
    alpha: Any
    base: tuple[int, ...] | None


def _update(stored: _StoredUpdate, config: Mapping[str, Any], folder: Path) -> LoraUpdate:
    module, parts, r, alpha = stored.module, stored.parts, stored.r, stored.alpha
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(parts) != set(names):
        raise FormatError(f"{folder}: {module!r} lacks a half of its update", got=sorted(parts), expected=list(names))
    A, B = parts[names[0]], parts[names[1]]
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1:
        raise FormatError(f"{folder}: the halves of {module!r} do not fit", got=[list(A.shape), list(B.shape)])
    if not _is_number(alpha) or type(r) is not int or r != A.shape[0] or r == 0:
        raise FormatError(
            f"{folder}: rank or alpha of {module!r} contradicts its config",
            got=reprlib.repr([r, alpha]),
            expected=f"a rank of {A.shape[0]}, as its matrices have, and a number" if A.shape[0] else "a rank of 1 or more",
        )
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise FormatError(f"{folder}: the update of {module!r} holds NaN or infinity", hint="take an earlier checkpoint")
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return LoraUpdate(A, B.reshape(B.shape[:2]), scaling, embedding, config.get("fan_in_fan_out") is True, stored.base)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, well within the range of float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
