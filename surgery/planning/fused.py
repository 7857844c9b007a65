"""The slices of a fused weight, such as q, k and v of one attention projection, with sizes from ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import OptionError
from surgery.format.views import Slice
from surgery.planning.recipes import Rule, family_of

_ATTENTION = ("q", "k", "v")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def slices_of(rule: Rule, shape: tuple[int, int], config: Mapping[str, Any], tensor: str, whole: str) -> tuple[Slice, ...]:
    """The slices of a fused matrix (m, n) that a rule names.

    Slices q, k and v have the sizes of the attention heads; any others share the length equally. They follow one another, or
    alternate: with ``group`` by key-value head, each after the query heads that share it; with ``column`` one by one.

    Args:
        rule: names them.
        shape: of the matrix.
        config: of the model.
        tensor: its name.
        whole: what a user does who wants the matrix whole, for a hint.

    Raises:
        OptionError: ``config.json`` lacks a size, or the sizes do not add up to the length.
    """
    length = shape[rule.axis]
    if rule.every == "column":
        widths = [1] * len(rule.slices)
    elif set(rule.slices) <= set(_ATTENTION):
        heads, groups, width = _attention(config, tensor, whole)
        across = {"q": heads * width, "k": groups * width, "v": groups * width}
        widths = [across[name] // (groups if rule.every == "group" else 1) for name in rule.slices]
    else:
        widths = [length // len(rule.slices)] * len(rule.slices)
    period = sum(widths)
    if min(widths) < 1 or length % period or (rule.every is None and length != period):
        raise OptionError(
            f"{tensor}: its slices {', '.join(rule.slices)} do not add up to the size of the tensor",
            got=f"{' + '.join(map(str, widths))} for a length of {length} of {list(shape)}",
            hint=f"{whole}, or correct the recipe",
        )
    slices, start = [], 0
    for name, width in zip(rule.slices, widths, strict=True):
        slices.append(Slice(name, rule.axis, period, start, start + width))
        start += width
    return tuple(slices)


def _attention(config: Mapping[str, Any], tensor: str, whole: str) -> tuple[int, int, int]:
    """The number of query heads, that of key-value heads, and the width of a head."""
    sizes = dict(config)
    for part in ("text_config", "attn_config"):
        if isinstance(config.get(part), dict):
            sizes.update(config[part])
    heads = _first(sizes, _HEADS)
    if heads is None:
        raise OptionError(f"{tensor}: config.json does not tell the number of attention heads", hint=whole)
    groups = _first(sizes, _KEY_VALUE_HEADS) or heads
    if family_of(config) == "falcon" and not sizes.get("new_decoder_architecture"):
        groups = 1 if sizes.get("multi_query", True) else heads  # its config.json names another number
    width = _first(sizes, ("head_dim",))
    if width is None:
        across = _first(sizes, _WIDTH)
        if across is None:
            raise OptionError(f"{tensor}: config.json does not tell the width of a head", hint=whole)
        width = across // heads
    return heads, groups, width


def _first(sizes: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (sizes[name] for name in names if type(sizes.get(name)) is int and 0 < sizes[name] < 1 << 32)
    return next(found, None)
