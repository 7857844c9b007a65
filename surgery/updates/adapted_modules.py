"""Scales as low-rank updates ``B A`` of a model's modules, in no adapter's format yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.format.factors import FactorsReaders
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.models.carriers import Carrier, Layer, carriers_of, places_of, terms_of
from surgery.models.placement import Place, TensorPart
from surgery.updates.protocol import ScalesUpdate

_FOLD_HINT = "fold instead: surgery fold gives standard weights for any model. Or factorize without it: --exclude"


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """A module that an adapter changes.

    Attributes:
        name: of the module.
        carrier: its weight; None for one of the experts that the model stacks.
        targets: what is in it, with the places of each.
        rank: of all of that.
        shape: of its weight as an adapter sees it: (out, in), or (out, in, kernel...) for a convolution.
    """

    name: str
    carrier: Carrier | None
    targets: Sequence[tuple[TargetRecord, Sequence[Place]]]
    rank: int
    shape: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether the module holds its weight as (in, out)."""
        return self.carrier is not None and self.carrier.layers[0].kind == "transposed"


@dataclass(frozen=True, slots=True)
class AdaptedModules:
    """All modules that an adapter changes.

    Attributes:
        modules: in the order of the checkpoint's targets.
        carriers: the parameters of the model that targets are in, by their names.
        experts: parameter that stacks experts -> the targets in it, each an expert of its own in ``modules``.
        rank: of the adapter: the largest of the modules.
    """

    modules: Sequence[AdaptedModule]
    carriers: Mapping[str, Carrier]
    experts: Mapping[str, Sequence[TargetRecord]]
    rank: int

    @classmethod
    def of(cls, model: nn.Module | None, manifest: Manifest) -> AdaptedModules:
        """Those with targets of a checkpoint.

        Args:
            model: without weights; None where transformers does not know it, and modules are named as in the checkpoint.
            manifest: of the checkpoint.

        Raises:
            OptionError: a target that no update ``B A`` of a module can change.
        """
        if model is None:
            places, carriers = _as_named(manifest)
        else:
            places = places_of(model, manifest)
            carriers = carriers_of(model, {place.parameter for found in places.values() for place in found})
        found: dict[str, tuple[Carrier | None, list[tuple[TargetRecord, list[Place]]]]] = {}
        experts: dict[str, list[TargetRecord]] = {}
        for target in manifest.targets:
            by_parameter: dict[str, list[Place]] = {}
            for place in places.get(target.tensor, ()):
                by_parameter.setdefault(place.parameter, []).append(place)
            for parameter, inside in by_parameter.items():
                if len(inside[0].shape) == 3 and target.view == "matrix":
                    experts.setdefault(parameter, []).append(target)
                    found[_module_of(target.tensor, target)] = (None, [(target, inside)])
                    continue
                carrier = carriers[parameter]
                _check_carrier(target, carrier)
                found.setdefault(_module_of(parameter, target), (carrier, []))[1].append((target, inside))
        modules = [_adapted(name, carrier, targets) for name, (carrier, targets) in found.items()]
        return cls(modules, carriers, experts, max(module.rank for module in modules))

    def shapes(self, module: AdaptedModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B: (rank, in) and (out, rank), or (rank, in, kernel...) and (out, rank, 1...) for a convolution."""
        out, *inputs = module.shape
        return (self.rank, *inputs), (out, self.rank, *(1,) * (len(inputs) - 1))

    def halves(self, module: AdaptedModule, factors: FactorsReaders, update: ScalesUpdate) -> tuple[torch.Tensor, torch.Tensor]:
        """``A = V^T`` and ``B = U diag(s (g - 1))`` of a module, padded with zeros to the rank of the adapter.

        Args:
            module: one of ``modules``.
            factors: of the checkpoint.
            update: the scales.

        Returns:
            A (rank, columns) and B (rows, rank), float32, contiguous, on the CPU; of a convolution as matrices.
        """
        lefts, rights = [], []
        for target, places in module.targets:
            with factors.of(target) as reader:
                kept = reader.factors(target)
            change = update.change_of_values(target, kept.s)
            if module.carrier is None:
                pairs = [(kept.U, kept.V)]
            else:
                pairs = [(term.left, term.right) for _, term in terms_of(target, places, self.carriers, [kept])]
            for left, right in pairs:
                if module.is_transposed:
                    left, right = right, left
                lefts.append(left * change)
                rights.append(right)
        missing = self.rank - module.rank
        A = nn.functional.pad(torch.cat(rights, dim=1).T, (0, 0, 0, missing))
        B = nn.functional.pad(torch.cat(lefts, dim=1), (0, missing))
        return A.contiguous(), B.contiguous()


def not_exportable(target: TargetRecord, got: str) -> OptionError:
    """The error for a target that an adapter cannot change: ``got`` says what it is."""
    return OptionError(f"{target.key!r} cannot be exported as LoRA", got=got, hint=_FOLD_HINT)


def _adapted(name: str, carrier: Carrier | None, targets: Sequence[tuple[TargetRecord, Sequence[Place]]]) -> AdaptedModule:
    rank = sum(target.rank * len(inside) for target, inside in targets)
    shape = tuple(targets[0][0].shape) if carrier is None else carrier.shape
    if carrier is not None and carrier.layers[0].kind == "transposed":
        shape = shape[::-1]
    return AdaptedModule(name, carrier, targets, rank, shape)


def _as_named(manifest: Manifest) -> tuple[dict[str, list[Place]], dict[str, Carrier]]:
    """Places and carriers in a model that is not transformers': modules are named as in the checkpoint."""
    places, carriers = {}, {}
    for target in manifest.targets:
        places[target.tensor] = [Place(target.tensor, tuple(target.shape), TensorPart.whole(target.tensor, target.shape))]
        kind = {"matrix": "linear", "convolution": "convolution", "stack": "unknown"}[target.view]
        carriers[target.tensor] = Carrier([Layer(nn.Module(), "weight", kind)], tuple(target.shape), False)
    return places, carriers


def _module_of(tensor: str, target: TargetRecord) -> str:
    """The module that a tensor with a target is the weight of."""
    module, _, last = tensor.rpartition(".")
    if last != "weight":
        raise not_exportable(target, "no weight of a module")
    return module


def _check_carrier(target: TargetRecord, carrier: Carrier) -> None:
    """Refuse what an adapter changes in another way than fold, or not at all."""
    layer = carrier.layers[0]
    if layer.kind not in ("linear", "transposed", "convolution"):
        raise not_exportable(target, layer.described)
    if len(carrier.layers) > 1:
        raise not_exportable(target, "a weight that several modules share")
    if layer.kind == "convolution" and getattr(layer.module, "groups", 1) != 1:
        raise not_exportable(target, "a convolution in groups")
