"""Which tensors are factorized, how they are seen, and why the others are not: a pure function of headers and config."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgery.errors import FormatError, OptionError, few
from surgery.escapes import quoted
from surgery.format.header import Stored, TensorEntry
from surgery.format.manifest_records import Alias
from surgery.format.options import Options
from surgery.format.tensor_view import TensorView
from surgery.format.views import Kind, Slice, View
from surgery.names import FACTORIZABLE_DTYPES, WEIGHT_BITS, glob_of_numbers, told_dtype
from surgery.planning.fused import slices_of
from surgery.planning.recipes import Recipe, Rule, recipe_for_family
from surgery.planning.roles import kind_of, own_slices, why_no_linear
from surgery.planning.unloaded import why_unloaded
from surgery.quantized.codec import PART_NAMES
from surgery.quantized.recognize import Quantization
from surgery.quantized.unread import UnreadWeight
from surgery.quantized.weight import Quantized

DEFAULT_RANK = 16
#: Why quantized weights are passed over where residuals are asked for.
NO_RESIDUAL = "has no residual layout"
DEFAULT_MAX_RANK = 256

VECTOR, EXCLUDED = "a vector (norm, bias)", "matched by --exclude"
_SINGLE = "a single row or column"
_NO_WEIGHT = re.compile(r"^(A_log|D|dt_bias|inv_freq)$|_bias$|^bias$|rotary|freqs|_scale(_inv)?$")


@dataclass(frozen=True, slots=True)
class Target(TensorView):
    """A weight that will be factorized, or a slice of one.

    Attributes:
        tensor, shard, dtype, shape: of the tensor, as in the checkpoint.
        view: how it is seen as matrices.
        rank: directions kept of each matrix, at most min(m, n).
        energy: share of the squared Frobenius norm to keep with as few directions as will do; ``rank`` is then the
            most. None: exactly ``rank``.
        asked: the rank before it was cut to the matrix.
        quantized: how a quantized weight is stored; None for one that is not quantized.
        aliases: the tensors that hold the same parameter once more, see ``surgery.planning.aliases``.
    """

    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    view: View
    rank: int
    energy: float | None
    asked: int
    quantized: Quantized | None = None
    aliases: tuple[Alias, ...] = ()

    @property
    def seen_as(self) -> View:
        """How it is seen as matrices: ``view``."""
        return self.view

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole tensor in the checkpoint."""
        return math.prod(self.shape) * WEIGHT_BITS[self.dtype] // 8

    @property
    def factor_bytes(self) -> int:
        """Bytes of U, s and V, in float32."""
        count, m, n = self.matrices
        return 4 * self.rank * count * (m + n + 1)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor, or a slice of one, that is passed over.

    Attributes:
        tensor, shard: its name, and the weight file that it is in.
        reason: why, in words.
        wanted: whether it would be a target by its name, and is none for another reason, which a note tells: its dtype, its
            shape, or how it is packed.
        entries: of the weight, if it is wanted and could be a target if it were stored in another way; else 0.
    """

    tensor: str
    shard: str
    reason: str
    wanted: bool = False
    entries: int = 0


@dataclass(frozen=True)
class Model:
    """What has to be known of a model to choose targets in it, besides the entries of its tensors.

    Attributes:
        config: its ``config.json``, empty if there is none.
        recipe: the one that applies, if any.
        quantization: what is quantized in it.
        quantized_too: whether quantized weights may be targets: they have no residual layout.
    """

    config: Mapping[str, Any]
    recipe: Recipe | None
    quantization: Quantization
    quantized_too: bool = True

    @property
    def quantized(self) -> Mapping[str, Quantized]:
        """The quantized weights that can be read, by name."""
        return self.quantization.weights

    @cached_property
    def parts(self) -> Mapping[str, str]:
        """Each tensor that belongs to the numbers of a quantized weight -> what it is, in words."""
        return {
            part.name: f"the {PART_NAMES[part.role]} of an {told_dtype(one.dtype)} weight"
            for one in self.quantized.values()
            for part in one.parts
        }


def choose(entry: TensorEntry, shard: str, options: Options, model: Model) -> list[Target | Skipped]:
    """Decide whether a tensor is a target; for a fused weight that is split, whether each slice is one.

    Args:
        entry: of the tensor in the header; a packed weight stands for the tensor that holds its numbers.
        shard: the weight file that it is in.
        options: what was asked for.
        model: what is known of the model.

    Returns:
        A target, or why there is none; one for each slice.

    Raises:
        FormatError: it is an empty weight.
    """
    if (unread := model.quantization.unread_tensors.get(entry.stored.name)) is not None:
        return [_skipped_unread(entry, shard, unread, options, model)]
    rule = model.recipe.rule_for(entry.name) if model.recipe else None
    by_name = _no_weight(entry) or _unwanted(entry, options, model, rule)
    if by_name is None or entry.name.split(".")[-1] == "weight":
        _check_not_empty(entry, options, model, wanted=by_name is None)
    if (reason := _impossible(entry, model) or by_name or _unsupported(entry, model)) is not None:
        # A vector counts as wanted only by a rule that decides alone: a name, a glob of a user, or a rule that narrows may well
        # match norms too.
        matrix = len(entry.shape) > 1 or (_is_named(rule, model) and not options.include)
        wanted = by_name is None and matrix and entry.name not in model.parts
        entries = math.prod(entry.shape) if wanted and len(entry.shape) > 1 else 0
        return [Skipped(entry.stored.name, shard, reason, wanted, entries)]
    kind = (rule.view if rule else None) or kind_of(entry)
    quantized = model.quantized.get(entry.name)
    # By default such a tensor is no target, and a wide glob of a user matches it by chance: nothing to be told.
    named = rule is not None and (rule.view is not None or (_is_named(rule, model) and not options.include))
    if (reason := _unfit(entry, kind, quantized=quantized is not None)) is not None:
        return [Skipped(entry.stored.name, shard, reason, named)]
    _, m, n = View(kind).shape(entry.shape)
    parts: tuple[Slice, ...] = ()
    if rule is None or (rule.view is None and not rule.slices):
        parts = own_slices(entry, model.config, options.split)
    elif rule.slices and _wants_split(options, model, rule):
        whole = "leave --split out" if options.split else "give --no-split"
        parts = slices_of(rule, (m, n), model.config, entry.name, whole)
    views = [View(kind, part) for part in parts] or [View(kind)]
    rank, energy = extent(options, rule)
    fates: list[Target | Skipped] = []
    for view in views:
        smaller = min(view.shape(entry.shape)[1:])
        target = Target(entry.name, shard, entry.dtype, entry.shape, view, min(rank, smaller), energy, rank, quantized)
        fates.append(target if smaller > 1 else Skipped(target.key, shard, _SINGLE, named))
    return fates


def _is_named(rule: Rule | None, model: Model) -> bool:
    """Whether a rule takes the tensors that it matches, whatever they are; not if it narrows what is a target by default."""
    return rule is not None and model.recipe is not None and not model.recipe.narrows


def _unfit(entry: TensorEntry, kind: Kind, *, quantized: bool) -> str | None:
    """Why a tensor of two dimensions or more is nothing to factorize if it is seen so; None if it is."""
    try:
        _, m, n = View(kind).shape(entry.shape)
    except ValueError as error:
        return str(error)
    if min(m, n) < 2:
        return _SINGLE
    if kind == "convolution" and (entry.shape[1] == 1 or quantized):
        return "a quantized convolution" if quantized else "a depthwise convolution"
    return None


def _skipped_unread(entry: TensorEntry, shard: str, weight: UnreadWeight, options: Options, model: Model) -> Skipped:
    """A tensor of a weight that is not read; the one with its numbers stands for it."""
    if entry.stored.name != weight.main:
        return Skipped(entry.stored.name, shard, f"belongs to a weight that is {weight.method}")
    shape = weight.shape or (2, 2)
    meant = [
        # Three dimensions are a stack's: no convolution is packed.
        TensorEntry(name, entry.dtype, shape[-2:] if len(shape) == 3 else shape, entry.start, entry.end)
        for name in ((weight.name, weight.main) if options.include else (weight.name,))
    ]
    rule = model.recipe.rule_for(weight.name) if model.recipe else None
    wanted = any(_no_weight(one) is None and _unwanted(one, options, model, rule) is None for one in meant)
    wanted = wanted and not matches(weight.main, options.exclude)
    return Skipped(entry.stored.name, shard, f"{weight.method}, copied as it is", wanted, weight.entries if wanted else 0)


def _wants_split(options: Options, model: Model, rule: Rule) -> bool:
    if options.split is not None:
        return options.split
    return rule.split if rule.split is not None else model.recipe is not None and model.recipe.split


def extent(options: Options, rule: Rule | None) -> tuple[int, float | None]:
    """The rank and the energy of a target: those of the options, else the rule's, else the defaults.

    With an energy the rank is the largest allowed; without one the energy is None.
    """
    if options.rank is not None:
        return options.rank, None
    own = rule or Rule("", ())
    energy = own.energy if options.energy is None and own.rank is None else options.energy
    if energy is None:
        return own.rank or DEFAULT_RANK, None
    return options.max_rank or own.max_rank or DEFAULT_MAX_RANK, energy


def _impossible(entry: TensorEntry, model: Model) -> str | None:
    """Why a tensor can be no target by its dtype and shape, whatever its name; None if it can."""
    if entry.name in model.parts:
        return model.parts[entry.name]
    if not entry.dtype.startswith(("F", "BF", "C")) and entry.name not in model.quantized:
        return f"no floating-point weight ({entry.dtype})"
    if len(entry.shape) < 2:
        return VECTOR
    return None


def _no_weight(entry: TensorEntry) -> str | None:
    """Why a tensor can be no target by its name, whatever is asked for; None if it can."""
    if _NO_WEIGHT.search(entry.name.split(".")[-1]):
        return "no weight (bias, state or table)"
    return None


def _unsupported(entry: TensorEntry, model: Model) -> str | None:
    if entry.dtype in FACTORIZABLE_DTYPES or (entry.name in model.quantized and model.quantized_too):
        return None
    if entry.name in model.quantized:
        return f"{told_dtype(entry.dtype)}, which {NO_RESIDUAL}, copied as it is"
    return f"dtype {entry.dtype} is not supported"


def _check_not_empty(entry: TensorEntry, options: Options, model: Model, *, wanted: bool) -> None:
    """Refuse an empty weight, which a sharded trainer writes if it does not gather the weights before it saves.

    An embedding without rows or a head without classes, (0, n), is fine unless it would be a target.
    """
    if 0 not in entry.shape or not (wanted or entry.shape == (0,)):
        return
    if not wanted and (matches(entry.name, options.exclude) or why_unloaded(entry.name, model.config)):
        return
    raise FormatError(
        f"the checkpoint is broken: {entry.name!r} is empty",
        got=f"{entry.dtype} {list(entry.shape)}",
        expected="the numbers of a weight",
        hint="save it again with the weights gathered (DeepSpeed ZeRO-3: stage3_gather_16bit_weights_on_model_save), or "
        "--exclude it if it is meant to be empty",
    )


def _unwanted(entry: TensorEntry, options: Options, model: Model, rule: Rule | None) -> str | None:
    if matches(entry.name, options.exclude):
        return EXCLUDED
    if options.include:
        return None if matches(entry.name, options.include) else "not matched by --include"
    if (unloaded := why_unloaded(entry.name, model.config)) is not None:
        return unloaded
    if rule is not None and rule.skip is not None:
        return rule.skip
    if model.recipe is None or model.recipe.refines_for(model.config):
        return _unwanted_by_default(entry, model.config, model.recipe, rule)
    if rule is not None and not model.recipe.narrows:
        return None
    family = recipe_for_family(model.config)
    reason = _unwanted_by_default(entry, model.config, family, family.rule_for(entry.name) if family else None)
    return reason or (None if rule is not None else f"not in the recipe {model.recipe.name}")


def _unwanted_by_default(entry: TensorEntry, config: Mapping[str, Any], family: Recipe | None, rule: Rule | None) -> str | None:
    """Why a tensor is no target of a model, whose family has a recipe or none; ``rule`` is the one of it that matches."""
    if rule is not None:
        return rule.skip
    return why_no_linear(entry, config, convolutions=family is not None and family.convolutions)


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether any of the globs fits the whole name; case counts."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def check_globs(options: Options, names: list[str], packed: Mapping[str, Stored]) -> None:
    """Refuse globs that match no tensor of a model, or only tensors that weights are packed in.

    Args:
        options: with the globs.
        names: of all tensors, and of all weights.
        packed: each tensor that a weight is packed in -> the weight.

    Raises:
        OptionError: with the nearest names, or with those of the weights.
    """
    own = [name for name in names if name not in packed or packed[name].name == name]
    for option, globs in (("--include", options.include), ("--exclude", options.exclude)):
        check_all_match(option, globs, names)
        for glob in globs:
            if fnmatch.filter(own, glob):
                continue
            stored = fnmatch.filter(names, glob)
            weights = [packed[name].name for name in stored]
            meant = glob.removesuffix(stored[0].removeprefix(weights[0]))
            is_meant = set(fnmatch.filter(own, meant)) == {*weights}
            raise OptionError(
                f"{option} {glob!r} matches only tensors that weights are packed in",
                got=few(stored),
                expected=f"the weights: {few(weights)}",
                hint=f"{option} {quoted(meant)}" if is_meant else None,
            )


def check_all_match(option: str, globs: Sequence[str], names: list[str]) -> None:
    """Refuse any of the globs of an option that matches no tensor of a model. Raises OptionError with the nearest names."""
    for glob in globs:
        if not fnmatch.filter(names, glob):
            near = f"a glob over names such as {near_misses(glob, names)}"
            raise OptionError(f"{option} {glob!r} matches no tensor", expected=near)


def near_misses(glob: str, names: Sequence[str]) -> str:
    """A few tensor names that the user may have meant, the first of each kind."""
    literal = re.sub(r"[*?\[\]]", "", glob)
    # Most names differ from others in the block index alone: one of each kind is compared.
    kinds = {glob_of_numbers(name): name for name in reversed(names)}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(literal.strip("."), parts, n=2, cutoff=0.5)
    hits = [kind for kind in kinds if any(part in kind.split(".") for part in near)]
    hits += difflib.get_close_matches(literal, kinds, n=3, cutoff=0.3)
    chosen = list(dict.fromkeys(hits))[:3] or list(kinds)[:3]
    return ", ".join(chosen)
