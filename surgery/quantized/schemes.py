"""What a config says of how weights are quantized, beyond what their tensors tell: blocks, groups of compressed-tensors.

Source of the groups: ``QuantizationConfig`` and ``QuantizationArgs`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgery.errors import FormatError
from surgery.expressions import Expression, ExpressionError
from surgery.format.header import TensorEntry

#: Each tensor of a model -> its entry, and the weight file that it is in.
Where = Mapping[str, tuple[TensorEntry, str]]

COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one group of layers is quantized, by ``config_groups``.

    Attributes:
        type: of the numbers.
        bits: of each.
        strategy: what shares a scale: ``tensor``, ``channel``, ``group``, ``tensor_group`` or ``block``; None if that is not
            told.
        block: of a group (1, its columns), or of a block; None where the strategy has none.
        symmetric: whether there are no zero points.
        format: how it is packed; None if that is not told.
        named: whether it is for layers with this name, without ``.weight``, by name or expression.
        every: whether it is for all layers of a class.
    """

    type: Literal["int", "float"]
    bits: int
    strategy: str | None
    block: tuple[int, int] | None
    symmetric: bool
    format: str | None
    named: Callable[[str], bool]
    every: bool

    def block_of(self, m: int, n: int) -> tuple[int, int] | None:
        """How many rows and columns of a matrix share a scale; None if that is not told."""
        if self.strategy == "tensor":
            return max(m, 1), max(n, 1)
        return (1, max(n, 1)) if self.strategy == "channel" else self.block


@dataclass(frozen=True, slots=True)
class Told:
    """What a config says of a quantization.

    Attributes:
        model: its name, for messages.
        method: ``quant_method``, in lower case; None if there is none.
        block: ``weight_block_size``; None if there is none.
        powers_of_two: whether scales of FP8 are powers of two, whatever their dtype: engines read nothing but their exponents.
        schemes: of the groups of compressed-tensors; empty where it is not that.
        is_empty: whether the config says nothing at all.
    """

    model: str
    method: str | None
    block: tuple[int, int] | None
    powers_of_two: bool
    schemes: tuple[Scheme, ...]
    is_empty: bool

    def of(self, layer: str) -> tuple[Scheme, ...]:
        """The schemes that may be those of a layer: those that name it, else those for a class, else all.

        The class of a layer is not known from its tensors, and loaders rename layers before they look.
        """
        for group in ([one for one in self.schemes if one.named(layer)], [one for one in self.schemes if one.every]):
            if group:
                return tuple(group)
        return self.schemes


def read_told(described: Mapping[str, Any], model: str) -> Told:
    """Read what a config says of a quantization.

    Args:
        described: the part of the config that does; empty if none does.
        model: its name, for messages.

    Raises:
        FormatError: it makes no sense.
    """
    method = method_of(described)
    schemes: list[Scheme] = []
    if method == COMPRESSED_TENSORS or (method is None and "config_groups" in described):
        groups = described.get("config_groups")
        for name, group in groups.items() if isinstance(groups, dict) else ():
            if isinstance(group, dict) and isinstance(group.get("weights"), dict):
                schemes.append(_scheme(group, described.get("format"), f"{model}/config.json: config_groups[{name!r}]"))
    powers_of_two = described.get("scale_fmt") == "ue8m0"  # DeepSeek-V3.1 and later
    return Told(model, method, _block(described, model), powers_of_two, tuple(schemes), not described)


def method_of(described: Mapping[str, Any]) -> str | None:
    """The method that a config names, in small letters; None where it names none."""
    method = described.get("quant_method")
    if method is None and (described.get("load_in_4bit") or described.get("load_in_8bit")):
        return "bitsandbytes"
    name = str(method or "").lower().replace("compressed_tensors", "compressed-tensors")
    return None if name in ("", "none") else name


def _block(described: Mapping[str, Any], model: str) -> tuple[int, int] | None:
    block = described.get("weight_block_size")
    return None if block is None else _pair(block, f"{model}/config.json: weight_block_size")


def _pair(value: Any, what: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value)):
        raise FormatError(f"{what} makes no sense", got=repr(value)[:80], expected="two numbers such as [128, 128]")
    return value[0], value[1]


def _scheme(group: Mapping[str, Any], packed: Any, what: str) -> Scheme:
    weights = group["weights"]
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy")
    if not isinstance(bits, int) or kind not in ("int", "float") or not isinstance(size, int | None):
        raise FormatError(
            f"{what} makes no sense",
            got=repr({"num_bits": bits, "type": kind, "group_size": size})[:120],
            expected="num_bits 4, type int or float, group_size 128 or none",
        )
    if strategy is None:
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = str(strategy)
    block = None
    if strategy in ("group", "tensor_group") and size is not None and size > 0:
        block = 1, size
    if strategy == "block":
        block = _pair(weights.get("block_structure"), f"{what}, block_structure")
    targets = group.get("targets")
    targets = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    own = group.get("format") or packed
    return Scheme(
        kind,
        bits,
        strategy,
        block,
        weights.get("symmetric", True) is not False,
        own if isinstance(own, str) and own != "mixed-precision" else None,
        _named(targets),
        any("." not in target and not target.startswith("re:") for target in targets),
    )


def _named(targets: list[str]) -> Callable[[str], bool]:
    """Whether one of the targets is a layer's name, or an expression that its name begins with."""
    names = {target for target in targets if not target.startswith("re:")}
    expressions = []
    for target in targets:
        if target.startswith("re:"):
            try:
                expressions.append(Expression(f"(?:{target.removeprefix('re:')}).*"))
            except ExpressionError:  # it names no layer that we know of: ``Told.of`` goes on to other schemes
                continue

    def named(layer: str) -> bool:
        try:
            return layer in names or any(expression.fullmatch(layer) for expression in expressions)
        except ExpressionError:
            return False

    return named
