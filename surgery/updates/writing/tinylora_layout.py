"""The kept directions as an adapter of PEFT's TinyLoRA, which trains scales or cores of them.

TinyLoRA computes ``B (sum_i v_i P_i) A`` with v trained. With ``A = diag(sqrt s) V^T``, ``B = U diag(sqrt s)`` and
``P_i = e_i e_i^T`` the numbers of v are g - 1; with a ``P = e_i e_j^T`` for each pair of directions they are C - I.

Source of the method: arXiv 2602.04118; of the format: PEFT 0.20 and 0.21, ``tuners/tinylora``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from surgery.format.scales.writing import as_cores, distance
from surgery.format.views import View
from surgery.lossless.factors import Factors
from surgery.models.carriers import Carrier, terms_of
from surgery.models.placement import Place
from surgery.names import ADAPTER_WEIGHTS, PEFT_PREFIX, TINYLORA, Train
from surgery.updates.writing.adapter import AdapterToWrite, Pair
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor, Refusal
from surgery.updates.writing.modules import AdaptedModule, AdaptedModules
from surgery.updates.writing.peft_layout import targeted

#: Layers that TinyLoRA adapts, and matrices of them.
_KINDS = ("linear", "transposed")


@dataclass(frozen=True, slots=True)
class Block:
    """The directions of one target in a module.

    Attributes:
        key: of the target.
        rank: how many directions it has.
        first: which of the module's directions is the first of them.
        first_number: which of the module's numbers v is the first of them.
        transposed: whether PEFT has the core of the target transposed.
    """

    key: str
    rank: int
    first: int
    first_number: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class TinyLoraModule:
    """A module whose numbers v PEFT keeps by their place among all that are adapted.

    Attributes:
        module: the module.
        index: that place.
        rank: the directions that TinyLoRA has of it: no more than its weight has rows or columns.
        blocks: the targets in it.
    """

    module: AdaptedModule
    index: int
    rank: int
    blocks: Sequence[Block]

    @property
    def key_of_numbers(self) -> str:
        """The name of v in the adapter's file."""
        return f"base_model.tinylora_v.{self.index}"

    def key_of(self, part: str) -> str:
        """The name of ``A``, ``B`` or ``P`` in the adapter's file."""
        return f"{PEFT_PREFIX}{self.module.name}.tinylora_{part}"


@dataclass(frozen=True, slots=True)
class TinyLora:
    """All that TinyLoRA trains of a factorized checkpoint.

    Attributes:
        adapted: the modules.
        modules: the same, in the order in which the model has them.
        every: the names of all modules of the model.
        train: ``scales`` or ``core``.
        rank: the largest of the modules.
        numbers: how many v each module has; those that no target in it needs have no part in anything.
    """

    adapted: AdaptedModules
    modules: Sequence[TinyLoraModule]
    every: Sequence[str]
    train: Train
    rank: int
    numbers: int

    @classmethod
    def of(cls, adapted: AdaptedModules, model: nn.Module | None, train: Train, refusal: Refusal) -> TinyLora:
        """How TinyLoRA trains scales or cores.

        Args:
            adapted: the modules with targets.
            model: the skeleton; None where transformers does not know it.
            train: what is to be trained.
            refusal: how it is said that a tensor cannot be written.

        Raises:
            OptionError: a target that TinyLoRA has no place for.
        """
        first = adapted.modules[0].tensors[0][0]
        if model is None:
            raise refusal.of(first.key, "of a model that transformers does not know: PEFT counts modules in its order")
        order = {name: number for number, (name, _) in enumerate(model.named_modules())}
        ordered = sorted(adapted.modules, key=lambda one: order[one.name])
        rank, found = adapted.rank, []
        seen: set[str] = set()
        for index, module in enumerate(ordered):
            layer = model.get_submodule(module.name)
            if module.kind not in _KINDS or not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
                raise refusal.of(module.tensors[0][0].key, f"in a {type(layer).__name__}, which PEFT's TinyLoRA does not adapt")
            own = min(rank, *module.shape)
            if module.rank > own:
                raise refusal.of(
                    module.tensors[0][0].key,
                    f"in {module.name!r} with {module.rank} directions together, of which PEFT's TinyLoRA takes {own}",
                )
            blocks = list(_blocks(module, adapted.carriers, refusal))
            if twice := next((one for one, _ in module.tensors if one.key in seen), None):
                raise refusal.of(twice.key, "in several modules, in each of which PEFT's TinyLoRA would train it apart")
            seen |= {block.key for block in blocks}
            found.append(TinyLoraModule(module, index, own, blocks))
        return cls(adapted, found, [*order], train, rank, 0).training(train)

    def training(self, train: Train) -> TinyLora:
        """The same with other numbers v: of scales, or of cores."""
        modules, numbers = [], 0
        for one in self.modules:
            ends = [*accumulate((_count(train, block.rank) for block in one.blocks), initial=0)]
            blocks = [replace(block, first_number=first) for block, first in zip(one.blocks, ends, strict=False)]
            modules.append(replace(one, blocks=blocks))
            numbers = max(numbers, ends[-1])
        return replace(self, modules=modules, train=train, numbers=numbers)

    @property
    def trainable(self) -> int:
        """How many numbers are trained that have a part in anything."""
        return sum(_count(self.train, block.rank) for one in self.modules for block in one.blocks)

    def adapter(self, form: AdapterForm) -> AdapterToWrite:
        """The adapter; what is in it besides A and B is given by ``whole``."""
        pairs = [Pair(one.module, one.rank, (one.key_of("A"), one.key_of("B"))) for one in self.modules]
        whole = {key: key for one in self.modules for key in (one.key_of("P"), one.key_of_numbers)}
        config = json.dumps(self._config(form), indent=1).encode() + b"\n"
        return AdapterToWrite(self.adapted, pairs, form.dtype, ADAPTER_WEIGHTS, config, {"format": "pt"}, {}, whole)

    def _config(self, form: AdapterForm) -> dict[str, Any]:
        return {
            "peft_type": TINYLORA,
            "base_model_name_or_path": form.base,
            "revision": form.revision,
            "r": self.rank,
            "u": self.numbers,
            "weight_tying": 0.0,
            "projection_seed": 0,  # all of what it would give is in the file
            "save_projection": True,
            "target_modules": targeted([one.module.name for one in self.modules], self.every),
            "tinylora_dropout": 0.0,
            "fan_in_fan_out": any(one.module.kind == "transposed" for one in self.modules),
            "bias": "none",
            "modules_to_save": None,
            "init_weights": True,
            "inference_mode": False,
            "task_type": form.task,
        }

    def whole(self, values: Mapping[str, torch.Tensor]) -> dict[str, Made]:
        """What the file holds of each module besides A and B: the matrices P, and the numbers v.

        Args:
            values: key of each target -> its scales (k,) or core (k, k); where scales are trained, cores turn nothing.
        """
        found = {}
        for one in self.modules:
            found[one.key_of("P")] = Made((self.numbers, one.rank, one.rank), partial(self.projections, one))
            found[one.key_of_numbers] = Made((self.numbers,), partial(self._numbers, one, values))
        return found

    def projections(self, one: TinyLoraModule) -> torch.Tensor:
        """P of a module, float32 (u, r, r)."""
        P = torch.zeros(self.numbers, one.rank, one.rank)
        for block in one.blocks:
            at = torch.arange(block.first, block.first + block.rank)
            if self.train == "scales":
                rows, columns = at, at
            else:
                rows, columns = at.repeat_interleave(block.rank), at.repeat(block.rank)
            if block.transposed:
                rows, columns = columns, rows
            P[torch.arange(block.first_number, block.first_number + len(rows)), rows, columns] = 1
        return P

    def _numbers(self, one: TinyLoraModule, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        v = torch.zeros(self.numbers)
        for block in one.blocks:
            value = values[block.key].reshape(block.rank, -1)
            is_core = value.shape[1] > 1
            if self.train == "scales":
                value = value.diagonal() if is_core else value[:, 0]
            elif not is_core:
                value = as_cores(value[:, 0])
            change = distance(value, self.train).flatten()
            v[block.first_number : block.first_number + len(change)] = change
        return v

    def values(self, one: TinyLoraModule, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """Key of each target in a module -> its scales (k,) or core (k, k) that the numbers v (u,) are, float32."""
        found = {}
        for block in one.blocks:
            change = v[block.first_number : block.first_number + _count(self.train, block.rank)].float()
            if self.train == "scales":
                found[block.key] = 1 + change
            else:
                found[block.key] = change.view(block.rank, block.rank) + torch.eye(block.rank)
        return found


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is made when it is written. Implements ``Copied``.

    Attributes:
        shape: its sizes.
        make: gives it, float32.
    """

    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def dtype(self) -> str:
        return "F32"

    def read(self) -> torch.Tensor:
        return self.make()


def _count(train: Train, rank: int) -> int:
    return rank if train == "scales" else rank * rank


def _blocks(module: AdaptedModule, carriers: Mapping[str, Carrier], refusal: Refusal) -> Iterator[Block]:
    """The targets of a module, in the order of the columns that ``AdaptedModule.halves`` gives them; not yet numbered."""
    first = 0
    for one, places in module.tensors:
        terms = [*_transpositions(one, places, carriers)]
        if len(terms) != 1:
            raise refusal.of(one.key, f"in {module.name!r} in {len(terms)} parts, which PEFT's TinyLoRA would train apart")
        yield Block(one.key, one.rank, first, 0, terms[0] != module.is_turned)
        first += one.rank


def _transpositions(one: LowRankTensor, places: Sequence[Place], carriers: Mapping[str, Carrier]) -> Iterator[bool]:
    """Whether each part of a target is transposed in the parameter that it is in."""
    _, m, n = View(one.view, one.slice).shape(one.shape)
    nothing = Factors(torch.zeros(m, 1), torch.zeros(1), torch.zeros(n, 1))
    for _, term in terms_of(one, places, carriers, [nothing]):
        yield term.transposed
