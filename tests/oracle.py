"""The models of transformers, made on the meta device, and what the module that owns a parameter says of each tensor.

So the choice of targets, which knows names, shapes and configs only, is held against the models themselves. No weight has
values, so that widths stay as the configs have them; the number of layers is cut, one of each kind being kept.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import transformers.models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

#: What a module does with a parameter.
Owner = Literal["linear", "experts", "in_proj", "embedding", "convolution", "norm", "recurrent", "buffer", "raw"]

_FOLDER = Path(transformers.models.__path__[0])
_COUNT = re.compile(r"(^|_)(n|num|encoder|decoder|depth)(_|$).*layers?(_|$)|^(depth|n_layer|num_blocks)$|layers$")
_EXPERTS = re.compile(r"Experts|ExpertGLU|ParallelLinear|MoELinear")
_NORM = re.compile(r"Norm")


def families() -> list[str]:
    """The folders of transformers with models in them."""
    return sorted({path.parent.name for path in _FOLDER.glob("*/modeling_*.py")})


@cache
def classes_of(family: str) -> tuple[type, ...]:
    """The model classes of a folder, without bases that are no model by themselves."""
    found: dict[str, type] = {}
    for path in sorted((_FOLDER / family).glob("modeling_*.py")):
        try:
            module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        except ImportError:
            continue
        for name, kind in vars(module).items():
            if (
                inspect.isclass(kind)
                and issubclass(kind, transformers.PreTrainedModel)
                and kind.__module__ == module.__name__
                and kind.config_class is not None
                and not name.endswith("PreTrainedModel")
            ):
                found[name] = kind
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Made:
    """A model without values.

    Attributes:
        model: it.
        config: its ``config.json``.
        cut: whether layers were left out.
    """

    model: Any
    config: dict[str, Any]
    cut: bool


def make(kind: Any) -> Made | str:
    """A model of a class, on the meta device; or why it cannot be made from its config's defaults."""
    why = ""
    for cut in (True, False):
        try:
            config = _config(kind.config_class, cut=cut)
            with torch.device("meta"), no_init_weights(), _without_losses(kind):
                model = kind(config)
            return Made(model.eval(), json.loads(config.to_json_string(use_diff=False)), cut)
        except Exception as error:  # whatever a model raises that cannot be made so
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return why


def _config(kind: Any, *, cut: bool) -> Any:
    values = _MORE.get(kind.__name__, {})
    values = kind(**(values() if callable(values) else values)).to_dict()
    config = kind(**(_cut(values) if cut else values))
    config._attn_implementation = "eager"
    return config


_MORE: Mapping[str, Any] = {}


def _cut(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config with few layers: two, or one of each kind that lists over the layers tell."""
    counts = {name: n for name, n in values.items() if type(n) is int and n > 2 and _COUNT.search(name)}
    made: dict[str, Any] = {}
    kept: dict[int, list[int]] = {}
    for n in set(counts.values()):
        rows = [values[name] for name in values if isinstance(values[name], list | tuple) and len(values[name]) == n]
        kinds: dict[str, int] = {}
        for i in range(n):
            kinds.setdefault(repr([row[i] for row in rows]), i)
        kept[n] = sorted(kinds.values()) if len(kinds) > 1 else [0, 1]
    for name, value in values.items():
        if name in counts:
            made[name] = len(kept[value])
        elif isinstance(value, dict):
            made[name] = _cut(value)
        elif isinstance(value, list | tuple) and len(value) in kept:
            made[name] = [value[i] for i in kept[len(value)]]
        else:
            made[name] = value
    return made


@contextmanager
def _without_losses(kind: type) -> Iterator[None]:
    """Lets a model be made whose loss needs scipy: a loss has no weights."""
    module: Any = inspect.getmodule(kind)
    checked = getattr(module, "requires_backends", None)
    if checked is None:
        yield
        return
    module.requires_backends = lambda obj, backends: None if "scipy" in backends else checked(obj, backends)
    try:
        yield
    finally:
        module.requires_backends = checked


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a model's state.

    Attributes:
        name: in the file, or in memory.
        shape: of the tensor.
        owner: what the modules that own the parameters in it say of it.
        module: the classes of these modules.
        parameters: the names of these in memory.
        in_block: whether one of several numbered modules has it, apart from the module that owns it.
    """

    name: str
    shape: tuple[int, ...]
    owner: Owner
    module: str
    parameters: tuple[str, ...]
    in_block: bool


def weights(model: nn.Module) -> list[Weight]:
    """The tensors of a model under their names in memory."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            owner: Owner = "buffer" if name in module._buffers else _owner(module, name, tensor)
            full = f"{path}.{name}" if path else name
            numbered = any(_is_list(model, path.split("."), i) for i in range(len(path.split(".")) - 1))
            found.append(Weight(full, tuple(tensor.shape), owner, type(module).__name__, (full,), numbered))
    return found


def _is_list(model: nn.Module, path: list[str], place: int) -> bool:
    return path[place].isdigit() and isinstance(
        model.get_submodule(".".join(path[:place])), nn.ModuleList | nn.Sequential | nn.ModuleDict
    )


def _owner(module: nn.Module, name: str, tensor: torch.Tensor) -> Owner:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return "in_proj"
    if isinstance(module, nn.Linear | Conv1D) and name == "weight":
        return "linear"
    if _EXPERTS.search(kind) and tensor.ndim >= 2 and "bias" not in name:
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.RNNBase):
        return "recurrent"
    return "norm" if _NORM.search(kind) else "raw"


def saved(model: Any, in_memory: list[Weight]) -> list[Weight]:
    """The tensors of a model as ``save_pretrained`` names and cuts them."""
    by_name = {weight.name: weight for weight in in_memory}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in by_name}
    with _Origins(state) as origins:
        reverted = revert_weight_conversion(model, state)
    found = []
    for name, tensor in reverted.items():
        sources = [by_name[source] for source in sorted(origins.of(tensor))]
        first = sources[0]
        found.append(
            Weight(
                name,
                tuple(tensor.shape),
                first.owner,
                " ".join(dict.fromkeys(source.module for source in sources)),
                tuple(source.name for source in sources),
                first.in_block,
            )
        )
    return found


class _Origins(TorchDispatchMode):
    """Follows tensors through operations: from which named tensors each one was made."""

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._known: list[tuple[torch.Tensor, frozenset[str]]] = []
        self._of: dict[int, frozenset[str]] = {}
        for name, tensor in named.items():
            self._note(tensor, frozenset({name}))

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._of[id(tensor)]

    def _note(self, tensor: torch.Tensor, names: frozenset[str]) -> None:
        self._known.append((tensor, names))  # which keeps it, so that no other one gets its id
        self._of[id(tensor)] = self._of.get(id(tensor), frozenset()) | names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        names = frozenset[str]().union(*(self._of.get(id(one), frozenset()) for one in tensors))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._note(one, names)
        return result
