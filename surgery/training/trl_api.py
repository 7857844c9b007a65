"""What is used of TRL past its documented interface: which of its trainers hold a reference, read the weight of the head, or
load a model by themselves, and by what.

Tried with TRL 1.9.0 to 1.16.0 (docs/compatibility.md has which). TRL itself is not imported: it is optional. What a release has
under other names is not recognized; a second model that a trainer has made by then is refused all the same, see
``surgery.training.reference``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

#: Trainers that take the model with its adapters off for the reference where their ``ref_model`` is None.
_WITH_REFERENCE = {"DPOTrainer", "GRPOTrainer", "KTOTrainer", "OnlineDPOTrainer", "RLOOTrainer"}
#: Trainers that multiply with the weight of the output head by themselves; others do so in a forward of their own.
_PAST_THE_HEAD = {"DistillationTrainer"}
#: Callbacks, and what they do.
_CALLBACKS = {
    "SyncRefModelCallback": "mixes the model's weights into the reference model, but not its scales",
    "BEMACallback": "averages and saves a second whole model",
    "MergeModelCallback": "merges whole models from checkpoints, which hold scales only",
}
#: The function of a trainer's module by which it loads a model.
LOADER = "create_model_from_path"


def has_reference(kind: type) -> bool:
    return _is_of_trl(kind, _WITH_REFERENCE)


def reads_past_the_head(kind: type) -> bool:
    return _is_of_trl(kind, _PAST_THE_HEAD)


def harm_of_callback(kind: type) -> str | None:
    """What a callback does with whole models that is not right with scales; None for others."""
    return next((_CALLBACKS[base.__name__] for base in kind.__mro__ if base.__name__ in _CALLBACKS), None)


def loaders(kind: type) -> list[tuple[Any, Callable[..., Any]]]:
    """The modules that a trainer's class and its bases are from, and what each loads a model by."""
    modules = {base.__module__: sys.modules[base.__module__] for base in kind.__mro__}
    return [(module, getattr(module, LOADER)) for module in modules.values() if hasattr(module, LOADER)]


def _is_of_trl(kind: type, names: set[str]) -> bool:
    return any(base.__name__ in names and base.__module__.partition(".")[0] == "trl" for base in kind.__mro__)
