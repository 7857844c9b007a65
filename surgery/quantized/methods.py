"""What methods of quantization are called: those that configs of models may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.quantized.schemes import method_of

#: ``quant_method`` in configs -> what people call it. What is not quantized in a model of these is a weight like any other.
METHODS: Mapping[str, str] = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "awq_marlin": "AWQ",
    "bitblas": "BitBLAS",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "blockwise_int8": "INT8 in blocks",
    "compressed-tensors": "compressed-tensors",
    "deepspeedfp": "DeepSpeed FP6 or FP8",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "experts_int8": "INT8 of experts",
    "fbgemm_fp8": "FBGEMM FP8",
    "fouroversix": "Four Over Six",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's quantization",
    "gptq": "GPTQ",
    "gptq_bitblas": "GPTQ",
    "gptq_marlin": "GPTQ",
    "gptq_marlin_24": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "inc": "Neural Compressor",
    "intel/auto-round": "AutoRound",
    "marlin": "Marlin",
    "metal": "Metal",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "ModelOpt",
    "modelopt_mixed": "ModelOpt",
    "modelopt_mxfp8": "ModelOpt",
    "moe_wna16": "GPTQ or AWQ of experts",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "petit_nvfp4": "NVFP4",
    "ptpc_fp8": "FP8",
    "qqq": "QQQ",
    "quanto": "quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "sparseml": "compressed-tensors",
    "spqr": "SpQR",
    "torchao": "torchao",
    "tpu_int8": "INT8",
    "vptq": "VPTQ",
    "w4afp8": "W4AFP8",
    "w8a8_fp8": "FP8",
    "w8a8_int8": "INT8",
}


def called(described: Mapping[str, Any]) -> str | None:
    """What people call the method that a config names; None where it names none, or none that is known."""
    method = method_of(described)
    if method is None or method not in METHODS:
        return None
    if method == "compressed-tensors" and isinstance(described.get("format"), str):
        return f"{METHODS[method]} ({described['format']})"
    if method.startswith("modelopt") and isinstance(described.get("quant_algo"), str):
        return f"{METHODS[method]} ({described['quant_algo']})"
    return METHODS[method]
