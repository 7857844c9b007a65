"""Tensors that an adapter in PEFT's layout holds whole: as modules that are saved beside it, and biases.

Source: PEFT 0.21, ``ModulesToSaveWrapper`` and ``set_additional_trainable_modules``; a module that is saved is saved whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from surgery.models.carriers import Carrier, carriers_of
from surgery.models.placement import Place, TensorPart
from surgery.names import PEFT_PREFIX
from surgery.updates.writing.low_rank import Refusal

_REFUSAL = Refusal("put into an adapter whole", "leave it out of --full; or keep the tuned checkpoint itself")
#: By these names PEFT knows that a module has the weight of the embedding, so that it saves all that share this.
_KNOWN_AS_TIED = ("embed_tokens", "lm_head")


@dataclass(slots=True)
class Whole:
    """What an adapter holds whole.

    Attributes:
        keys: of its file -> the tensor of the checkpoint that is there.
        modules: names of modules that PEFT saves.
        bias: what the config says of biases.
        tied: names of tensors that are one parameter, which two of the modules share; a single one if it is stored once.
    """

    keys: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    bias: str = "none"
    tied: list[tuple[str, ...]] = field(default_factory=list)


def whole_tensors(
    copied: Sequence[str],
    model: nn.Module | None,
    places: Mapping[str, Sequence[Place]],
    adapted: Collection[str],
) -> Whole:
    """What an adapter holds whole so that some tensors are in it, which may be more: of a module all parameters.

    Args:
        copied: names of tensors of the checkpoint.
        model: the skeleton.
        places: of all tensors of the checkpoint, in the model.
        adapted: names of the modules that have low-rank updates.

    Raises:
        OptionError: a tensor that PEFT cannot load so, or not rightly.
    """
    whole = Whole()
    if not copied:
        return whole
    if model is None:
        raise _REFUSAL.of(copied[0], "of a model that transformers does not know")
    homes = {place.parameter: name for name, found in places.items() for place in found if _is_whole(place, name, found)}
    by_tensor = {name: parameter for parameter, name in homes.items()}
    wanted: dict[str, dict[str, str]] = {}
    for name in copied:
        if name not in by_tensor:
            raise _REFUSAL.of(name, "a tensor that the model does not have, or holds together with others")
        module, _, leaf = by_tensor[name].rpartition(".")
        wanted.setdefault(module, {})[leaf] = name
    held = [name for name in homes if name.rpartition(".")[0] in wanted]
    carriers = carriers_of(model, held)
    homes_and_carriers = {name: (tensor, carriers.get(name)) for name, tensor in homes.items()}
    for module, leaves in wanted.items():
        if module in whole.modules:  # with another that shares its weight
            continue
        own = {leaf: parameter.ndim for leaf, parameter in model.get_submodule(module).named_parameters(recurse=False)}
        if [*leaves] == ["bias"] and (module in adapted or own.get("weight", 0) > 1):
            # By its bias alone, without the weight.
            whole.bias = "all" if module not in adapted or whole.bias == "all" else "lora_only"
            whole.keys[f"{PEFT_PREFIX}{module}{'.base_layer' if module in adapted else ''}.bias"] = leaves["bias"]
        else:
            _save(whole, model, homes_and_carriers, module, next(iter(leaves.values())), adapted)
    return whole


def _is_whole(place: Place, name: str, found: Sequence[Place]) -> bool:
    return len(found) == 1 and place.part == TensorPart.whole(name, place.shape)


def _save(
    whole: Whole,
    model: nn.Module,
    homes: Mapping[str, tuple[str, Carrier | None]],
    module: str,
    name: str,
    adapted: Collection[str],
) -> None:
    """Save a module, all of it, as PEFT does.

    Args:
        whole: what is added to.
        model: the skeleton.
        homes: parameter of the model -> the tensor that it is, and for those of the module its carrier.
        module: the name of the module.
        name: of a tensor of it, for messages.
        adapted: names of the modules that have low-rank updates.
    """
    held = model.get_submodule(module)
    if not module or any(True for child in held.children() for _ in child.parameters()):
        raise _REFUSAL.of(name, f"a parameter of {type(held).__name__} itself, which has layers inside")
    if module in adapted:
        raise _REFUSAL.of(name, f"in {module!r}, which has a low-rank update")
    also = [one for one, _ in model.named_modules() if one != module and one.endswith(module)]
    also += [one for one in adapted if f".{module}." in f".{one}."]
    if also:
        raise _REFUSAL.of(name, f"in {module!r}, by whose name PEFT would take {also[0]!r} too")
    sharing = [module]
    for leaf, _ in held.named_parameters(recurse=False):
        if f"{module}.{leaf}" not in homes:
            raise _REFUSAL.of(name, f"in {module!r}, of which {leaf!r} is stored otherwise or not at all")
        carrier = homes[f"{module}.{leaf}"][1]
        if carrier is not None and len(carrier.layers) > 1:
            sharing = [one for one, other in model.named_modules() if any(layer.module is other for layer in carrier.layers)]
            _check_tied(sharing, name)
            whole.tied.append(tuple(homes[other][0] for one in sharing if (other := f"{one}.{leaf}") in homes))
        for one in sharing:
            whole.keys[f"{PEFT_PREFIX}{one}.{leaf}"] = homes.get(f"{one}.{leaf}", homes[f"{module}.{leaf}"])[0]
    if any(True for _ in held.buffers()):
        raise _REFUSAL.of(name, f"in {module!r}, which has more than parameters")
    whole.modules += sharing


def _check_tied(sharing: Sequence[str], name: str) -> None:
    ends = [one.rpartition(".")[2] for one in sharing]
    if len(sharing) != 2 or not any(end in _KNOWN_AS_TIED for end in ends):
        raise _REFUSAL.of(name, f"a weight that {len(sharing)} modules share, which PEFT does not tie again")
