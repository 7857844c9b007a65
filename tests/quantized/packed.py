"""Tiny checkpoints with layers packed as releases on the hub have them: names, dtypes and shapes of each method's library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
_GENERATOR = torch.Generator().manual_seed(11)


def _integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, generator=_GENERATOR, dtype=torch.int64).to(dtype)


def _floats(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=_GENERATOR).to(dtype)


I8, U8, I16, I32, I64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64
F16, F32, BF16, FP8 = torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn


def _gptq(m: int, n: int) -> Tensors:
    groups = n // 16
    return {
        "qweight": _integers(I32, n // 8, m),
        "qzeros": _integers(I32, groups, m // 8),
        "scales": _floats(F16, groups, m),
        "g_idx": torch.arange(n, dtype=I32) // 16,
    }


def _awq(m: int, n: int) -> Tensors:
    groups = n // 16
    return {
        "qweight": _integers(I32, n, m // 8),
        "qzeros": _integers(I32, groups, m // 8),
        "scales": _floats(F16, groups, m),
    }


def _bnb_4bit(kind: str) -> Callable[[int, int], Tensors]:
    def packed(m: int, n: int) -> Tensors:
        state = json.dumps({"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [m, n]}).encode()
        return {
            "weight": _integers(U8, m * n // 2, 1),
            "weight.absmax": _integers(U8, m * n // 64),
            "weight.nested_absmax": _floats(F32, 1),
            "weight.nested_quant_map": _floats(F32, 256),
            "weight.quant_map": _floats(F32, 16),
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(state), dtype=U8),
        }

    return packed


def _bnb_8bit(m: int, n: int) -> Tensors:
    return {"weight": _integers(I8, m, n), "SCB": _floats(F32, m), "weight_format": torch.tensor(0, dtype=U8)}


def _exl2(m: int, n: int) -> Tensors:
    return {
        "q_weight": _integers(I32, n // 8, m),
        "q_invperm": torch.arange(n, dtype=I16),
        "q_scale": _integers(I32, n // 16, m // 8),
        "q_scale_max": _floats(F16, n // 16),
        "q_groups": _integers(I16, 2 * n // 16),
    }


def _exl3(m: int, n: int) -> Tensors:
    return {"trellis": _integers(I16, n // 16, m // 16, 48), "suh": _floats(F16, n), "svh": _floats(F16, m)}


def _mlx(biases: str) -> Callable[[int, int], Tensors]:
    return lambda m, n: {
        "weight": _integers(torch.int32, m, n // 8).view(torch.uint32),
        "scales": _floats(BF16, m, n // 16),
        biases: _floats(BF16, m, n // 16),
    }


def _hqq(m: int, n: int) -> Tensors:
    return {
        "W_q": _integers(U8, m * n // 128, 64),
        "scale": _floats(F16, m * n // 64, 1),
        "zero": _floats(F16, m * n // 64, 1),
        "shape": torch.tensor([m, n]),
        "nbits": torch.tensor(4),
        "group_size": torch.tensor(64),
        "axis": torch.tensor(1),
        "packing": torch.tensor([52, 98, 105, 116], dtype=U8),
    }


def _aqlm(m: int, n: int) -> Tensors:
    return {"codes": _integers(I8, m, n // 8, 2), "codebooks": _floats(F16, 2, 256, 1, 8), "scales": _floats(F16, m, 1, 1, 1)}


def _vptq(m: int, n: int) -> Tensors:
    return {
        "indices": _integers(I32, 1, m // 8, n),
        "centroids.weight": _floats(F16, 1, 2048),
        "weight_scale": _floats(F16, n),
        "weight_bias": _floats(F16, n),
        "perm": torch.arange(n, dtype=I16),
    }


def _spqr(m: int, n: int) -> Tensors:
    return {
        "dense_weights": _integers(I64, m * n // 16),
        "row_offsets": _integers(I32, m + 1),
        "col_vals": _integers(I32, 20),
        "in_perm": torch.arange(n, dtype=I16),
    }


def _quanto(m: int, n: int) -> Tensors:
    return {"weight._data": _integers(I8, m, n), "weight._scale": _floats(BF16, m, 1), "input_scale": torch.ones(())}


def _eetq(m: int, n: int) -> Tensors:
    return {"weight": _integers(I8, n, m), "weight_scales": _floats(F16, m)}


def _higgs(m: int, n: int) -> Tensors:
    return {
        "weight": _integers(I16, m // 4, n),
        "scales": _floats(F16, m, n // 16),
        "tables": _floats(F16, 16),
        "tables2": _floats(F32, 16, 16, 2),
    }


def _fp_quant(m: int, n: int) -> Tensors:
    return {
        "qweight": _integers(U8, m, n // 2),
        "scales": _integers(U8, m, n // 16),
        "weight_global_scale": _floats(F32, 1),
        "act_global_scale": _floats(F32, 1),
        "forward_hadamard_matrix": _floats(BF16, 16, 16),
    }


def _bitnet(m: int, n: int) -> Tensors:
    return {"weight": _integers(U8, m // 4, n), "weight_scale": _floats(BF16, 1)}


def _sparse(m: int, n: int) -> Tensors:
    return {
        "weight.compressed": _floats(BF16, m * n // 2),
        "weight.bitmask": _integers(U8, m, n // 8),
        "weight.shape": torch.tensor([m, n]),
        "weight.row_offsets": torch.arange(m)[:, None],
    }


def _marlin_24(m: int, n: int) -> Tensors:
    return {
        "weight_packed": _integers(I32, n // 32, 2 * m),
        "scale_packed": _floats(F16, n // 16, m),
        "meta": _integers(I16, n // 32, 2 * m),
    }


def _pack_quantized_3_bits(m: int, n: int) -> Tensors:
    return {
        "weight_packed": _integers(I32, m, -(-n // 10)),
        "weight_scale": _floats(BF16, m, n // 16),
        "weight_shape": torch.tensor([m, n]),
    }


def _torchao_inside(m: int, n: int) -> Tensors:
    return {"_weight_qdata": _floats(F32, m, n).to(FP8), "_weight_scale": _floats(F32, m, 1)}


def _torchao_before(m: int, n: int) -> Tensors:
    return {"weight:qdata": _integers(I8, m, n), "weight:scale": _floats(F32, m, 1), "weight:zero_point": _integers(I8, m, 1)}


def _comfy(m: int, n: int) -> Tensors:
    return {
        "weight": _integers(U8, m, n // 2),
        "weight_scale": _floats(F32, m, n // 16).to(FP8),
        "weight_scale_2": torch.ones(()),
        "comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=U8),
    }


def _nunchaku(m: int, n: int) -> Tensors:
    return {
        "qweight": _integers(I8, m, n // 2),
        "wscales": _floats(BF16, n // 16, m),
        "smooth_factor": _floats(BF16, n),
        "smooth_factor_orig": _floats(BF16, n),
        "proj_down": _floats(BF16, n, 16),
        "proj_up": _floats(BF16, m, 16),
    }


def _squeezellm(m: int, n: int) -> Tensors:
    return {"qweight": _integers(I32, n // 8, m), "lookup_table": _floats(F16, m, 16)}


def _quip(m: int, n: int) -> Tensors:
    signs = {"SU": _floats(F16, n), "SV": _floats(F16, m)}
    return {"Qidxs": _integers(I64, m // 8, n // 8), **signs, "codebook_id": torch.tensor(7)}


def _qtip(m: int, n: int) -> Tensors:
    signs = {"SU": _floats(F16, n), "SV": _floats(F32, m)}
    return {"trellis": _integers(I16, m * n // 256, 48), **signs, "rcp": torch.tensor(0), "tlut": _floats(F16, 512, 2)}


def _modelslim(m: int, n: int) -> Tensors:
    """Ascend's, static: ``(q - weight_offset) * weight_scale``."""
    return {
        "weight": _integers(I8, m, n),
        "weight_scale": _floats(F32, m, 1),
        "weight_offset": _floats(F32, m, 1),
        "input_scale": _floats(F32, 1),
        "input_offset": _floats(F32, 1),
        "deq_scale": _floats(F32, m),
        "quant_bias": _integers(I32, m),
    }


def _svdquant(m: int, n: int) -> Tensors:
    return {
        "weight": _integers(U8, m, n // 2),
        "weight_scale": _floats(F32, m, n // 16).to(FP8),
        "weight_scale_2": torch.ones(()),
        "svdquant_lora_a": _floats(BF16, 8, n),
        "svdquant_lora_b": _floats(BF16, m, 8),
    }


def _scaled_inputs(m: int, n: int) -> Tensors:
    """What its layer multiplies its inputs with, is no weight times these scales."""
    weight = {"weight": _floats(F32, m, n).to(FP8), "weight_scale": torch.ones(())}
    return {**weight, "input_scale": torch.ones(()), "pre_quant_scale": _floats(BF16, n)}


def _rotated(m: int, n: int) -> Tensors:
    """Its layer turns its inputs first, by a matrix that no training changes."""
    return {
        "weight_packed": _integers(I32, m, n // 8),
        "weight_scale": _floats(BF16, m, n // 32),
        "weight_shape": torch.tensor([m, n]),
        "R4_input.weight": _floats(F32, n, n),
    }


def _fnuz(m: int, n: int) -> Tensors:
    return {"weight": _floats(F32, m, n).to(torch.float8_e4m3fnuz), "weight_scale": torch.ones(())}


def _int8_blocks(m: int, n: int) -> Tensors:
    return {"weight": _integers(I8, m, n), "weight_scale_inv": _floats(F32, m // 32, n // 32)}


def _w4afp8(m: int, n: int) -> Tensors:
    return {"weight": _integers(I8, m, n // 2), "weight_scale_inv": _floats(BF16, m, n // 32)}


@dataclass(frozen=True)
class Packing:
    """A way to pack a layer.

    Attributes:
        called: the method's name in messages, where a config describes it.
        tensors: (m, n) -> the layer's tensors, by the rest of their names.
        described: what is in ``config.json``, besides what any has.
        alone: the method's name where no config says anything; None where it cannot be told.
    """

    called: str
    tensors: Callable[[int, int], Tensors]
    described: Mapping[str, Any]
    alone: str | None = None


def _method(name: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **more}}


_GROUPS = {"group_size": 16, "bits": 4}
PACKINGS: Mapping[str, Packing] = {
    "gptq": Packing("GPTQ", _gptq, _method("gptq", bits=4, group_size=16, desc_act=True), "GPTQ"),
    "awq": Packing("AWQ", _awq, _method("awq", bits=4, version="gemm"), "AWQ"),
    "auto-round": Packing("AutoRound", _gptq, _method("auto-round", bits=4, packing_format="auto_round:auto_gptq"), "GPTQ"),
    "nf4": Packing("bitsandbytes", _bnb_4bit("nf4"), _method("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    "fp4": Packing(
        "bitsandbytes", _bnb_4bit("fp4"), {"quantization_config": {"load_in_4bit": True, "load_in_8bit": False}}, "bitsandbytes"
    ),
    "int8": Packing("bitsandbytes", _bnb_8bit, _method("bitsandbytes", load_in_8bit=True), "bitsandbytes"),
    "exl2": Packing("EXL2", _exl2, _method("exl2", bits=4.0), "EXL2"),
    "exl3": Packing("EXL3", _exl3, _method("exl3", bits=3.0), "EXL3"),
    "mlx": Packing("MLX", _mlx("biases"), {"quantization": _GROUPS, "quantization_config": _GROUPS}, None),
    "metal": Packing("Metal", _mlx("qbiases"), _method("metal", bits=4, group_size=16), None),
    "hqq": Packing("HQQ", _hqq, _method("hqq", quant_config={}), "HQQ"),
    "aqlm": Packing("AQLM", _aqlm, _method("aqlm", num_codebooks=2), "AQLM"),
    "vptq": Packing("VPTQ", _vptq, _method("vptq", config_for_layers={}), "VPTQ"),
    "spqr": Packing("SpQR", _spqr, _method("spqr"), "SpQR"),
    "quanto": Packing("quanto", _quanto, _method("quanto", weights="int8"), "quanto"),
    "eetq": Packing("EETQ", _eetq, _method("eetq", weights="int8"), "EETQ"),
    "higgs": Packing("HIGGS", _higgs, _method("higgs", bits=4), "HIGGS"),
    "fp-quant": Packing("FP-Quant", _fp_quant, _method("fp_quant", forward_dtype="mxfp4"), "FP-Quant"),
    "bitnet": Packing("BitNet", _bitnet, _method("bitnet"), "BitNet"),
    "sparse": Packing(
        "compressed-tensors (sparse-bitmask)", _sparse, _method("compressed-tensors", format="sparse-bitmask"),
        "compressed-tensors (sparse)",
    ),
    "marlin-24": Packing(
        "compressed-tensors (marlin-24)", _marlin_24, _method("compressed-tensors", format="marlin-24"),
        "compressed-tensors (marlin-24)",
    ),
    "torchao": Packing("torchao", _torchao_inside, _method("torchao"), "torchao"),
    "torchao before": Packing("torchao", _torchao_before, _method("torchao"), "torchao"),
    "comfy": Packing("ComfyUI's quantization", _comfy, {}, "ComfyUI's quantization"),
    "nunchaku": Packing("Nunchaku's SVDQuant", _nunchaku, {}),
    "squeezellm": Packing("SqueezeLLM", _squeezellm, {}),
    "quip#": Packing("QuIP#", _quip, {"quip_params": {"codebook": "E8P12"}}),
    "qtip": Packing("QTIP", _qtip, {"quip_params": {"L": 16}}),
    "modelslim": Packing("ModelSlim's quantization", _modelslim, {"quantize": "w8a8"}),
    "svdquant": Packing(
        "ModelOpt (NVFP4_SVD) with a low-rank part", _svdquant, _method("modelopt", quant_algo="NVFP4_SVD"),
        "quantization with a low-rank part",
    ),
    "scaled inputs": Packing(
        "ModelOpt (FP8) with scaled inputs", _scaled_inputs, _method("modelopt", quant_algo="FP8"),
        "quantization with scaled inputs",
    ),
    "rotated": Packing(
        "compressed-tensors (pack-quantized) with rotations", _rotated,
        _method("compressed-tensors", format="pack-quantized", transform_config={"config_groups": {"R4": {}}}),
        "quantization with rotations",
    ),
    "fp8 of amd": Packing("Quark", _fnuz, _method("quark"), "FP8 of another kind"),
    "int8 in blocks": Packing(
        "INT8 in blocks", _int8_blocks, _method("blockwise_int8", weight_block_size=[32, 32]), "integers with scales"
    ),
    "w4afp8": Packing("W4AFP8", _w4afp8, _method("w4afp8"), "integers with scales"),
}  # fmt: skip


def save_packed(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], packing: Packing, which: Callable[[str], bool], *, card: str = ""
) -> Path:
    """A model of which some layers are packed.

    Args:
        tensors, config: of the model, in 16 bits.
        packing: how.
        which: whether a weight is packed, by its name.
        card: the front matter of its card; empty for none.
    """
    folder.mkdir(parents=True)
    written: Tensors = {}
    for name, tensor in tensors.items():
        if which(name):
            module = name.removesuffix("weight")
            written |= {module + last: part.contiguous() for last, part in packing.tensors(*tensor.shape).items()}
        else:
            written[name] = tensor
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, **packing.described}))
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    return folder
