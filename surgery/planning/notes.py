"""Notes of a plan: what a user should know before the run."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.errors import OptionError, few
from surgery.escapes import quoted
from surgery.format.options import Options
from surgery.planning.recipes import Recipe, builtin_recipes, family_of
from surgery.planning.targets import EXCLUDED, Model, Skipped, Target, matches
from surgery.quantized.recognize import Quantization

_BY_DEFAULT = "that would be targets"


def notes_of_plan(
    options: Options, model: Model, targets: Sequence[Target], skipped: Sequence[Skipped], names: Sequence[str]
) -> list[str]:
    """Notes on what is not as the options may lead a user to expect.

    Args:
        options: what was asked for.
        model: what is known of the model, with the recipe that applies.
        targets, skipped: what was chosen, and what was passed over.
        names: of all tensors of the model.

    Raises:
        OptionError: the rank is larger than every target.
    """
    recipe = model.recipe
    alone = recipe is not None and not recipe.narrows and not recipe.refines_for(model.config)
    named = "that --include names" if options.include else "that the recipe names" if alone else _BY_DEFAULT
    own = recipe if has_own_recipe(options) else None
    return [
        *_rank_notes(targets),
        *notes_of_reach(skipped, targets, named),
        *_include_notes(options, targets, skipped),
        *([] if own is None else [*_key_notes(own, model), *_rule_notes(own, options, targets, skipped, names)]),
        *_split_notes(options, targets),
        *_alias_notes(targets),
    ]


def _rank_notes(targets: Sequence[Target]) -> list[str]:
    exact = [target for target in targets if target.energy is None]
    clamped = [target for target in exact if target.rank < target.asked]
    if not clamped:
        return []
    first = clamped[0]
    if len(clamped) == len(targets):
        largest = max(min(target.matrices[1:]) for target in targets)
        raise OptionError(
            f"rank {first.asked} is larger than every target",
            expected=f"at most {largest}, the largest smaller side of a target",
        )
    return [
        f"rank {first.asked} is larger than {len(clamped)} of {len(targets)} targets and is cut to their smaller side there "
        f"(first: {first.key} {list(first.matrices[1:])}, rank {first.rank})"
    ]


def notes_of_reach(skipped: Sequence[Skipped], targets: Sequence[Target], named: str = _BY_DEFAULT) -> list[str]:
    """Notes on tensors that are no targets only because of their dtype, their shape or how they are packed.

    Args:
        skipped, targets: what was passed over, and what was chosen.
        named: which tensors these are taken of, after the word.
    """
    wanted = [item for item in skipped if item.wanted]
    every = sum(target.entries for target in targets) + sum(item.entries for item in wanted)
    by_reason: dict[str, list[Skipped]] = {}
    for item in wanted:
        by_reason.setdefault(item.reason, []).append(item)
    return [
        f"{len(items)} of {len(targets) + len(wanted)} tensors {named} are passed over"
        + (f", {_share_text(entries / every)} of their weights" if (entries := sum(item.entries for item in items)) else "")
        + f": {_reason(items[0])}"
        for items in by_reason.values()
    ]


def _reason(first: Skipped) -> str:
    """Why some tensors are passed over, with the first of them."""
    return f"{first.reason} (first: {first.tensor})"


def share_reached(targets: Sequence[Target], skipped: Sequence[Skipped]) -> float:
    """Share of the weights that would be targets, by number of entries, that are."""
    there = sum(target.entries for target in targets)
    return there / max(1, there + sum(item.entries for item in skipped))


def _share_text(share: float) -> str:
    """A share as a percentage that looks like nothing only if it is, and like all only if it is."""
    return "100 %" if share == 1 else f"{min(max(100 * share, 0.01), 99.9):.3g} %"


def notes_of_quantization(quantization: Quantization) -> list[str]:
    """Notes on weights that were cast to FP8; and if the config names a method by which no weight is quantized.

    Then the weights are what they are. The config of a model that has been dequantized, or merged after training on a quantized
    one, often names the method still; loaders quantize the weights, or look for scales.
    """
    notes = []
    if casts := [one.name for one in quantization.weights.values() if not one.parts]:
        notes.append(f"{len(casts)} FP8 weights have no scales, and are read as plain numbers (first: {casts[0]})")
    if quantization.is_named_only:
        notes.append(
            f"config.json names {quantization.method}, and no weight is quantized: all are taken as they are stored. Loaders "
            "may quantize them, or fail: if that is not meant, take it out of config.json"
        )
    return notes


def has_own_recipe(options: Options) -> bool:
    """Whether the recipe that applies is one of the user's own."""
    return options.recipe is not None and options.recipe not in builtin_recipes()


def _include_notes(options: Options, targets: Sequence[Target], skipped: Sequence[Skipped]) -> list[str]:
    """Notes on globs of --include that take no tensor, unless the notes of reach tell why, or the user has excluded it."""
    taken = _taken(targets)
    return [
        f"--include {quoted(glob)} takes no tensor: {_reason(passed[0])}"
        for glob in options.include
        if not any(matches(name, [glob]) for name in taken)
        and (passed := [item for item in skipped if matches(item.tensor, [glob])])
        and not passed[0].wanted
        and passed[0].reason != EXCLUDED
    ]


def _taken(targets: Sequence[Target]) -> set[str]:
    """The names of the tensors of targets."""
    return {name for target in targets for name in (target.tensor, *(alias.tensor for alias in target.aliases))}


def _key_notes(recipe: Recipe, model: Model) -> list[str]:
    """Notes on keys of a user's own recipe that decide nothing in this model."""
    if recipe.families and not recipe.refines:
        return [f"recipe {recipe.name}: families decides nothing without refines = true"]
    if recipe.refines and not recipe.refines_for(model.config):
        families = f"families has {few(recipe.families)}" if recipe.families else "there are no families"
        return [
            f"recipe {recipe.name}: refines decides nothing in a model of the family {family_of(model.config)}, as {families}: "
            "what no rule matches is passed over"
        ]
    return []


def _rule_notes(
    recipe: Recipe, options: Options, targets: Sequence[Target], skipped: Sequence[Skipped], names: Sequence[str]
) -> list[str]:
    """Notes on rules of a user's own recipe that match no tensor or take none, which is probably a mistake."""
    deciding = {name: rule for name in names if (rule := recipe.rule_for(name))}
    used = {id(rule) for rule in deciding.values()}
    taking = {id(deciding.get(name)) for name in _taken(targets)}
    passed: dict[int, Skipped] = {}
    for item in skipped:
        passed.setdefault(id(deciding.get(item.tensor)), item)
    notes = []
    for i, rule in enumerate(recipe.rules):
        told, key = f"recipe {recipe.name}: rule {i + 1} ({rule.text})", id(rule)
        if key not in used:
            notes.append(f"{told} decides on no tensor of this model")
        elif rule.skip is None and key in passed and key not in taking and not options.include and not passed[key].wanted:
            notes.append(f"{told} takes no tensor: {_reason(passed[key])}")
    return notes


def _split_notes(options: Options, targets: Sequence[Target]) -> list[str]:
    if not options.split or any(target.view.slice for target in targets):
        return []
    return ["--split changes nothing here: no target is known to fuse several projections"]


def _alias_notes(targets: Sequence[Target]) -> list[str]:
    aliases = {target.tensor: target.aliases for target in targets if target.aliases}
    if not aliases:
        return []
    tensor, others = next(iter(aliases.items()))
    return [
        f"{tensor} is stored again as {', '.join(alias.tensor for alias in others)}: one parameter, edited together"
        + (f" (and {len(aliases) - 1} more)" if len(aliases) > 1 else "")
    ]
