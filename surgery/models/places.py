"""Where the targets of a checkpoint are in a model, and whether what it lacks may be lacking."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

from torch import nn

from surgery.errors import OptionError
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.models.packed import held_at, loaded_name
from surgery.models.placement import Place, homes, locate, parameter_names
from surgery.models.transformers_api import is_from_transformers


def places_of(model: nn.Module, manifest: Manifest) -> dict[str, list[Place]]:
    """Tensor of a target, or alias of one -> its places in the model, for those targets that the model has.

    Some may be absent, since loaders drop tensors of a checkpoint: layers for multi-token prediction, or the vision tower of
    a model that is loaded for its text.

    Raises:
        OptionError: the model has none of the targets, or lacks most of them, by number and by size, and not just whole
            towers; or it is not one of transformers and seems to have a target under another name; or a parameter of a target
            is also another tensor of the checkpoint, which the manifest does not know as an alias.
    """
    shapes: dict[str, Sequence[int] | None] = {loaded_name(skipped.tensor): None for skipped in manifest.skipped}
    shapes |= {tensor: target.shape for target in manifest.targets for tensor in target.tensors}
    places = locate(model, shapes)
    if absent := [target for target in manifest.targets if places.keys().isdisjoint(target.tensors)]:
        _check_lacking(model, manifest, absent, shapes, lacks_all=not places)
    _check_alone(model, manifest, shapes)
    return places


def _check_lacking(
    model: nn.Module, manifest: Manifest, absent: Sequence[TargetRecord], known: Container[str], *, lacks_all: bool
) -> None:
    """Refuse a model that lacks too many targets, or has one under another name. Raises OptionError."""
    renamed = None if is_from_transformers(model) else _renamed(model, absent, known)
    by_number = 2 * len(absent) > len(manifest.targets)
    by_size = 2 * sum(target.entries for target in absent) > sum(target.entries for target in manifest.targets)
    most = by_number and by_size and not _are_whole_towers(absent, manifest.targets)
    if renamed is not None or lacks_all or most:
        raise OptionError(
            f"{absent[0].tensor!r} is not in this model, nor are {len(absent) - 1} others of {len(manifest.targets)} targets",
            got=type(model).__name__ + (f", with {renamed!r} of the same shape" if renamed is not None else ""),
            expected="the model that the checkpoint loads as",
            hint="attach to the transformers model inside a wrapper; or leave out what the model does not have: --exclude",
        )


def _are_whole_towers(absent: Sequence[TargetRecord], targets: Sequence[TargetRecord]) -> bool:
    """Whether absent targets are all that there are in some lists of blocks, as where a model is loaded for its text alone."""
    lost = {_list_of_blocks(target.tensor) for target in absent}
    return sum(_list_of_blocks(target.tensor) in lost for target in targets) == len(absent)


def _list_of_blocks(tensor: str) -> str:
    """The name of the outermost numbered list that a tensor is in; the whole name where it is in none."""
    return re.split(r"\.\d+\.", tensor, maxsplit=1)[0]


def _renamed(model: nn.Module, absent: Sequence[TargetRecord], known: Container[str]) -> str | None:
    """The name of a parameter that is not in the checkpoint and has the shape of an absent target; None if there is none.

    It could hold the residual of that target, and the model would compute without the target's leading directions.
    """
    parameters = {name: held_at(model, full) for name, full in parameter_names(model).items()}
    loaded = {id(parameter) for name, parameter in parameters.items() if name in known}
    shapes = {tuple(target.shape) for target in absent}
    found = (name for name, own in parameters.items() if id(own) not in loaded and tuple(own.shape) in shapes)
    return next(found, None)


def _check_alone(model: nn.Module, manifest: Manifest, tensors: Iterable[str]) -> None:
    """Refuse a parameter of a target that has a second tensor in the checkpoint which is no known alias: a fold would miss it.

    Raises:
        OptionError: naming both tensors.
    """
    together: dict[int, dict[str, str]] = {}  # id of a parameter -> each name that tensors are loaded into, and one of these
    for tensor, name in homes(model, tensors).items():
        together.setdefault(id(held_at(model, name)), {}).setdefault(name, tensor)
    twice = {tensor: set(found.values()) for found in together.values() if len(found) > 1 for tensor in found.values()}
    for target in manifest.targets:
        for tensor in target.tensors:
            if others := sorted(twice.get(tensor, set()).difference(target.tensors)):
                raise OptionError(
                    f"{target.key!r} is one parameter of the model with {others[0]!r}, which a fold would leave as it is",
                    got=f"a model that ties them; {others[0]!r} had other bytes, or it was not known that it is tied",
                    hint="factorize a local copy of the model, of which all weights are compared; or load it without tying: "
                    "tie_word_embeddings=False",
                )
