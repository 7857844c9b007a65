"""Put the scales of a factorized checkpoint into a loaded model as its only trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.arguments import as_path
from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.format.factors import FactorsReader
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.format.scales import read_scales, write_scales
from surgery.models.carriers import Carrier, Layer, carriers_of, is_sharded, places_of, terms_of, unwrapped
from surgery.models.peft_api import has_adapters, unfitting_adapter
from surgery.models.placement import Place
from surgery.models.recognize import held_elsewhere, is_residual
from surgery.models.terms import Term
from surgery.names import ATTACHED_NAME
from surgery.progress import note
from surgery.training.lowrank import Adding, LowRankPath, Shadow


class _Attached:
    """A path in its place: the hooks that make the layers of a parameter use it.

    Attributes:
        path: a submodule of the first of the layers.
        modules: the layers.
    """

    def __init__(self, path: LowRankPath, layers: Sequence[Layer]) -> None:
        self.path = path
        self.modules = [layer.module for layer in layers]
        self._kinds = [layer.kind for layer in layers]
        self._handles: list[Any] = []
        self._hooks: list[Adding | Shadow] = []
        first = layers[0]
        self._owner, self._name = first.module, ATTACHED_NAME + ("" if first.name == "weight" else f"_{first.name}")
        first.module.add_module(self._name, path)
        for layer in layers:
            if layer.kind == "unknown":
                shadow = Shadow(path, layer.module, layer.name)
                for module in (layer.module, *layer.readers):
                    self._handles.append(module.register_forward_pre_hook(shadow.enter))
                    # Also after an exception, with which a recomputation under gradient checkpointing may end.
                    self._handles.append(module.register_forward_hook(shadow.leave, always_call=True))
                self._hooks.append(shadow)
            else:
                adding = Adding(path, layer.kind)
                self._handles.append(layer.module.register_forward_hook(adding, with_kwargs=True))
                self._hooks.append(adding)

    @property
    def used(self) -> tuple[bool, bool]:
        """Whether any of the layers has been run, and whether all have that may be read in another way than by being run.

        An embedding beside others of the same weight may be there for its name alone, as T5's ``shared`` is.
        """
        used = [hook.used for hook in self._hooks]
        return any(used), any(used) and all(ran for ran, kind in zip(used, self._kinds, strict=True) if kind != "embedding")

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(self._owner, self._name)


class Scales:
    """The scales attached to a model; made by ``attach``."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        manifest: Manifest,
        homes: dict[str, tuple[_Attached, int]],
        attached: list[_Attached],
    ) -> None:
        self._model = model
        self._folder = folder
        self._manifest = manifest
        self._homes = homes
        self._attached = attached
        #: ``g`` of the targets that the model does not have.
        self._absent = {t.key: torch.ones(t.scales_shape, dtype=torch.float32) for t in manifest.targets if t.key not in homes}

    def __repr__(self) -> str:
        """How many targets and numbers, of which folder, where they are, and whether they have been changed."""
        deltas = [home.path.delta(i) for home, i in self._homes.values()]
        there, every = len(self._homes), len(self._manifest.targets)
        parts = [
            f"{there} targets" + (f" of {every}" if there < every else ""),
            f"{sum(delta.numel() for delta in deltas):,} trainable",
            repr(str(self._folder)),
            ", ".join(sorted({str(delta.device) for delta in deltas})),
            _state(deltas),
        ]
        if not self._attached:
            parts.append("detached")
        return f"Scales({', '.join(parts)})"

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the model are trained, and how many it has, as PEFT does.

        All of the model's count: with a LoRA beside the scales, its parameters are trainable as well.
        """
        trainable = every = 0
        for parameter in self._model.parameters():
            count = _count(parameter)
            every += count
            trainable += count if parameter.requires_grad else 0
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}")

    def parameters(self) -> Iterator[nn.Parameter]:
        """What to hand to an optimizer: ``g - 1`` of each target in the model, float32 (B k,). Use no weight decay.

        Raises:
            OptionError: they have been offloaded, where nothing can train them.
        """
        return iter([_trainable(home.path.delta(i)) for home, i in self._homes.values()])

    def values(self) -> dict[str, torch.Tensor]:
        """Key of a target -> ``g``, float32 (k,), or (B, k) for a stack, on the CPU.

        Of a target that the model does not have: 1, or what was last loaded. Where they are sharded over processes, all of
        these must ask together.
        """
        shapes = {target.key: target.scales_shape for target in self._manifest.targets}
        values = {key: 1 + _whole(home.path.delta(i), shapes[key]) for key, (home, i) in self._homes.items()}
        return values | {key: value.clone() for key, value in self._absent.items()}

    @on_its_own_terms
    def save(self, path: str | Path) -> None:
        """Write the scales file that ``surgery fold`` takes.

        In a distributed run all processes must call it, and the first one writes.

        Args:
            path: of the file, replaced if it is there.

        Raises:
            OptionError: no path; or the scales have been offloaded, or taken over in a way that is not known here.
            OutputError: it cannot be written.

        Warns:
            SurgeryWarning: the model was run, and some scales had no part in it; or they are frozen.
        """
        path = as_path(path, "path")
        used = {key: home.used for key, (home, _) in self._homes.items()}
        unused = sorted(key for key, (_, every) in used.items() if not every)
        if unused and any(some for some, _ in used.values()):
            note(
                f"the scales of {unused[0]!r} and of {len(unused) - 1} other targets were never used, or not by all layers "
                "that share the weight: the model does not run these, or reads their weights in a way that is not known here"
            )
        if frozen := [key for key, (home, i) in self._homes.items() if not home.path.delta(i).requires_grad]:
            note(
                f"the scales of {frozen[0]!r} and of {len(frozen) - 1} other targets are frozen: what freezes a model, such as "
                "PEFT's get_peft_model, comes before attach"
            )
        values = self.values()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            write_scales(path, values, self._manifest.fingerprint)

    @on_its_own_terms
    def load(self, path: str | Path) -> None:
        """Take the values of a scales file.

        Those of targets that the model does not have are kept for ``values`` and ``save``.

        Args:
            path: of the file, written with the same factorized folder.

        Raises:
            ScalesError: no such file, or scales of other factors, or not finite.
            ReadError, FormatError: it cannot be read, or is no safetensors file.
            OptionError: no path; or the scales have been offloaded.

        Warns:
            SurgeryWarning: see ``surgery.format.scales.read_scales``.
        """
        values = read_scales(Path(path), self._manifest)
        self._absent = {key: values[key] for key in self._absent}
        with torch.no_grad():
            for key, (home, i) in self._homes.items():
                delta: Any = _trainable(home.path.delta(i))
                value = values[key].flatten() - 1
                if is_sharded(delta):
                    from torch.distributed.tensor import distribute_tensor

                    value = distribute_tensor(value.to(delta.device), delta.device_mesh, delta.placements)
                delta.copy_(value)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Within it the model computes as with scales that are all 1; their values stay, and hold again after it.

            with scales.untouched():
                reference = model(ids).logits

        On the original weights that is the original model, bit for bit; on a residual it is within the rounding of the
        dtype. No gradients are recorded.
        """
        paths = [attached.path for attached in self._attached]
        before = [path.untouched for path in paths]
        for path in paths:
            path.untouched = True
        try:
            with torch.no_grad():
                yield
        finally:
            for path, value in zip(paths, before, strict=True):
                path.untouched = value

    def act_on(self, module: nn.Module) -> bool:
        """Whether a weight of the module itself, not of one inside it, has scales.

        Args:
            module: any module of the model.
        """
        return any(module is other for attached in self._attached for other in attached.modules)

    def detach(self) -> None:
        """Take the scales out of the model again. Its weights are what they were; they stay frozen."""
        for attached in self._attached:
            attached.remove()
        self._attached.clear()


def _state(deltas: Sequence[nn.Parameter]) -> str:
    """What can be said of ``g - 1`` of all targets without asking other processes."""
    if any(delta.is_meta for delta in deltas):
        return "offloaded"
    frozen = "" if all(delta.requires_grad for delta in deltas) else ", frozen"
    if any(map(is_sharded, deltas)):
        return "sharded" + frozen
    changed = sum(bool(delta.detach().any()) for delta in deltas)
    return (f"{changed} changed" if changed else "untouched") + frozen


def _count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter. bitsandbytes packs two of 4 bits into a byte; DeepSpeed leaves what is elsewhere empty."""
    count = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
    return 2 * parameter.element_size() * count if type(parameter).__name__ == "Params4bit" else count


def _trainable(delta: nn.Parameter) -> nn.Parameter:
    if delta.is_meta:
        raise OptionError("the scales have been offloaded with the model", hint="offload the model first, then attach")
    return delta


def _whole(delta: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter's values on the CPU, gathered if it is sharded over processes."""
    value: Any = _trainable(delta).detach()
    gathered: torch.Tensor = value.full_tensor() if is_sharded(value) else value
    if gathered.numel() != math.prod(shape):
        raise OptionError(
            "the scales have been taken over by a trainer in a way that is not known here",
            got=list(gathered.shape),
            expected=list(shape),
            hint="shard with DistributedDataParallel or FSDP2 (fully_shard)",
        )
    return gathered.float().cpu().reshape(shape)


@on_its_own_terms
def attach(model: nn.Module, factorized: str | Path) -> Scales:
    """Freeze a model and make the scales of a factorized checkpoint its only trainable parameters.

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

    Returns:
        The scales, all 1, to be trained, saved and taken out again.

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
    dtype = _activations(bare)
    planned: dict[int, _Planned] = {}
    homes = {}
    for shard in manifest.shards:
        if shard.factors is not None:
            with FactorsReader(factorized, shard) as reader:
                for target in manifest.targets_of(shard.source.file):
                    copies = [places[tensor] for tensor in target.tensors if tensor in places]
                    if copies:
                        stored = partial(_stored, factorized, shard, target)
                        homes[target.key] = _add(target, copies, carriers, reader, dtype, stored, planned)
    paths = {key: plan.path() for key, plan in planned.items()}
    if not has_adapters(bare):  # else PEFT has done it
        bare.requires_grad_(False)
    attached = []
    for key, path in paths.items():
        plan = planned[key]
        attached.append(_Attached(path, plan.carrier.layers))
        path.requires_grad_(True)
    by_key = dict(zip(planned, attached, strict=True))
    if absent:
        note(
            f"{len(absent)} of {len(manifest.targets)} targets are not in this model (first: {absent[0].key!r}): their scales "
            "stay at 1, and fold leaves these weights as they are"
        )
    return Scales(model, factorized, manifest, {key: (by_key[home], i) for key, (home, i) in homes.items()}, attached)


def _check_suitable(model: Any, bare: Any) -> None:
    """Refuse what is known to use weights in ways that scales cannot follow."""
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


@dataclass(slots=True)
class _Planned:
    """A path in the making: the parameter that it is for, and for each target in it its delta, its singular values, 1 if the
    residual is in the model, else 0, and its terms."""

    carrier: Carrier
    entries: list[tuple[nn.Parameter, torch.Tensor, int, list[Term]]] = field(default_factory=list)

    def path(self) -> LowRankPath:
        deltas, values, offsets, terms = zip(*self.entries, strict=True)
        carrier = self.carrier
        sizes = {(len(term.left), len(term.right)) for group in terms for term in group}
        if sizes != {carrier.rows_and_columns}:  # a tower that the input does not reach would never tell
            raise OptionError(
                f"factors do not fit {carrier.layers[0].described}",
                got=f"rows and columns {sorted(sizes)}",
                expected=carrier.rows_and_columns,
                hint="targets that are joined in the model must be seen in the same way: check the views of the recipe",
            )
        with carrier.present():
            weight = carrier.weight()
        like = torch.empty(0, device=weight.device, dtype=torch.float32 if carrier.quantized else weight.dtype)
        return LowRankPath(deltas, values, offsets, terms, carrier.shape[0] if carrier.stack else None, like)


def _add(
    target: TargetRecord,
    copies: list[list[Place]],
    carriers: dict[str, Carrier],
    reader: FactorsReader,
    dtype: torch.dtype,
    stored: Callable[[], torch.Tensor],
    planned: dict[int, _Planned],
) -> tuple[int, int]:
    """Give a target's directions to the paths of the parameters that it is in.

    Args:
        copies: where its tensor is, and where each alias of that. A loader may tie them or not: in a residual checkpoint they
            differ, and each is told by its own bytes.

    Returns:
        a key of ``planned``, and which of its entries this is.
    """
    factors = [reader.factors(target, i) for i in range(target.matrices[0])]
    s = torch.cat([factor.s for factor in factors])
    terms: dict[int, tuple[int, list[Term]]] = {}
    for places in copies:
        if any(id(carriers[place.parameter]) in terms for place in places):
            continue
        here: dict[int, list[Term]] = {}
        for carrier, term in terms_of(target, places, carriers, factors):
            planned.setdefault(id(carrier), _Planned(carrier))
            here.setdefault(id(carrier), []).append(term)
        every = [term for group in here.values() for term in group]
        residual = is_residual(target, places, carriers, every, factors, dtype, stored)
        terms |= {key: (int(residual), group) for key, group in here.items()}
    first = next(iter(terms))
    home = first, len(planned[first].entries)
    with planned[first].carrier.present():
        delta = nn.Parameter(torch.zeros_like(s, device=planned[first].carrier.weight().device))
    for key, (offset, group) in terms.items():
        planned[key].entries.append((delta, s, offset, group))
    return home
