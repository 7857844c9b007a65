"""The parts of transformers that are used beyond its documented interface.

These are the conversion of checkpoints that it loads, and the methods of its Trainer that are overridden. Tried with 5.0.0 to
5.23.0 (docs/compatibility.md has which). A name that a release lacks is a MissingExtra. Up to 4.57, whose loader converts in
another way, scales can be attached to models that have all tensors under the names of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.errors import MissingExtra

#: Operations that only permute an axis -> the axis; None where the operation itself knows it. The oldest releases have no
#: Interleave.
_REORDERING = {"Interleave": None, "PermuteForRope": 0}

#: Methods by which the Trainer writes and reads checkpoints. If they had other names, it would save the whole model.
_OVERRIDDEN = (
    "_load_best_model",
    "_load_from_checkpoint",
    "_save",
    "_save_optimizer_and_scheduler",
    "add_callback",
    "save_model",
)
#: Constants of its module: names of files in a checkpoint.
_FILES = ("SCHEDULER_NAME", "TRAINING_ARGS_NAME")


def imported(what: str) -> Any:
    """The package transformers, imported.

    Args:
        what: is done with it, the beginning of the error.

    Raises:
        MissingExtra: it is not installed, or refuses another installed package, such as a hub client that is too new for it.
    """
    try:
        import transformers
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        raise MissingExtra(
            f"{what} transformers, which " + ("is not installed" if missing else "cannot be imported"),
            got=None if missing else error,
            hint="pip install 'transformers>=5.0'",
        ) from error
    return transformers


def is_from_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers; does not import it, since it is optional."""
    return any(kind.__module__ == "transformers.modeling_utils" for kind in type(model).__mro__)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, the linear layer of GPT-2, whose weight is (in, out)."""
    kind: Any = type(module)
    return bool(kind.__qualname__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils")


def tie(model: Any) -> None:
    """Tie the weights of a model on the meta device, which transformers 5.0 does not do by itself."""
    if hasattr(model, "all_tied_weights_keys"):
        model.tie_weights(recompute_mapping=False)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Where ``from_pretrained`` puts a tensor of a checkpoint.

    Attributes:
        tensor: its name in the checkpoint.
        parameter: the name of the first parameter that it is loaded into.
        pattern, converter: transformers' converter for it, and the converter's pattern that matches its name; None if the
            tensor is loaded without conversion.
    """

    tensor: str
    parameter: str
    pattern: str | None = None
    converter: Any = None


def loaded_by(model: nn.Module, names: Mapping[str, Any], tensors: Iterable[str]) -> list[Loaded]:
    """Where ``from_pretrained`` puts the tensors of a checkpoint, for those that the model uses.

    Args:
        model: of transformers.
        names: of its parameters.
        tensors: names in the checkpoint.

    Returns:
        In the order in which transformers collects them, which is the order of experts in a stack.

    Raises:
        MissingExtra: this release of transformers has no known interface for its conversion, and a tensor needs one.
    """
    prefix: Any = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        known = dict(names)
        found = []
        for tensor in sorted(tensors, key=dot_natural_key):
            renamed, pattern = rename_source_key(tensor, renamings, converters, prefix, known)
            if renamed not in names and tensor in names:
                renamed, pattern = rename_source_key(tensor, [], [], prefix, known)
            if renamed in names:
                found.append(Loaded(tensor, renamed, pattern, None if pattern is None else by_pattern[pattern]))
        return found
    except (AttributeError, ImportError, TypeError) as error:
        return _as_named(names, tensors, prefix, error)


def _as_named(names: Mapping[str, Any], tensors: Iterable[str], prefix: str, why: Exception) -> list[Loaded]:
    """``loaded_by`` without transformers' conversion: names have to match, except for the prefix of the base model."""
    found = []
    for tensor in tensors:
        candidates = (tensor, f"{prefix}.{tensor}", tensor.removeprefix(f"{prefix}."))
        parameter = next((candidate for candidate in candidates if candidate in names), None)
        if parameter is None:
            raise _not_fitting(f"{tensor!r} is loaded in a way that this release of transformers does not tell", why)
        found.append(Loaded(tensor, parameter))
    return found


def renamed_on_loading(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, what it becomes) for names inside a model that transformers renames when it loads a checkpoint.

    A rule for the names of a checkpoint may fit those of the model as well: one of Laguna's makes ``shared_experts..`` of
    ``shared_experts.``. None where this release has no known interface for that, or no rules for the family.
    """
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        rules_of: Any = conversion_mapping.get_checkpoint_conversion_mapping
        if rules_of(str(getattr(model.config, "model_type", None))) is None:
            return
        mapping = conversion_mapping.get_model_conversion_mapping(model)  # type: ignore[arg-type]
        rules = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        renamed = [(name, rename_source_key(name, rules, [])[0]) for name in names]
    except (AttributeError, ImportError, TypeError):
        return
    yield from ((name, other) for name, other in renamed if other != name)


def family_of_conversion(model: nn.Module) -> str:
    """The family by whose rules transformers converts a model's experts on loading: its own, or one that it is like."""
    config: Any = model.config
    family = str(getattr(config, "model_type", None))
    try:
        from transformers import conversion_mapping
    except ImportError:
        return family
    return str(getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(family, family))


def reordered_axis(operation: Any) -> int | None:
    """The axis of a matrix that an operation of a converter permutes; None for other operations."""
    import transformers.core_model_loading

    for name, axis in _REORDERING.items():
        kind: Any = getattr(transformers.core_model_loading, name, ())
        if isinstance(operation, kind):
            return int(operation.dim) if axis is None else axis
    return None


def converted(converter: Any, operations: Sequence[Any], model: Any, name: str, tensors: Mapping[str, Sequence[Any]]) -> Any:
    """Run a converter on tensors, or on objects that stand for tensors.

    Args:
        converter: of transformers; a copy of it is used.
        operations: to do instead of its own.
        model: of transformers.
        name: of the parameter that it collects the tensors for.
        tensors: by pattern, in order.

    Returns:
        Parameter -> the tensor that is loaded into it.
    """
    following = deepcopy(converter)
    following.operations = list(operations)
    for pattern, members in tensors.items():
        for member in members:
            following.add_tensor(name, name, pattern, member)
    made = following.convert(name, model=model, config=model.config)
    if isinstance(made, tuple):  # with errors, in 5.0
        made, _ = made
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def check_trainer_class(bases: Sequence[type]) -> None:
    """Refuse a Trainer without the methods that SaveScales overrides, since it would save and load whole models.

    Args:
        bases: its class and that class's bases, without SaveScales.

    Raises:
        MissingExtra: this release of transformers has other methods.
    """
    import transformers.trainer

    missing = [name for name in _OVERRIDDEN if not any(name in vars(base) for base in bases)]
    missing += [name for name in _FILES if not hasattr(transformers.trainer, name)]
    if missing:
        raise _not_fitting(f"{bases[0].__name__} has no {missing[0]}, by which scales are saved in the place of the model")


def trainer_file(name: str) -> str:
    """The Trainer's name of a file in a checkpoint, by its constant ``TRAINING_ARGS_NAME`` or ``SCHEDULER_NAME``."""
    import transformers.trainer

    return str(getattr(transformers.trainer, name))


@contextmanager
def counted_as_adapted(model: Any) -> Iterator[None]:
    """Makes the Trainer accept a quantized model, which it refuses without PEFT's adapters."""
    needed = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", True)
    if needed:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if needed:
            model._hf_peft_config_loaded = False


def _not_fitting(what: str, why: Exception | None = None) -> MissingExtra:
    import transformers

    return MissingExtra(
        what,
        got=f"transformers {transformers.__version__}" + (f" ({why})" if why else ""),
        expected="transformers 5.0 to 5.23, with which this version of surgery was tried",
        hint="pip install 'transformers>=5.0'",
    )
