"""Matching two sets of names: those that a file has for its tensors, and those that are wanted.

The names of a fine-tuned model, of scales and of an adapter's modules differ from those of the checkpoint where the model was
saved inside a wrapper, or as a part of a larger model. Here names are compared as texts only. Conversions that transformers
does when it loads a model are in ``surgery.tuned.conversion``.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from surgery.errors import SurgeryError
from surgery.progress import note

#: Attributes by which wrappers hold a module, and which become a part of all names inside: DDP and DataParallel,
#: torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = frozenset(
    [
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "base_layer",
    ]
)
#: The text model within a model for images and texts. Its place in a name varies: ``language_model.model.layers``,
#: ``model.language_model.layers``, and just ``model.layers`` where the text model was saved alone.
_LANGUAGE_MODEL = "language_model"
_WEIGHT = ".weight"
#: A suffix that names may have: a single word, but none of a tensor that is not the weight, such as the part of it that weight
#: normalization or pruning stores (``weight_v``, ``weight_orig``), or the module that PEFT has replaced (``original_module``).
#: Several words would be a module inside the one that is meant, which may change the weight.
_SUFFIX = re.compile(
    r"(\.weight)?\.(?!(bias|delta|grad|mask|momentum_buffer|original(\d*|_module)|weight_\w+|(max_)?exp_avg(_sq)?)$)\w+"
)
#: Words of a prefix that say that the tensors after it are no weights: those of optimizers.
_NO_WEIGHTS = frozenset(["exp_avg", "exp_avg_sq", "grad", "max_exp_avg_sq", "momentum_buffer"])
#: The names by which prefixes and suffixes are found, and how many of these are tried.
_PROBES, _TRIED = 3, 16
#: Names that ``nearest`` compares by their characters.
_COMPARED = 32

_Error = TypeVar("_Error", bound=SurgeryError)


@dataclass(frozen=True, slots=True)
class NameMap:
    """How the names that are wanted fit the names that are there.

    Attributes:
        given: wanted name, or one that will do instead of it -> the name that is there for it.
        missing: wanted names that are not there, sorted.
        unknown: names that are there and stand for no wanted one, sorted.
        doubtful: a wanted name and two names that are there, either of which it could be; None if there is no such case.
        also: name that need not be there -> the name that is there for it.
    """

    given: dict[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    doubtful: tuple[str, str, str] | None = None
    also: dict[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the names fit one to one: all wanted names are there, and no others."""
        return self.is_complete and not self.unknown

    @property
    def is_complete(self) -> bool:
        """Whether all wanted names are there, without doubt about any; there may be others."""
        return not self.missing and self.doubtful is None

    @property
    def renamed(self) -> tuple[str, str] | None:
        """(name that is there, wanted name) for the first wanted name that is there under another; None if none is."""
        return next(((there, name) for name, there in sorted(self.given.items()) if there != name), None)

    def misfit(self, kind: type[_Error], what: str, wanted: Collection[str], *, expected: str, hint: str) -> _Error:
        """The error for names that do not fit, with the nearest names of both sides.

        Args:
            kind: the class of the error.
            what: is wrong, the first line of the error.
            wanted: all names that were wanted.
            expected: what would have been right.
            hint: what to do.
        """
        fit = sum(name in self.given for name in wanted)
        got = f"{fit} of {len(wanted)} names fit"
        if self.doubtful is not None:
            name, one, other = self.doubtful
            got += f"; {name!r} could be {one!r} or {other!r}"
        elif self.missing and (near := nearest(self.missing[0], self.unknown)) is not None:
            got += f"; the nearest to {self.missing[0]!r} is {near!r}"
        if self.renamed is not None:
            got += f"; {self.renamed[0]!r} would be {self.renamed[1]!r}"
        return kind(what, got=got, expected=expected, hint=hint)


def note_renamed(names: NameMap, where: str, wanted: str = "the checkpoint's") -> None:
    """Note for the user that names in ``where`` differ from the wanted ones; ``wanted`` says whose names these are."""
    if (renamed := names.renamed) is not None:
        fit = "correspond to them one to one" if names.fits else "all that are needed are found"
        note(f"{where}: its names differ from {wanted}, but {fit}: {renamed[0]!r} is taken for {renamed[1]!r}")


def nearest(name: str, others: Iterable[str]) -> str | None:
    """The name in ``others`` most similar to ``name``, by the words between dots, then by characters; None if none is."""
    words = Counter(name.split("."))
    shared = {other: (words & Counter(other.split("."))).total() for other in others}
    # Comparing characters is slow, and there may be hundreds of thousands of names.
    likely = sorted(shared, key=lambda other: (-shared[other], abs(len(other) - len(name)), other))[:_COMPARED]
    scored = [(shared[other], difflib.SequenceMatcher(None, name[:200], other[:200]).ratio(), other) for other in likely]
    count, ratio, found = max(scored, default=(0, 0.0, ""))
    return found if count or ratio > 0.5 else None


def without_wrappers(name: str) -> str:
    """A name without those of modules that wrap others, such as ``module`` and ``_orig_mod``."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def match_names(there: Collection[str], wanted: Collection[str]) -> NameMap:
    """Match the names that are there with the wanted ones, one to one.

    Names match if they are equal. Otherwise these differences are ignored: the names of modules that wrap others
    (``module``, ``_orig_mod`` ...), anywhere in a name; ``.weight`` at its end; and one prefix that all names of one set have
    and those of the other lack. If there are two such ways to match them, only equal names are matched, and the map is
    ``doubtful``. So docs/format.md has it for scales.
    """
    return _Search(there, dict.fromkeys(wanted, ()), one_to_one=True).best()


def find_names(
    there: Collection[str],
    wanted: Mapping[str, Collection[str]],
    also: Collection[str] = (),
    alike: Callable[[str, str], bool] | None = None,
) -> NameMap:
    """Find all wanted names among those that are there, of which there may be more.

    Names match as for ``match_names``; the module that holds the text model of a larger one, and one suffix, are ignored too.

    Args:
        there: names.
        wanted: name -> other names that will do instead.
        also: names of the same set as ``wanted`` that need not be there. If they are, they do not count as ``unknown``.
        alike: called with a wanted name and the name that is there for it; whether they can be the same tensor, such as by
            their shapes. A way to match in which any pair is not alike is only taken if all names are equal.

    Returns:
        The equal names, if all wanted ones are there and alike; else the only other way to find all. If there is none, a map
        that is not complete, or that has equal names which are not alike.
    """
    return _Search(there, wanted, also, alike).best()


@dataclass(frozen=True, slots=True)
class _Affix:
    """The prefix or suffix by which all wanted names differ from those that are there.

    Attributes:
        at_start: whether it is a prefix.
        there: what the names that are there have; empty if nothing.
        wanted: what the wanted names have in its place; empty if nothing.
    """

    at_start: bool
    there: str
    wanted: str

    def renamed(self, core: str) -> str | None:
        """The core of a wanted name, changed into that of the name that is there; None if it lacks the prefix or suffix."""
        if self.at_start:
            return self.there + core[len(self.wanted) :] if core.startswith(self.wanted) else None
        return core[: len(core) - len(self.wanted)] + self.there if core.endswith(self.wanted) else None


_NO_AFFIX = _Affix(True, "", "")


class _Search:
    """Tries the ways in which the names may differ.

    Args:
        there, wanted, also, alike: as for ``find_names``.
        one_to_one: whether all that is there must be wanted, as for ``match_names``.
    """

    def __init__(
        self,
        there: Collection[str],
        wanted: Mapping[str, Collection[str]],
        also: Collection[str] = (),
        alike: Callable[[str, str], bool] | None = None,
        *,
        one_to_one: bool = False,
    ) -> None:
        self._one_to_one = one_to_one
        self._left_out = _WRAPPERS if one_to_one else _WRAPPERS | {_LANGUAGE_MODEL}
        self._there = dict.fromkeys(there)  # in a fixed order, so that results do not depend on hashes
        self._wanted = wanted
        self._needed = [*wanted, *(name for others in wanted.values() for name in others if name not in wanted)]
        known = set(self._needed)
        self._further = [name for name in also if name not in known]
        self._alike = alike

    def best(self) -> NameMap:
        """The map of equal names if it will do, else the only other one that does; else the map in which most names fit."""
        exact = self._map({name: (name,) for name in (*self._needed, *self._further) if name in self._there})
        if self._is_whole(exact) and self._is_alike(exact):
            return exact
        cores = {name: self._core(name) for name in (*self._needed, *self._further)}
        by_core: dict[str, list[str]] = {}
        for name in self._there:
            by_core.setdefault(self._core(name), []).append(name)
        found = []
        for affix in self._affixes(by_core):
            meant = {name: affix.renamed(core) for name, core in cores.items()}
            found.append(self._map({name: by_core[core] for name, core in meant.items() if core in by_core}))
        whole: dict[tuple[Any, ...], NameMap] = {}
        for one in found:
            if self._is_whole(one) and self._is_alike(one):
                whole.setdefault(tuple(sorted((name, one.given.get(name)) for name in self._needed)), one)
        ways = list(whole.values())
        if len(ways) > 1:
            name = next(name for name in self._needed if ways[0].given.get(name) != ways[1].given.get(name))
            return replace(exact, doubtful=(name, ways[0].given.get(name, "nothing"), ways[1].given.get(name, "nothing")))
        if ways:
            return ways[0]
        if self._is_whole(exact):
            return exact
        # max takes the first of several with as many names: equal names, then those without a prefix or suffix.
        return max([exact, *found], key=lambda one: (len(one.given), one.doubtful is not None))

    def _map(self, sources: Mapping[str, Collection[str]]) -> NameMap:
        """The map that follows from ``sources``: wanted name -> the names that are there which it could be."""
        given: dict[str, str] = {}
        taken: dict[str, str] = {}
        doubtful: tuple[str, str, str] | None = None
        for name in self._needed:
            several = sorted(sources.get(name, ()))
            if len(several) > 1:
                doubtful = doubtful or (name, several[0], several[1])
            elif several and several[0] not in taken:
                given[name] = several[0]
                taken[several[0]] = name
            elif several:
                # Two wanted names would share the one that is there, so neither has it.
                given.pop(taken[several[0]], None)
        missing = [name for name, others in self._wanted.items() if not any(one in given for one in (name, *others))]
        known = {one for name in (*given, *self._further) for one in sources.get(name, ())}
        unknown = self._there.keys() - known
        also = {}
        for name in self._further:
            possible = sources.get(name, ())
            if len(possible) == 1 and (there := next(iter(possible))) not in taken:
                also[name] = there
                taken[there] = name
        return NameMap(given, tuple(sorted(missing)), tuple(sorted(unknown)), doubtful, also)

    def _is_whole(self, found: NameMap) -> bool:
        return found.fits if self._one_to_one else found.is_complete

    def _is_alike(self, found: NameMap) -> bool:
        return self._alike is None or all(self._alike(name, found.given[name]) for name in self._needed if name in found.given)

    def _affixes(self, by_core: Iterable[str]) -> list[_Affix]:
        """The most frequent prefixes and suffixes of the longest wanted names, which resemble few others by chance."""
        found = Counter([_NO_AFFIX])
        for core in sorted(map(self._core, self._needed), key=len)[-_PROBES:]:
            for other in by_core:
                if other.endswith(f".{core}"):
                    if _NO_WEIGHTS.isdisjoint((start := other.removesuffix(core)).split(".")):
                        found[_Affix(True, start, "")] += 1
                elif core.endswith(f".{other}"):
                    found[_Affix(True, "", core.removesuffix(other))] += 1
                elif self._one_to_one:
                    continue
                elif other.startswith(f"{core}.") and _SUFFIX.fullmatch(end := other.removeprefix(core)):
                    found[_Affix(False, end, "")] += 1
                elif core.startswith(f"{other}.") and _SUFFIX.fullmatch(end := core.removeprefix(other)):
                    found[_Affix(False, "", end)] += 1
        return [affix for affix, _ in found.most_common(_TRIED)]

    def _core(self, name: str) -> str:
        """A name without the names of wrappers and without ``.weight``; the part in brackets, of a slice, is kept."""
        tensor, bracket, part = name.partition("[")
        words = [word for word in tensor.split(".") if word not in self._left_out]
        return ".".join(words).removesuffix(_WEIGHT) + bracket + part
