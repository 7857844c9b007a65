"""How a model is quantized, from its config and headers: FP8 with scales by block or by matrix is read, all else is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import FormatError, SourceError
from surgery.format.header import Header, TensorEntry

FP8 = "F8_E4M3"
#: Keys under which ``config.json`` describes a quantization.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
SCALE_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
#: Ends of names of the scales that quantize a layer's inputs and outputs at inference. They mean nothing for its weight.
_ACTIVATION_SCALES = tuple(f"{of}_scale{end}" for of in ("activation", "act", "input", "output") for end in ("", "_inv"))

_DENSE = "factorize the publisher's unquantized model, and fold into that"

#: Hints for formats that are not read, by ``quant_method``: how transformers dequantizes such a model, where it can.
_INSTEAD = {
    "mxfp4": "load it with Mxfp4Config(dequantize=True), save_pretrained(FOLDER, save_original_format=False), factorize that",
    "bitsandbytes": "load it with transformers, call model.dequantize(), save_pretrained(FOLDER), factorize that",
    "higgs": "load it with transformers, call model.dequantize(), save_pretrained(FOLDER), factorize that",
    "compressed-tensors": "load it with CompressedTensorsConfig(dequantize=True), save_pretrained(FOLDER), factorize that",
    "mxfp8": "load it with its config's dequantize=True in bfloat16, save_pretrained(FOLDER), factorize that",
    "metal": "load it with MetalConfig(dequantize=True), save_pretrained(FOLDER), factorize that",
}

#: Names of tensors that only quantized checkpoints have, and the method they tell of where ``config.json`` says nothing.
_TRACES = (
    (re.compile(r".*\.(qweight|qzeros|g_idx)"), "gptq or awq"),
    (re.compile(r".*\.(weight_packed|weight_global_scale|weight_shape)"), "compressed-tensors"),
    (re.compile(r".*\.weight\.(absmax|quant_map|quant_state\..*|nested_absmax)|.*\.SCB", re.DOTALL), "bitsandbytes"),
    (re.compile(r".*\.(W_q|codebooks|qbiases)"), "hqq, aqlm or mlx"),
)
_SCALE_LIKE = re.compile(r"(\.|_)(weight_scale(_2|_inv)?|scale_weight|qscale_weight|scale_inv|scale)$")


@dataclass(frozen=True, slots=True)
class Scaled:
    """Where the scales of an FP8 weight are.

    Attributes:
        scale: the name of the tensor that holds them.
        shard: the weight file they are in, which may be another than the weight's.
        block: how many rows and columns share a scale: all of the matrix where it has a single one.
        activations: the names of the scales of the layer's inputs and outputs, which mean nothing for the weight.
    """

    scale: str
    shard: str
    block: tuple[int, int]
    activations: tuple[str, ...]


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``config.json`` says of a quantization, for the whole model or its language model; None if it says nothing."""
    parts = [config, *(config[part] for part in ("text_config", "language_config") if isinstance(config.get(part), dict))]
    for part in parts:
        for key in QUANTIZATION_KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                found: Mapping[str, Any] = part[key]
                return found
    return None


def read_quantization(config: Mapping[str, Any], headers: Mapping[str, Header], model: str) -> dict[str, Scaled]:
    """The FP8 weights of a model and where their scales are; empty for a model that is not quantized.

    Args:
        config: its ``config.json``.
        headers: of all its weight files, by name.
        model: its name, for messages.

    Raises:
        SourceError: it is quantized in a way that is not supported; says what to do instead.
        FormatError: an FP8 weight without its scales, or with scales that do not fit it.
    """
    where = {entry.name: (entry, shard) for shard, header in headers.items() for entry in header.tensors}
    described = quantization_of(config)
    if described is None:
        _refuse_traces(where, model)
        return {}
    method = _method(described)
    if method != "fp8":
        raise _unsupported(f"{model} is", method, f"quant_method {method!r} in config.json")
    block = _block(described, model)
    return {
        name: _scaled(entry, where, block, model)
        for name, (entry, _) in where.items()
        if entry.dtype == FP8 and len(entry.shape) >= 2
    }


def _method(described: Mapping[str, Any]) -> str:
    method = described.get("quant_method")
    if method is None and (described.get("load_in_4bit") or described.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method).lower()


def _block(described: Mapping[str, Any], model: str) -> tuple[int, int] | None:
    block = described.get("weight_block_size", [128, 128])
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise FormatError(
            f"{model}/config.json: weight_block_size makes no sense",
            got=repr(block)[:80],
            expected="two numbers such as [128, 128]",
        )
    return block[0], block[1]


def _scaled(
    entry: TensorEntry, where: Mapping[str, tuple[TensorEntry, str]], block: tuple[int, int] | None, model: str
) -> Scaled:
    name = entry.name + SCALE_SUFFIX
    if name not in where:
        near = [other for other in where if other.startswith(entry.name.removesuffix(".weight")) and _SCALE_LIKE.search(other)]
        raise FormatError(
            f"{model}: {entry.name!r} is FP8, and its scales are missing",
            got=", ".join(near[:3]) or "no tensor like it",
            expected=repr(name),
            hint="the model is incomplete or of another format: without its scales the weight means nothing",
        )
    scale, shard = where[name]
    *stack, m, n = entry.shape
    # A single number is the scale of the whole matrix, whatever the config says of blocks: transformers reads it so.
    whole = max(m, 1), max(n, 1)
    fitting = {tuple(shape): whole for shape in ([*stack], [*stack, 1, 1], *([] if stack else [[1]]))}
    if block is not None:
        fitting[(*stack, -(-m // block[0]), -(-n // block[1]))] = block
    if scale.shape not in fitting or scale.dtype not in _SCALE_DTYPES:
        by = f"for blocks of {list(block)}, or one for each matrix" if block else "one for each matrix"
        raise FormatError(
            f"{model}: the scales {name!r} do not fit {entry.name!r}",
            got=f"{scale.dtype} {list(scale.shape)} for {list(entry.shape)}",
            expected=f"{' or '.join(_SCALE_DTYPES)} {' or '.join(str(list(shape)) for shape in reversed(fitting))}, {by}",
        )
    beside = entry.name.removesuffix("weight") if entry.name.endswith(".weight") else f"{entry.name}_"
    activations = tuple(beside + last for last in _ACTIVATION_SCALES if beside + last in where)
    return Scaled(name, shard, fitting[scale.shape], activations)


def _seems(model: str, method: str, entry: TensorEntry) -> SourceError:
    """The error for a tensor as a method stores it, in a model that tells of none."""
    got = f"{entry.name!r}, {entry.dtype}, and no quantization_config in config.json"
    return _unsupported(f"{model} seems to be", method, got)


def _unsupported(model_is: str, method: str, got: str) -> SourceError:
    return SourceError(
        f"{model_is} quantized with {method}, which is not supported",
        got=got,
        expected="bfloat16, float16, float32, or FP8 with scales (quant_method 'fp8')",
        hint=_INSTEAD.get(method, _DENSE),
    )


def _refuse_traces(where: Mapping[str, tuple[TensorEntry, str]], model: str) -> None:
    for name, (entry, _) in where.items():
        for pattern, method in _TRACES:
            if pattern.fullmatch(name):
                raise _seems(model, method, entry)
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in where:
            raise _seems(model, "mxfp4", entry)
        if entry.dtype == FP8 and (scales := [name + suffix for suffix in ("_scale_inv", "_scale") if name + suffix in where]):
            raise SourceError(
                f"{model} has FP8 weights with scales, but its config.json has no quantization_config",
                got=f"{name!r} and {scales[0]!r}",
                expected='"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}',
                hint="restore the config.json of the model",
            )
