"""The choice of directions in the first steps of any optimizer of torch, without a line of the user's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from surgery.errors import OptionError
from surgery.peft.adapter_scales import AdapterScales
from surgery.training.choice import check_alone


class AwaitedChoice:
    """The choice of an adapter's directions that is to be made.

    In the first steps of an optimizer that has the adapter's parameters the gradients are added up and taken away, so that the
    steps change none of these parameters; then the directions are chosen that ``Scales.choose`` chooses by the sum.

    Args:
        scales: of the adapter.
        keep: how many directions to train of each matrix.
        steps: how many steps are looked at.
    """

    def __init__(self, scales: AdapterScales, keep: int, steps: int) -> None:
        self._scales = scales
        self._keep = keep
        self._steps = steps
        self._seen = 0
        self._sums: list[torch.Tensor | None] = []

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients of a step that is about to be made.

        Raises:
            OptionError: see ``Scales.choose``; or the optimizer has made steps with the parameters.
        """
        if self._scales.chosen is not None:  # a checkpoint has brought it
            _awaited.discard(self)
            return
        deltas = self._scales.parameters_anywhere()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        mine = [delta for delta in deltas if id(delta) in held]
        if not mine or all(delta.grad is None for delta in mine):
            return
        check_alone(deltas)
        if any(optimizer.state.get(delta) for delta in mine):
            raise OptionError(
                "the optimizer has already made steps, and the directions of its parameters are not chosen yet",
                hint="load the adapter without choose, or start again",
            )
        if not self._sums:
            self._sums = [None] * len(deltas)
        for i, delta in enumerate(deltas):
            if delta.grad is not None:
                before = self._sums[i]
                gradient = delta.grad.detach().float()
                self._sums[i] = gradient.clone() if before is None else before + gradient
                delta.grad = None
        self._seen += 1
        if self._seen == self._steps:
            for delta, total in zip(deltas, self._sums, strict=True):
                delta.grad = total
            _awaited.discard(self)
            self._scales.choose(self._keep)


#: Those of all models that are alive. A model's own is held by its adapter.
_awaited: weakref.WeakSet[AwaitedChoice] = weakref.WeakSet()
_is_listening = False


def await_choice(scales: AdapterScales, keep: int, steps: int) -> AwaitedChoice:
    """Choose an adapter's directions in the steps to come; for as long as what is returned is held."""
    global _is_listening
    if not _is_listening:
        register_optimizer_step_pre_hook(_before_step)
        _is_listening = True
    awaited = AwaitedChoice(scales, keep, steps)
    _awaited.add(awaited)
    return awaited


def _before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for awaited in list(_awaited):
        awaited.look(optimizer)
