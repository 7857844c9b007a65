"""FP8: float8_e4m3fn with scales for blocks, channels or whole matrices, as any of the publishers names and stores them.

| scales | as in | |
| --- | --- | --- |
| ``X_scale_inv`` | DeepSeek-V3 ("DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3), Mistral | blocks, or one |
| ``X.scale`` beside ``X.weight`` | DeepSeek-V4 | blocks, powers of two |
| ``X_scale`` | compressed-tensors, AutoFP8, modelopt, fbgemm, MXFP8 | one, by channel, or blocks; MXFP8: of 1 x 32 |
| ``X.qscale_weight`` | Mistral, in its own format | one |
| ``X.scale_weight`` | ComfyUI, before ``X.weight_scale`` | one |

The stored scale multiplies, whatever its name says. Which block it is for is told by the ratio of the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import FormatError
from surgery.format.header import TensorEntry
from surgery.names import FP8
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E4M3
from surgery.quantized.weight import Quantized, Storage, StoredPart

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
#: Blocks that publishers use, for scales whose number tells no single one.
_USUAL = (128, 64, 32, 16)

Where = Mapping[str, tuple[TensorEntry, str]]


def find_fp8(entry: TensorEntry, where: Where, block: tuple[int, int] | None, model: str) -> Quantized:
    """An FP8 weight with its scales.

    Args:
        entry: of the weight, F8_E4M3 with two dimensions or more.
        where: each tensor of the model -> its entry, and the weight file that it is in.
        block: as the config tells; None where it does not.
        model: its name, for messages.

    Raises:
        FormatError: it has no scales, or such as do not fit it.
    """
    names = scale_names(entry.name)
    name = next((name for name in names if name in where), None)
    if name is None:
        near = [other for other in where if other.startswith(entry.name.removesuffix("weight")) and other != entry.name]
        raise FormatError(
            f"{model}: {entry.name!r} is FP8, and its scales are missing",
            got=", ".join(near[:3]) or "no tensor like it",
            expected=" or ".join(map(repr, names[:2])),
            hint="the model is incomplete, was cast to FP8 without scales, or is of another format: without its scales the "
            "weight means nothing",
        )
    scale, shard = where[name]
    found = _block(entry.shape, scale.shape, block)
    if found is None or scale.dtype not in _SCALE_DTYPES:
        by = "one for each matrix, row or block" + (f" of {list(block)}" if block else "")
        raise FormatError(
            f"{model}: the scales {name!r} do not fit {entry.name!r}",
            got=f"{scale.dtype} {list(scale.shape)} for {list(entry.shape)}",
            expected=f"{', '.join(_SCALE_DTYPES)}, {by}",
        )
    size, by_matrix = found
    storage: Storage = "exponents" if scale.dtype == "U8" else "plain"
    part = StoredPart("scale", name, shard, by_matrix, storage)
    codec = Codec(E4M3(), size, "FP8", renewed=True)
    beside = beside_of(entry.name, where)
    return Quantized(entry.name, FP8, entry.shape, where[entry.name][1], entry.stored, codec, (part,), beside)


def scale_names(weight: str) -> list[str]:
    """The names that the scales of a weight may have, in the order in which they are looked for."""
    names = [f"{weight}_scale_inv", f"{weight}_scale"]
    if weight.endswith(".weight"):
        layer = weight.removesuffix("weight")
        names += [f"{layer}scale", f"{layer}qscale_weight", f"{layer}scale_weight"]
    return names


#: Ends of names of the scales that quantize a layer's inputs and outputs at inference, and of ComfyUI's word on how a layer is
#: quantized. They mean nothing for its weight.
_ACTIVATIONS = (
    *(f"{of}_scale{end}" for of in ("activation", "act", "input", "output") for end in ("", "_inv", "_ub")),
    "qscale_act",
    "scale_input",
    "comfy_quant",
)


def beside_of(weight: str, where: Where) -> tuple[str, ...]:
    """The tensors beside a weight that tell nothing of its numbers."""
    beside = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
    return tuple(beside + last for last in _ACTIVATIONS if beside + last in where)


def _block(shape: tuple[int, ...], scale: tuple[int, ...], told: tuple[int, int] | None) -> tuple[tuple[int, int], bool] | None:
    """The block that scales of this shape are for, and whether there are scales for each matrix of a stack; None if none fits.

    A single number is the scale of the whole matrix, whatever the config says of blocks: transformers reads it so.
    """
    *stack, m, n = shape
    whole = max(m, 1), max(n, 1)
    if scale in ((), (1,), (1,) * len(shape)):
        return whole, stack == [1] and len(scale) > 0
    if stack and scale in (tuple(stack), (*stack, 1, 1)):
        return whole, True
    if scale == (m,) and not stack:  # by channel, without a second dimension
        return (1, whole[1]), False
    if len(scale) != len(shape) or list(scale[:-2]) != stack:
        return None
    counts = scale[-2], scale[-1]
    channels = [(1, whole[1])] if counts == (m, 1) else [(whole[0], 1)] if counts == (1, n) else []
    told_too = [] if told is None else [told]
    # Without a word in the config the ratio of the shapes tells.
    sizes = [(rows, columns) for rows in _sizes(m, counts[0]) for columns in _sizes(n, counts[1])] if told is None else []
    for rows, columns in (*channels, *told_too, *sizes):
        if (-(-m // rows), -(-n // columns)) == counts:
            return (rows, columns), bool(stack)
    return None


def _sizes(length: int, count: int) -> list[int]:
    """The sides that blocks may have of which a length holds so many."""
    exact = [] if count == 0 or length % count else [length // count]
    return [size for size in _USUAL if -(-length // size) == count] + exact
