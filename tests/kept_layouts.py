"""Small models of each layout, from integers alone, and what surgery once made of them: kept in ``tests/kept``.

``python -m tests.kept_layouts`` writes them anew: after a change of the format, and after no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import surgery
from tests.models import files_of

KEPT = Path(__file__).parent / "kept"
#: When the weight files of all models were changed, in nanoseconds.
_CHANGED = 1_700_000_000_000_000_000
_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES, "intermediate_size": 40}
_PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_SIZES, "intermediate_size": 32, "pad_token_id": 0}
_FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def _weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A falling spectrum and noise, the same numbers on every machine."""
    numbers = np.random.Generator(np.random.PCG64(list(shape))).integers(-(2**12), 2**12, (3, *shape)).astype(np.float64)
    *stack, m, n = shape if len(shape) < 4 else (shape[0], int(np.prod(shape[1:])))
    rows, columns = np.arange(1, m + 1)[:, None], np.arange(1, n + 1)[None, :]
    trend = 2.0**12 * ((rows * 7 % 5 - 2) * (columns * 3 % 4 - 1.5) + 0.5 * (rows % 2 - 0.5) * (columns % 3 - 1))
    return torch.from_numpy((numbers[0].reshape(*stack, m, n) + trend).reshape(shape) / 2.0**16).to(dtype)


def _blocks(projection: str, layers: int = 2, **dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"q_proj": (24, 24), "up_proj": (40, 24), "down_proj": (24, 40)}
    of = {"q_proj": "self_attn", "up_proj": "mlp", "down_proj": "mlp"}
    return {
        f"model.layers.{i}.{of[name]}.{name}.weight": _weight(*shape, dtype=dtypes.get(name, torch.bfloat16)) * (i + 1)
        for i in range(layers)
        for name, shape in shapes.items()
        if projection in name
    }


def _quantized(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """FP8 with a power of two for each block of 16 x 16, and these scales."""
    quantized, scales = {}, {}
    for name, weight in weights.items():
        m, n = weight.shape
        scale = torch.full((-(-m // 16), -(-n // 16)), 2.0**-9)
        quantized[name] = (weight.float() * 2**9).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales[f"{name}_scale_inv"] = scale
    return quantized, scales


def _fp8() -> list[dict[str, torch.Tensor]]:
    quantized, scales = _quantized(_blocks("proj"))
    return [scales, {**quantized, "model.norm.weight": torch.ones(24, dtype=torch.bfloat16)}]


def _tied() -> list[dict[str, torch.Tensor]]:
    embedding = _weight(50, 24)
    return [{"model.embed_tokens.weight": embedding, **_blocks("q_proj")}, {"lm_head.weight": embedding.clone()}]


def _stacks() -> list[dict[str, torch.Tensor]]:
    experts = {f"layers.{i}.experts.up": _weight(3, 20, 28, dtype=torch.float16) * (i + 1) for i in range(2)}
    return [{**experts, "layers.0.attn.q.weight": _weight(24, 24), "conv.weight": _weight(12, 4, 3, 3)}]


def _mixed() -> list[dict[str, torch.Tensor]]:
    several = _blocks("proj", up_proj=torch.float32, down_proj=torch.float16)
    names = sorted(several)
    norm = {"model.norm.weight": torch.ones(24, dtype=torch.bfloat16)}
    return [
        {name: several[name] for name in names[:3]} | norm,
        {name: several[name] for name in names[3:]},
        {"norm_2": torch.ones(3)},
    ]


def _fused() -> list[dict[str, torch.Tensor]]:
    return [
        {
            f"model.layers.{i}.{name}.weight": _weight(*shape) * (i + 1)
            for i in range(2)
            for name, shape in (("self_attn.qkv_proj", (48, 24)), ("mlp.gate_up_proj", (64, 24)), ("mlp.down_proj", (24, 32)))
        }
    ]


@dataclass(frozen=True)
class Kept:
    """A model, and how it is factorized and folded.

    Attributes:
        tensors: of each weight file.
        config: of the model; None for none.
        options: of ``factorize``.
        fold: of ``fold``.
    """

    tensors: Callable[[], list[dict[str, torch.Tensor]]]
    config: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fold: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        files = self.tensors()
        names = (
            ["model.safetensors"]
            if len(files) == 1
            else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        )
        for name, tensors in zip(names, files, strict=True):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
        if len(files) > 1:
            index = {
                "metadata": {},
                "weight_map": {key: name for name, tensors in zip(names, files, strict=True) for key in tensors},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if self.config is not None:
            (folder / "config.json").write_text(json.dumps(self.config))
        for path in folder.iterdir():
            os.utime(path, ns=(_CHANGED, _CHANGED))
        return folder

    @property
    def is_overlay(self) -> bool:
        return self.options.get("layout") == "overlay" or "quantization_config" in (self.config or {})


CASES = {
    "residual": Kept(_mixed, _LLAMA, {"rank": 4}),
    "uncorrected": Kept(_mixed, _LLAMA, {"rank": 4, "correction": False}),
    "overlay": Kept(_mixed, _LLAMA, {"rank": 3, "layout": "overlay"}),
    "slices": Kept(_fused, _PHI3, {"rank": 3, "split": True}),
    "stacks": Kept(_stacks, None, {"energy": 0.8, "include": ("*up", "*q.weight", "conv.weight")}),
    "tied": Kept(_tied, {**_LLAMA, "tie_word_embeddings": True}, {"rank": 3, "include": ("*embed*", "*q_proj*")}),
    "fp8": Kept(_fp8, {**_LLAMA, "quantization_config": _FP8}, {"rank": 3}),
    "dequantized": Kept(_fp8, {**_LLAMA, "quantization_config": _FP8}, {"rank": 3}, {"dequantize": True}),
}


def scales_for(factorized: Path) -> dict[str, torch.Tensor]:
    """Scales from 0.5 to 1.5 for all targets but the first."""
    found = {}
    for number, target in enumerate(surgery.Manifest.read(factorized).targets):
        shape = tuple(target.scales_shape)
        values = np.random.Generator(np.random.PCG64(number)).integers(-128, 128, shape) / 256 if number else np.zeros(shape)
        found[target.key] = torch.from_numpy(1 + values).float()
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files_of(folder).items()}


def made_from_kept(name: str, place: Path) -> dict[str, dict[str, str]]:
    """What follows, on any machine, from the kept checkpoint of a case."""
    case, factorized = CASES[name], KEPT / name
    base = case.save(place / "model") if case.is_overlay else None
    untouched = {target.key: torch.ones(tuple(target.scales_shape)) for target in surgery.Manifest.read(factorized).targets}
    found = {}
    for what, scales in (("untouched", untouched), ("scaled", scales_for(factorized))):
        surgery.fold(
            factorized,
            scales,
            place / what,
            base=base,
            device="cpu",
            **{"rounding": "nearest", **case.fold},
            progress=surgery.Silent(),
        )
        found[what] = hashes(place / what)
    if name in ("residual", "slices"):
        surgery.export(factorized, scales_for(factorized), place / "adapter", progress=surgery.Silent())
        found["adapter"] = hashes(place / "adapter")
    return found


def measured(name: str, place: Path) -> dict[str, Any]:
    """What is measured of a model of a case, and of a fold of its kept checkpoint: their last bits are this machine's."""
    case, factorized, quiet = CASES[name], KEPT / name, surgery.Silent()
    model = case.save(place / "model")
    base = model if case.is_overlay else None
    surgery.fold(
        factorized, scales_for(factorized), place / "tuned", base=base, device="cpu", rounding="nearest", progress=quiet
    )
    surgery.project(factorized, place / "tuned", place / "scales.safetensors", base=base, device="cpu", progress=quiet)
    include = case.options.get("include", ())
    spectra = surgery.spectra(
        model, place / "tuned", top=6, subspace=3, include=include, device="cpu", progress=quiet
    ).as_json()
    told = {key: value for key, value in spectra.items() if key in ("options", "targets", "findings")}
    return {
        "scales": hashlib.sha256((place / "scales.safetensors").read_bytes()).hexdigest(),
        "spectra": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    }


def kernel() -> dict[str, str]:
    """What the last bits of an SVD depend on, and with threads those of other sums: the libraries below look at all of it."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    parts = re.findall(r"^(?:vendor_id|cpu family|model)\s*:\s*(.*)$", described, re.MULTILINE)[:3]
    return {
        "torch": torch.__version__.partition("+")[0],
        "cpu": " ".join([torch.backends.cpu.get_cpu_capability(), *parts]),
        "threads": str(torch.get_num_threads()),
    }


def manifest_without_versions(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "surgery/manifest.json").read_text())
    return {key: value for key, value in parsed.items() if key not in ("tool", "torch", "device", "sha256")}


def _write() -> None:
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir()
    known: dict[str, Any] = {"kernel": kernel(), "made": {}, "measured": {}}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            model = case.save(Path(place) / "model")
            surgery.factorize(model, KEPT / name, device="cpu", **case.options, progress=surgery.Silent())
            shutil.rmtree(model)
            known["made"][name] = made_from_kept(name, Path(place))
        with tempfile.TemporaryDirectory() as place:
            known["measured"][name] = measured(name, Path(place))
        print(name, sum(map(len, files_of(KEPT / name).values())), file=sys.stderr)
    (KEPT / "made.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    _write()
