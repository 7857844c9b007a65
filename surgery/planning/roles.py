"""What a tensor is in its model, told by name, shape and config: a linear layer of a block, or what else.

``tests/planning/test_oracle.py`` holds this against the modules that own the tensors in the models of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.format.header import TensorEntry
from surgery.format.views import Kind, Slice
from surgery.names import is_of_lora

_EMBEDDING = re.compile(
    r"embed|^(wte|wpe|relative_attention_bias)$|(?<!com)position(?!_?wise)|rel_pos|(^|_)embs?$|^codebooks?$"
)
_NORM = re.compile(r"norm|^ln(_|\d|$)|layernorm")
#: Modules whose outputs are the model's; those of detectors have ``embed`` in their names.
_HEAD = re.compile(
    r"(^|_)(heads?|classifiers?)$|^(score|embed_out|cls|qa_outputs|output_layer|tdnn)$|(class|bbox|box)_embed|hypernetworks"
)
#: Modules after the blocks that make one vector of a sequence, as in BERT.
_POOLER = re.compile(r"^pooler$")
_ROUTER = re.compile(r"(^|_)router(_|$)|^shared_expert_gate$")
#: Routers by these names are told from the gates of layers by their sizes.
_GATE = re.compile(r"^(gate|wg|gating|gating_network|(moe|expert|experts)_gate)$")
#: Layers of a feed-forward module, which may be called after the gate that it has, as Moshi's is.
_FEED_FORWARD = re.compile(r"(^|_)(in|out|up|down)(_|$)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERT = re.compile(r"(^|[._])experts?([._]|$)")
_EXPERTS = re.compile(r"(^|[._])(experts?|moe)([._]|$)")
#: Parameters of a module that are weights of linear layers all the same: those of torch's ``nn.MultiheadAttention``.
_PROJECTIONS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})

#: Keys of a config that count the experts which a router chooses from.
_EXPERT_COUNT = re.compile(r"(^|_)(num|n)_(local_|routed_|moe_)?experts?$|(^|_)experts?_(num|count)$|^moe_experts$")


def why_no_linear(entry: TensorEntry, config: Mapping[str, Any], *, convolutions: bool = False) -> str | None:
    """Why a tensor is not the weight of a linear layer in a numbered block; None if it is.

    With ``convolutions`` those in numbered blocks count, too, unless each of their filters sees a single channel.
    """
    *modules, last = entry.name.split(".")
    owner = modules[-1] if modules else ""
    # A mixture has other matrices than its experts, and such tensors have names of any kind.
    experts = has_experts(entry.name) and (len(entry.shape) > 2 or _EXPERT.search(entry.name) is not None)
    if last != "weight" and last not in _PROJECTIONS and not experts:
        return "no weight of a linear layer"
    if is_of_lora(entry.name):
        return "part of a LoRA adapter"
    if any(map(_ROUTER.search, (*modules, last))) or _routes(modules, entry.shape, config):
        return "a router"
    if _in_module(modules, _HEAD):
        return "an output head"
    if _in_module(modules, _POOLER):
        return "a pooler"
    if is_embedding(entry.name):
        return "an embedding"
    if _NORM.search(owner):
        return "a norm"
    if len(entry.shape) > 2 and not experts and not (convolutions and entry.shape[1] > 1):
        return "a depthwise convolution" if entry.shape[1] == 1 else "a convolution"
    if not in_block(entry.name):
        return "outside the transformer blocks"
    if _joins_experts(entry) and _joined(entry, config) is None:
        return "experts joined in one matrix, and config.json does not tell how many"
    return None


def in_block(tensor: str) -> bool:
    """Whether a tensor is in one of several numbered blocks, by its name."""
    return _innermost(tensor.split(".")[:-1]) is not None


def is_embedding(tensor: str) -> bool:
    """Whether a tensor is an embedding, by its name."""
    modules = tensor.split(".")[:-1]
    block = _innermost(modules)
    if block is None and "shared" in modules:  # of T5 and BART; in a block it is what experts share
        return True
    return any(map(_EMBEDDING.search, modules[block or 0 :]))


def has_experts(tensor: str) -> bool:
    """Whether a tensor is of a mixture of experts, by its name."""
    return _EXPERTS.search(tensor) is not None


def kind_of(entry: TensorEntry) -> Kind:
    """The view of a tensor for which no rule names one."""
    if len(entry.shape) == 2:
        return "matrix"
    return "stack" if len(entry.shape) == 3 and has_experts(entry.name) else "convolution"


def own_slices(entry: TensorEntry, config: Mapping[str, Any], split: bool | None) -> tuple[Slice, ...]:
    """The slices in which a matrix is taken without any rule: those whose parts are matrices of their own.

    Args:
        entry: of the tensor.
        config: of the model.
        split: whether fused projections are to be split; None: nobody says.

    Returns:
        q, k and v of an ``in_proj_weight``, or the experts of a layer that lie one below the other; none for other tensors.
    """
    if len(entry.shape) != 2:
        return ()
    rows, columns = entry.shape
    if entry.name.split(".")[-1] == "in_proj_weight" and rows == 3 * columns and split is not False:
        return _equal_parts(("q", "k", "v"), rows)
    if _joins_experts(entry) and (count := _joined(entry, config)) is not None:
        return _equal_parts([f"expert_{i}" for i in range(count)], rows)
    return ()


def _equal_parts(names: Sequence[str], rows: int) -> tuple[Slice, ...]:
    size = rows // len(names)
    return tuple(Slice(name, 0, rows, i * size, (i + 1) * size) for i, name in enumerate(names))


def _innermost(modules: Sequence[str]) -> int | None:
    """Where in a name the list is that has the innermost numbered block, of lists in lists the outermost; None if none is.

    A number that the layer itself has in a list is that of no block, such as those of the layers of a projector. What a block
    lies in does not count: a tower inside of an embedding has blocks like any other.
    """
    last = len(modules) - 1
    if modules[-1:] == ["proj"] and modules[-3:-2] == ["net"]:
        last -= 2  # diffusers' feed-forward layers: net.0 is an activation, with the projection before it
    block = next((i for i in range(last - 1, -1, -1) if modules[i].isdecimal()), None)
    if block is None:
        return None
    while block > 0 and modules[block].isdecimal():
        block -= 1
    return block


def _in_module(modules: Sequence[str], kind: re.Pattern[str]) -> bool:
    """Whether a layer is of a head or a pooler, by this pattern of its name. What attention calls so is none."""
    start = _innermost(modules) or 0
    return any(kind.search(modules[i]) and not _of_attention(modules, i) for i in range(start, len(modules)))


def _routes(modules: Sequence[str], shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Whether a layer, or a module around it, that is called a gate chooses experts. Those of attention do not."""
    gates = [i for i, name in enumerate(modules) if _GATE.search(name) and not _of_attention(modules, i)]
    if not gates or len(shape) != 2 or _FEED_FORWARD.search(modules[-1]):
        return False
    counts = set(_expert_counts(config))
    if not counts:
        return 2 * shape[0] <= shape[1]  # the gate of a layer has as many outputs as the layer
    # A router may also choose among experts that are shared, or do nothing.
    return gates[-1] < len(modules) - 1 or any(n <= size <= 2 * n for n in counts for size in shape)


def _of_attention(modules: Sequence[str], place: int) -> bool:
    return place > 0 and _ATTENTION.search(modules[place - 1]) is not None


def _joins_experts(entry: TensorEntry) -> bool:
    """Whether a matrix has all experts of a layer, one below the other, as in DBRX."""
    *modules, last = entry.name.split(".")
    if len(entry.shape) != 2 or last == "weight" or "experts" not in modules:
        return False
    return not any(name.isdecimal() for name in modules[modules.index("experts") :])


def _joined(entry: TensorEntry, config: Mapping[str, Any]) -> int | None:
    """How many experts a matrix joins; None if the config does not tell."""
    return max((n for n in _expert_counts(config) if entry.shape[0] % n == 0), default=None)


def _expert_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of experts that a config and its parts tell."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif _EXPERT_COUNT.search(key):
            yield from (n for n in (value if isinstance(value, list) else [value]) if type(n) is int and n > 1)
