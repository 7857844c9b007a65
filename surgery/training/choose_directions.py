"""``ChooseDirections``: a callback of transformers' Trainer that chooses the directions to train before the first step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.models.transformers_api import imported
from surgery.training.attached_scales import Scales

if TYPE_CHECKING:
    from transformers import TrainerCallback as _TrainerCallback
else:
    try:
        from transformers import TrainerCallback as _TrainerCallback
    except ImportError:  # transformers is optional; to make a callback tells so
        _TrainerCallback = object


class ChooseDirections(_TrainerCallback):
    """A Trainer callback that chooses the directions to train before the first step, by the gradients of some batches.

        trainer = ScalesTrainer(model, args, train_dataset=data, scales=scales, callbacks=[ChooseDirections(scales)])

    The Trainer must have ``SaveScales``. The batches come from its training data, and the loss is the Trainer's.
    Afterwards the callback restores the random states: the steps are the same as in a training that began with this
    choice. If directions are chosen already, as in a resumed run, the callback does nothing.

    Args:
        scales: the scales that the Trainer trains.
        keep: how many directions to train of each matrix, see ``Scales.choose``.
        batches: how many batches to use.

    Raises:
        OptionError: ``keep`` or ``batches`` is less than 1. When training begins: the Trainer does not have
            ``SaveScales``, or has other scales, or runs on several processes; or it resumes from a checkpoint in which
            no directions are chosen.
        MissingExtra: transformers is not installed.
    """

    @on_its_own_terms
    def __init__(self, scales: Scales, keep: int = 16, batches: int = 8) -> None:
        imported("callbacks are made for")
        for name, value in (("keep", keep), ("batches", batches)):
            if value < 1:
                raise OptionError(f"{name} must be 1 or more", got=value)
        self._scales = scales
        self._keep = keep
        self._batches = batches
        self._trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the directions. The Trainer calls this method.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state, which has the number of steps made so far.
            control: not used.
        """
        if self._scales.chosen is not None:
            return
        if args.world_size > 1:
            raise OptionError(
                "directions cannot be chosen in the middle of a run of several processes",
                got=f"{args.world_size} processes",
                hint="choose in one process, scales.save(...), and in each of them scales.load(...) after attach",
            )
        if self._trainer is None:
            raise OptionError("ChooseDirections needs a Trainer with surgery.SaveScales", got="another Trainer")
        if state.global_step > 0:
            raise OptionError(
                "the checkpoint was saved before any directions were chosen, and its optimizer knows all of them",
                hint="start again: load its scales, without resume_from_checkpoint",
            )
        trainer = self._trainer
        with _same_random_states(args.device):
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1  # some of TRL's losses divide by it; the first step sets it again
            loader = trainer.get_train_dataloader()
            # accelerate's own loader would count as the one that is trained with.
            for batch in islice(getattr(loader, "base_dataloader", loader), self._batches):
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
                loss.backward()
        self._scales.choose(self._keep)


def show_trainer(callback: Any, trainer: Any) -> None:
    """Let a callback, if it chooses directions, look at the batches of a Trainer with ``SaveScales``.

    Raises:
        OptionError: they have different scales.
    """
    if not isinstance(callback, ChooseDirections):
        return
    if trainer.scales is not callback._scales:
        raise OptionError("ChooseDirections has other scales than the Trainer", hint="pass the same to both")
    callback._trainer = trainer


@contextmanager
def _same_random_states(device: torch.device) -> Iterator[None]:
    """A context after which all random generators are as before it."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    devices = [device] if device.type != "cpu" else []
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
