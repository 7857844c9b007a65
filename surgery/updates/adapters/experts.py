"""Updates of single experts, by the names that they had before transformers 5, onto checkpoints that stack them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from surgery.models.placement import Place, locate, parameter_names
from surgery.models.transformers_api import is_from_transformers, loaded_by
from surgery.updates.adapters.content import ModuleUpdate
from surgery.updates.adapters.homes import Homes

_SINGLE = re.compile(r"(?P<experts>.+)\.(?P<number>\d+)\.(?P<projection>[^.]+)")


def places_in_stacks(updates: Iterable[ModuleUpdate], homes: Homes) -> dict[str, Place]:
    """Module of a single expert -> where its weight would be in the stack that the checkpoint has instead.

    transformers itself is asked: where would it put the weights of all experts, if they were stored one by one? Modules whose
    tensors are there, and those of which it knows no stack, are left out.
    """
    lacking: dict[str, dict[str, tuple[int, int]]] = {}  # name of the experts -> projection -> (out, in)
    modules = []
    for one in updates:
        found = _SINGLE.fullmatch(one.module)
        if found is not None and one.A.ndim == 2 and homes.named(f"{one.module}.weight") is None:
            modules.append(one.module)
            lacking.setdefault(found["experts"], {})[found["projection"]] = (len(one.B), one.A.shape[1])
    model = homes.model if modules else None
    if model is None or not is_from_transformers(model):
        return {}
    imagined: dict[str, Sequence[int] | None] = {}
    for experts, projections in lacking.items():
        imagined |= _all_of_them(model, experts, projections)
    places = locate(model, imagined)
    found_places = {module: places.get(f"{module}.weight", []) for module in modules}
    return {module: several[0] for module, several in found_places.items() if len(several) == 1}


def _all_of_them(model: nn.Module, experts: str, projections: Mapping[str, tuple[int, int]]) -> dict[str, Sequence[int] | None]:
    """Names and shapes of the weights of all experts of a layer, with the projections that are stacked together with these."""
    names = parameter_names(model)
    shapes: dict[str, Sequence[int] | None] = {}
    for projection, shape in projections.items():
        for loaded in loaded_by(model, names, [f"{experts}.0.{projection}.weight"]):
            if loaded.converter is None:
                continue
            count = model.get_parameter(names[loaded.parameter]).shape[0]
            words = [pattern.replace("\\", "").split(".") for pattern in loaded.converter.source_patterns]
            together = {word[-2] for word in words if len(word) > 1 and word[-1].startswith("weight")} | {projection}
            for number in range(count):
                shapes |= {f"{experts}.{number}.{one}.weight": projections.get(one, shape) for one in sorted(together)}
    return shapes
