"""What a fold keeps of trained scales: in the weights, and in what the folded model computes.

    python benchmarks/kept.py --gigabytes 0.1 --hidden 1024 --rank 16 --changes 0.0005,0.001,0.003,0.01,0.03,0.1

An LLM-shaped model in bfloat16, and its FP8 copy (E4M3, float32 scales of blocks of 128x128), are factorized, and folded with
random scales whose ``g - 1`` have this root mean square; with ``--train core`` random cores C with as large a ``C - I``. From
the bytes, in float64, with ``D = U diag(s (g - 1)) V^T``, or ``U diag(sqrt s) (C - I) diag(sqrt s) V^T``:

- ``kept``: the share of the update that arrives, ``<W_out - W, D> / <D, D>`` over all targets; ``least`` that of the worst one.
- ``error``: what differs from D within its directions, ``|U^T (W_out - W - D) V|``, relative to ``|U^T D V|``.
- ``distance``: ``|W_out - W - D|`` relative to ``|W|``.

Then, for ``--logits``, the logits of the folded model beside those of the original one with the scales attached, both computed
in float32: the largest and the root mean square difference, relative to those that the scales make. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import write_checkpoint
from merge import Tensors
from safetensors.torch import load_file, save_file

import surgery
from surgery.names import TRAINS, Train
from surgery.progress import Silent

_BLOCK = 128
#: Kind of checkpoint -> ways to fold it: options of ``fold``.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "bfloat16": {"nearest": {"rounding": "nearest"}, "directions": {"rounding": "directions"}, "by itself": {}},
    "FP8": {
        "nearest": {"rounding": "nearest"},
        "directions": {"rounding": "directions"},
        "dequantize": {"dequantize": True},
    },
}


def _spread(scales: torch.Tensor, m: int, n: int) -> torch.Tensor:
    return scales.repeat_interleave(_BLOCK, 0)[:m].repeat_interleave(_BLOCK, 1)[:, :n]


def write_fp8(source: Path, folder: Path) -> None:
    """An FP8 copy of a model, all matrices of its blocks; sizes are multiples of 128."""
    folder.mkdir()
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(path).items():
            if ".layers." not in name or weight.ndim != 2:
                tensors[name] = weight
                continue
            m, n = weight.shape
            parts = weight.float().reshape(m // _BLOCK, _BLOCK, n // _BLOCK, _BLOCK)
            scales = parts.abs().amax((1, 3)) / 448
            tensors[name] = (weight.float() / _spread(scales, m, n)).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def dense(tensors: Tensors, name: str) -> torch.Tensor:
    """float64 weights of a tensor, FP8 or not."""
    weight = tensors[name]
    if weight.dtype != torch.float8_e4m3fn:
        return weight.double()
    return weight.double() * _spread(tensors[f"{name}_scale_inv"].double(), *weight.shape)


def measured(model: Path, factorized: Path, scales: dict[str, torch.Tensor], out: Path) -> dict[str, float]:
    """What is left of the update, by the bytes; see above."""
    before, after, factors = Tensors(model), Tensors(out), Tensors(factorized / "surgery")
    asked = arrived = within = missed = distance = size = 0.0
    least = math.inf
    for name, g in scales.items():
        U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
        W = dense(before, name)
        C = g.double() if g.ndim == 2 else torch.diag(g.double())
        core = s.sqrt()[:, None] * (C - torch.eye(len(s))) * s.sqrt()
        D, R = U @ core @ V.T, dense(after, name) - W
        mine, here = D.square().sum().item(), (R * D).sum().item()
        asked, arrived, least = asked + mine, arrived + here, min(least, here / mine)
        within += core.square().sum().item()
        missed += (U.T @ (R - D) @ V).square().sum().item()
        distance += (R - D).square().sum().item()
        size += W.square().sum().item()
    return {
        "kept": arrived / asked,
        "least": least,
        "error": math.sqrt(missed / within),
        "distance": math.sqrt(distance / size),
    }


def random_scales(factorized: Path, change: float, train: Train) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, g in load_file(factorized / "surgery/scales.safetensors").items():
        if train == "scales":
            found[name] = 1 + change * torch.randn(g.shape, generator=generator)
        else:
            found[name] = torch.eye(len(g)) + change / len(g) ** 0.5 * torch.randn(len(g), len(g), generator=generator)
    return found


def load(folder: Path) -> Any:
    """A model in float32, FP8 weights dequantized."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    is_fp8 = "quantization_config" in json.loads((folder / "config.json").read_text())
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if is_fp8 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.to(torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(8192, (4, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.double()
    return found


def attached_logits(
    model: Path, factorized: Path, scales: dict[str, torch.Tensor], train: Train
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the original model, and of it with these scales or cores attached."""
    loaded = load(model)
    untouched = logits(loaded)
    attached = surgery.attach(loaded, factorized, train=train)
    with torch.no_grad():
        for key, delta in zip(attached.values(), attached.parameters(), strict=True):
            delta.copy_((scales[key] - (1 if train == "scales" else torch.eye(len(scales[key])))).view_as(delta))
    return untouched, logits(loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--train", choices=TRAINS, default="scales")
    parser.add_argument("--changes", default="0.0005,0.001,0.003,0.01,0.03,0.1")
    parser.add_argument("--logits", default="0.003", help="for which of the changes logits are compared; empty for none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    changes = [float(change) for change in args.changes.split(",")]
    compared = {float(change) for change in args.logits.split(",") if change}
    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as folder:
        found = run(Path(folder), changes, compared, args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def run(folder: Path, changes: list[float], compared: set[float], args: argparse.Namespace) -> list[dict[str, Any]]:
    models = {"bfloat16": folder / "bfloat16", "FP8": folder / "fp8"}
    weights = write_checkpoint(models["bfloat16"], args.gigabytes * 1e9, args.hidden)
    write_fp8(models["bfloat16"], models["FP8"])
    size = f"hidden {args.hidden}, {weights / 1e6:.0f} million weights in targets"
    print(f"{size}, {args.train} at rank {args.rank}, torch {torch.__version__}")
    print(
        f"{'':9} {'change':>7} {'':11} {'kept':>8} {'least':>8} {'error':>8} {'distance':>9}   logits: largest, rms", flush=True
    )
    rows: list[dict[str, Any]] = []
    for kind, model in models.items():
        factorized, out = folder / f"{kind}-factorized", folder / "out"
        layout: Literal["overlay", "residual"] = "overlay" if kind == "FP8" else "residual"
        surgery.factorize(model, factorized, rank=args.rank, layout=layout, progress=Silent())
        for change in changes:
            scales = random_scales(factorized, change, args.train)
            seen = attached_logits(model, factorized, scales, args.train) if change in compared else None
            for way, options in WAYS[kind].items():
                base = model if layout == "overlay" else None
                surgery.fold(factorized, scales, out, base=base, overwrite=True, progress=Silent(), **options)
                row = {"kind": kind, "change": change, "way": way, **measured(model, factorized, scales, out)}
                told = ""
                if seen is not None:
                    untouched, attached = seen
                    effect, difference = attached - untouched, logits(load(out)) - attached
                    row["logits_largest"] = (difference.abs().max() / effect.abs().max()).item()
                    row["logits_rms"] = (difference.norm() / effect.norm()).item()
                    told = f"{row['logits_largest']:18.4f}, {row['logits_rms']:.4f}"
                rows.append(row)
                figures = f"{row['kept']:8.4f} {row['least']:8.4f} {row['error']:8.4f} {row['distance']:9.5f}"
                print(f"{kind:9} {change:7.2%} {way:11} {figures} {told}".rstrip(), flush=True)
    return rows


if __name__ == "__main__":
    main()
