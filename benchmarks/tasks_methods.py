"""The ways to train that benchmarks/tasks.py compares, and how a model is made ready for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from adapt_directions import add_control
from adapt_methods import Method, with_adapter

import surgery


def _methods(all_of: int, equal: tuple[Method, ...], scales: float, core: float) -> tuple[Method, ...]:
    """In the order in which they are run; ``all_of``: the rank that the task chooses from; rates that the search starts at."""
    return (
        Method("none", "none"),
        Method("scales of 16", "scales", 16, scales),
        Method("core of 8", "core", 8, core),
        Method("LoRA rank 8", "lora", 8, 3e-3),
        Method("full fine-tuning", "full", 0, 1e-4),
        *equal,
        Method("scales of 16, chosen", "scales", all_of, scales, keep=16),
        Method("core of 8, chosen", "core", all_of, core, keep=8),
        Method("scales of 16, random directions", "scales", 16, scales, directions="random"),
        Method("scales of 16, bottom directions", "scales", 16, scales, directions="bottom"),
        Method("core of 8, random directions", "core", 8, core, directions="random"),
        Method("core of 8, bottom directions", "core", 8, core, directions="bottom"),
        Method("scales of 64", "scales", 64, scales),
        Method("core of 32", "core", 32, core / 3),
        Method("LoRA rank 1", "lora", 1, 1e-2),
        Method("scales of 64 + LoRA rank 1", "lora", 1, 1e-2, scales=64),
        Method("DoRA rank 8", "dora", 8, 3e-3),
        Method("PiSSA rank 8", "pissa", 8, 1e-3),
        Method("scales of 64, chosen", "scales", all_of, scales, keep=64),
        Method("scales of all", "scales", all_of, scales),
    )


def _layers(name: str, *layers: int) -> tuple[str, ...]:
    return tuple(f"encoder.layer.{i}.attention.{name}" for i in layers)


#: Of MiniLM's 36 matrices scales of 16 are 576 numbers, a core of 8 2304. LoRA of rank 1 has 768 for one square matrix.
MINILM = _methods(
    384,
    (
        Method(
            "LoRA, 2304 numbers",
            "lora",
            1,
            1e-2,
            placements=(
                _layers("self.value", 3, 4, 5),
                _layers("self.value", 0, 1, 2),
                _layers("self.value", 1, 3, 5),
                _layers("output.dense", 3, 4, 5),
                tuple(name for matrix in ("query", "key", "value") for name in _layers(f"self.{matrix}", 3)),
            ),
        ),
        Method(
            "LoRA, 768 numbers",
            "lora",
            1,
            3e-2,
            placements=(*(_layers("self.value", i) for i in (5, 3, 1)), *(_layers("output.dense", i) for i in (5, 3))),
        ),
    ),
    scales=3e-2,
    core=1e-2,
)
_VALUES = tuple(f"layers.{i}.self_attn.v_proj" for i in range(30))
_QUERIES, _OUTPUTS = (tuple(f"layers.{i}.self_attn.{name}_proj" for i in range(30)) for name in "qo")
#: Of SmolLM2's 210 matrices a core of 8 is 13440 numbers. LoRA of rank 1 has 768 for one ``v_proj``, 1152 for ``q_proj`` or
#: ``o_proj``: 17 of the former, or 8 of the latter and 5 of the former, have 13056.
SMOLLM2 = tuple(
    method
    for method in _methods(
        128,
        (
            Method(
                "LoRA, 13056 numbers",
                "lora",
                1,
                1e-2,
                placements=(
                    _VALUES[13:],
                    _VALUES[:17],
                    (*_OUTPUTS[22:], *_VALUES[25:]),
                    (*_QUERIES[22:], *_VALUES[25:]),
                ),
            ),
        ),
        scales=3e-2,
        core=1e-2,
    )
    if method.name != "scales of all"
)


def prepare(
    model: Any, method: Method, linears: list[str] | str, factorized: Path, seed: int
) -> tuple[list[torch.nn.Parameter], Any]:
    """What of a model is trained, and the ``Scales`` or the PEFT model that saves it.

    Args:
        model: a module with the model itself as its ``backbone``, which is changed.
        linears: the layers that a LoRA is put on, as PEFT takes them.
        factorized: the model at the rank of the method.
        seed: of directions that are random.
    """
    backbone, saves = model.backbone, None
    if method.kind in ("lora", "pissa", "dora"):
        saves = model.backbone = with_adapter(backbone, method, linears, seed)
        if method.scales:
            surgery.attach(backbone, factorized)
    elif method.kind == "full":
        backbone.requires_grad_(True)
    elif method.kind == "none":
        backbone.requires_grad_(False)
    elif method.directions == "top":
        saves = surgery.attach(backbone, factorized, train=method.kind)
    else:
        return add_control(backbone, factorized, method.directions, method.kind, seed), None
    return [parameter for parameter in model.backbone.parameters() if parameter.requires_grad], saves
