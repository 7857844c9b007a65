"""Other ways in which one adapter is written: keys that other tools leave, diffusers' and kohya's layouts, damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.truths.models import rename

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"
_PREFIX = "base_model.model."


def renamed(pattern: str, new: str) -> Callable[[Path], None]:
    """Replace a regular expression in the name of every tensor of an adapter, of which at least one must have it."""

    def write(adapter: Path) -> None:
        names = set(load_file(adapter / WEIGHTS))
        rename(adapter / WEIGHTS, lambda name: re.sub(pattern, new, name))
        assert set(load_file(adapter / WEIGHTS)) != names

    return write


def edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of an adapter, by name."""

    def write(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        edit(tensors)
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})

    return write


def configured(**entries: Any) -> Callable[[Path], None]:
    """Change entries of an adapter's config."""

    def write(adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(config | entries))

    return write


def pickled(adapter: Path) -> None:
    """As PEFT saved adapters until 2023."""
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def half_precision(adapter: Path) -> None:
    """bfloat16 matrices, as many trainers save them."""
    edited(lambda tensors: tensors.update({name: value.to(torch.bfloat16) for name, value in tensors.items()}))(adapter)


def as_diffusers(
    prefix: str, *, down: str = "lora_A.weight", up: str = "lora_B.weight", alphas: bool = False, metadata: bool = False
) -> Callable[[Path], None]:
    """diffusers' layout: one file, names of modules behind that of the component, with alphas or metadata or neither.

    Sources: ``save_lora_weights`` and ``save_lora_adapter`` of diffusers 0.42, which write the adapter's config as metadata;
    releases before 0.35 wrote neither it nor alphas, and loaded alpha as the rank.
    """

    def write(adapter: Path) -> None:
        config, tensors = _take(adapter)
        written = {}
        for name, value in tensors.items():
            written[prefix + name.replace("lora_A.weight", down).replace("lora_B.weight", up)] = value
            if alphas and name.endswith("lora_A.weight"):
                written[f"{prefix}{name.removesuffix('.lora_A.weight')}.alpha"] = torch.tensor(float(config["lora_alpha"]))
        about = {"format": "pt"}
        if metadata:
            about["lora_adapter_metadata"] = json.dumps({prefix + key: value for key, value in config.items()})
        save_file(written, adapter / DIFFUSERS, metadata=about)

    return write


def as_processors(adapter: Path) -> None:
    """diffusers' first layout, of attention processors: ``unet.X.attn1.processor.to_q_lora.down.weight``."""
    _, tensors = _take(adapter)
    written = {}
    for name, value in tensors.items():
        found = re.fullmatch(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?\.lora_([AB])\.weight", name)
        assert found is not None, name
        written[f"unet.{found[1]}.processor.{found[2]}_lora.{'down' if found[3] == 'A' else 'up'}.weight"] = value
    save_file(written, adapter / DIFFUSERS)


def as_kohya(file: str = DIFFUSERS) -> Callable[[Path], None]:
    """kohya's layout: dots of a module's name are underscores, and each module has its alpha."""

    def write(adapter: Path) -> None:
        config, tensors = _take(adapter)
        written = {}
        for name, value in tensors.items():
            module, _, half = name.removesuffix(".weight").rpartition(".")
            key = "lora_unet_" + module.replace(".", "_")
            written[f"{key}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = value
            written[f"{key}.alpha"] = torch.tensor(float(config["lora_alpha"]))
        save_file(written, adapter / file, metadata={"ss_network_dim": str(config["r"])})

    return write


def _take(adapter: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of an adapter without PEFT's prefix; its files are removed."""
    config = json.loads((adapter / CONFIG).read_text())
    tensors = {name.removeprefix(_PREFIX): value for name, value in load_file(adapter / WEIGHTS).items()}
    for path in list(adapter.iterdir()):
        path.unlink()
    return config, tensors


def write_adapter(adapter: Path, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> None:
    """An adapter of plain LoRA updates: module -> A (r, in) and B (out, r)."""
    adapter.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for module, (A, B) in modules.items():
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": A, f"{_PREFIX}{module}.lora_B.weight": B}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    r = len(next(iter(modules.values()))[0])
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted({m.rpartition(".")[2] for m in modules}),
    }
    (adapter / CONFIG).write_text(json.dumps(config))
