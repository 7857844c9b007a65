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
    for cut, filled in ((True, False), (True, True), (False, False), (False, True)):
        try:
            config = _config(kind.config_class, cut=cut, filled=filled)
            with torch.device("meta"), no_init_weights(), _without_losses(kind):
                model = kind(config)
            return Made(model.eval(), json.loads(config.to_json_string(use_diff=False)), cut)
        except Exception as error:  # whatever a model raises that cannot be made so
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return why


_RESNET = {"use_timm_backbone": False, "backbone": None, "backbone_config": {"model_type": "resnet"}}
_IMAGE_TOKEN = {"vocabulary_map": {"<image>": 1}}
#: Config -> what its defaults lack.
_LACKING: Mapping[str, Mapping[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 4},
    "AyaVisionConfig": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "ChameleonConfig": _IMAGE_TOKEN,
    "ConditionalDetrConfig": _RESNET,
    "DabDetrConfig": _RESNET,
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 8, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 512, "moe_num_experts": 4, "hidden_size": 2048},
    },
    "DeformableDetrConfig": _RESNET,
    "DetrConfig": _RESNET,
    "Emu3Config": _IMAGE_TOKEN,
    "InformerConfig": {"prediction_length": 4},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "Lfm2MoeConfig": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
    "ReformerConfig": {"is_decoder": True},
    "TableTransformerConfig": _RESNET,
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
}


#: Config -> what its model reads and the config does not know.
_MISSING: Mapping[str, Mapping[str, Any]] = {
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 768},
}


def _config(kind: Any, *, cut: bool, filled: bool) -> Any:
    values = kind(**_LACKING.get(kind.__name__, {})).to_dict()
    if cut:
        values = _cut(values)
    if filled:
        values = _filled(values)
    config = kind(**values)
    config._attn_implementation = "eager"
    for part in (config, *(part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig))):
        for inner in (part, *(one for one in vars(part).values() if isinstance(one, transformers.PretrainedConfig))):
            for name, value in _MISSING.get(type(inner).__name__, {}).items():
                setattr(inner, name, value)
    return config


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config with sizes in the place of those that its defaults leave out."""
    made = {name: _filled(value) if isinstance(value, dict) else value for name, value in values.items()}
    heads, width = made.get("num_attention_heads"), made.get("hidden_size")
    sizes: dict[str, Any] = {"vocab_size": 50, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts": 8}
    sizes |= {"indexer_compress_ratio": 4, "indexer_budget": 2048, "indexer_n_heads": 4, "indexer_kv_heads": 1}
    sizes |= {"indexer_head_dim": 256, "moe_intermediate_size": 64, "mlp_layer_types": ["dense", "sparse"] * 32}
    if type(heads) is int and type(width) is int:
        sizes |= {"num_key_value_heads": heads, "head_dim": width // heads, "intermediate_size": 2 * width}
    return made | {name: size for name, size in sizes.items() if name in made and made[name] is None}


def _cut(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config with few layers: two, or one of each kind that lists over the layers tell."""
    counts = {name: n for name, n in values.items() if type(n) is int and n > 2 and _COUNT.search(name)}
    kept: dict[int, list[int]] = {}
    for n in set(counts.values()):
        rows = [value for value in values.values() if isinstance(value, list | tuple) and len(value) == n]
        kinds: dict[str, int] = {}
        for i in range(n):
            kinds.setdefault(repr([row[i] for row in rows]), i)
        kept[n] = sorted(kinds.values()) if len(kinds) > 1 else [0, 1]
    made: dict[str, Any] = {}
    for name, value in values.items():
        if counts and name in ("stage_names", "out_features", "out_indices"):
            continue  # which name layers
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
    found: list[Weight] = []

    def visit(module: nn.Module, path: str, numbered: bool, is_number: bool) -> None:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                owner: Owner = "buffer" if name in module._buffers else _owner(module, name, tensor)
                found.append(Weight(path + name, tuple(tensor.shape), owner, type(module).__name__, (path + name,), numbered))
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{path}{name}.", numbered or is_number, isinstance(module, _LISTS) and name.isdecimal())

    visit(model, "", False, False)
    return found


_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _owner(module: nn.Module, name: str, tensor: torch.Tensor) -> Owner:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return "in_proj"
    if (isinstance(module, nn.Linear | Conv1D) or kind.endswith("Linear")) and name == "weight":
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
