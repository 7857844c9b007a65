"""The parts of TRL that are known here beyond its documented interface.

These are the trainers that have a reference model, read the weight of the output head, or load a model by themselves. Tried
with TRL 1.9.0 to 1.16.0 (docs/compatibility.md has which). TRL itself is not imported, since it is optional. Names that
another release has changed are not recognized; a second model that its trainers make is refused all the same
(``surgery.training.reference.check_trainer``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

#: Trainers whose reference, if ``ref_model`` is None, is the model with its adapters off.
_WITH_REFERENCE = {"DPOTrainer", "GRPOTrainer", "KTOTrainer", "OnlineDPOTrainer", "RLOOTrainer"}
#: Trainers that multiply by the weight of the output head themselves. Others do so in a ``forward`` that they set on the model.
_PAST_THE_HEAD = {"DistillationTrainer"}
#: Callbacks that are wrong with scales -> what they do.
_CALLBACKS = {
    "SyncRefModelCallback": "mixes the model's weights into the reference model, but not its scales",
    "BEMACallback": "averages and saves a second whole model",
    "MergeModelCallback": "merges whole models from checkpoints, which hold scales only",
}
#: The function in a trainer's module that loads a model.
LOADER = "create_model_from_path"


def has_reference(kind: type) -> bool:
    """Whether a class of trainers has a reference model."""
    return _is_of_trl(kind, _WITH_REFERENCE)


def reads_past_the_head(kind: type) -> bool:
    """Whether a class of trainers multiplies by the weight of the output head without calling the head."""
    return _is_of_trl(kind, _PAST_THE_HEAD)


def harm_of_callback(kind: type) -> str | None:
    """What a class of callbacks does that is wrong with scales, in words; None for others."""
    return next((_CALLBACKS[base.__name__] for base in kind.__mro__ if base.__name__ in _CALLBACKS), None)


def loaders(kind: type) -> list[tuple[Any, Callable[..., Any]]]:
    """(module, its ``LOADER`` function) for the modules that a trainer's class and its bases are from, if they have one."""
    modules = {base.__module__: sys.modules[base.__module__] for base in kind.__mro__}
    return [(module, getattr(module, LOADER)) for module in modules.values() if hasattr(module, LOADER)]


def _is_of_trl(kind: type, names: set[str]) -> bool:
    return any(base.__name__ in names and base.__module__.partition(".")[0] == "trl" for base in kind.__mro__)
