"""What attaching to a model would do: which low-rank paths its parameters get, found before anything in the model changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.models.carriers import Layer, carriers_of, unwrapped
from surgery.models.packed import unpack
from surgery.models.peft_api import unfitting_adapter
from surgery.models.places import places_of
from surgery.models.recognize import held_elsewhere
from surgery.progress import note
from surgery.training.lowrank import LowRankPath
from surgery.training.planned_paths import PlannedPaths
from surgery.training.ways import Way


@dataclass(frozen=True, slots=True)
class AttachPlan:
    """The paths that a model is to get.

    Attributes:
        manifest: of the factorized checkpoint.
        paths: each path, untouched, and the layers that use its parameter.
        keys: of the targets in each of the paths, by the number of their deltas.
        homes: key of each target in the model -> which of the paths has its delta, and which entry of that it is.
        absent: targets that the model does not have.
    """

    manifest: Manifest
    paths: list[tuple[LowRankPath, list[Layer]]]
    keys: list[list[str]]
    homes: dict[str, tuple[int, int]]
    absent: list[TargetRecord]

    def note_absent(self) -> None:
        """Tell a note if there are targets that the model does not have."""
        if self.absent:
            note(
                f"{len(self.absent)} of {len(self.manifest.targets)} targets are not in this model (first: "
                f"{self.absent[0].key!r}): they stay untouched, and fold leaves these weights as they are"
            )


def plan_attach(model: nn.Module, factorized: Path, way: Way, factors: torch.dtype | None = None) -> AttachPlan:
    """Find the parameters of a model that the targets of a checkpoint are in, and make their paths.

    Args:
        model: see ``attach``; in wrappers or not.
        factorized: the checkpoint.
        way: what is trained.
        factors: the dtype of the paths' factors; None for that of each weight.

    Raises:
        SourceError, OptionError, FormatError, MissingExtra: see ``attach``.
    """
    manifest = Manifest.read(factorized)
    bare = unwrapped(model)
    _check_suitable(model, bare)
    unpack(bare)
    places = places_of(bare, manifest)
    absent = [target for target in manifest.targets if places.keys().isdisjoint(target.tensors)]
    if absent and (elsewhere := held_elsewhere(bare, manifest, absent)) is not None:
        target, name = elsewhere
        raise OptionError(
            f"{target.key!r} is in this model under a name that the checkpoint does not have, and would get no scales",
            got=repr(name),
            expected="the names that a loader gives it by itself",
            hint="load the model without key_mapping, and adapt this weight only by a plain LoRA; or leave it out (--exclude)",
        )
    carriers = carriers_of(bare, {place.parameter for found in places.values() for place in found})
    planned = PlannedPaths(carriers, _activations(bare), way)
    for shard in manifest.shards:
        if shard.factors is not None:
            with FactorsReader(factorized, shard) as reader:
                for target in manifest.targets_of(shard.source.file):
                    copies = [places[tensor] for tensor in target.tensors if tensor in places]
                    if copies:
                        own = [reader.factors(target, i) for i in range(target.matrices[0])]
                        planned.add(target, copies, own, partial(_stored, factorized, shard, target))
    return AttachPlan(manifest, planned.paths(factors), planned.keys, planned.homes, absent)


def _check_suitable(model: Any, bare: Any) -> None:
    """Refuse models and layers that are known to use weights in ways that scales cannot follow."""
    if getattr(getattr(bare, "config", None), "model_type", None) == "rwkv":
        raise OptionError("RWKV divides its weights when it is put into eval mode, and scales cannot follow that")
    # Scales are not included in the weight that such an adapter sees; the folded model would not be what was trained.
    if (unfitting := unfitting_adapter(model)) is not None:
        name, kind = unfitting
        raise OptionError(
            f"the adapter {name!r} looks at the weight that it changes, and cannot go with scales",
            got=kind,
            expected="such as a plain LoRA",
        )


def _activations(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of what is not quantized."""
    kinds = (parameter.dtype for parameter in model.parameters())
    return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), torch.float32)


def _stored(factorized: Path, shard: ShardRecord, target: TargetRecord) -> torch.Tensor:
    """A target's tensor as it is in a residual checkpoint."""
    assert shard.residual is not None
    with ShardReader(factorized / shard.residual.file, name=shard.residual.file) as reader:
        return reader.read(next(entry for entry in reader.header.tensors if entry.name == target.tensor))
