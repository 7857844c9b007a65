"""The ways to train that benchmarks/adapt.py and tasks.py compare, and how the demo model is made ready for each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from adapt_directions import add_control

import surgery
from surgery.demo.run import CONTEXT, MODEL, load, prose

LAYERS = range(6)
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
EVERY = 128  # no matrix of the model has more directions
CHOOSING = 8  # batches whose gradients choose the directions

Kind = Literal["none", "scales", "core", "orthogonal", "lora", "pissa", "dora", "vera", "psoft", "full"]


def value_and(matrix: str, *layers: int) -> tuple[str, ...]:
    return tuple(f"layers.{i}.{name}" for i in layers for name in ("self_attn.v_proj", f"mlp.{matrix}"))


def queries_and_values(*layers: int) -> tuple[str, ...]:
    return tuple(f"layers.{i}.self_attn.{name}" for i in layers for name in ("q_proj", "v_proj"))


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        name: in the table.
        kind: of what is trained.
        rank: of its factors.
        first_rate: that the search for the learning rate starts at.
        placements: the sets of modules it may choose from, one empty set for all targets.
        directions: top of the kept ones, or a control.
        keep: how many directions the task chooses of ``rank``; 0 without a choice.
        scales: how many scales of each target are trained beside it.
    """

    name: str
    kind: Kind
    rank: int = 0
    first_rate: float = 1e-2
    placements: tuple[tuple[str, ...], ...] = ((),)
    directions: str = "top"
    keep: int = 0
    scales: int = 0

    @property
    def factorized(self) -> int:
        """The rank that it needs the model factorized at; 0 if it does not."""
        return self.rank if self.kind in ("scales", "core", "orthogonal") else self.scales


# 672 numbers are 16 for each of 42 targets, or rank 1 on values and an MLP matrix of one layer: 192 + 480. 2688 are 64 for each
# target, four such pairs, or queries and values of all layers: 6 (256 + 192). DoRA also has a number for each output.
ONE_LAYER = tuple(value_and(matrix, layer) for layer in LAYERS for matrix in MLP)
FOUR_LAYERS = (queries_and_values(*LAYERS), *(value_and(matrix, *LAYERS[1:5]) for matrix in MLP))
TWO_LAYERS = (
    *(queries_and_values(first, first + 1, first + 2) for first in LAYERS[:4]),
    *(value_and(matrix, 2, 3) for matrix in MLP),
)
VALUES = tuple(f"layers.{i}.self_attn.v_proj" for i in LAYERS)
DORA_QUERIES = tuple((*VALUES, *(f"layers.{first + i}.self_attn.q_proj" for i in range(3))) for first in LAYERS[:4])

METHODS = (
    Method("scales of 16", "scales", 16, 5e-2),
    Method("scales of 16, chosen of 128", "scales", EVERY, 5e-2, keep=16),
    Method("scales of 16, random directions", "scales", 16, 5e-2, directions="random"),
    Method("scales of 16, bottom directions", "scales", 16, 1e-1, directions="bottom"),
    Method("scales of 16, bottom directions, own s", "scales", 16, 5e-1, directions="bottom, own s"),
    Method("core of 4", "core", 4, 1e-2),
    Method("core of 4, chosen of 128", "core", EVERY, 1e-2, keep=4),
    Method("core of 4, random directions", "core", 4, 2e-2, directions="random"),
    Method("core of 4, bottom directions", "core", 4, 5e-2, directions="bottom"),
    Method("orthogonal core of 4", "orthogonal", 4, 1e-2),
    Method("VeRA, 672 numbers", "vera", 48, 5e-2, (("v_proj",),)),
    Method("LoRA, 672 numbers", "lora", 1, 5e-2, ONE_LAYER),
    Method("scales of 64", "scales", 64, 2e-2),
    Method("scales of 64, random directions", "scales", 64, 5e-2, directions="random"),
    Method("core of 8", "core", 8, 1e-2),
    Method("core of 8, random directions", "core", 8, 2e-2, directions="random"),
    Method("core of 8, bottom directions", "core", 8, 5e-2, directions="bottom"),
    Method("orthogonal core of 10", "orthogonal", 10, 5e-3),
    Method("PSOFT of PEFT of 10", "psoft", 10, 5e-3, (LINEAR,)),
    Method("VeRA, 2688 numbers", "vera", 128, 1e-1, (("q_proj", "v_proj"),)),
    Method("scales of 32 + LoRA, 1344 numbers", "lora", 1, 2e-2, TWO_LAYERS, scales=32),
    Method("DoRA, 2688 numbers", "dora", 1, 2e-2, DORA_QUERIES),
    Method("PiSSA, 2688 numbers", "pissa", 1, 1e-2, FOUR_LAYERS),
    Method("LoRA, 2688 numbers", "lora", 1, 2e-2, FOUR_LAYERS),
    Method("scales of all directions", "scales", EVERY, 5e-2),
    Method("core of 16", "core", 16, 5e-3),
    Method("LoRA, 10752 numbers", "lora", 4, 2e-2, FOUR_LAYERS),
    Method("core of 32", "core", 32, 2e-3),
    Method("core of 32, random directions", "core", 32, 5e-3, directions="random"),
    Method("orthogonal core of 44", "orthogonal", 44, 1e-3),
    Method("scales of 16 + LoRA rank 3, all targets", "lora", 3, 1e-2, (LINEAR,), scales=16),
    Method("DoRA rank 3, all targets", "dora", 3, 1e-2, (LINEAR,)),
    Method("PiSSA rank 3, all targets", "pissa", 3, 5e-3, (LINEAR,)),
    Method("LoRA rank 3, all targets", "lora", 3, 1e-2, (LINEAR,)),
    Method("LoRA rank 16, all targets", "lora", 16, 5e-3, (LINEAR,)),
    Method("full fine-tuning", "full", 0, 5e-4),
)
FULL = METHODS[-1]


@dataclass(frozen=True, slots=True)
class Run:
    method: Method
    modules: tuple[str, ...]
    rate: float
    seed: int
    steps: int
    batch: int
    folder: Path


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text to train on, to tune on, and to report on."""
    text, held_out = prose()
    cut = len(text) * 4 // 5
    return text[:cut], text[cut:], held_out


def batches(run: Run, text: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The first batches of a run, (batch, CONTEXT) each."""
    generator = torch.Generator().manual_seed(run.seed)
    starts = [torch.randint(len(text) - CONTEXT, (run.batch, 1), generator=generator) for _ in range(count)]
    return [text[start + torch.arange(CONTEXT)] for start in starts]


def prepare(run: Run, text: torch.Tensor) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model and what of it is trained."""
    method, factorized = run.method, run.folder / str(run.method.factorized)
    model = load(MODEL)
    if method.kind in ("lora", "pissa", "dora", "vera", "psoft"):
        model = with_adapter(model, method, list(run.modules), run.seed)
    elif method.kind != "full":
        if method.directions != "top":
            return model, add_control(model, factorized, method.directions, method.kind, run.seed)
        scales = surgery.attach(model, factorized, train=method.kind)
        if method.keep:
            for ids in batches(run, text, CHOOSING):
                model(input_ids=ids, labels=ids).loss.backward()
            scales.choose(keep=method.keep)
    if method.scales:
        surgery.attach(model, factorized)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_adapter(model: Any, method: Method, modules: list[str] | str, seed: int) -> Any:
    """A model with PEFT's adapter of a method; ``modules`` as PEFT takes them."""
    import peft

    rank = method.rank
    # With the learning rate tuned, alpha is but another name for it.
    if method.kind == "vera":
        config: peft.PeftConfig = peft.VeraConfig(r=rank, target_modules=modules, projection_prng_key=seed)
    elif method.kind == "psoft":
        config = peft.PsoftConfig(r=rank, psoft_alpha=rank, target_modules=modules)
    else:
        begin: Any = "pissa" if method.kind == "pissa" else True
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=modules, init_lora_weights=begin, use_dora=method.kind == "dora"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers is about to rename
        return peft.get_peft_model(model, config)
