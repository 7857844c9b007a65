"""Recipes: TOML files that say which tensors of a family are factorized, how they are seen, and at which rank.

description = "what it is for"
families = ["llama"]                 # model_type of config.json; such models take a built-in recipe by themselves
refines = true                       # for these families: what no rule matches is as in a model without recipe
narrows = false                      # whether rules choose among the targets that the model has without this recipe
convolutions = false                 # whether the convolutions of blocks are then targets, as their linear layers are
split = false                        # whether fused projections are split, if --split does not say

[[rules]]                            # the first one that matches a tensor's name decides
match = ["*.q_proj.weight"]          # globs over tensor names, or: regex = '...'
view = "matrix"                      # matrix, stack, convolution; by itself from the number of dimensions
slices = ["q", "k", "v"]             # of what projections it is made, in this order
every = "group"                      # they alternate: group (by key-value head), column (one by one)
axis = "rows"                        # rows or columns of the matrix
rank = 16                            # or energy = 0.5 with max_rank = 64; if the command line says nothing
skip = "why"                         # instead of all these: never a target
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from surgery.errors import OptionError, ReadError
from surgery.expressions import MOST_CHARACTERS, Expression, ExpressionError
from surgery.format.views import KINDS, Kind
from surgery.reports import NOT_IN_JSON, Report, in_json
from surgery.solvers.limits import check_energy

Every = Literal["group", "column"]

RECIPE_KEYS = ("description", "families", "refines", "narrows", "convolutions", "split", "rules")
RULE_KEYS = ("match", "regex", "view", "slices", "every", "axis", "split", "rank", "energy", "max_rank", "skip")
_MAX_BYTES = 1 << 20
_AXES = {"rows": 0, "columns": 1}
#: What values of a type are called by those who write TOML.
_TYPES = {str: "a string, in quotes", bool: "true or false", int: "a whole number", (int, float): "a number"}


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do with the tensors whose names match.

    Attributes:
        text: the patterns, as they are written in the recipe.
        patterns: the compiled patterns. A rule applies if one of them matches the whole name.
        view: how the tensor is seen; None: this is decided by its dimensions.
        slices: the projections that a fused tensor consists of, in this order; empty if the tensor is not fused.
        every: how the slices alternate: ``group`` (by key-value head) or ``column`` (column by column); None: they lie
            one after the other.
        axis: 0 if the slices are rows of the matrix, 1 if they are columns.
        split: whether to split the tensor; None: the recipe decides.
        rank, energy, max_rank: as on the command line.
        skip: why such a tensor is not a target; None if it is one.
    """

    text: str = field(metadata=in_json("match"))
    patterns: tuple[re.Pattern[str] | Expression, ...] = field(repr=False, metadata=NOT_IN_JSON)
    view: Kind | None = None
    slices: tuple[str, ...] = ()
    every: Every | None = None
    axis: int = 0
    split: bool | None = None
    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    skip: str | None = None

    def matches(self, name: str) -> bool:
        """Whether one of the patterns fits a tensor's whole name.

        Raises:
            OptionError: a regular expression that takes too long on this name.
        """
        try:
            return any(pattern.fullmatch(name) for pattern in self.patterns)
        except ExpressionError as error:
            raise OptionError(
                f"a regular expression of the recipe cannot be matched against {name[:80]!r}",
                got=f"{self.text[:80]!r}: {error}",
                hint="use globs (match), or split it in several",
            ) from None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which tensors are factorized, and how they are seen.

    Attributes:
        name: name of its file.
        description: what the recipe is for.
        families: the models that get this recipe automatically, by the ``model_type`` or the class in their config.
            ``diffusers`` stands for models of any class of diffusers.
        refines: what happens, in a model of these families, with tensors that no rule matches. If true, the default
            rules decide whether they are targets, as without a recipe. If false, they are passed over.
        narrows: whether the rules choose only among the tensors that are targets by default. Then a rule whose pattern
            also matches the name of an embedding, a router or a norm does not make that tensor a target.
        convolutions: with ``refines``, whether the convolutions of blocks are targets, as the linear layers are.
        split: whether fused projections are split if neither the user nor the rule decides.
        rules: the first rule that matches a tensor's name decides.
    """

    name: str
    description: str
    families: tuple[str, ...]
    refines: bool
    narrows: bool
    convolutions: bool
    split: bool
    rules: tuple[Rule, ...]

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches a tensor's name."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def refines_for(self, config: Mapping[str, Any]) -> bool:
        """Whether, in the model of a config, tensors that no rule matches are targets as in a model without recipe.

        A model whose config names no family is taken for one of the recipe's.
        """
        return self.refines and (family_of(config) is None or self.is_for(config))

    def is_for(self, config: Mapping[str, Any]) -> bool:
        """Whether the model of a config is of its families."""
        # A class of diffusers may have a setting of its own that is called model_type.
        return ("diffusers" if "_class_name" in config else family_of(config)) in self.families


@dataclass(frozen=True, slots=True)
class RecipesReport(Report):
    """The recipes that ship with the package.

    Attributes:
        recipes: the recipes, sorted by name.
    """

    recipes: tuple[Recipe, ...]


def recipes() -> RecipesReport:
    """The recipes that ship with the package. ``recipe=`` takes them by name.

    Returns:
        Each recipe with its description, the model families that get it automatically, and its rules.
    """
    return RecipesReport(tuple(builtin_recipes().values()))


@cache
def builtin_recipes() -> Mapping[str, Recipe]:
    """The recipes that ship with the package, by name."""
    here = Path(__file__).resolve().parents[1]
    # In a wheel they are inside of the package, in a checkout beside it.
    folder = next(path for path in (here / "recipes", here.parent / "recipes") if path.is_dir())
    return {path.stem: read_recipe(path) for path in sorted(folder.glob("*.toml"))}


def find_recipe(name: str) -> Recipe:
    """A recipe by name or by the path of its file.

    Raises:
        OptionError: there is none, or it makes no sense.
        ReadError: its file cannot be read.
    """
    if name in builtin_recipes():
        return builtin_recipes()[name]
    path = Path(name)
    if path.is_file():
        return read_recipe(path)
    is_path = path.suffix == ".toml" or path.name != name
    raise OptionError(
        f"there is no {'file' if is_path else 'recipe'} {name!r}",
        expected="the file of a recipe, or the name of a built-in one"
        if is_path
        else f"a file, or one of {', '.join(builtin_recipes())}",
        hint=_did_you_mean(path.stem, tuple(builtin_recipes())) or "surgery recipes lists the built-in ones",
    )


def recipe_for_family(config: Mapping[str, Any]) -> Recipe | None:
    """The built-in recipe for the family that ``config.json`` names; None for families without one."""
    return next((recipe for recipe in builtin_recipes().values() if recipe.is_for(config)), None)


def family_of(config: Mapping[str, Any]) -> str | None:
    """The family of a model: ``model_type`` of transformers, or the class name of diffusers."""
    family = config.get("model_type") or config.get("_class_name")
    return family if isinstance(family, str) else None


def read_recipe(path: Path) -> Recipe:
    """A recipe from its file.

    Raises:
        ReadError: it cannot be read.
        OptionError: it is no TOML, or makes no sense.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise OptionError(
                f"the recipe {path} is too large", got=f"{path.stat().st_size} bytes", expected=f"at most {_MAX_BYTES}"
            )
        parsed = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ReadError(f"the recipe {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"the recipe {path} is no valid TOML", got=error) from None
    where = f"recipe {path.name}"
    _check_keys(parsed, RECIPE_KEYS, where)
    families = parsed.get("families", [])
    rules = parsed.get("rules")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise OptionError(f"{where} has no rules", expected="one [[rules]] table or more")
    recipe = Recipe(
        name=path.stem,
        description=_of_type(parsed.get("description", ""), str, f"{where}: description"),
        families=_strings(families, f"{where}: families"),
        refines=_of_type(parsed.get("refines", False), bool, f"{where}: refines"),
        narrows=_of_type(parsed.get("narrows", False), bool, f"{where}: narrows"),
        convolutions=_of_type(parsed.get("convolutions", False), bool, f"{where}: convolutions"),
        split=_of_type(parsed.get("split", False), bool, f"{where}: split"),
        rules=tuple(_rule(rule, f"{where}, rule {i + 1}") for i, rule in enumerate(rules)),
    )
    if recipe.convolutions and not recipe.refines:
        raise OptionError(f"{where}: convolutions goes with refines", hint="refines = true, and families")
    return recipe


def _rule(table: dict[str, Any], where: str) -> Rule:
    _check_keys(table, RULE_KEYS, where)
    if ("match" in table) == ("regex" in table):
        raise OptionError(f"{where} needs either match or regex", got=", ".join(table) or "neither")
    key = "match" if "match" in table else "regex"
    written = _strings([table[key]] if isinstance(table[key], str) else table[key], f"{where}: {key}")
    if not written:
        raise OptionError(f"{where}: {key} is empty")
    patterns = tuple((_glob if key == "match" else _expression)(text, where) for text in written)
    if table.get("skip") == "":
        raise OptionError(f"{where}: skip must tell the reason", got="an empty string")
    if "skip" in table and len(table) > 2:
        raise OptionError(f"{where} skips its tensors, so nothing else can be said of them", got=", ".join(table))
    numbers = {name: table.get(name) for name in ("rank", "max_rank")}
    for name, number in numbers.items():
        if number is not None and (_of_type(number, int, f"{where}: {name}") < 1):
            raise OptionError(f"{where}: {name} must be at least 1", got=number)
    energy, max_rank = table.get("energy"), numbers["max_rank"]
    if energy is not None:
        if numbers["rank"] is not None:
            raise OptionError(f"{where}: a rank and an energy contradict each other")
        check_energy(_of_type(energy, (int, float), f"{where}: energy"), 1)
    elif max_rank is not None:
        raise OptionError(f"{where}: max_rank goes with an energy")
    slices = _strings(table.get("slices", []), f"{where}: slices")
    if len(slices) == 1 or len(set(slices)) < len(slices) or not all(re.fullmatch(r"\w+", name) for name in slices):
        raise OptionError(f"{where}: slices must be two or more different names", got=", ".join(slices))
    if table.get("every") == "group" and not set(slices) <= {"q", "k", "v"}:
        raise OptionError(f"{where}: only slices q, k and v alternate by group", got=", ".join(slices))
    if not slices and (odd := [name for name in ("every", "axis", "split") if name in table]):
        raise OptionError(f"{where}: {odd[0]} goes with slices")
    return Rule(
        text=", ".join(written),
        patterns=patterns,
        view=_one_of(table.get("view"), KINDS, f"{where}: view"),
        slices=slices,
        every=_one_of(table.get("every"), ("group", "column"), f"{where}: every"),
        axis=_AXES[_one_of(table.get("axis", "rows"), tuple(_AXES), f"{where}: axis")],
        split=None if "split" not in table else _of_type(table["split"], bool, f"{where}: split"),
        rank=numbers["rank"],
        energy=energy,
        max_rank=max_rank,
        skip=None if "skip" not in table else _of_type(table["skip"], str, f"{where}: skip"),
    )


def _glob(text: str, where: str) -> re.Pattern[str]:
    if len(text) > MOST_CHARACTERS:
        raise OptionError(f"{where}: a glob of {len(text)} characters", expected=f"at most {MOST_CHARACTERS}")
    # A bracket that is never closed stands for itself. fnmatch would search to the end of the glob for each of them.
    head, closed, rest = text.rpartition("]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about patterns that a later Python may read in another way
        return re.compile(fnmatch.translate(head + closed + rest.replace("[", "[[]")))


def _expression(text: str, where: str) -> Expression:
    try:
        return Expression(text)
    except ExpressionError as error:
        raise OptionError(
            f"{where}: no regular expression that can be matched in bounded time",
            got=f"{text[:80]!r}: {error}",
            hint="instead of looking ahead or back, skip what is not meant in a rule before this one; else use globs (match)",
        ) from None


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise OptionError(
                f"{where}: unknown key {key!r}", expected=f"one of {', '.join(known)}", hint=_did_you_mean(key, known)
            )


def _did_you_mean(word: str, known: tuple[str, ...]) -> str | None:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None


def _of_type(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = _TYPES[kind] + (", without quotes" if isinstance(value, str) else "")
        raise OptionError(f"{where} has the wrong type", got=repr(value)[:80], expected=expected)
    return value


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise OptionError(f"{where} has the wrong type", got=repr(value)[:80], expected="a list of strings")
    return tuple(value)


def _one_of(value: Any, known: tuple[str, ...], where: str) -> Any:
    if value is not None and value not in known:
        hint = _did_you_mean(value, known) if isinstance(value, str) else None
        raise OptionError(f"{where} makes no sense", got=repr(value)[:80], expected=f"one of {', '.join(known)}", hint=hint)
    return value
