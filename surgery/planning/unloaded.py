"""Tensors that a checkpoint holds and its model does not, as far as names and ``config.json`` tell.

What a loader drops besides, such as the vision tower of a model that is loaded for its text, shows when the scales are
attached.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: A block of the language model; a tower of another kind has another word on the way to its layers, or counts them elsewhere.
_BLOCK = re.compile(
    r"(?:(?:model|language_model|text_model|llm|transformer|backbone|thinker|gpt_neox)\.)*(?:layers|h)\.(\d+)\.(.+)"
)
_TEXT = ("thinker_config", "text_config", "language_config", "llm_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: mtp, mtp_layers, mtp_block ...: a part of the name, whatever the family.
_PREDICTION = re.compile(r"(?:^|\.)mtp(?:_\w+|\d+)?\.")
_KEYS_AND_VALUES = re.compile(r"self_attn\.[kv]_proj\.")


def why_unloaded(name: str, config: Mapping[str, Any]) -> str | None:
    """Why the model that ``config`` describes is loaded without a tensor; None if it is not known to be."""
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
    """The part that describes the language model."""
    inner = next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), None)
    return config if inner is None else _text_config(inner)
