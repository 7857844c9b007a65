"""MXFP4: E2M1 numbers with a power of two for each 32 along the inputs (OCP Microscaling Formats Specification v1.0).

| numbers | scales | as in |
| --- | --- | --- |
| ``X_blocks`` U8 [experts, out, in / 32, 16] | ``X_scales`` U8 [experts, out, in / 32] | gpt-oss: X is [experts, in, out] |
| ``X.weight`` I8 [out, in / 2] | ``X.scale`` F8_E8M0 [out, in / 32] | DeepSeek-V4's experts |
"""

from __future__ import annotations

from surgery.errors import FormatError
from surgery.format.header import TensorEntry
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E2M1
from surgery.quantized.fp8 import Where
from surgery.quantized.weight import Quantized, StoredPart

MXFP4 = "MXFP4"
_GROUP = 32


def find_blocks(entry: TensorEntry, where: Where, model: str) -> Quantized | None:
    """A weight of which a tensor holds the blocks; None if it is no such tensor.

    Raises:
        FormatError: its scales are missing, or do not fit.
    """
    if not entry.name.endswith("_blocks") or entry.dtype != "U8" or len(entry.shape) != 4 or entry.shape[-1] != 16:
        return None
    name = entry.name.removesuffix("_blocks")
    scales = f"{name}_scales"
    if scales not in where:
        raise FormatError(
            f"{model}: {entry.name!r} looks like packed MXFP4 numbers, and its scales are missing",
            expected=repr(scales),
            hint="the model is incomplete",
        )
    experts, out, groups, _ = entry.shape
    scale, shard = where[scales]
    if scale.dtype not in ("U8", "F8_E8M0") or scale.shape != (experts, out, groups):
        raise FormatError(
            f"{model}: the scales {scales!r} do not fit {entry.name!r}",
            got=f"{scale.dtype} {list(scale.shape)}",
            expected=f"U8 {[experts, out, groups]}",
        )
    part = StoredPart("scale", scales, shard, True, "exponents" if scale.dtype == "U8" else "plain")
    # The model's parameter is the transpose: it multiplies from the right.
    codec = Codec(E2M1(), (_GROUP, 1), MXFP4, transposed=True)
    return Quantized(name, MXFP4, (experts, _GROUP * groups, out), where[entry.name][1], entry.stored, codec, (part,))


def find_nibbles(entry: TensorEntry, where: Where) -> Quantized | None:
    """A weight that is stored under its own name with two numbers to a byte; None if it is no such tensor."""
    if not entry.name.endswith(".weight") or entry.dtype not in ("I8", "U8") or len(entry.shape) != 2:
        return None
    out, columns = entry.shape[0], 2 * entry.shape[1]
    name = entry.name.removesuffix("weight") + "scale"
    if name not in where:
        return None
    scale, shard = where[name]
    if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != (out, columns // _GROUP) or columns % _GROUP:
        return None
    part = StoredPart("scale", name, shard, False, "exponents" if scale.dtype == "U8" else "plain")
    codec = Codec(E2M1(), (1, _GROUP), MXFP4)
    return Quantized(entry.name, MXFP4, (out, columns), where[entry.name][1], entry.stored, codec, (part,))
