"""FP8 copies of models, with a scale for each block of their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models import tensors_of

BLOCK = (16, 16)


def scales_by_hand(weight: torch.Tensor, block: tuple[int, int], *, powers_of_two: bool) -> torch.Tensor:
    """One by one, from the format's description."""
    *stack, m, n = weight.shape
    rows, columns = -(-m // block[0]), -(-n // block[1])
    scales = torch.empty(*stack, rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].float()
            scale = part.abs().amax((-2, -1)) / 448
            scales[..., i, j] = torch.exp2(torch.ceil(torch.log2(scale))) if powers_of_two else scale
    return scales.to(torch.float8_e8m0fnu) if powers_of_two else scales


def quantize_model(
    source: Path,
    folder: Path,
    *,
    block: tuple[int, int] = BLOCK,
    powers_of_two: bool = False,
    apart: bool = False,
    which: Callable[[str], bool] = lambda name: "layers" in name and name.endswith(("_proj.weight", "_proj")),
) -> Path:
    """An FP8 copy of a model; ``apart`` puts the scales into a shard of their own."""
    folder.mkdir(parents=True)
    weights: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(source).items():
        if not which(name):
            weights[name] = tensor.to(torch.bfloat16)
            continue
        scale = scales_by_hand(tensor, block, powers_of_two=powers_of_two)
        m, n = tensor.shape[-2:]
        spread = scale.float()[..., (torch.arange(m) // block[0])[:, None], (torch.arange(n) // block[1])[None, :]]
        weights[name] = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales[f"{name}_scale_inv"] = scale
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if not apart:
        save_file({**weights, **scales}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    # The scales come first, so that they are met before the weights that they belong to.
    shards = {"model-00001-of-00002.safetensors": scales, "model-00002-of-00002.safetensors": weights}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
