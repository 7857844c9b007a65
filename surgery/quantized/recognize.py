"""How a model is quantized, from its config and headers: which weights are read, and which are passed over, by what method."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from surgery.format.header import Header
from surgery.names import FP8
from surgery.quantized.cast import as_cast, is_fp8_matrix, scales_beside
from surgery.quantized.formats import find_quantized
from surgery.quantized.fp8 import scales_missing
from surgery.quantized.methods import METHODS, called
from surgery.quantized.schemes import Where, method_of, read_told
from surgery.quantized.unread import INTEGERS, UnreadWeight, find_foreign, find_left_over
from surgery.quantized.weight import Quantized, beside_weights

#: Keys under which ``config.json`` describes a quantization.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
#: The key under which MLX does.
_MLX_KEY = "quantization"
#: Files beside ``config.json`` that describe a quantization: of ModelOpt, AutoGPTQ and AutoAWQ.
MODELOPT_FILE = "hf_quant_config.json"
QUANTIZATION_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Quantization:
    """What is quantized in a model.

    Attributes:
        weights: name of a weight that is read -> how it is stored.
        unread: name of a weight that is packed in a way that is not read -> what is known of it.
        method: what people call the method that the config names; None if it names none.
        unknown: why it is not known what the model's weights mean, as (what is not known, what was found); None if it is.
    """

    weights: Mapping[str, Quantized] = field(default_factory=dict)
    unread: Mapping[str, UnreadWeight] = field(default_factory=dict)
    method: str | None = None
    unknown: tuple[str, str] | None = None

    @cached_property
    def unread_tensors(self) -> Mapping[str, UnreadWeight]:
        """Each tensor of a weight that is not read -> that weight."""
        return {tensor: one for one in self.unread.values() for tensor in one.tensors}

    @property
    def is_named_only(self) -> bool:
        """Whether the config names a method, and no weight is quantized."""
        return self.method is not None and not self.weights and not self.unread


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``config.json`` says of a quantization, for the whole model or a part of it; None if it says nothing."""
    for part in parts_of_config(dict(config)):
        for key in (*QUANTIZATION_KEYS, _MLX_KEY):
            found = part.get(key)
            if isinstance(found, dict) and found and (key != _MLX_KEY or _is_of_mlx(found)):
                return {"quant_method": "mlx", **found} if _is_of_mlx(found) else found
    return None


def parts_of_config(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and the configs inside of it: of a language model, of a vision tower ..."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key not in QUANTIZATION_KEYS:
            yield from parts_of_config(value)


def _is_of_mlx(described: Mapping[str, Any]) -> bool:
    """Whether it is in MLX's few words, which it repeats under the key of transformers."""
    return "quant_method" not in described and {"group_size", "bits"} <= described.keys() and "desc_act" not in described


def read_quantization(config: Mapping[str, Any], headers: Mapping[str, Header], model: str) -> Quantization:
    """The quantized weights of a model; none for one that is not quantized.

    Args:
        config: its ``config.json``.
        headers: of all its weight files, by name, as they are in the files.
        model: its name, for messages.

    Raises:
        FormatError: a weight without its scales, or with scales that do not fit it.
    """
    where = {entry.name: (entry, shard) for shard, header in headers.items() for entry in header.tensors}
    described = quantization_of(config) or {}
    if (method := method_of(described)) is not None and method not in METHODS:
        return Quantization(unknown=(f"quantized with {method!r}, a method that is not known", "its config.json names it"))
    unread = find_foreign(where, described)
    foreign = {tensor for one in unread.values() for tensor in one.tensors}
    weights: dict[str, Quantized] = {}
    told = read_told(described, model)
    for entry, _ in where.values():
        if entry.name not in foreign and (found := find_quantized(entry, where, told)) is not None:
            weights[found.name] = found
    if told.is_empty:
        unread |= _fp8_without_known_scales(where, weights, foreign, model)
    read = {
        *(tensor for one in unread.values() for tensor in one.tensors),
        *(one.numbers.name for one in weights.values()),
        *beside_weights(weights.values()),
    }
    unread |= find_left_over(where, described, read)
    unknown = next((one for one in unread.values() if one.method == INTEGERS), None)
    if unknown is not None:
        entry = where[unknown.main][0]
        found_there = f"{unknown.main!r}, {entry.dtype} {list(entry.shape)}, and nothing says how it is packed"
        return Quantization(weights, unread, called(described), ("packed in a way that is not known", found_there))
    return Quantization(weights, unread, called(described))


def _fp8_without_known_scales(
    where: Where, weights: dict[str, Quantized], foreign: Collection[str], model: str
) -> dict[str, UnreadWeight]:
    """Add FP8 weights that were cast to the ``weights`` of a model whose config says nothing of a quantization.

    Returns:
        Those that have something like scales beside them, and so are no casts.

    Raises:
        FormatError: other FP8 weights have scales, so that they are missing here.
    """
    some_have_scales = any(one.dtype == FP8 for one in weights.values())
    names, unread = sorted(where), {}
    for entry, shard in where.values():
        if not is_fp8_matrix(entry) or entry.name in weights or entry.name in foreign:
            continue
        if beside := scales_beside(entry.name, names):
            method, tensors = "FP8 with scales of a kind that is not known", (entry.name, *beside)
            unread[entry.name] = UnreadWeight(entry.name, method, entry.name, tensors, entry.shape, math.prod(entry.shape))
        elif some_have_scales and entry.dtype == FP8:
            raise scales_missing(entry, where, model)
        else:
            weights[entry.name] = as_cast(entry, shard)
    return unread
