"""How a model is quantized, from its config and headers: which weights are read, and which are passed over, by what method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import SourceError
from surgery.format.header import Header
from surgery.quantized.formats import find_quantized
from surgery.quantized.schemes import Where, read_told
from surgery.quantized.weight import Quantized

#: Keys under which ``config.json`` describes a quantization.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")

_DENSE = "factorize the publisher's unquantized model, and fold into that"

#: Hints for formats that are not read, by ``quant_method``: how transformers dequantizes such a model, where it can.
_INSTEAD = {
    "bitsandbytes": "load it with transformers, call model.dequantize(), save_pretrained(FOLDER), factorize that",
    "higgs": "load it with transformers, call model.dequantize(), save_pretrained(FOLDER), factorize that",
    "compressed-tensors": "load it with CompressedTensorsConfig(dequantize=True), save_pretrained(FOLDER), factorize that",
    "metal": "load it with MetalConfig(dequantize=True), save_pretrained(FOLDER), factorize that",
}

#: Names of tensors that only quantized checkpoints have, and the method they tell of where ``config.json`` says nothing.
_TRACES = (
    (re.compile(r".*\.(qweight|qzeros|g_idx)"), "gptq or awq"),
    (re.compile(r".*\.(weight_packed|weight_global_scale|weight_shape)"), "compressed-tensors"),
    (re.compile(r".*\.weight\.(absmax|quant_map|quant_state\..*|nested_absmax)|.*\.SCB", re.DOTALL), "bitsandbytes"),
    (re.compile(r".*\.(W_q|codebooks|qbiases)"), "hqq, aqlm or mlx"),
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is quantized in a model.

    Attributes:
        weights: name of a weight that is read -> how it is stored.
        unread: name of a tensor that holds a weight which is not read, or a part of one -> the method.
    """

    weights: Mapping[str, Quantized] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    def check_read(self, model: str) -> None:
        """Refuse a model of which some weights cannot be read.

        Raises:
            SourceError: names one, and what to do instead.
        """
        for tensor, method in self.unread.items():
            raise unsupported(model, method, repr(tensor))


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``config.json`` says of a quantization, for the whole model or its language model; None if it says nothing."""
    parts = [config, *(config[part] for part in ("text_config", "language_config") if isinstance(config.get(part), dict))]
    for part in parts:
        for key in QUANTIZATION_KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                found: Mapping[str, Any] = part[key]
                return found
    return None


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
    told = read_told(described, model)
    weights: dict[str, Quantized] = {}
    for entry, _ in where.values():
        if (found := find_quantized(entry, where, told)) is not None:
            weights[found.name] = found
    return Quantization(weights, _unread(where, told.method or _bitsandbytes(described), weights))


def _bitsandbytes(described: Mapping[str, Any]) -> str | None:
    return "bitsandbytes" if described.get("load_in_4bit") or described.get("load_in_8bit") else None


def _unread(where: Where, method: str | None, weights: Mapping[str, Quantized]) -> dict[str, str]:
    """The tensors that only quantized models have and that belong to no weight that is read -> the method."""
    known = {name for one in weights.values() for name in (one.numbers.name, *(part.name for part in one.parts), *one.beside)}
    found: dict[str, str] = {}
    for name in where:
        if name not in known and (seems := next((told for trace, told in _TRACES if trace.fullmatch(name)), None)) is not None:
            found[name] = method or seems
    return found


def unsupported(model: str, method: str, got: str) -> SourceError:
    """The error for a model that is quantized in a way that is not read."""
    return SourceError(
        f"{model} is quantized with {method}, which is not supported",
        got=got,
        expected="bfloat16, float16, float32, FP8 with scales, or MXFP4",
        hint=_INSTEAD.get(method, _DENSE),
    )
