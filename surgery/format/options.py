"""``Options`` of a factorization, one object from the command line to the manifest. Without torch, so that --help is fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from surgery.arguments import as_path, check_fields
from surgery.errors import OptionError
from surgery.files.json_files import NOT_IN_EARLIER
from surgery.solvers.limits import DEFAULT_TOLERANCE, check_accuracy, check_energy


@dataclass(frozen=True, slots=True)
class Options:
    """Which weights are factorized, and how accurately. The manifest records the options under these names, in this order.

    A field counts as set if it differs from its default. Where a field is None, the recipe decides; if the recipe says
    nothing, surgery uses its own default.

    Attributes:
        rank: k, the directions to keep of each matrix, at most its smaller side. The rank is 16 if neither a rank nor
            an energy is given and the recipe has none.
        energy: use this in place of a rank: keep as few directions of each target as hold this share of its squared
            Frobenius norm.
        max_rank: with an energy, the most directions to keep; 256 if None.
        recipe: name or file of a recipe (``surgery.planning.recipes``). If None, surgery takes the recipe of the
            model's family, if there is one. In a manifest it is the name of the recipe that applied.
        split: whether fused weights are split into their projections, where the recipe knows them. If None, the recipe
            decides.
        correction: whether the residual layout keeps the corrections that make it lossless.
        include: globs over tensor names. If there are any, exactly the weights that match are targets, including
            embeddings, heads and convolutions.
        exclude: globs over tensor names that are never targets.
        seed: seed of the random start of the truncated SVD, see ``surgery.truncated_svd``.
        tolerance: the truncated SVD stops when its residuals, over the largest singular value, are below this number.
        prove: whether to prove for each matrix that no larger singular value was missed. The manifest records it only
            if it is True.

    Raises:
        OptionError: a field has the wrong type.
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
    prove: bool = field(default=False, metadata=NOT_IN_EARLIER)

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self) -> None:
        """Refuse options that are not valid for any model.

        Raises:
            OptionError: a rank and an energy are given together, or a number is out of its range.
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
    """The options that ``recommend`` takes as keywords. Types are those of the fields, or looser ones that are converted."""

    recipe: str | Path | None
    include: tuple[str, ...] | list[str]
    exclude: tuple[str, ...] | list[str]
    seed: int
    tolerance: float


class ExtractKeywords(RecommendKeywords, total=False):
    """The options that ``extract`` takes as keywords."""


class SpectraKeywords(RecommendKeywords, total=False):
    """The options that ``spectra`` takes as keywords."""

    split: bool | None


class OptionKeywords(SpectraKeywords, total=False):
    """All fields of ``Options`` as keywords, for ``factorize`` and ``plan``."""

    rank: int | None
    energy: float | None
    max_rank: int | None
    correction: bool
    prove: bool


def chosen_options(
    function: str, kind: type[RecommendKeywords], options: Options | None, keywords: Mapping[str, object]
) -> Options:
    """The options of a call, which may be given as an object, as keywords or as both; checked.

    Args:
        function: the name of the function that is called, for messages.
        kind: the keywords that this function knows; it ignores other fields.
        options: its argument ``options``.
        keywords: the fields that were given as keywords.

    Raises:
        OptionError: a keyword contradicts a field that ``options`` sets, ``options`` sets a field that the function does not
            know, or an option makes no sense.
    """
    given: dict[str, Any] = dict(keywords)
    if given.get("recipe") is not None:
        given["recipe"] = str(given["recipe"])
    default = Options()
    by_keyword = replace(default, **given)
    options = default if options is None else options
    for name in (one.name for one in fields(Options)):
        said = getattr(options, name)
        if said == getattr(default, name):
            continue
        if name not in kind.__annotations__:
            raise OptionError(f"{function}() does not use {name}, which its options set", got=f"{name} = {said!r}")
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
