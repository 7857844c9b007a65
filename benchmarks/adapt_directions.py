"""Scales and cores on any directions, as a control of those that factorize keeps.

``FixedDirections`` adds ``U diag(sqrt s) (C - I) diag(sqrt s) V^T`` to a linear layer for whatever U, s and V it is given.
``check`` holds it against ``surgery.attach``, on the directions that attach takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery.demo.run import CONTEXT, MODEL, load, prose
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest
from surgery.names import Train

Directions = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U (m, k), s (k,), V (n, k)


class FixedDirections(nn.Module):
    """The change ``((x V) M) U^T`` of a linear layer's output, of directions that stay as they are.

    Args:
        directions: U (m, k), s (k,) and V (n, k).
        train: whether ``delta`` is g - 1 (k,) or C - I (k, k).
    """

    def __init__(self, directions: Directions, train: Train) -> None:
        super().__init__()
        u, s, v = (part.float() for part in directions)
        self.u, self.v, self.root = u, v, s.sqrt()
        self.delta = nn.Parameter(torch.zeros(len(s)) if train == "scales" else torch.zeros(len(s), len(s)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (x @ self.v) * self.root
        # y = W x has U C V^T, and rows of x multiply from the left.
        hidden = hidden * self.delta if self.delta.ndim == 1 else hidden @ self.delta.mT
        return (hidden * self.root) @ self.u.mT

    def add_to(self, _layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """A forward hook."""
        return output + self(inputs[0])


def add(model: Any, directions: Mapping[str, Directions], train: Train) -> list[nn.Parameter]:
    """Add trainable changes, 0 at first, to a model that is frozen; ``directions`` by names of weights. What is trained."""
    model.requires_grad_(False)
    parameters = []
    for name, found in directions.items():
        change = FixedDirections(found, train)
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(change.add_to)
        parameters.append(change.delta)
    return parameters


def kept(factorized: Path) -> dict[str, Directions]:
    """The directions of a factorized checkpoint of plain matrices."""
    manifest = Manifest.read(factorized)
    directions = {}
    for shard in manifest.shards:
        if shard.factors is not None:
            with FactorsReader(factorized, shard) as reader:
                for target in manifest.targets_of(shard.source.file):
                    factors = reader.factors(target, 0)
                    directions[target.key] = factors.U, factors.s, factors.V
    return directions


def random(weight: torch.Tensor, k: int, generator: torch.Generator) -> Directions:
    """Orthonormal directions of no meaning to the weight, with its largest singular values."""
    sides = [torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0] for n in weight.shape]
    return sides[0], torch.linalg.svdvals(weight.double())[:k], sides[1]


def bottom(weight: torch.Tensor, k: int, _generator: torch.Generator) -> Directions:
    """The last singular directions, with the largest singular values in place of their own."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, -k:], s[:k], vt[-k:].mT


def bottom_as_they_are(weight: torch.Tensor, k: int, _generator: torch.Generator) -> Directions:
    """The last singular directions, with their own singular values, the largest of these first as elsewhere."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, -k:], s[-k:], vt[-k:].mT


CONTROLS: dict[str, Callable[[torch.Tensor, int, torch.Generator], Directions]] = {
    "random": random,
    "bottom": bottom,
    "bottom, own s": bottom_as_they_are,
}


def add_control(model: Any, factorized: Path, control: str, train: Train, seed: int) -> list[nn.Parameter]:
    """Add changes on other directions of the weights that ``factorized`` has targets of, as many as it keeps."""
    make = CONTROLS[control]
    generator = torch.Generator().manual_seed(seed)
    ranks = {name: len(s) for name, (_, s, _) in kept(factorized).items()}
    return add(model, {name: make(model.get_parameter(name).detach(), k, generator) for name, k in ranks.items()}, train)


@torch.no_grad()
def check(factorized: Path, train: Train) -> float:
    """The largest difference between what ``attach`` and ``FixedDirections`` change in a model's logits with the same random
    values on the same directions, over the largest change. Raises RuntimeError if it is not float32's rounding."""
    ids = prose()[1][None, :CONTEXT]
    untouched = load(MODEL)(input_ids=ids).logits
    ours, others = load(MODEL), load(MODEL)
    scales = surgery.attach(ours, factorized, train=train)
    torch.manual_seed(0)
    for parameter in scales.parameters():
        parameter.normal_(std=0.05)
    identity = torch.ones if train == "scales" else torch.eye
    directions = kept(factorized)
    for key, delta in zip(directions, add(others, directions, train), strict=True):
        delta.copy_(scales.values()[key] - identity(len(delta)))
    changes = [model(input_ids=ids).logits - untouched for model in (ours, others)]
    error = float((changes[0] - changes[1]).abs().max() / changes[0].abs().max())
    if not error < 1e-4:
        raise RuntimeError(f"{train}: attach and the benchmark's own module differ by {error:.1e} of the change")
    return error
