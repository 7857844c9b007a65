"""MXFP4 and NVFP4: E2M1 numbers, two to a byte, with scales for groups along the inputs.

MXFP4 (OCP Microscaling Formats Specification v1.0): a power of two for each 32.

| numbers | scales | as in |
| --- | --- | --- |
| ``X_blocks`` U8 [experts, out, in / 32, 16] | ``X_scales`` U8 [experts, out, in / 32] | gpt-oss: X is [experts, in, out] |
| ``X.weight`` I8 [out, in / 2] | ``X.scale`` F8_E8M0 [out, in / 32] | DeepSeek-V4's experts |
| ``X.weight`` U8 [out, in / 2] | ``X.weight_scale`` U8 [out, in / 32] | modelopt, Quark |
| ``X.weight_packed`` U8 [out, in / 2] | ``X.weight_scale`` U8 [out, in / 32] | compressed-tensors |

NVFP4: an E4M3 number for each 16, and a float32 for all, which multiplies them in modelopt and divides them in
compressed-tensors.

| numbers | scales | all | as in |
| --- | --- | --- | --- |
| ``X.weight`` U8 [out, in / 2] | ``X.weight_scale`` [out, in / 16] | ``X.weight_scale_2`` | modelopt |
| ``X`` U8 [experts, out, in / 2] | ``X_weight_scale`` [experts, out, in / 16] | ``X_weight_scale_2`` | modelopt |
| ``X`` U8 [experts, in / 2, out] | ``X_weight_scale`` [experts, in / 16, out] | ``X_weight_scale_2`` | modelopt's Llama 4 |
| ``X.weight_packed`` U8 [out, in / 2] | ``X.weight_scale`` [out, in / 16] | ``X.weight_global_scale`` | compressed-tensors |
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import FormatError
from surgery.format.header import TensorEntry
from surgery.names import FP8
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E2M1
from surgery.quantized.fp8 import beside_of
from surgery.quantized.schemes import Told, Where
from surgery.quantized.weight import Quantized, StoredPart

MXFP4, NVFP4 = "MXFP4", "NVFP4"
#: How many numbers share a scale.
_GROUPS = {MXFP4: 32, NVFP4: 16}
_EXPONENTS = ("U8", "F8_E8M0")
#: Methods of configs whose bytes are these formats, where no tensor but the scales tells.
_METHODS = (None, "modelopt", "modelopt_fp4", "modelopt_mixed", "mxfp4", "nvfp4", "quark", "compressed-tensors", "fp8")


def find_blocks(entry: TensorEntry, where: Where, told: Told) -> Quantized | None:
    """A weight of which a tensor holds the blocks, as gpt-oss has them; None if it is no such tensor.

    Raises:
        FormatError: its scales are missing, or do not fit.
    """
    if not entry.name.endswith("_blocks") or entry.dtype != "U8" or len(entry.shape) != 4 or entry.shape[-1] != 16:
        return None
    name = entry.name.removesuffix("_blocks")
    experts, out, groups, _ = entry.shape
    scale, shard = _part(entry, f"{name}_scales", _EXPONENTS, [(experts, out, groups)], where, told)
    part = StoredPart("scale", scale.name, shard, True, "exponents" if scale.dtype == "U8" else "plain")
    # The model's parameter is the transpose: it multiplies from the right.
    codec = Codec(E2M1(), (_GROUPS[MXFP4], 1), name, transposed=True)
    shape = experts, _GROUPS[MXFP4] * groups, out
    return Quantized(name, MXFP4, shape, where[entry.name][1], entry.stored, codec, (part,))


def find_compressed(entry: TensorEntry, where: Where, told: Told) -> Quantized | None:
    """A weight that compressed-tensors has packed in bytes; None if it is no such tensor.

    Raises:
        FormatError: its scales are missing, do not fit, or are not those that the config tells.
    """
    if not entry.name.endswith(".weight_packed") or entry.dtype != "U8" or len(entry.shape) not in (2, 3):
        return None
    layer = entry.name.removesuffix("weight_packed")
    if f"{layer}weight_scale" not in where:
        return None
    format_ = NVFP4 if where[f"{layer}weight_scale"][0].dtype == FP8 else MXFP4
    schemes = told.of(layer.removesuffix("."))
    if schemes and not any((one.type, one.bits, one.block) == ("float", 4, (1, _GROUPS[format_])) for one in schemes):
        raise FormatError(
            f"{told.model}: {entry.name!r} is not what the config says of it",
            got=f"{format_}, by the dtype of its scales",
            expected=" or ".join(f"{one.type} of {one.bits} bits, {one.strategy} {one.block}" for one in schemes),
        )
    names = _Names(f"{layer}weight", f"{layer}weight_scale", f"{layer}weight_global_scale")
    return _of_bytes(entry, names, format_, where, told)


def find_bytes(entry: TensorEntry, where: Where, told: Told) -> Quantized | None:
    """A weight that is stored under its own name with two numbers to a byte; None if it is no such tensor.

    Raises:
        FormatError: scales of NVFP4 do not fit.
    """
    is_layer = entry.name.endswith(".weight")
    if entry.dtype not in ("I8", "U8") or len(entry.shape) not in (2, 3) or not (is_layer or len(entry.shape) == 3):
        return None
    layer = entry.name.removesuffix("weight") if is_layer else f"{entry.name}_"
    if f"{layer}pre_quant_scale" in where:  # what the layer computes with is another weight
        return None
    names = _Names(entry.name, f"{layer}weight_scale", f"{layer}weight_scale_2")
    if entry.dtype == "U8" and names.scale in where and names.all in where and where[names.scale][0].dtype == FP8:
        return _of_bytes(entry, names, NVFP4, where, told)
    for scale in (f"{layer}scale", f"{entry.name}_scale_inv", f"{entry.name}_scale", names.scale):
        if scale in where and told.method in _METHODS and _is_mxfp4(entry, where[scale][0]):
            return _of_bytes(entry, _Names(entry.name, scale, names.all), MXFP4, where, told)
    return None


@dataclass(frozen=True, slots=True)
class _Names:
    """Of the weight, of the scales of its groups, and of what all of these have in common."""

    weight: str
    scale: str
    all: str


def _is_mxfp4(entry: TensorEntry, scale: TensorEntry) -> bool:
    *rows, packed = entry.shape
    return scale.dtype in _EXPONENTS and scale.shape == (*rows, 2 * packed // 32) and packed % 16 == 0


def _of_bytes(entry: TensorEntry, names: _Names, format_: str, where: Where, told: Told) -> Quantized:
    group = _GROUPS[format_]
    *stack, rows, packed = entry.shape
    along = [] if 2 * packed % group else [(*stack, rows, 2 * packed // group)]
    if format_ == NVFP4 and stack and 2 * rows % group == 0:
        along.append((*stack, 2 * rows // group, packed))
    dtypes = (FP8,) if format_ == NVFP4 else _EXPONENTS
    scale, shard = _part(entry, names.scale, dtypes, along, where, told)
    parts = [StoredPart("scale", scale.name, shard, bool(stack), "exponents" if scale.dtype == "U8" else "plain")]
    if format_ == NVFP4:
        shapes = [(), (1,), *([tuple(stack), (*stack, 1), (*stack, 1, 1)] if stack else [])]
        whole, shard = _part(entry, names.all, ("F32",), shapes, where, told)
        parts.append(StoredPart("global_scale", whole.name, shard, len(whole.shape) > 0 and [whole.shape[0]] == stack))
    columnwise = scale.shape != along[0]
    codec = Codec(
        E2M1(),
        (group, 1) if columnwise else (1, group),
        names.weight,
        divides=names.all.endswith("global_scale"),
        columnwise=columnwise,
    )
    shape = (*stack, 2 * rows, packed) if columnwise else (*stack, rows, 2 * packed)
    beside = beside_of(names.weight, where)
    return Quantized(names.weight, format_, shape, where[entry.name][1], entry.stored, codec, tuple(parts), beside)


def _part(
    entry: TensorEntry,
    name: str,
    dtypes: tuple[str, ...],
    shapes: list[tuple[int, ...]],
    where: Where,
    told: Told,
) -> tuple[TensorEntry, str]:
    """A tensor beside the numbers, and its weight file.

    Raises:
        FormatError: it is missing, or of another dtype or shape.
    """
    if name not in where:
        raise FormatError(
            f"{told.model}: {entry.name!r} looks like packed 4-bit numbers, and its scales are missing",
            expected=repr(name),
            hint="the model is incomplete",
        )
    part, shard = where[name]
    if part.dtype not in dtypes or part.shape not in shapes:
        raise FormatError(
            f"{told.model}: the scales {name!r} do not fit {entry.name!r}",
            got=f"{part.dtype} {list(part.shape)} for {entry.dtype} {list(entry.shape)}",
            expected=f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}",
        )
    return part, shard
