"""The reference model of a trainer, and refusing trainers that would make a second model or use weights without scales.

A model that a trainer loads from the model's path, or sends to another program, has no scales; if the path is a residual
checkpoint, it is a bare residual. As the reference we give the trainer the model itself with its scales untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import OptionError
from surgery.format.manifest import Manifest
from surgery.models.accelerate_api import is_peft_model
from surgery.models.carriers import unwrapped
from surgery.names import MANIFEST_FILE
from surgery.training.attached_scales import Scales
from surgery.training.lowrank import LowRankPath
from surgery.training.trl_api import LOADER, harm_of_callback, has_reference, loaders, reads_past_the_head


class Reference(nn.Module):
    """A trainer's model as it was before training: with its scales untouched, in eval mode, and without gradients.

    PEFT's adapters are off in it, or the copy of them that TRL keeps under the name ``ref`` is on. It has no weights and no
    attributes of the model: a trainer that does more than call it fails, rather than use the trained model.

    Args:
        model: called for the model that is trained, since the trainer may wrap or replace it.
        scales: attached to the model.
    """

    def __init__(self, model: Callable[[], nn.Module], scales: Scales) -> None:
        super().__init__()
        self._model = model
        self._scales = scales

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        with self._scales.untouched(), _evaluating(model), _initial_adapters(model):
            return model(*args, **kwargs)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, except for its linear layers, which compute the same in either mode."""
    # On a CPU, 4-bit layers of bitsandbytes are repacked by the first forward in eval mode, and have no gradients after that.
    modules = [module for module in model.modules() if module.training and not isinstance(module, nn.Linear)]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def _initial_adapters(model: Any) -> Iterator[None]:
    """Puts PEFT's adapters into their state before training: off, or TRL's copy of them."""
    if not is_peft_model(model):
        yield
    elif "ref" in model.peft_config:
        active = model.active_adapter
        model.set_adapter("ref")
        try:
            yield
        finally:
            model.set_adapter(active)
    else:
        with model.disable_adapter():
            yield


def check_arguments(bases: Sequence[type], scales: Scales, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuse arguments of a Trainer with which it would use a model without the scales.

    Args:
        bases: the Trainer's class and its bases, in method resolution order.
        scales: attached to its model.
        args, kwargs: the arguments of the Trainer.

    Returns:
        The arguments by name, without those that are None.

    Raises:
        OptionError: an argument makes it do so.
    """
    names = [
        list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:] for base in bases if "__init__" in vars(base)
    ]
    # A class that passes *args on does not name them; the first one that has no *args does.
    naming = next(group for group in names if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in group))
    given = {**dict(zip((parameter.name for parameter in naming), args, strict=False)), **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    kind = bases[0]
    if isinstance(given.get("model"), str | Path):
        raise OptionError(
            f"{kind.__name__} would load a model by itself, without the scales",
            got=repr(str(given["model"])),
            hint="pass the model that they are attached to",
        )
    options = given.get("args")
    if getattr(options, "use_vllm", False) or any(each.name == "weight_transfer" for group in names for each in group):
        raise OptionError(
            f"{kind.__name__} sends the model's weights to vLLM, which would generate without the scales",
            expected="use_vllm=False, with which the model generates by itself",
        )
    if getattr(options, "teacher_model_kind", "live") != "live":
        raise OptionError(
            f"{kind.__name__} makes a teacher from the model by itself, with no scales or with wrong ones",
            got=f"teacher_model_kind={options.teacher_model_kind!r}",  # type: ignore[union-attr]
            expected="teacher_model_kind='live'",
        )
    own = {id(parameter) for parameter in scales.parameters()}
    for name, value in given.items():
        if name in ("model", "loss"):  # a loss that is a module, as of sentence-transformers, holds the model that is trained
            continue
        for model in value if name == "reward_funcs" and isinstance(value, list) else [value]:
            if isinstance(model, nn.Module) and any(id(parameter) in own for parameter in model.parameters()):
                raise OptionError(
                    f"{name} is the model that is trained, or shares its scales, and would change with it",
                    hint="leave ref_model out: the reference is the model with its scales untouched then"
                    if name == "ref_model"
                    else "load a model of its own",
                )
            if folder := _bare_residual(model):
                raise OptionError(
                    f"{name} is a bare residual, without the singular directions that were taken out of its weights",
                    got=str(folder),
                    expected="the original model, or a folded one",
                )
    return given


def _bare_residual(model: Any) -> Path | None:
    """The folder of a residual checkpoint that a model without scales was loaded from, or that a path names; else None."""
    if isinstance(model, nn.Module):
        if any(isinstance(module, LowRankPath) for module in model.modules()):
            return None
        model = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(model, str | Path):
        return None
    try:
        factorized = (Path(model) / MANIFEST_FILE).is_file()
    except OSError:  # a text too long for a path
        return None
    return Path(model) if factorized and Manifest.read(Path(model)).layout == "residual" else None


@contextmanager
def no_second_load(kind: type, given: dict[str, Any]) -> Iterator[None]:
    """Prevents a Trainer of TRL that is being made from loading its model again, from the path in the model's config.

    Instead of a reference model it gets None, and prepares none, as for a model with adapters.

    Args:
        kind: the Trainer's class.
        given: its arguments by name.

    Raises:
        OptionError: it loads the model, and is not known to do so for a reference.
    """
    path = getattr(getattr(given.get("model"), "config", None), "_name_or_path", "")
    patched = loaders(kind)

    def loading(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_another(model_id: str, *args: Any, **kwargs: Any) -> Any:
            if model_id != path or model_id in _strings(given):
                return load(model_id, *args, **kwargs)
            if not has_reference(kind):
                raise _second_model(kind, f"loads {model_id!r} once more")
            return None

        return load_another

    for module, load in patched:
        setattr(module, LOADER, loading(load))
    try:
        yield
    finally:
        for module, load in patched:
            setattr(module, LOADER, load)


def check_trainer(trainer: Any, scales: Scales, given: dict[str, Any], forward: Any) -> None:
    """Refuse a Trainer that uses weights without scales or has made a second model; else set its reference if it needs one.

    Args:
        trainer: made within ``scales.untouched()`` and ``no_second_load``.
        scales: attached to its model.
        given: its arguments by name.
        forward: what ``own_forward`` gave before the Trainer was made.

    Raises:
        OptionError: it is such a Trainer.
    """
    kind = type(trainer)
    model: Any = unwrapped(trainer.model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    past = own_forward(model) is not forward or reads_past_the_head(kind)
    if head is not None and scales.act_on(head) and (past or getattr(trainer.args, "use_liger_kernel", False)):
        raise OptionError(
            f"{kind.__name__} multiplies with the weight of the output head by itself, and would leave its scales out",
            hint="factorize without it (--exclude), or train with another Trainer",
        )
    for callback in trainer.callback_handler.callbacks:
        check_callback(callback)
    known = {
        id(parameter)
        for module in [model, *given.values()]
        if isinstance(module, nn.Module)
        for parameter in module.parameters()
    }
    for name, value in vars(trainer).items():
        path = getattr(getattr(value, "config", None), "_name_or_path", None)
        if (
            not isinstance(value, nn.Module)
            or name in given
            or path in _strings(given)
            or any(id(parameter) in known for parameter in value.parameters())
        ):
            continue
        if name == "ref_model":
            # A copy that was made while the scales were untouched keeps them untouched.
            paths = [module for module in value.modules() if isinstance(module, LowRankPath)]
            right = bool(paths) and all(path.untouched for path in paths)
        else:
            right = not isinstance(value, type(model))
        if not right:
            raise _second_model(kind, f"has made {name} by itself")
    if has_reference(kind) and trainer.ref_model is None:
        trainer.ref_model = Reference(lambda: trainer.model, scales)


def check_callback(callback: Any) -> None:
    """Refuse a callback (an object or a class) of TRL that copies or merges whole models, which is wrong with scales."""
    kind = callback if isinstance(callback, type) else type(callback)
    if (harm := harm_of_callback(kind)) is not None:
        raise OptionError(f"{kind.__name__} {harm}", hint="train without it")


def own_forward(model: nn.Module) -> Any:
    """The ``forward`` that has been set on a model itself, in place of its class's; None if none has."""
    return vars(unwrapped(model)).get("forward")


def _strings(given: dict[str, Any]) -> list[str]:
    """The arguments that are strings: one may be the path of a model that the user asks for."""
    return [value for value in given.values() if isinstance(value, str)]


def _second_model(kind: type, what: str) -> OptionError:
    return OptionError(
        f"{kind.__name__} {what}: a second model without the scales, which may be a bare residual",
        hint="pass that model to the Trainer yourself, if it takes one: the original, not the factorized folder; or override "
        "the method that makes it",
    )
