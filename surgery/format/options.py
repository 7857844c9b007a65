"""What is asked of a factorization: one object from the command line to the manifest. No torch here: --help must not wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from surgery.arguments import as_path, check_fields
from surgery.errors import OptionError
from surgery.linalg.limits import DEFAULT_TOLERANCE, check_accuracy, check_energy


@dataclass(frozen=True, slots=True)
class Options:
    """Which weights are factorized, and how accurately; the manifest records them under these names, in this order.

    A field is set if it is not at its default. What is None is left to the recipe, and then to the defaults.

    Attributes:
        rank: k, directions to keep of each matrix, at most the smaller side; 16 if neither it, nor an energy, nor the
            recipe says anything.
        energy: keep as few directions of each target as hold this share of its squared Frobenius norm instead.
        max_rank: the most directions then; 256 if not given.
        recipe: name or file of a recipe (``surgery.planning.recipes``); None: the one of the model's family, if there is
            one. In a manifest it is the name of the one that applied.
        split: whether fused weights are split into their projections, where the recipe knows them; None: as the recipe says.
        correction: with the residual layout, keep what makes it lossless.
        include: globs over tensor names. If any are given, exactly the weights they match are taken, embeddings, heads
            and convolutions too.
        exclude: globs over tensor names that are never taken.
        seed: of the truncated SVD's random start, see ``surgery.truncated_svd``.
        tolerance: residual over the largest singular value at which the truncated SVD stops.

    Raises:
        OptionError: a field is of another type.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    recipe: str | None = None
    split: bool | None = None
    correction: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    tolerance: float = DEFAULT_TOLERANCE

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self) -> None:
        """Refuse what makes no sense for any model.

        Raises:
            OptionError: a rank and an energy together, or a number out of its range.
        """
        if self.rank is not None and self.energy is not None:
            raise OptionError("a rank and an energy contradict each other", got=f"rank {self.rank}, energy {self.energy}")
        if self.energy is not None:
            check_energy(self.energy, 1)
        for option, number in (("rank", self.rank), ("max-rank", self.max_rank)):
            if number is not None and number < 1:
                raise OptionError(f"the {option} must be at least 1", got=number, hint=f"--{option} 16")
        check_accuracy(self.tolerance, self.seed)


class RecommendKeywords(TypedDict, total=False):
    """The options that ``recommend`` takes as keywords. Each is of the type of its field, or may be given more loosely."""

    recipe: str | Path | None
    include: tuple[str, ...] | list[str]
    exclude: tuple[str, ...] | list[str]
    seed: int
    tolerance: float


class SpectraKeywords(RecommendKeywords, total=False):
    """The options that ``spectra`` takes as keywords."""

    split: bool | None


class OptionKeywords(SpectraKeywords, total=False):
    """All fields of ``Options`` as keywords, for ``factorize`` and ``plan``."""

    rank: int | None
    energy: float | None
    max_rank: int | None
    correction: bool


def chosen_options(
    function: str, kind: type[RecommendKeywords], options: Options | None, keywords: Mapping[str, object]
) -> Options:
    """The options of a call, given as an object, as keywords or as both, after their own ``check``.

    Args:
        function: that is called, for messages.
        kind: the keywords that it knows; it has no use for other fields.
        options: what it was given as ``options``.
        keywords: fields that it was given one by one.

    Raises:
        OptionError: a keyword contradicts what ``options`` sets, ``options`` sets what the function has no use for, or
            one makes no sense.
    """
    given: dict[str, Any] = dict(keywords)
    if given.get("recipe") is not None:
        given["recipe"] = str(given["recipe"])
    default = Options()
    by_keyword = replace(default, **given)
    options = default if options is None else options
    for name in (field.name for field in fields(Options)):
        said = getattr(options, name)
        if said == getattr(default, name):
            continue
        if name not in kind.__annotations__:
            raise OptionError(f"{function}() has no use for {name}, which its options set", got=f"{name} = {said!r}")
        if name in given and getattr(by_keyword, name) != said:
            raise OptionError(
                f"{function}(): the keyword {name} contradicts its options",
                got=f"{name} = {getattr(by_keyword, name)!r}, and {said!r} in the options",
                hint=f"dataclasses.replace(options, {name}=...) makes options with another {name}",
            )
    chosen = replace(options, **{name: getattr(by_keyword, name) for name in given})
    if chosen.recipe is not None:
        chosen = replace(chosen, recipe=_as_given(chosen.recipe))
    chosen.check()
    return chosen


def _as_given(recipe: str) -> str:
    """The name of a recipe, or the path of its file with a ``~`` expanded."""
    path = as_path(recipe, "recipe")
    return str(path) if recipe.startswith("~") else recipe
