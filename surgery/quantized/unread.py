"""Weights that are packed in ways that are not read: how they are known by their tensors, and what people call the methods.

Nothing of such a weight is read, and its tensors are copied as they are. That is right only where nothing else in the model
depends on how they are read: so each method is here by name, and a model that is quantized by another one is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.format.header import TensorEntry
from surgery.names import DTYPE_BITS, FP8
from surgery.quantized.methods import called
from surgery.quantized.schemes import Where

#: The tensors of a layer, by the rest of their names.
Layer = Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class UnreadWeight:
    """A weight that is packed in a way that is not read.

    Attributes:
        name: as a model that holds it dequantized names it.
        method: what people call how it is packed.
        main: the tensor that stands for it: the one with its numbers.
        tensors: all tensors of it.
        shape: of the weight, (out, in); None where the shapes of its tensors do not tell.
        entries: how many numbers it has; where its shape is not known as many as there would be at four bits each.
    """

    name: str
    method: str
    main: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...] | None
    entries: int


#: The shape of a weight, of its layer's tensors and what the config says; None where they do not tell.
_ShapeOf = Callable[[Layer, Mapping[str, Any]], tuple[int, ...] | None]


def _not_told(layer: Layer, config: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a method stores a layer.

    Attributes:
        method: what people call it, where the config does not name one.
        main: the name, below the layer, of the tensor with the numbers.
        parts: an expression for the names of all its tensors.
        beside: an expression for one of them that must be there besides; None where the name of ``main`` tells enough.
        dtypes: which ``main`` may have; empty for any.
        only_told: whether a layer that does not tell the shape of its weight is of another kind.
        shape: of the weight.
    """

    method: str
    main: str
    parts: str
    beside: str | None = None
    dtypes: tuple[str, ...] = ()
    only_told: bool = False
    shape: _ShapeOf = _not_told


def _as_stored(main: str) -> _ShapeOf:
    """The shape of a weight of which each number has a byte."""
    return lambda layer, _: layer[main].shape if DTYPE_BITS[layer[main].dtype] == 8 and layer[main].dtype != "U8" else None


def _of_qweight(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """GPTQ packs along the inputs, qweight (in * bits / 32, out); AWQ along the outputs, (in, out * bits / 32)."""
    qweight, scales, zeros = (layer[name].shape if name in layer else () for name in ("qweight", "scales", "qzeros"))
    if len(qweight) != 2 or len(scales) != 2 or len(zeros) != 2:
        return None
    rows, columns = qweight
    out = scales[1]
    if columns == out and zeros[1] and (32 * zeros[1]) % out == 0:
        return out, rows * 32 // (32 * zeros[1] // out)
    return (out, rows) if columns < out else None


def _is_awq(layer: Layer) -> bool:
    return {"qzeros", "scales"} <= layer.keys() and layer["qweight"].shape[1:] != layer["scales"].shape[1:]


def _of_exl2(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    order = layer.get("q_invperm") or layer.get("q_perm")
    return None if order is None or len(layer["q_weight"].shape) != 2 else (layer["q_weight"].shape[1], *order.shape)


def _of_exl3(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Tiles of 16 by 16."""
    shape = layer["trellis"].shape
    return (16 * shape[1], 16 * shape[0]) if len(shape) == 3 else None


def _of_aqlm(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Each code stands for a group of outputs and inputs."""
    codes, books = layer["codes"].shape, layer["codebooks"].shape
    return (codes[0] * books[2], codes[1] * books[3]) if len(codes) == 3 and len(books) == 4 else None


def _of_mlx(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    shape, group = layer["scales"].shape, config.get("group_size", 64)
    return (*shape[:-1], shape[-1] * group) if len(shape) > 1 and type(group) is int else None


def _of_higgs(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    scales = layer.get("scales")
    return None if scales is None else (scales.shape[0], layer["weight"].shape[-1])


def _of_marlin_24(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of each 32 inputs 16 are stored, in one row."""
    packed, scales = layer["weight_packed"].shape, layer["scale_packed"].shape
    return (scales[1], 32 * packed[0]) if len(packed) == len(scales) == 2 else None


def _of_bitmask(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """A bit for each number."""
    mask = next(entry.shape for name, entry in layer.items() if name.endswith("bitmask"))
    return (mask[0], 8 * mask[1]) if len(mask) == 2 else None


def _of_integers(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """With scales of blocks each number has a byte; with ``weight_scale_inv`` of groups (SGLang's W4AFP8) half a byte."""
    weight, scale = layer["weight"].shape, layer.get("weight_scale_inv")
    if scale is not None and len(weight) > 1 and scale.shape[:-1] == weight[:-1] and weight[-2] > 1:
        return (*weight[:-1], 2 * weight[-1])
    return _as_stored("weight")(layer, config)


def _of_quip(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """A sign for each input and each output."""
    return (*layer["SV"].shape, *layer["SU"].shape) if {"SU", "SV"} <= layer.keys() else None


def _of_blocks(layer: Layer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Blocks of 16 bytes with two numbers each."""
    *rows, groups, size = layer["blocks"].shape
    return (*rows, 2 * groups * size)


_BYTES = ("I8", "U8")
#: What is beside a weight of few bits that is not all that its layer multiplies with.
_INPUTS_SCALED, _LOW_RANK, _ROTATION = "pre_quant_scale", r".*svdquant_lora_[ab]", r"\w+_(input|output)\.weight"
#: What such methods are called begins with this where no config names one.
_WITH = "quantization with "
_OF_SCALED = r"weight|weight_\w+|(input|output|pre_quant)_(global_)?scale|input_offset|deq_scale|quant_bias|scale_bias"
#: The kinds that no format that is read is like. Sources: what each library saves, and what loaders look for.
_FOREIGN = (
    _Kind("FP-Quant", "qweight", "d?qweight|scales|(weight|act)_global_scale|(forward|backward)_hadamard_matrix",
          beside="forward_hadamard_matrix"),
    _Kind("Nunchaku's SVDQuant", "qweight",
          r"qweight|w\w*scales?|wzeros|smooth_factor(_orig)?|smooth(_orig)?|(proj|lora)_(down|up)", beside="wscales"),
    _Kind("SqueezeLLM", "qweight", "qweight|lookup_table|rows|cols|vals|full_rows|full_row_indices", beside="lookup_table"),
    _Kind("GPTQ", "qweight", "qweight|qzeros|scales|g_idx|perm|bits", beside="scales", shape=_of_qweight),
    _Kind("EXL2", "q_weight", "q_(weight|perm|invperm|scale|scale_max|groups|group_map)", shape=_of_exl2),
    _Kind("QuIP#", "Qidxs", r"Qidxs\w*|SU|SV|Wscale|codebook_id|had_(left|right)|scaleWH|A|B", shape=_of_quip),
    _Kind("QTIP", "trellis", r"trellis|SU|SV|rcp|tlut|tp_rank|had_(left|right)", beside="SU", shape=_of_quip),
    _Kind("EXL3", "trellis", "trellis|suh?|svh?|scale|mcg|mul1", shape=_of_exl3),
    _Kind("HQQ", "W_q", "(?!bias$).*"),
    _Kind("AQLM", "codes", "codes|codebooks|scales", beside="codebooks", shape=_of_aqlm),
    _Kind("VPTQ", "indices", r"(res_|outlier_)?(indices|centroids\.weight)|weight_scale|weight_bias|perm|inv_perm",
          beside="centroids.weight"),
    _Kind("SpQR", "dense_weights", "dense_weights|row_offsets|col_vals|col_ptrs|in_perm|shape"),
    _Kind("bitsandbytes", "weight", r"weight|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..*",
          beside="weight.absmax"),
    _Kind("bitsandbytes", "weight", "weight|SCB|CB|weight_format", beside="SCB", dtypes=("I8",), shape=_as_stored("weight")),
    _Kind("quanto", "weight._data", r"weight\._.*|(input|output)_scale", shape=_as_stored("weight._data")),
    _Kind("quanto", "weight._data._data", r"weight\._.*|(input|output)_scale"),
    _Kind("compressed-tensors (sparse)", "weight.compressed", r"weight\.(compressed|bitmask|shape|row_offsets)",
          beside="weight.bitmask", shape=_of_bitmask),
    _Kind("compressed-tensors (sparse)", "compressed", "compressed|bitmask|shape|row_offsets|weight_scale", beside="bitmask",
          shape=_of_bitmask),
    _Kind("compressed-tensors (marlin-24)", "weight_packed", "weight_packed|scale_packed|meta|weight_shape",
          beside="scale_packed", shape=_of_marlin_24),
    _Kind("Metal", "weight", "weight|scales|qbiases", beside="qbiases", dtypes=("U32",), shape=_of_mlx),
    _Kind("MLX", "weight", "weight|scales|biases", beside="scales", dtypes=("U32",), shape=_of_mlx),
    _Kind("HIGGS", "weight", "weight|scales|tables2?", beside="tables", dtypes=("I16",), shape=_of_higgs),
    _Kind("EETQ", "weight", "weight|weight_scales", beside="weight_scales", dtypes=("I8",),
          shape=lambda layer, _: layer["weight"].shape[::-1]),
    _Kind("MXFP4 in gpt-oss's own layout", "blocks", "blocks|scales", beside="scales", dtypes=("U8",), shape=_of_blocks),
    _Kind("ModelSlim's quantization", "weight", _OF_SCALED, beside="weight_offset", dtypes=_BYTES, shape=_as_stored("weight")),
    _Kind(f"{_WITH}scaled inputs", "weight", _OF_SCALED, beside=_INPUTS_SCALED, dtypes=(FP8,),
          shape=_as_stored("weight")),
    *(_Kind(method, main, f"{_OF_SCALED}|{beside}", beside=beside, dtypes=(FP8, *_BYTES, "I32"))
      for method, beside in ((f"{_WITH}a low-rank part", _LOW_RANK), (f"{_WITH}rotations", _ROTATION))
      for main in ("weight", "weight_packed")),
    _Kind("ComfyUI's quantization", "weight", "weight|weight_scale(_2)?|input_scale|pre_quant_scale|comfy_quant",
          beside="comfy_quant", dtypes=(*_BYTES, "F4"), shape=_as_stored("weight")),
)  # fmt: skip

#: Dtypes of FP8 that no format which is read has scales for.
_OTHER_FP8 = ("F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
#: The kinds that formats which are read are like. They are looked for among what those leave over.
_LEFT_OVER = (
    _Kind("BitNet", "weight", "weight|weight_scale", beside="weight_scale", dtypes=("U8",), only_told=True,
          shape=lambda layer, _: (4 * layer["weight"].shape[0], *layer["weight"].shape[1:])
          if math.prod(layer["weight_scale"].shape) == 1 else None),
    _Kind("compressed-tensors", "weight_packed",
          "weight_(packed|scale|shape|zero_point|g_idx|global_scale)|input_(global_)?scale"),
    _Kind("integers with scales", "weight",
          "weight|weight_(scale|scale_inv|scale_2|zero_point|shift)|(input|pre_quant|output)_scale|scale",
          beside="weight_scale(_inv)?", dtypes=_BYTES, shape=_of_integers),
    _Kind("FP8 of another kind", "weight", r"weight|weight_\w+|input_scale|scale_(weight|input)", dtypes=_OTHER_FP8,
          beside=r"weight_scale(_inv)?|scale_weight", shape=_as_stored("weight")),
)  # fmt: skip

#: The tensor with the numbers of a weight that torchao has packed.
_TORCHAO = re.compile(
    r"(?P<module>(?:[^:]*\.)?)(?:_(?P<inside>\w+)_qdata|(?P<before>\w+):_?(?:qdata|int_data|data|packed_weight))"
)
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
#: A numbered block: only in these layers are looked for.
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
#: Integers that models have without being quantized: masks, positions, tables of indices.
_PLAIN_INTEGERS = re.compile(r"bias|mask|position|(^|_)ids?($|_)|ind(ex|ices)|table|tid2eid|count|steps?|tri[lu]|rotary|freqs")


def find_foreign(where: Where, described: Mapping[str, Any]) -> dict[str, UnreadWeight]:
    """The weights that are packed in ways that no format which is read is like, by name.

    Args:
        where: all tensors of the model.
        described: what its config says of the quantization.
    """
    return {**dict(_found(where, described, _FOREIGN)), **dict(_of_torchao(where, described))}


def find_left_over(where: Where, described: Mapping[str, Any], read: set[str]) -> dict[str, UnreadWeight]:
    """Further weights that are packed, or seem to be, of which no tensor is ``read``, by name.

    The method of one that only seems to be packed is that of the config, or ``integers``.
    """
    rest = {name: place for name, place in where.items() if name not in read}
    found = dict(_found(rest, described, _LEFT_OVER))
    claimed = {tensor for one in found.values() for tensor in one.tensors}
    for name, (entry, _) in rest.items():
        if name not in claimed and _looks_packed(entry, where):
            module, _, last = name.rpartition(".")
            weight = name if last == "weight" or not module else f"{module}.weight"
            found.setdefault(weight, _unread(weight, called(described) or INTEGERS, name, [entry], None))
    return found


#: The method of weights that only seem to be packed.
INTEGERS = "integers"


def _found(where: Where, described: Mapping[str, Any], kinds: tuple[_Kind, ...]) -> Iterator[tuple[str, UnreadWeight]]:
    below, told = _below(where), called(described)
    by_last: dict[str, list[str]] = {}
    for name in where:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    taken: set[str] = set()
    for kind in kinds:
        for name in by_last.get(kind.main.rpartition(".")[2], ()):
            if not (name == kind.main or name.endswith(f".{kind.main}")) or name in taken:
                continue
            entry = where[name][0]
            if kind.dtypes and entry.dtype not in kind.dtypes:
                continue
            module = name.removesuffix(kind.main)
            layer = {last: where[module + last][0] for last in below.get(module, ()) if re.fullmatch(kind.parts, last)}
            if kind.beside is not None and not any(re.fullmatch(kind.beside, last) for last in layer):
                continue
            shape = _shape(kind, layer, described)
            if kind.only_told and shape is None:
                continue
            method = told or ("AWQ" if kind.method == "GPTQ" and _is_awq(layer) else kind.method)
            if told is not None and kind.method.startswith(_WITH):
                method = kind.method.replace("quantization", told, 1)
            taken.update(module + last for last in layer)
            weight = f"{module}weight"
            yield weight, _unread(weight, method, name, layer.values(), shape)


def _shape(kind: _Kind, layer: Layer, described: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a layer's weight; None where its tensors do not tell, or have other shapes than those of the kind."""
    try:
        return kind.shape(layer, described)
    except (IndexError, ZeroDivisionError):
        return None


def _below(where: Where) -> dict[str, list[str]]:
    """Prefix of a module, with its point -> the rest of the names of the tensors in it, and two modules below it."""
    below: dict[str, list[str]] = {}
    for name in where:
        end = len(name)
        for _ in range(3):
            end = name.rfind(".", 0, end)
            below.setdefault(name[: end + 1], []).append(name[end + 1 :])
            if end < 0:
                break
    return below


def _of_torchao(where: Where, described: Mapping[str, Any]) -> Iterator[tuple[str, UnreadWeight]]:
    """What torchao packs: the tensors of a weight X.weight are ``X._weight_qdata`` ..., or ``X.weight:qdata`` ..."""
    matches = {name: match for name in where if (match := _TORCHAO.fullmatch(name)) is not None}
    below = _below(where) if matches else {}
    for name, match in matches.items():
        module, weight = match["module"], match["inside"] or match["before"]
        prefix = f"_{weight}_" if match["inside"] else f"{weight}:"
        layer = {last: where[module + last][0] for last in below[module] if last.startswith(prefix)}
        numbers = where[name][0]
        # A tensor that is not quantized has the same form of name in older files, and is all by itself.
        if len(layer) > 1:
            shape = numbers.shape if numbers.dtype in ("I8", FP8) else None
            yield module + weight, _unread(module + weight, called(described) or "torchao", name, layer.values(), shape)


def _looks_packed(entry: TensorEntry, where: Where) -> bool:
    """Whether a tensor is a matrix of integers in a layer that has no other weight."""
    module, _, last = entry.name.rpartition(".")
    if entry.dtype not in _INTEGERS or len(entry.shape) < 2 or min(entry.shape[-2:]) < 2:
        return False
    if not _IN_BLOCK.search(entry.name) or _PLAIN_INTEGERS.search(last):
        return False
    weight = where.get(f"{module}.weight")
    return last == "weight" or weight is None or weight[0].dtype in _INTEGERS


def _unread(name: str, method: str, main: str, tensors: Iterable[TensorEntry], shape: tuple[int, ...] | None) -> UnreadWeight:
    sizes = {entry.name: entry.nbytes for entry in tensors}
    return UnreadWeight(name, method, main, tuple(sizes), shape, 2 * sizes[main] if shape is None else math.prod(shape))
