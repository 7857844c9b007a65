"""Put the scales of a factorized checkpoint, or cores, into a loaded model as its only trainable parameters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.models.carriers import carriers_of, places_of, unwrapped
from surgery.models.peft_api import has_adapters, unfitting_adapter
from surgery.models.recognize import held_elsewhere
from surgery.progress import note
from surgery.training.attached_path import AttachedPath
from surgery.training.attached_scales import Scales
from surgery.training.lowrank import LowRankPath
from surgery.training.planned_paths import PlannedPaths
from surgery.training.ways import Way


@on_its_own_terms
def attach(model: nn.Module, factorized: str | Path, train: Way = "scales") -> Scales:
    """Freeze a model and make the scales of a factorized checkpoint its only trainable parameters.

    Instead of a multiplier for each kept direction a core can be trained, which also turns the directions:
    ``W + U diag(sqrt s) (C - I) diag(sqrt s) V^T``, with C (k, k) free (``core``; LoRA-XS, arXiv 2405.17604), or
    ``diag(1 + a) Q diag(1 + b)`` with Q orthogonal (``orthogonal``; PSOFT, arXiv 2505.11235), which is Cayley's transform of
    a skew matrix.

    The model may have been loaded from the original weights or from the factorized folder (residual layout); which, is
    told by the bytes of its weights, target by target. A weight that is quantized in memory is told by what its layer
    computes. Untouched scales on the original weights change no bit of what the model computes. Without its scales, a model
    loaded from the residual layout is another model: load the original, so that whatever loads it once more, such as a
    trainer that wants a reference, has the same.

    Names and shapes of a transformers model are followed through its own conversion: experts that it stacks, and weights
    that it joins or takes apart. In a model with PEFT's adapters, these stay as trainable as they are. Targets that the
    loader has dropped, such as the vision tower of a model that is loaded for its text, keep their scales at 1.

    Args:
        model: in the dtype of the checkpoint or a wider one, or quantized, on any device or several. Not yet sharded.
        factorized: a folder written by ``surgery.factorize``.
        train: ``scales``, ``core`` or ``orthogonal``.

    Returns:
        The scales, all 1, or cores, all the identity, to be trained, saved and taken out again.

    Raises:
        SourceError: the model's weights are neither the original nor the residual.
        OptionError: most targets are not in the model, or one is there under a name that is not known or in a way that scales
            cannot be attached to, or scales are attached already.
        FormatError: the factorized folder is damaged.
        MissingExtra: the release of transformers does not tell how the model was loaded.

    Warns:
        SurgeryWarning: some targets are not in the model.
    """
    factorized = Path(factorized)
    manifest = Manifest.read(factorized)
    bare = unwrapped(model)
    if any(isinstance(module, LowRankPath) for module in bare.modules()):
        raise OptionError("scales are attached to this model already", hint="detach() them first")
    _check_suitable(model, bare)
    places = places_of(bare, manifest)
    absent = [target for target in manifest.targets if places.keys().isdisjoint(target.tensors)]
    if absent and (elsewhere := held_elsewhere(bare, manifest, absent)) is not None:
        target, name = elsewhere
        raise OptionError(
            f"{target.key!r} is in this model under a name that the checkpoint does not have, and would get no scales",
            got=repr(name),
            expected="the names that a loader gives it by itself",
            hint="load the model without key_mapping, and adapt this weight by nothing but a plain LoRA; or --exclude it",
        )
    carriers = carriers_of(bare, {place.parameter for found in places.values() for place in found})
    planned = PlannedPaths(carriers, _activations(bare), train)
    for shard in manifest.shards:
        if shard.factors is not None:
            with FactorsReader(factorized, shard) as reader:
                for target in manifest.targets_of(shard.source.file):
                    copies = [places[tensor] for tensor in target.tensors if tensor in places]
                    if copies:
                        factors = [reader.factors(target, i) for i in range(target.matrices[0])]
                        planned.add(target, copies, factors, partial(_stored, factorized, shard, target))
    paths = planned.paths()
    if not has_adapters(bare):  # else PEFT has done it
        bare.requires_grad_(False)
    attached = []
    for path, layers in paths:
        attached.append(AttachedPath(path, layers))
        path.requires_grad_(True)
    if absent:
        note(
            f"{len(absent)} of {len(manifest.targets)} targets are not in this model (first: {absent[0].key!r}): their scales "
            "stay at 1, and fold leaves these weights as they are"
        )
    homes = {key: (attached[number], i) for key, (number, i) in planned.homes.items()}
    return Scales(model, factorized, manifest, homes, attached, train)


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
