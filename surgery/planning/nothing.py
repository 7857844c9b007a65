"""What is said of a plan without targets: which tensors were meant, and why none of them is one."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import replace

from surgery.errors import OptionError, SurgeryError, few
from surgery.escapes import quoted
from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.names import glob_of_numbers
from surgery.planning.notes import has_own_recipe
from surgery.planning.recipes import Recipe
from surgery.planning.targets import EXCLUDED, NO_RESIDUAL, VECTOR, Model, Skipped, Target, choose, matches, near_misses
from surgery.source.protocol import Source
from surgery.weights.recognition import factorize_instead, not_read


def nothing_selected(
    source: Source,
    options: Options,
    model: Model,
    skipped: Sequence[Skipped],
    names: Sequence[str],
    entries: Sequence[tuple[TensorEntry, str]],
) -> SurgeryError:
    """The error for a plan without targets.

    Args:
        source: the model.
        options: what was asked for.
        model: what is known of the model, with the recipe that applies.
        skipped: all that was passed over.
        names: of all tensors of the model.
        entries: of all weights, and the weight files that they are in.
    """
    unread = model.quantization.unread_tensors
    if wanted := [unread[item.tensor] for item in skipped if item.wanted and item.tensor in unread]:
        what = f"what --include takes of {source.name}" if options.include else f"all of {source.name} that would be a target"
        return not_read(f"{what} is in", wanted, factorize_instead(source))
    if unread and not options.include:
        return not_read(f"{source.name} is in", unread.values(), factorize_instead(source))
    if without_residual := [item for item in skipped if NO_RESIDUAL in item.reason]:
        return OptionError(
            f"all {len(without_residual)} weights of {source.name} that would be targets are quantized, and have no residual "
            "layout",
            got=f"{without_residual[0].tensor} ({without_residual[0].reason})",
            hint="--layout overlay: the weights stay as they are, and the factors are those of the dequantized weights",
        )
    if options.include:
        asked = [item for item in skipped if matches(item.tensor, options.include)]
        return OptionError(
            f"nothing that --include matches in {source.name} can be factorized",
            got=_told(asked) or None,
            hint=_instead_of(asked, options, model, entries),
        )
    matrices = [item for item in skipped if not item.reason.startswith((VECTOR, "no floating"))]
    near = _told(matrices) or f"{len(skipped)} tensors, none of them a matrix of floating-point numbers"
    if model.recipe is None:
        return OptionError(
            f"no tensor of {source.name} is a target",
            got=near,
            expected="weights of linear layers inside transformer blocks",
            hint="--include GLOB takes any weight by name" if matrices else None,
        )
    if has_own_recipe(options):
        return _recipe_takes_none(source, model.recipe, skipped, names)
    return OptionError(
        f"the recipe {model.recipe.name} takes no tensor of {source.name}",
        got=_told([item for item in skipped if item.wanted]) or near,
        hint="surgery recipes lists the others; --include GLOB takes any weight by name",
    )


def _told(items: Sequence[Skipped]) -> str:
    return few([f"{item.tensor} ({item.reason})" for item in items], between="; ")


def _recipe_takes_none(source: Source, recipe: Recipe, skipped: Sequence[Skipped], names: Sequence[str]) -> OptionError:
    """The error for a recipe of the user's own: its rules that match tensors, with the reasons; else its patterns."""
    what = f"the recipe {recipe.name} takes no tensor of {source.name}"
    rules = {id(rule): f"rule {i + 1} ({rule.text})" for i, rule in enumerate(recipe.rules) if rule.skip is None}
    if not rules:
        return OptionError(what, got="rules with skip alone", hint="a rule without skip takes the tensors that it matches")
    decided = [(item, id(rule)) for item in skipped if (rule := recipe.rule_for(item.tensor)) and rule.skip is None]
    if decided:
        told = few(dict.fromkeys(rules[rule] for _, rule in decided))
        excluded = all(item.reason == EXCLUDED for item, _ in decided)
        return OptionError(
            what,
            got=_told([item for item, _ in decided]),
            hint="let --exclude match fewer tensors"
            if excluded
            else f"correct {told}; --include GLOB takes any weight by name",
        )
    blind = [rule for rule in recipe.rules if rule.skip is None and not any(rule.matches(name) for name in names)]
    if not blind:
        return OptionError(
            what,
            got=f"{few(rules.values())}: an earlier rule skips all that it matches",
            hint="put it before that rule, or let that match fewer tensors",
        )
    # What a regular expression says literally, without its backslashes, of the first pattern.
    pattern = re.sub(r"\\(.)", r"\1", blind[0].text.split(", ")[0])
    which = [rules[id(rule)] for rule in blind]
    return OptionError(
        what,
        got=few([f"{rule} matches no tensor" for rule in which], between="; "),
        expected=f"a pattern for names such as {near_misses(pattern, names)}",
        hint=f"correct the pattern of {few(which)}",
    )


def _instead_of(
    asked: Sequence[Skipped], options: Options, model: Model, entries: Sequence[tuple[TensorEntry, str]]
) -> str | None:
    """What to give in place of globs that match only what cannot be factorized."""
    if asked and all(item.reason == EXCLUDED for item in asked):
        return "--exclude takes out all that --include matches: leave one of them out"
    owners = {part.name: weight.name for weight in model.quantization.weights.values() for part in weight.parts}
    if weights := [owners[item.tensor] for item in asked if item.tensor in owners]:
        return f"give the name of the weight that it belongs to: --include {_glob_of(weights[0])}"
    never = "vectors are never targets" if all(item.reason == VECTOR for item in asked) else None
    default = replace(options, include=(), split=False)
    for entry, file in entries:
        if any(isinstance(fate, Target) for fate in choose(entry, file, default, model)):
            return (f"{never}; " if never else "") + f"--include {_glob_of(entry.name)} takes weights of layers"
    return never


def _glob_of(name: str) -> str:
    """The glob that matches a name, and those that differ from it in numbers alone, as a word of a shell command."""
    return quoted(glob_of_numbers(glob.escape(name)))
