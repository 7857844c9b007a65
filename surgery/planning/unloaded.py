"""Tensors of a checkpoint that loaders leave out, as far as names and ``config.json`` tell.

A loader may leave out more, such as the vision tower of a model that is loaded for text. ``attach`` finds that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: A tensor in a block of the language model. Towers of other kinds have other modules in the names of their layers.
_BLOCK = re.compile(
    r"(?:(?:model|language_model|text_model|llm|transformer|backbone|thinker|gpt_neox)\.)*(?:layers|h)\.(\d+)\.(.+)"
)
_TEXT = ("thinker_config", "text_config", "language_config", "llm_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: Modules for multi-token prediction, in any family: mtp, mtp_layers, mtp_block ...
_PREDICTION = re.compile(r"(?:^|\.)mtp(?:_\w+|\d+)?\.")
_KEYS_AND_VALUES = re.compile(r"self_attn\.[kv]_proj\.")


def why_unloaded(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a loader leaves out a tensor of the model that ``config`` describes; None if that is not known."""
    if _PREDICTION.search(name):
        return "multi-token prediction, which loaders leave out"
    block = _BLOCK.fullmatch(name)
    if block is None or config.get("is_encoder_decoder"):
        return None
    text = _text_config(config)
    counts = [text[key] for key in _LAYERS if type(text.get(key)) is int]
    layers = max(counts, default=0)
    if layers < 1:
        return None
    if int(block[1]) >= layers:
        return f"past the {layers} layers of the model: loaders leave it out"
    shared = text.get("num_kv_shared_layers")
    if type(shared) is int and int(block[1]) >= layers - shared and _KEYS_AND_VALUES.match(block[2]):
        return "keys and values that the layer takes from another one: loaders leave it out"
    return None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model; the whole config where there is no such part."""
    inner = next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), None)
    return config if inner is None else _text_config(inner)
