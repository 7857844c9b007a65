"""The low-rank paths that a model is to get, gathered target by target before anything in the model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.format.manifest_records import TargetRecord
from surgery.lossless.factors import Factors
from surgery.models.carriers import Carrier, Layer, terms_of
from surgery.models.placement import Place
from surgery.models.recognize import HeldTarget, is_residual
from surgery.models.terms import Term
from surgery.training.lowrank import Entry, LowRankPath
from surgery.training.ways import Way, numbers_of_way


class PlannedPaths:
    """The paths in the making, one for each parameter that targets are in.

    Args:
        carriers: the parameters, by their names.
        dtype: that the model computes in.
        way: what is trained.

    Attributes:
        homes: key of a target -> which of ``paths`` has its delta, and which of the entries of that it is.
    """

    def __init__(self, carriers: Mapping[str, Carrier], dtype: torch.dtype, way: Way) -> None:
        self._carriers = carriers
        self._dtype = dtype
        self._way = way
        self._planned: dict[int, _PlannedPath] = {}
        self.homes: dict[str, tuple[int, int]] = {}

    def add(
        self,
        target: TargetRecord,
        copies: Sequence[Sequence[Place]],
        factors: Sequence[Factors],
        stored: Callable[[], torch.Tensor],
    ) -> None:
        """Give a target's directions to the paths of the parameters that it is in.

        Args:
            target: not yet added.
            copies: where its tensor is, and where each alias of that; at least one. A loader may tie them or not: in a
                residual checkpoint they differ, and each is told by its own bytes.
            factors: of each of its matrices.
            stored: gives its tensor in the residual checkpoint.

        Raises:
            SourceError, OptionError: see ``is_residual``.
        """
        s = torch.stack([factor.s for factor in factors])
        terms: dict[int, tuple[int, list[Term]]] = {}
        for places in copies:
            if any(id(self._carriers[place.parameter]) in terms for place in places):
                continue
            here: dict[int, list[Term]] = {}
            for carrier, term in terms_of(target, places, self._carriers, factors):
                self._planned.setdefault(id(carrier), _PlannedPath(carrier, len(self._planned)))
                here.setdefault(id(carrier), []).append(term)
            every = [term for group in here.values() for term in group]
            held = HeldTarget(target, places, self._carriers, factors, every)
            residual = is_residual(held, self._dtype, stored)
            terms |= {key: (int(residual), group) for key, group in here.items()}
        first = self._planned[next(iter(terms))]
        self.homes[target.key] = first.number, len(first.entries)
        with first.carrier.present():
            numbers = len(s) * numbers_of_way(self._way, target.rank)
            delta = nn.Parameter(torch.zeros(numbers, dtype=torch.float32, device=first.carrier.weight().device))
        for key, (offset, group) in terms.items():
            self._planned[key].entries.append(Entry(delta, s, offset, group))
            self._planned[key].keys.append(target.key)

    @property
    def keys(self) -> list[list[str]]:
        """The key of each entry of each of the ``paths``."""
        return [planned.keys for planned in self._planned.values()]

    def paths(self, factors: torch.dtype | None = None) -> list[tuple[LowRankPath, list[Layer]]]:
        """Each path, and the layers that use its parameter.

        Args:
            factors: their dtype; None for that of each weight.

        Raises:
            OptionError: what is in a parameter does not fill it.
        """
        return [(planned.path(self._way, factors), planned.carrier.layers) for planned in self._planned.values()]


@dataclass(slots=True)
class _PlannedPath:
    """A path in the making.

    Attributes:
        carrier: the parameter that it is for.
        number: which of all paths it is, from 0.
        entries: the targets in it.
        keys: of these.
    """

    carrier: Carrier
    number: int
    entries: list[Entry] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def path(self, way: Way, factors: torch.dtype | None) -> LowRankPath:
        carrier = self.carrier
        sizes = {(len(term.left), len(term.right)) for entry in self.entries for term in entry.terms}
        if sizes != {carrier.rows_and_columns}:  # a tower that the input does not reach would never tell
            raise OptionError(
                f"factors do not fit {carrier.layers[0].described}",
                got=f"rows and columns {sorted(sizes)}",
                expected=carrier.rows_and_columns,
                hint="targets that are joined in the model must be seen in the same way: check the views of the recipe",
            )
        with carrier.present():
            weight = carrier.weight()
        dtype = factors or (torch.float32 if carrier.quantized else weight.dtype)
        like = torch.empty(0, device=weight.device, dtype=dtype)
        return LowRankPath(way, self.entries, carrier.shape[0] if carrier.stack else None, like)
