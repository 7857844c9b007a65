"""INT4 and INT8 of compressed-tensors: integers with scales for groups along the inputs, channels or whole matrices.

| numbers | beside | as in |
| --- | --- | --- |
| ``X.weight_packed`` I32 [out, in / 8] (INT8: in / 4) | ``X.weight_scale`` [out, groups], ``X.weight_shape`` | pack-quantized |
| ``X.weight`` I8 [out, in] | ``X.weight_scale`` [out, 1] | int-quantized, naive-quantized |

Weights that are not symmetric have ``X.weight_zero_point``, packed along the outputs in pack-quantized; those that were ordered
by the size of activations ``X.weight_g_idx``, the group of each column.

Source: ``compressors/`` of compressed-tensors 0.20; of the groups ``_process_group`` in 0.13, which still had them.
"""

from __future__ import annotations

from surgery.errors import FormatError
from surgery.format.header import TensorEntry
from surgery.quantized.codec import Codec
from surgery.quantized.elements import Integers
from surgery.quantized.fp8 import beside_of
from surgery.quantized.schemes import COMPRESSED_TENSORS, Scheme, Told, Where
from surgery.quantized.weight import Quantized, Storage, StoredPart

_BITS = (4, 8)
_SCALE_DTYPES = ("F32", "BF16", "F16")
#: Methods of configs whose int8 weights are these, where no group of compressed-tensors tells.
_METHODS = (None, COMPRESSED_TENSORS, "w8a8_int8")


def find_integers(entry: TensorEntry, where: Where, told: Told) -> Quantized | None:
    """A weight of which a tensor holds integers; None if it holds none, or such as are not read.

    Raises:
        FormatError: what belongs to it is missing, does not fit, or contradicts the config.
    """
    packed = entry.name.endswith(".weight_packed") and entry.dtype == "I32"
    plain = entry.name.endswith(".weight") and entry.dtype == "I8"
    layer = entry.name.removesuffix("_packed").removesuffix("weight")
    if not (packed or plain) or len(entry.shape) not in (2, 3) or f"{layer}weight_scale" not in where:
        return None
    formats = (None, "pack-quantized") if packed else (None, "int-quantized", "naive-quantized")
    schemes = [one for one in told.of(layer.removesuffix(".")) if one.type == "int" and one.bits in _BITS]
    schemes = [one for one in schemes if one.format in formats]
    if not schemes:
        # How many bits packed ones have, only a scheme tells.
        if packed or told.schemes or told.method not in _METHODS or where[f"{layer}weight_scale"][0].dtype not in _SCALE_DTYPES:
            return None
        schemes = [Scheme("int", 8, how, None, True, None, lambda _: False, True) for how in ("tensor", "channel")]
    for scheme in schemes:
        if (found := _as_told(entry, layer, scheme, where)) is not None:
            return found
    names = [f"{layer}weight_{what}" for what in ("scale", "zero_point", "g_idx")]
    there = [f"{name} {where[name][0].dtype} {list(where[name][0].shape)}" for name in names if name in where]
    raise FormatError(
        f"{told.model}: what belongs to {entry.name!r} does not fit it, or not what the config says of it",
        got=f"{entry.dtype} {list(entry.shape)}, with {', '.join(there)}",
        expected=" or ".join(_said(scheme) for scheme in schemes),
    )


def _as_told(entry: TensorEntry, layer: str, scheme: Scheme, where: Where) -> Quantized | None:
    """The weight, if its tensors are as a scheme says; else None."""
    packed = entry.dtype == "I32"
    scale, shard = where[f"{layer}weight_scale"]
    *stack, m, width = entry.shape
    n = _columns(entry, layer, scheme, where) if packed else width
    if n is None or (block := scheme.block_of(m, n)) is None or scale.dtype not in _SCALE_DTYPES:
        return None
    block = block[0], min(block[1], max(n, 1))
    grid = -(-m // block[0]), -(-n // block[1])
    by_matrix = bool(stack)
    if scheme.strategy == "tensor" and scale.shape in ((), (1,)):
        by_matrix = False
    elif scale.shape != (*stack, *grid) and not (scale.shape == (m,) and grid == (m, 1) and not stack):
        return None
    parts = [StoredPart("scale", scale.name, shard, by_matrix)]
    zero = where.get(f"{layer}weight_zero_point")
    if (zero is None) != scheme.symmetric:
        return None
    if zero is not None:
        is_packed = zero[0].dtype == "I32"
        shape = (*stack, -(-m * scheme.bits // 32), grid[1]) if is_packed else scale.shape
        if zero[0].shape != shape or zero[0].dtype not in (("I32",) if packed and scheme.strategy != "tensor" else ("I8",)):
            return None
        rows, bits = (m, scheme.bits) if is_packed else (0, 0)
        storage: Storage = "packed rows" if is_packed else "plain"
        parts.append(StoredPart("zero_point", zero[0].name, zero[1], by_matrix, storage, rows, bits))
    group = where.get(f"{layer}weight_g_idx")
    if group is not None:
        if stack or group[0].shape != (n,) or group[0].dtype not in ("I32", "I64"):
            return None
        parts.append(StoredPart("group_index", group[0].name, group[1]))
    shape_told = where.get(f"{layer}weight_shape")
    if shape_told is not None:
        if shape_told[0].shape != (len(entry.shape),) or shape_told[0].dtype not in ("I32", "I64"):
            return None
        parts.append(StoredPart("shape", shape_told[0].name, shape_told[1]))
    name = f"{layer}weight"
    return Quantized(
        name,
        f"INT{scheme.bits}",
        (*stack, m, n),
        where[entry.name][1],
        entry.stored,
        Codec(Integers(scheme.bits, packed), block, name),
        tuple(parts),
        beside_of(name, where),
    )


def _columns(entry: TensorEntry, layer: str, scheme: Scheme, where: Where) -> int | None:
    """How many columns a weight has whose numbers are packed; None if its tensors contradict each other.

    Where the header does not tell, it has as many as there is room for: the tensor of its shape, which is read with it, must
    say the same.
    """
    per = 32 // scheme.bits
    most = entry.shape[-1] * per
    if f"{layer}weight_g_idx" in where:
        n = where[f"{layer}weight_g_idx"][0].shape[0] if len(where[f"{layer}weight_g_idx"][0].shape) == 1 else -1
    elif scheme.block is not None and scheme.strategy != "channel":
        n = min(where[f"{layer}weight_scale"][0].shape[-1] * scheme.block[1], most)
    else:
        n = most
    return n if most - per < n <= most else None


def _said(scheme: Scheme) -> str:
    block = "" if scheme.block is None else f" of {scheme.block[1]}"
    zeros = "without" if scheme.symmetric else "with"
    return f"{scheme.bits} bits, one scale for each {scheme.strategy}{block}, {zeros} zero points"
