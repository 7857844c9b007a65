"""The parts of accelerate that are used here (it comes with transformers' Trainer), and its marks on a model.

Tried with accelerate 1.13.0 to 1.15.0 (docs/compatibility.md has which).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from surgery.errors import MissingExtra


def is_kept_elsewhere(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere, and a hook fetches them for its forward."""
    return hasattr(module, "_hf_hook")


def at_hand(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the weights of a module are on its execution device. Raises MissingExtra: accelerate is too old."""
    aligned: AbstractContextManager[Any] = _utility("align_module_device")(module)
    return aligned


def is_peft_model(model: Any) -> bool:
    """Whether a model is PEFT's, also inside wrappers that shard or compile it. Raises MissingExtra: accelerate is too old."""
    return bool(_utility("is_peft_model")(model))


def save_sharded_optimizer(accelerator: Any, optimizer: Any, model: Any, folder: str) -> None:
    """Write the state of an optimizer under FSDP into a folder. Raises MissingExtra: accelerate is too old."""
    _utility("save_fsdp_optimizer")(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)


def _utility(name: str) -> Any:
    """A function of ``accelerate.utils``. Raises MissingExtra if the installed release has none of that name."""
    import accelerate  # type: ignore[import-untyped]

    found = getattr(accelerate.utils, name, None)
    if found is None:
        raise MissingExtra(
            f"accelerate has no {name}, which is used here",
            got=f"accelerate {accelerate.__version__}",
            expected="accelerate 1.11 to 1.15, with which this version of surgery was tried",
            hint="pip install 'accelerate>=1.11'",
        )
    return found
