"""Missing layers: whether the numbered layers, blocks and experts of a model are all there, by the names of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

#: Keys under which configs say how many layers a model has. Where layers are run more than once (ALBERT, HRM), the number of
#: those that are stored comes first.
_COUNTS = ("num_hidden_groups", "num_layers_per_stack", "num_hidden_layers", "n_layer")
_TEXT_PARTS = ("text_config", "language_config", "llm_config")
_LISTS_OF_LAYERS = ("layers", "layer", "h", "blocks")


def numbering_notes(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Notes on layers, blocks or experts that seem to be missing: numbers left out, or fewer layers than the config says.

    Args:
        names: of all tensors.
        config: ``config.json`` of the model.
    """
    lists = _numbered(names)
    holes = [(prefix, *hole) for prefix, items in lists.items() if (hole := _hole(prefix, items)) is not None]
    notes = []
    if holes:
        prefix, first, count, last = holes[0]
        notes.append(
            f"the numbering has holes, as if parts of the model were missing: of {prefix}.0 to {prefix}.{last} there is no "
            f"{prefix}.{first}"
            + (f", nor {count - 1} others" if count > 1 else "")
            + (f"; {len(holes) - 1} more such lists" if len(holes) > 1 else "")
        )
    length = max((max(items) + 1 for items in lists.values() if len(set.union(*items.values())) > 1), default=0)
    told = _layers_of(config)
    if 0 < length < told:
        notes.append(f"the config speaks of {told} layers, and no list of layers among the weights is longer than {length}")
    return notes


def _numbered(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Prefix of names before a number -> the number -> the modules after it."""
    lists: dict[str, dict[int, set[str]]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[1:-1], start=1):
            if part.isascii() and part.isdecimal() and len(part) <= 9:
                modules = lists.setdefault(".".join(parts[:i]), {}).setdefault(int(part), set())
                modules.add(".".join(parts[i + 1 : -1]))
    return lists


def _hole(prefix: str, items: Mapping[int, set[str]]) -> tuple[int, int, int] | None:
    """The first number that is missing, how many are missing, and the last number that is there; None if none is missing.

    Only among modules that are alike: in a sequence of convolutions and activations, numbers without weights are normal.
    """
    numbers = sorted(items)
    least = _alike(prefix, all(modules == items[numbers[0]] for modules in items.values()))
    gaps = [
        (before + 1, after - before - 1)
        for before, after in pairwise((-1, *numbers))
        if after - before > 1 and len((items[after] & items.get(before, items[after])) - {""}) >= least
    ]
    return (gaps[0][0], sum(count for _, count in gaps), numbers[-1]) if gaps else None


def _alike(prefix: str, of_one_kind: bool) -> float:
    """How many modules two neighbours in a list must have in common to be taken for layers or experts, by the list's name."""
    *above, name = prefix.split(".")
    if any(map(str.isdecimal, above)) and "expert" not in name:  # inside a layer there are short sequences of other kinds
        return 3 if name in _LISTS_OF_LAYERS else math.inf
    return 1 if name in _LISTS_OF_LAYERS and of_one_kind else 2


def _layers_of(config: Mapping[str, Any]) -> int:
    """How many layers a config says that the language model has; 0 if it does not say."""
    for part in (*(config.get(key) for key in _TEXT_PARTS), config):  # a config may count the layers of all its parts together
        for key in _COUNTS:
            if isinstance(part, Mapping) and isinstance(count := part.get(key), int):
                return count
    return 0
