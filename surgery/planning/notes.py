"""Notes of a plan: what a user should know before the run."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.errors import OptionError
from surgery.format.options import Options
from surgery.planning.recipes import Recipe, builtin_recipes
from surgery.planning.targets import Skipped, Target
from surgery.quantized.recognize import Quantization


def notes_of_plan(
    options: Options, recipe: Recipe | None, targets: Sequence[Target], skipped: Sequence[Skipped], names: Sequence[str]
) -> list[str]:
    """Notes on what is not as the options may lead a user to expect.

    Args:
        options: what was asked for.
        recipe: the one that applies; None without one.
        targets, skipped: what was chosen, and what was passed over.
        names: of all tensors of the model.

    Raises:
        OptionError: the rank is larger than every target.
    """
    return [
        *_rank_notes(targets),
        *notes_of_reach(skipped, targets),
        *_recipe_notes(options, recipe, names),
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


def notes_of_reach(skipped: Sequence[Skipped], targets: Sequence[Target]) -> list[str]:
    """Notes on tensors that are no targets only because of their dtype, their dimensions or how they are packed."""
    wanted = [item for item in skipped if item.wanted]
    every = sum(target.entries for target in targets) + sum(item.entries for item in wanted)
    by_reason: dict[str, list[Skipped]] = {}
    for item in wanted:
        by_reason.setdefault(item.reason, []).append(item)
    return [
        f"{reason}: {len(items)} of {len(targets) + len(wanted)} that would be targets are passed over"
        + (f", {_share_text(entries / every)} of their weights" if (entries := sum(item.entries for item in items)) else "")
        + f" (first: {items[0].tensor})"
        for reason, items in by_reason.items()
    ]


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


def _recipe_notes(options: Options, recipe: Recipe | None, names: Sequence[str]) -> list[str]:
    """Notes on rules of a user's own recipe that match no tensor, which is probably a mistake."""
    if recipe is None or options.recipe is None or options.recipe in builtin_recipes():
        return []
    used = {id(rule) for name in names if (rule := recipe.rule_for(name))}
    return [
        f"recipe {recipe.name}: rule {i + 1} ({rule.text}) decides on no tensor of this model"
        for i, rule in enumerate(recipe.rules)
        if id(rule) not in used
    ]


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
