"""Quantized weights as publishers store them: random codes and scales, and what they stand for in float64, entry by entry.

Nothing here is surgery's: codes are packed and unpacked by numpy, from the descriptions of the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e4m3() -> np.ndarray:
    """OCP 8-bit floats: a sign, four bits of exponent, three of mantissa; no infinities."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size = np.where(codes & 127 == 127, np.nan, size)
    return np.where(codes & 128, -size, size)


E4M3 = _e4m3()


class Read(NamedTuple):
    """What is stored, for each entry of a weight: its number, what is taken from that, and what it is multiplied by."""

    codes: np.ndarray
    zeros: np.ndarray | float
    scales: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        return (self.codes - self.zeros) * self.scales


@dataclass
class Layout:
    """One quantized weight in a file.

    Attributes:
        name: of the weight, as surgery names it.
        dtype: as surgery calls it.
        tensors: what the file has of it.
        codes: the number of each entry, as it was stored.
        read: decodes tensors, in float64.
        every: all numbers that an entry may have.
        quantization: what the config says.
        beside: what the file has that tells nothing of the weight.
    """

    name: str
    dtype: str
    tensors: dict[str, torch.Tensor]
    codes: np.ndarray
    read: Callable[[Mapping[str, torch.Tensor]], Read]
    every: np.ndarray
    quantization: dict[str, Any]
    beside: dict[str, torch.Tensor] = field(default_factory=dict)


def spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each entry."""
    m, n = shape[-2:]
    i, j = np.arange(m) // block[0], np.arange(n) // block[1]
    return np.broadcast_to(scales, (*scales.shape[:-2], *scales.shape[-2:]))[..., i[:, None], j[None, :]]


def _random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _codes(shape: tuple[int, ...], scale: float, low: float, high: float) -> np.ndarray:
    return np.clip(_random(1).normal(0, scale, shape), low, high)


def _nearest(x: np.ndarray, every: np.ndarray) -> np.ndarray:
    """The index of the nearest of some numbers."""
    order = np.argsort(np.where(np.isnan(every), np.inf, every), kind="stable")
    known = every[order][: int((~np.isnan(every)).sum())]
    middle = (known[1:] + known[:-1]) / 2
    return order[np.searchsorted(middle, x)]


def _scales_of(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> torch.Tensor:
    """Positive scales about ``size``, as they are stored; one of them 0 if the dtype can hold that and there are several."""
    exponents = _random(2).uniform(-1, 1, shape)
    scales = torch.from_numpy(np.asarray(size * 2.0**exponents)).float()
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        bits = (scales.log2().round() + 127).to(torch.uint8)
        return bits if dtype == torch.uint8 else bits.view(torch.float8_e8m0fnu)
    scales = scales.to(dtype).float()
    if scales.numel() > 8:
        scales.view(-1)[3] = 0
    return scales.to(dtype)


def _value(scales: torch.Tensor) -> np.ndarray:
    if scales.dtype == torch.uint8:
        return 2.0 ** (scales.numpy().astype(np.float64) - 127)
    if scales.dtype == torch.float8_e8m0fnu:
        return 2.0 ** (scales.view(torch.uint8).numpy().astype(np.float64) - 127)
    return np.asarray(scales.double().numpy())


def _count(length: int, side: int) -> int:
    return -(-length // side)


def fp8(
    quantization: Mapping[str, Any],
    names: str,
    shape: tuple[int, ...] = (40, 96),
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    stored: tuple[int, ...] | None = None,
    name: str = "model.layers.0.self_attn.q_proj.weight",
    beside: tuple[str, ...] = (),
) -> Layout:
    """FP8 with the scales under ``names``, in which X is the weight and L its layer."""
    *stack, m, n = shape
    rows, columns = block or (m, n)
    grid = (*stack, _count(m, rows), _count(n, columns))
    scales = _scales_of(grid, dtype, 1e-3)
    bytes_ = _nearest(_codes(shape, 60, -448, 448), E4M3).astype(np.uint8)
    bytes_.flat[:2] = 0, 128  # 0 and -0
    layer = name.removesuffix("weight")
    where = names.replace("X", name).replace("L.", layer)
    tensors = {
        name: torch.from_numpy(bytes_).view(torch.float8_e4m3fn),
        where: scales.reshape(grid if stored is None else stored),
    }
    extra = {f"{layer}{end}" if name.endswith("weight") else f"{name}_{end}": torch.tensor(0.25) for end in beside}
    every = E4M3[~np.isnan(E4M3)]

    def read(tensors: Mapping[str, torch.Tensor]) -> Read:
        found = _value(tensors[where].reshape(grid))
        return Read(E4M3[tensors[name].view(torch.uint8).numpy()], 0.0, spread(found, (rows, columns), shape))

    return Layout(name, "F8_E4M3", tensors, E4M3[bytes_], read, every, dict(quantization), extra)


def _scheme(format_: str, **weights: Any) -> dict[str, Any]:
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": None, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": settings, "input_activations": None, "format": format_}}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": groups, "ignore": ["lm_head"]}


_LAYER = "model.layers.0.self_attn.q_proj."


def _packed32(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Signed integers along the last dimension, in int32, from the lowest bits on, with an offset."""
    per = 32 // bits
    unsigned = (codes + 2 ** (bits - 1)).astype(np.uint64)
    unsigned = np.pad(unsigned, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    words = (unsigned.reshape(*codes.shape[:-1], -1, per) << (np.arange(per, dtype=np.uint64) * np.uint64(bits))).sum(-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def integers(
    bits: int,
    shape: tuple[int, ...] = (40, 256),
    group: int | None = 32,
    dtype: torch.dtype = torch.bfloat16,
    *,
    packed: bool = True,
    zeros: bool = False,
    order: bool = False,
    strategy: str = "group",
    layer: str = _LAYER,
) -> Layout:
    *stack, m, n = shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.round(_codes(shape, high / 2.5, low, high)).astype(np.int64)
    codes.flat[:2] = low, high
    block = (m, n) if strategy == "tensor" else (1, group or n)
    grid = (*stack, _count(m, block[0]), _count(n, block[1]))
    scales = _scales_of(grid, dtype, 0.03 / high)
    column = np.arange(n) // block[1]
    if order:
        column = _random(3).permutation(column)
    kind = "pack-quantized" if packed else "int-quantized"
    told = _scheme(kind, num_bits=bits, symmetric=not zeros, strategy=strategy, group_size=group)
    tensors = {f"{layer}weight_scale": scales.reshape(1) if strategy == "tensor" else scales}
    if packed:
        tensors[f"{layer}weight_packed"] = _packed32(codes, bits)
        tensors[f"{layer}weight_shape"] = torch.tensor(shape)
    else:
        tensors[f"{layer}weight"] = torch.from_numpy(codes.astype(np.int8))
    if zeros:
        points = _random(4).integers(low // 4, high // 4 + 1, grid)
        if packed:
            words = _packed32(np.swapaxes(points, -1, -2), bits).transpose(-1, -2).contiguous()
        else:
            words = torch.from_numpy(points.astype(np.int8))
        tensors[f"{layer}weight_zero_point"] = words
    if order:
        tensors[f"{layer}weight_g_idx"] = torch.from_numpy(column.astype(np.int32))

    def read(tensors: Mapping[str, torch.Tensor]) -> Read:
        row = np.arange(m) // block[0]
        scales = _value(tensors[f"{layer}weight_scale"].reshape(grid))[..., row[:, None], column[None, :]]
        numbers = tensors.get(f"{layer}weight")
        codes = _unpacked32(tensors[f"{layer}weight_packed"], bits, n) if numbers is None else numbers.numpy().astype(np.int64)
        zero = tensors.get(f"{layer}weight_zero_point")
        if zero is None:
            return Read(codes, 0.0, scales)
        points = zero.numpy().astype(np.int64)
        if packed:
            points = np.swapaxes(_unpacked32(zero.transpose(-1, -2).contiguous(), bits, m), -1, -2)
        return Read(codes, points[..., row[:, None], column[None, :]], scales)

    return Layout(f"{layer}weight", f"INT{bits}", tensors, codes, read, np.arange(low, high + 1.0), told)


def _unpacked32(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    unsigned = words.numpy().view(np.uint32)[..., None] >> (np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits))
    codes = (unsigned & np.uint32(2**bits - 1)).astype(np.int64) - 2 ** (bits - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :count]


def _nibbles(shape: tuple[int, ...]) -> np.ndarray:
    found = _nearest(_codes(shape, 2.5, -6, 6), E2M1)
    found.flat[:4] = 0, 8, 7, 15  # 0, -0, 6, -6
    return found


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Two along the last dimension to a byte, the first in the lower bits."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def _unpaired(packed: torch.Tensor) -> np.ndarray:
    numbers = packed.contiguous().view(torch.uint8).numpy()
    return E2M1[np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:-1], -1)]


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


def mxfp4(
    weight: str, scale: str, dtype: torch.dtype, quantization: Mapping[str, Any], *, numbers: torch.dtype = torch.uint8
) -> Layout:
    codes = _nibbles((40, 96))
    tensors = {weight: torch.from_numpy(_pairs(codes)).view(numbers), scale: _scales_of((40, 3), dtype, 2.0**-7)}

    def read(tensors: Mapping[str, torch.Tensor]) -> Read:
        return Read(_unpaired(tensors[weight]), 0.0, spread(_value(tensors[scale]), (1, 32), (40, 96)))

    return Layout(weight.removesuffix("_packed"), "MXFP4", tensors, E2M1[codes], read, E2M1, dict(quantization))


def gpt_oss() -> Layout:
    experts, out, into = 3, 40, 96
    codes = _nibbles((experts, out, into))
    scales = _scales_of((experts, out, into // 32), torch.uint8, 2.0**-7)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": torch.from_numpy(_pairs(codes)).view(experts, out, into // 32, 16), f"{name}_scales": scales}

    def read(tensors: Mapping[str, torch.Tensor]) -> Read:
        codes = _unpaired(tensors[f"{name}_blocks"].reshape(experts, out, into // 2))
        scales = spread(_value(tensors[f"{name}_scales"]), (1, 32), codes.shape)
        return Read(np.swapaxes(codes, -1, -2), 0.0, np.swapaxes(scales, -1, -2))

    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Layout(name, "MXFP4", tensors, np.swapaxes(E2M1[codes], -1, -2), read, E2M1, told)


def nvfp4(how: str) -> Layout:
    """``compressed``, ``modelopt``, or of stacks ``rows`` and ``columns``, by what lies together."""
    is_stack, is_turned = how in ("rows", "columns"), how == "columns"
    shape = (3, 40, 96) if is_stack else (40, 96)
    codes = _nibbles(shape)
    packed, scales = torch.from_numpy(_pairs(codes)), _scales_of((*shape[:-1], shape[-1] // 16), torch.float8_e4m3fn, 60.0)
    if is_turned:
        packed, scales = (one.view(torch.uint8).transpose(-1, -2).contiguous() for one in (packed, scales))
        scales = scales.view(torch.float8_e4m3fn)
    told = _modelopt("NVFP4")
    whole = torch.tensor([1e-4, 2e-4, 3e-4]) if how == "rows" else torch.tensor(2.5e-4)
    name = "model.layers.0.feed_forward.experts.gate_up_proj" if is_stack else f"{_LAYER}weight"
    names = [name, f"{name}_weight_scale", f"{name}_weight_scale_2"] if is_stack else [name, f"{name}_scale", f"{name}_scale_2"]
    beside = {f"{name}_input_scale" if is_stack else f"{_LAYER}input_scale": torch.tensor(0.01)}
    if how == "compressed":
        told = _scheme("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
        whole = torch.tensor([4321.0])
        names = [f"{name}_packed", f"{name}_scale", f"{name}_global_scale"]
        beside = {f"{_LAYER}input_global_scale": torch.tensor([12.0])}

    def read(tensors: Mapping[str, torch.Tensor]) -> Read:
        numbers, scale, all_ = (tensors[one] for one in names)
        if is_turned:
            numbers, scale = numbers.transpose(-1, -2), scale.view(torch.uint8).transpose(-1, -2).view(torch.float8_e4m3fn)
        factor = all_.double().numpy().reshape(-1, 1, 1) if is_stack else all_.double().numpy().reshape(())
        each = spread(_value(scale.contiguous()), (1, 16), shape)
        found = _unpaired(numbers), each / factor if how == "compressed" else each * factor
        turned = [np.swapaxes(one, -1, -2) for one in found] if is_turned else found
        return Read(turned[0], 0.0, turned[1])

    stored = np.swapaxes(E2M1[codes], -1, -2) if is_turned else E2M1[codes]
    return Layout(name, "NVFP4", dict(zip(names, (packed, scales, whole), strict=True)), stored, read, E2M1, told, beside)


_FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_BLOCKS = {**_FP8, "weight_block_size": [16, 16]}
_E8M0, _BF16, _U8 = torch.float8_e8m0fnu, torch.bfloat16, torch.uint8
_STACK = "model.layers.0.feed_forward.experts.gate_up_proj"
_EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def _float(strategy: str, format_: str = "float-quantized", **more: Any) -> dict[str, Any]:
    return _scheme(format_, num_bits=8, type="float", strategy=strategy, **more)


def _in_float32(layout: Layout) -> Layout:
    """Powers of two as DeepSeek-V3.1 has them: in float32, and the config says so."""
    name = next(name for name in layout.tensors if "scale" in name)
    layout.tensors[name] = layout.tensors[name].float()
    return layout


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "deepseek-v3": lambda: fp8(_BLOCKS, "X_scale_inv", (37, 100), (16, 16)),
    "deepseek-v3.1": lambda: _in_float32(
        fp8({**_BLOCKS, "scale_fmt": "ue8m0"}, "X_scale_inv", (37, 100), (16, 16), _E8M0)
    ),
    "deepseek-v3 expert": lambda: fp8(_BLOCKS, "X_scale_inv", (48, 96), (16, 16), name=_EXPERT),
    "deepseek-v3 silent": lambda: fp8({}, "X_scale_inv", (200, 320), (128, 128)),
    "deepseek-v4": lambda: fp8(_BLOCKS, "L.scale", (48, 96), (16, 16), _E8M0),
    "blocks stacked": lambda: fp8(_BLOCKS, "X_scale_inv", (3, 37, 50), (16, 16), name=_STACK),
    "mistral": lambda: fp8(
        {**_FP8, "weight_block_size": None}, "X_scale_inv", dtype=_BF16, stored=(), beside=("activation_scale",)
    ),
    "mistral's own": lambda: fp8(_FP8, "L.qscale_weight", dtype=_BF16, stored=(), beside=("qscale_act",)),
    "autofp8": lambda: fp8(_FP8, "X_scale", stored=(1,), beside=("input_scale",)),
    "modelopt fp8": lambda: fp8(_modelopt("FP8"), "X_scale", stored=(), beside=("input_scale",)),
    "modelopt fp8 blocks": lambda: fp8(_modelopt("FP8_PB_WO"), "X_scale", (128, 192), (64, 64), stored=(2, 1, 3, 1)),
    "modelopt fp8 stack": lambda: fp8(
        _modelopt("FP8"), "X_weight_scale", (3, 40, 96), (40, 96), stored=(3, 1, 1), name=_STACK, beside=("input_scale",)
    ),
    "fbgemm": lambda: fp8({"quant_method": "fbgemm_fp8"}, "X_scale", block=(1, 96), beside=("input_scale_ub",)),
    "fbgemm stack": lambda: fp8({"quant_method": "fbgemm_fp8"}, "X_scale", (3, 40, 96), (40, 1), name=_STACK),
    "fbgemm square": lambda: fp8(
        {"quant_method": "fbgemm_fp8"}, "X_scale", (3, 40, 40), (40, 1), stored=(3, 40, 1),
        name=_STACK.replace("gate_up", "down"),
    ),
    "ct fp8 tensor": lambda: fp8(_float("tensor"), "X_scale", dtype=_BF16, stored=(1,)),
    "ct fp8 channel": lambda: fp8(_float("channel"), "X_scale", block=(1, 96), dtype=_BF16, stored=(40, 1)),
    "ct fp8 row": lambda: fp8(_float("channel"), "X_scale", block=(1, 96), stored=(40,)),
    "ct fp8 block": lambda: fp8(_float("block", block_structure=[16, 32]), "X_scale", (37, 90), (16, 32), _BF16),
    "ct fp8 group": lambda: fp8(_float("group", "naive-quantized", group_size=48), "X_scale", block=(1, 48), dtype=_BF16),
    "mxfp8": lambda: fp8(_float("group", "mxfp8-quantized", group_size=32), "X_scale", block=(1, 32), dtype=_U8),
    "mxfp8 modelopt": lambda: fp8(_modelopt("MXFP8"), "X_scale", block=(1, 32), dtype=_U8),
    "int4": lambda: integers(4),
    "int4 of 128": lambda: integers(4, group=128, dtype=torch.float16),
    "int4 zeros": lambda: integers(4, (37, 96), zeros=True),
    "int4 order": lambda: integers(4, group=64, order=True, zeros=True),
    "int4 channel": lambda: integers(4, group=None, strategy="channel"),
    "int4 ragged": lambda: integers(4, (37, 100), group=20, order=True),
    "int4 stack": lambda: integers(4, (3, 37, 64), layer="model.layers.0.mlp.experts.gate_up_proj."),
    "int8 packed": lambda: integers(8, (37, 96), group=None, strategy="channel"),
    "int8 packed zeros": lambda: integers(8, (37, 96), zeros=True),
    "int8": lambda: integers(8, (37, 99), group=None, strategy="channel", packed=False),
    "int4 plain": lambda: integers(4, group=None, strategy="channel", packed=False),
    "int8 tensor": lambda: integers(8, group=None, strategy="tensor", packed=False),
    "int8 zeros": lambda: integers(8, group=None, strategy="channel", packed=False, zeros=True, dtype=torch.float32),
    "gpt-oss": gpt_oss,
    "deepseek-v4 fp4": lambda: mxfp4(f"{_LAYER}weight", f"{_LAYER}scale", _E8M0, _BLOCKS, numbers=torch.int8),
    "ct mxfp4": lambda: mxfp4(
        f"{_LAYER}weight_packed", f"{_LAYER}weight_scale", _U8,
        _scheme("mxfp4-pack-quantized", type="float", group_size=32),
    ),
    "quark mxfp4": lambda: mxfp4(f"{_LAYER}weight", f"{_LAYER}weight_scale", _U8, {"quant_method": "quark"}),
    "ct nvfp4": lambda: nvfp4("compressed"),
    "modelopt nvfp4": lambda: nvfp4("modelopt"),
    "modelopt nvfp4 stack": lambda: nvfp4("rows"),
    "modelopt nvfp4 llama 4": lambda: nvfp4("columns"),
}  # fmt: skip
