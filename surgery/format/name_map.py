"""Two sets of names held against each other: what a file calls its tensors, and what the checkpoint does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

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
_WEIGHT = ".weight"
_PROBES, _TRIED = 3, 16


@dataclass(frozen=True, slots=True)
class NameMap:
    """How two sets of names fit each other.

    Attributes:
        given: name that is wanted -> the one that is there instead.
        missing: names that are wanted and not there, sorted.
        unknown: names that are there and stand for none that is wanted, sorted.
    """

    given: dict[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether each name of one set stands for one of the other."""
        return not self.missing and not self.unknown

    @property
    def renamed(self) -> tuple[str, str] | None:
        """The first name that is wanted and there under another one: that one, and itself. None if there is none."""
        return next(((there, name) for name, there in sorted(self.given.items()) if there != name), None)


def match_names(there: Collection[str], wanted: Collection[str]) -> NameMap:
    """Hold names that are there against those that are wanted.

    They are the same, or else the same but for the names of modules that wrap others (``module``, ``_orig_mod`` ...) anywhere
    in them, for ``.weight`` at their end, and for one prefix that all of them have or lack. Where that can be understood in
    two ways, only those that are the same are taken for each other.
    """
    exact = _mapped({name: name for name in there}, there, {name: name for name in wanted}, wanted)
    if exact.fits:
        return exact
    given, asked = _by_core(there), _by_core(wanted)
    if given is None or asked is None:
        return exact
    found = [exact]
    for more, less in _prefixes(given, asked):
        cores = {less + core.removeprefix(more): name for core, name in given.items() if core.startswith(more)}
        found.append(_mapped(cores, there, asked, wanted))
    whole = {tuple(sorted(one.given.items())): one for one in found if one.fits}
    if len(whole) > 1:
        return exact
    return next(iter(whole.values()), None) or max(found, key=lambda one: len(one.given))


def _mapped(cores: dict[str, str], there: Collection[str], asked: dict[str, str], wanted: Collection[str]) -> NameMap:
    given = {name: cores[core] for core, name in asked.items() if core in cores}
    missing, unknown = set(wanted) - given.keys(), set(there) - set(given.values())
    return NameMap(given, tuple(sorted(missing)), tuple(sorted(unknown)))


def _by_core(names: Iterable[str]) -> dict[str, str] | None:
    """The names by what is left of them without wrappers and ``.weight``; None if that is the same for two."""
    found: dict[str, str] = {}
    for name in names:
        tensor, bracket, part = name.partition("[")
        core = ".".join(word for word in tensor.split(".") if word not in _WRAPPERS).removesuffix(_WEIGHT) + bracket + part
        if core in found:
            return None
        found[core] = name
    return found


def _prefixes(given: Iterable[str], asked: Collection[str]) -> list[tuple[str, str]]:
    """Prefixes that names may have more, or less: to be taken away, and to be put before. One of each two is empty.

    Those of the longest names, which are like few others, and the likeliest ones only: each is tried on all names.
    """
    found = Counter([("", "")])
    for core in sorted(given, key=len)[-_PROBES:]:
        found.update((core.removesuffix(other), "") for other in asked if core.endswith(f".{other}"))
        found.update(("", other.removesuffix(core)) for other in asked if other.endswith(f".{core}"))
    return [prefixes for prefixes, _ in found.most_common(_TRIED)]
