"""FP8: float8_e4m3fn with scales for blocks, channels or whole matrices, as any of the publishers names and stores them.

| scales | as in | |
| --- | --- | --- |
| ``X_scale_inv`` | DeepSeek-V3 ("DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3), Mistral | blocks, or one |
| ``X.scale`` beside ``X.weight`` | DeepSeek-V4 | blocks, powers of two |
| ``X_scale`` | compressed-tensors, AutoFP8, modelopt, fbgemm, MXFP8 | one, by channel, or blocks; MXFP8: of 1 x 32 |
| ``X_weight_scale`` beside a stack ``X`` | modelopt | one |
| ``X.qscale_weight`` | Mistral, in its own format | one |
| ``X.scale_weight`` | ComfyUI, before it wrote ``X.weight_scale`` | one |

The stored scale multiplies, whatever its name says. Which block it is for is told by the config, or the ratio of the shapes.
"""

from __future__ import annotations

import re

from surgery.errors import FormatError
from surgery.format.header import TensorEntry
from surgery.names import FP8
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E4M3
from surgery.quantized.schemes import Told, Where
from surgery.quantized.weight import Quantized, Storage, StoredPart

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
#: Sides of blocks that are looked for where the config tells none. Of two powers of two never both fit.
_SIDES = (8, 16, 32, 64, 128, 256, 512)
#: The groups along the inputs of OCP Microscaling (MX) formats, whatever a config says of other weights.
_MX = 1, 32
#: Scales are FP8 themselves in NVFP4.
_IS_SCALE = re.compile(r"(^|[._])scales?(_inv|_2)?$")


def find_fp8(entry: TensorEntry, where: Where, told: Told) -> Quantized | None:
    """A weight of which a tensor holds FP8 numbers; None if it holds none, or such as stand for themselves.

    Raises:
        FormatError: its scales are missing, or do not fit it.
    """
    if entry.dtype != FP8 or len(entry.shape) < 2 or _IS_SCALE.search(entry.name):
        return None
    there = [name for name in scale_names(entry.name) if name in where]
    if not there:
        of = entry.name.removesuffix("_scale")
        if of != entry.name and (of in where or f"{of}_packed" in where):
            return None  # the scales of an NVFP4 weight are FP8 themselves
        # Without scales, and without a word of the config, it is a cast, which stands for no other numbers.
        if told.is_empty:
            return None
        raise scales_missing(entry, where, told.model)
    name = there[0]
    if (other := next((one for one in _strange(entry.name, name) if one in where), None)) is not None:
        raise FormatError(
            f"{told.model}: it is not clear how {entry.name!r} is scaled",
            got=f"{name!r} and {other!r}",
            expected="one tensor of scales",
            hint="exclude it, or factorize the publisher's unquantized model",
        )
    scale, shard = where[name]
    found = _block(entry, scale, told)
    if found is None or scale.dtype not in _SCALE_DTYPES:
        raise FormatError(
            f"{told.model}: the scales {name!r} do not fit {entry.name!r}",
            got=f"{scale.dtype} {list(scale.shape)} for {list(entry.shape)}",
            expected=f"{', '.join(_SCALE_DTYPES)}, {_said(entry, told)}",
        )
    size, by_matrix = found
    storage: Storage = "exponents" if scale.dtype == "U8" else "plain"
    part = StoredPart("scale", name, shard, by_matrix, storage)
    codec = Codec(E4M3, size, entry.name, renewed=True, powers_of_two=told.powers_of_two)
    beside = beside_of(entry.name, where)
    return Quantized(entry.name, FP8, entry.shape, where[entry.name][1], entry.stored, codec, (part,), beside)


def scales_missing(entry: TensorEntry, where: Where, model: str) -> FormatError:
    """The error for an FP8 weight without scales, in a model where such weights have some."""
    near = [other for other in where if other.startswith(entry.name.removesuffix("weight")) and other != entry.name]
    return FormatError(
        f"{model}: {entry.name!r} is FP8, and its scales are missing",
        got=", ".join(near[:3]) or "no tensor like it",
        expected=" or ".join(map(repr, scale_names(entry.name)[:2])),
        hint="the model is incomplete, was cast to FP8 without scales, or is of another format: without its scales the "
        "weight means nothing",
    )


def scale_names(weight: str) -> list[str]:
    """The names that the scales of a weight may have, in the order in which they are looked for."""
    names = [f"{weight}_scale_inv", f"{weight}_scale"]
    if weight.endswith(".weight"):
        layer = weight.removesuffix("weight")
        return [*names, f"{layer}scale", f"{layer}qscale_weight", f"{layer}scale_weight"]
    return [*names, f"{weight}_weight_scale", f"{weight}_weight_scale_inv"]


def _strange(weight: str, scale: str) -> list[str]:
    """The names of tensors beside a weight with which its numbers would be others."""
    both = [name for name in (f"{weight}_scale_inv", f"{weight}_scale") if name != scale]
    return [*both, f"{weight}_zero_point", f"{weight}_scale_2", f"{weight}_global_scale"]


#: Ends of names of what quantizes a layer's inputs and outputs at inference, and of ComfyUI's word on how a layer is quantized.
#: They mean nothing for its weight.
_ACTIVATIONS = (
    *(f"{of}_scale{end}" for of in ("activation", "act", "input", "output") for end in ("", "_inv", "_ub")),
    *(f"{of}_{what}" for of in ("input", "output") for what in ("global_scale", "zero_point")),
    "qscale_act",
    "scale_input",
    "comfy_quant",
)


def beside_of(weight: str, where: Where) -> tuple[str, ...]:
    """The tensors beside a weight that tell nothing of its numbers."""
    beside = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
    return tuple(beside + last for last in _ACTIVATIONS if beside + last in where)


def _block(entry: TensorEntry, scale: TensorEntry, told: Told) -> tuple[tuple[int, int], bool] | None:
    """The block that scales are for, and whether there are scales for each matrix of a stack; None if none fits.

    A single number is the scale of the whole matrix, whatever the config says of blocks: transformers reads it so.
    """
    *stack, m, n = entry.shape
    shape = scale.shape
    if len(shape) == 4 and not stack and shape[1] == shape[3] == 1:  # modelopt writes blocks so
        shape = shape[0], shape[2]
    whole = max(m, 1), max(n, 1)
    if shape in ((), (1,), (1,) * len(entry.shape)):
        return whole, stack == [1] and len(shape) > 0
    if stack and shape in (tuple(stack), (*stack, 1, 1)):
        return whole, True
    if shape == (m,) and not stack:  # by channel, without a second dimension
        return (1, whole[1]), False
    if told.method == "fbgemm_fp8" and stack and shape == (*stack, n, 1):  # transformers has scales of columns so
        return (whole[0], 1), True
    if len(shape) != len(entry.shape) or list(shape[:-2]) != stack:
        return None
    counts = shape[-2], shape[-1]
    blocks = _told_blocks(entry, scale, told)
    if blocks is None:
        # By channel; squares; and groups along the inputs.
        blocks = [(1, whole[1])] if counts[1] == 1 else [(whole[0], 1)] if counts[0] == 1 else []
        if counts[0] != m:
            blocks += [(side, side) for side in _SIDES]
        else:
            blocks += [_MX] if scale.dtype == "U8" else [(1, side) for side in _SIDES if n % side == 0]
    fitting = {
        (min(rows, whole[0]), min(columns, whole[1])) for rows, columns in blocks if (-(-m // rows), -(-n // columns)) == counts
    }
    return (next(iter(fitting)), bool(stack)) if len(fitting) == 1 else None


def _told_blocks(entry: TensorEntry, scale: TensorEntry, told: Told) -> list[tuple[int, int]] | None:
    """The blocks that the config allows; None if it tells none."""
    m, n = max(entry.shape[-2], 1), max(entry.shape[-1], 1)
    schemes = [one for one in told.of(entry.name.removesuffix(".weight")) if (one.type, one.bits) == ("float", 8)]
    blocks = [block for one in schemes if (block := one.block_of(m, n)) is not None]
    if not blocks and told.block is not None:
        blocks = [told.block, (1, n), (m, 1)]
    if blocks and scale.dtype in ("U8", "F8_E8M0"):
        blocks.append(_MX)
    return blocks or None


def _said(entry: TensorEntry, told: Told) -> str:
    """Which scales a weight may have, in words."""
    blocks = _told_blocks(entry, entry, told)
    if blocks is None:
        return "one for each matrix or row, or for blocks whose size the shapes tell, or weight_block_size in the config"
    return "one for each matrix, or for " + " or ".join(f"each {rows} x {columns}" for rows, columns in blocks)
