"""What other libraries make of the same tensors: compressed-tensors of its own, transformers of those that it dequantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.format.safetensors import ShardReader
from surgery.quantized.recognize import read_quantization
from tests.quantized.layouts import LAYOUTS, Layout
from tests.releases import needs


def _read(layout: Layout, file: Path) -> torch.Tensor:
    """The weight as surgery reads it, float32."""
    save_file(layout.tensors, file)
    with ShardReader(file) as reader:
        config = {"quantization_config": layout.quantization}
        quantized = read_quantization(config, {file.name: reader.header}, "m").weights[layout.name]
        entries = reader.entries
        parts = {part.role: part.numbers(reader.read(entries[part.name])) for part in quantized.parts}
        return quantized.dequantized(reader.read(entries[quantized.numbers.name]), parts)


#: But for groups in another order, which it has given up.
_COMPRESSED = [
    name
    for name, layout in LAYOUTS.items()
    if layout().quantization.get("quant_method") == "compressed-tensors" and name not in ("int4 order", "int4 ragged")
]


@needs("compressed-tensors", ">=0.20", "decompressing one layer")
@pytest.mark.parametrize("name", _COMPRESSED)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    layout = LAYOUTS[name]()
    config = QuantizationConfig.model_validate({**layout.quantization, "quantization_status": "compressed"})
    scheme = config.config_groups["group_0"]
    state = {key.removeprefix(layout.name.removesuffix("weight")): tensor for key, tensor in layout.tensors.items()}
    if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        state["weight_scale"] = state["weight_scale"].float()  # it computes in the dtype of the scales
    if name == "ct fp8 row":
        state["weight_scale"] = state["weight_scale"][:, None]
    theirs = BaseCompressor.get_value_from_registry(config.format).decompress(state, scheme)["weight"]
    # NVFP4 comes as bfloat16.
    assert torch.equal(theirs, _read(layout, tmp_path / "model.safetensors").to(theirs.dtype))


def test_transformers_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    layout = LAYOUTS["gpt-oss"]()
    theirs = convert_moe_packed_tensors(*layout.tensors.values())
    assert torch.equal(theirs.float(), _read(layout, tmp_path / "model.safetensors"))


@needs("transformers", ">=5.20", "dequantizing FP8 and FP4 by the ratio of the shapes")
@pytest.mark.parametrize("name", ["deepseek-v3 expert", "deepseek-v4", "deepseek-v4 fp4", "mistral", "mxfp8", "mxfp8 modelopt"])
def test_transformers_fp8(name: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    layout = LAYOUTS[name]()
    theirs: Any = Fp8Dequantize(None)._dequantize_one(*layout.tensors.values(), output_dtype=torch.float32)
    assert torch.equal(theirs, _read(layout, tmp_path / "model.safetensors"))
