"""Two sets of names held against each other: what a file calls its tensors, and what somebody looks for.

The names of a fine-tuned model, of scales and of an adapter's modules differ from those of the checkpoint where the model was
saved inside a wrapper, or as a part of a larger model. Here they are compared as texts only. What transformers converts when it
loads a model is beyond that: see ``surgery.weights.conversion``.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from surgery.errors import SurgeryError
from surgery.progress import note

#: Modules around others, whose own name gets into those of all that is in them: DDP and DataParallel, torch.compile, FSDP,
#: checkpointing of activations, PEFT.
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
#: The module that holds the text model within a model for images and texts: now around that model, now inside it
#: (``language_model.model.layers``, ``model.language_model.layers``, and ``model.layers`` of the text model alone).
_LANGUAGE_MODEL = "language_model"
_WEIGHT = ".weight"
#: One word more at the end of a name, but none that says it is something else. Several words would be modules inside the one
#: that is meant, which may change the weight.
_SUFFIX = re.compile(r"(\.weight)?\.(?!(bias|grad|mask|momentum_buffer|original\d*|(max_)?exp_avg(_sq)?)$)\w+")
_PROBES, _TRIED = 3, 16
_COMPARED = 32

_Error = TypeVar("_Error", bound=SurgeryError)


@dataclass(frozen=True, slots=True)
class NameMap:
    """How two sets of names fit each other.

    Attributes:
        given: name that is wanted, or will do instead of one -> the one that is there for it.
        missing: names that are wanted and not there, sorted.
        unknown: names that are there and stand for none that is wanted, sorted.
        doubtful: a name that is wanted and two that are there, each of which it could be; None if there is no such name.
    """

    given: dict[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    doubtful: tuple[str, str, str] | None = None

    @property
    def fits(self) -> bool:
        """Whether each name of one set stands for one of the other."""
        return self.is_complete and not self.unknown

    @property
    def is_complete(self) -> bool:
        """Whether each name that is wanted is there, in one way only."""
        return not self.missing and self.doubtful is None

    @property
    def renamed(self) -> tuple[str, str] | None:
        """The first name that is wanted and there under another one: that one, and itself. None if there is none."""
        return next(((there, name) for name, there in sorted(self.given.items()) if there != name), None)

    def misfit(self, kind: type[_Error], what: str, wanted: Collection[str], *, expected: str, hint: str) -> _Error:
        """The error where names do not fit, with the names of both sides.

        Args:
            kind: of the error.
            what: cannot be had for it.
            wanted: the names that were.
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
    """Say so where names are taken for others, ``wanted``."""
    if (renamed := names.renamed) is not None:
        fit = "fit them one to one" if names.fits else "are found for all that are needed"
        note(f"{where}: names that differ from {wanted}, and {fit}: {renamed[0]!r} is taken for {renamed[1]!r}")


def nearest(name: str, others: Iterable[str]) -> str | None:
    """The name that is most like another, by the words between its dots, then by its characters; None if none is like it."""
    words = Counter(name.split("."))
    shared = {other: (words & Counter(other.split("."))).total() for other in others}
    # Comparing characters is slow, and there may be hundreds of thousands of names.
    likely = sorted(shared, key=lambda other: (-shared[other], abs(len(other) - len(name)), other))[:_COMPARED]
    scored = [(shared[other], difflib.SequenceMatcher(None, name[:200], other[:200]).ratio(), other) for other in likely]
    count, ratio, found = max(scored, default=(0, 0.0, ""))
    return found if count or ratio > 0.5 else None


def match_names(there: Collection[str], wanted: Collection[str]) -> NameMap:
    """Hold names that are there against those that are wanted, one to one.

    They are the same, or else the same but for the names of modules that wrap others (``module``, ``_orig_mod`` ...) anywhere
    in them, for ``.weight`` at their end, and for one prefix that all of them have or lack. Where that can be understood in
    two ways, only those that are the same are taken for each other. So docs/format.md has it for scales.
    """
    return _Search(there, dict.fromkeys(wanted, ()), one_to_one=True).best()


def find_names(
    there: Collection[str],
    wanted: Mapping[str, Collection[str]],
    also: Collection[str] = (),
    alike: Callable[[str, str], bool] | None = None,
) -> NameMap:
    """Find names where more may be there than is wanted: each that is wanted, all of them in the same way.

    They differ as for ``match_names``, or by the module that holds the text model of a larger one, or by one suffix.

    Args:
        there: names.
        wanted: name -> others that will do instead.
        also: names of the same set as those wanted, which need not be there. Those that are, are no ``unknown`` ones.
        alike: whether a name that is wanted and one that is there may be the same, such as by their shapes; asked of what is
            not wanted under the very name that is there, and to decide between several ways.

    Returns:
        The names that are the same, if these are all that are wanted, and alike; else the one other way to find all. Where
        there is none, a map that is not complete, or has names that are the same and not alike.
    """
    return _Search(there, wanted, also, alike).best()


@dataclass(frozen=True, slots=True)
class _Affix:
    """What all names that are wanted have more, or less, than those that are there, at their start or end."""

    at_start: bool
    there: str
    wanted: str

    def renamed(self, core: str) -> str | None:
        """A name that is wanted as it would be there; None if it cannot be."""
        if self.at_start:
            return self.there + core[len(self.wanted) :] if core.startswith(self.wanted) else None
        return core[: len(core) - len(self.wanted)] + self.there if core.endswith(self.wanted) else None


_NO_AFFIX = _Affix(True, "", "")


class _Search:
    """Tries the ways in which names may differ.

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
        self._there = dict.fromkeys(there)  # in order: what is tried first does not depend on chance
        self._wanted = wanted
        self._needed = [*wanted, *(name for others in wanted.values() for name in others if name not in wanted)]
        known = set(self._needed)
        self._further = [name for name in also if name not in known]
        self._alike = alike

    def best(self) -> NameMap:
        """The one map in which all is found, exact names first; else one of which less fits."""
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
        # Of those with as many names the first: the exact ones, then those without a prefix.
        return max([exact, *found], key=lambda one: (len(one.given), one.doubtful is not None))

    def _map(self, sources: Mapping[str, Collection[str]]) -> NameMap:
        """The map where each name may be those that are there which ``sources`` says."""
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
                # What is there once cannot be two.
                given.pop(taken[several[0]], None)
        missing = [name for name, others in self._wanted.items() if not any(one in given for one in (name, *others))]
        known = {one for name in (*given, *self._further) for one in sources.get(name, ())}
        unknown = self._there.keys() - known
        return NameMap(given, tuple(sorted(missing)), tuple(sorted(unknown)), doubtful)

    def _is_whole(self, found: NameMap) -> bool:
        return found.fits if self._one_to_one else found.is_complete

    def _is_alike(self, found: NameMap) -> bool:
        return self._alike is None or all(self._alike(name, found.given[name]) for name in self._needed if name in found.given)

    def _affixes(self, by_core: Iterable[str]) -> list[_Affix]:
        """Those that the longest names may have, which are like few others, and the likeliest only: each is tried on all."""
        found = Counter([_NO_AFFIX])
        for core in sorted(map(self._core, self._needed), key=len)[-_PROBES:]:
            for other in by_core:
                if other.endswith(f".{core}"):
                    found[_Affix(True, other.removesuffix(core), "")] += 1
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
        """What is left of a name without wrappers and ``.weight``."""
        tensor, bracket, part = name.partition("[")
        words = [word for word in tensor.split(".") if word not in self._left_out]
        return ".".join(words).removesuffix(_WEIGHT) + bracket + part
