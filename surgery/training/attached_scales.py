"""The scales that are attached to a model: their values, saved and loaded, and taken out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.arguments import as_path
from surgery.device import on_its_own_terms
from surgery.errors import OptionError, ScalesError
from surgery.format.manifest import Manifest
from surgery.format.scales.writing import write_scales
from surgery.models.carriers import is_sharded
from surgery.progress import note
from surgery.training.attached_path import PathInPlace
from surgery.training.choice import check_alone, leading, replace_data, summed_gradients
from surgery.training.loaded import TrainedFile
from surgery.training.ways import Way, numbers_of_way, restricted, saved_as, spread_out, values_from, values_of


class Scales:
    """The scales, or cores, that are attached to a model. ``attach`` returns them."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        manifest: Manifest,
        homes: dict[str, tuple[PathInPlace, int]],
        attached: Sequence[PathInPlace],
        way: Way,
    ) -> None:
        self._model = model
        self._folder = folder
        self._manifest = manifest
        self._homes = homes
        self._attached = list(attached)
        self._way: Way = way
        self._targets = {target.key: target for target in manifest.targets}
        #: Directions that are trained, (B, k) on the CPU, of each target in the model; None before any are chosen.
        self._masks: dict[str, torch.Tensor] | None = None
        #: Scales or cores of the targets that the model does not have, and what a file had beside them.
        self._absent = {
            key: values_from(way, torch.zeros(target.shape_of(saved_as(way)), dtype=torch.float32))
            for key, target in self._targets.items()
            if key not in homes
        }
        self._absent_beside: dict[str, dict[str, torch.Tensor]] = {}

    def __repr__(self) -> str:
        """How many targets and numbers, of which folder, where they are, and whether they have been changed."""
        deltas = [home.path.delta(i) for home, i in self._homes.values()]
        there, every = len(self._homes), len(self._manifest.targets)
        parts = [
            f"{there} targets" + (f" of {every}" if there < every else ""),
            f"{sum(delta.numel() for delta in deltas):,} trainable",
            *([f"train={self._way!r}"] if self._way != "scales" else []),
            *(["chosen"] if self._masks is not None else []),
            repr(str(self._folder)),
            ", ".join(sorted({str(delta.device) for delta in deltas})),
            _state(deltas),
        ]
        if not self._attached:
            parts.append("detached")
        return f"Scales({', '.join(parts)})"

    @property
    def train(self) -> Way:
        """What is trained: ``scales``, ``core`` or ``orthogonal``."""
        return self._way

    @property
    def chosen(self) -> dict[str, torch.Tensor] | None:
        """Which directions are trained, for the key of each target in the model: bool (k,), or (B, k) for a stack, on the CPU.

        None before ``choose``.
        """
        if self._masks is None:
            return None
        return {key: mask.view(self._targets[key].scales_shape).clone() for key, mask in self._masks.items()}

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the model are trainable, and how many there are in all, in the format of PEFT.

        All parameters of the model count. If there is a LoRA beside the scales, its parameters count as trainable too.
        """
        trainable = every = 0
        for parameter in self._model.parameters():
            count = _count(parameter)
            every += count
            trainable += count if parameter.requires_grad else 0
        print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters for the optimizer: one for each target in the model, float32, flat, 0 when untouched.

        They are ``g - 1`` (B k,) for scales, ``C - I`` (B k k,) for cores, and (B (k (k - 1) / 2 + 2 k),) for
        orthogonal cores. The latter hold, for each matrix, the skew-symmetric matrix below its diagonal, row by row,
        then a and b (see ``attach``). Use no weight decay.

        Raises:
            OptionError: the scales have been offloaded and cannot be trained there.
        """
        return iter([_trainable(home.path.delta(i)) for home, i in self._homes.values()])

    def values(self) -> dict[str, torch.Tensor]:
        """For the key of each target: ``g``, float32 (k,), or (B, k) for a stack; or its core ``C``, (k, k) or (B, k, k).

        All are on the CPU. A target that the model does not have has untouched values, or those that were last loaded.
        If the scales are sharded over processes, all processes must call this together.
        """
        values = {key: self._values_of(key, self._whole(key)) for key in self._homes}
        return values | {key: value.clone() for key, value in self._absent.items()}

    def _whole(self, key: str) -> torch.Tensor:
        """The parameters of all directions of a target, (B, numbers), on the CPU; gathered if they are sharded."""
        home, i = self._homes[key]
        target = self._targets[key]
        count, k = target.matrices[0], target.rank
        mask = None if self._masks is None else self._masks[key]
        trained = k if mask is None else int(mask[0].sum())
        parameters = _gathered(home.path.delta(i), (count, numbers_of_way(self._way, trained)))
        return parameters if mask is None else spread_out(self._way, parameters, k, _positions(mask))

    def _values_of(self, key: str, parameters: torch.Tensor) -> torch.Tensor:
        """The scales or core that the parameters (B, numbers) of a target amount to, float32."""
        target = self._targets[key]
        return values_of(self._way, parameters, target.rank).reshape(target.shape_of(saved_as(self._way)))

    @property
    def _noun(self) -> str:
        return "scales" if self._way == "scales" else "cores"

    @on_its_own_terms
    def choose(self, keep: int = 16) -> None:
        """Train only the directions of each matrix that the loss depends on most. The others are untouched from now on.

        The choice uses the gradients that backward passes have left in ``parameters()``. For scales, what counts is the
        magnitude of the gradient; for a core, the norm over the row and the column of the direction; for orthogonal
        cores, the norm over all parameters that belong to the direction. In a run with several processes, the gradients
        are summed over the processes.

        The parameters remain the same objects. They become smaller and have no gradients. An optimizer that has not
        made a step yet stays valid. Directions that are not chosen leave the computation, as if the weights had been
        factorized without them. If a weight of the model is a residual, which lacks these directions, they stay in the
        computation.

        Args:
            keep: how many directions to train of each matrix. A matrix that has no more than this keeps all of them.

        Raises:
            OptionError: there are no gradients, all are 0, or some are not finite; ``keep`` is less than 1; or the
                scales are detached, offloaded, sharded or in DistributedDataParallel.

        Warns:
            SurgeryWarning: the model has residuals.
        """
        if keep < 1:
            raise OptionError("at least one direction must be trained", got=f"keep {keep}", expected="1 or more")
        if not self._attached:
            raise OptionError(f"the {self._noun} are detached", hint="choose before detach")
        deltas = list(self.parameters())
        check_alone(deltas)
        kept = {}
        for key, gradient in zip(self._homes, summed_gradients(deltas), strict=True):
            k = self._trained(key)
            kept[key] = leading(self._way, gradient.view(self._targets[key].matrices[0], -1), k, keep)
        if self._restrict(kept):
            note(
                "weights of the model are residuals, which lack all kept directions: those that are not chosen must still be "
                "computed; with the original model loaded they would take neither memory nor time"
            )

    def _trained(self, key: str) -> int:
        """How many directions are trained of each matrix of a target."""
        return self._targets[key].rank if self._masks is None else int(self._masks[key][0].sum())

    def _restrict(self, kept: Mapping[str, torch.Tensor]) -> bool:
        """Train some of the directions that are trained, (B, k') int64; return whether residuals need the others."""
        deltas = {key: home.path.delta(i) for key, (home, i) in self._homes.items()}
        keys = {id(delta): key for key, delta in deltas.items()}
        lacking = False
        for attached in self._attached:
            lacking |= attached.path.restrict([kept[keys[id(delta)]] for delta in attached.path.deltas()])
        masks = {}
        for key, at in kept.items():
            delta, k = deltas[key], self._trained(key)
            data = restricted(self._way, delta.data.view(len(at), -1), k, at.to(delta.device))
            replace_data(delta, data.flatten())
            masks[key] = torch.zeros(len(at), self._targets[key].rank, dtype=torch.bool)
            masks[key].scatter_(1, at if self._masks is None else _positions(self._masks[key]).gather(1, at), True)
        self._masks = masks
        return lacking

    @on_its_own_terms
    def save(self, path: str | Path) -> None:
        """Write the scales file that ``surgery fold`` takes: multipliers if scales are trained, cores otherwise.

        The file also holds the choice of directions, and the parameters of orthogonal cores. In a distributed run all
        processes must call this; the first process writes.

        Args:
            path: path of the file. An existing file is replaced.

        Raises:
            OptionError: ``path`` is not a path; or the scales have been offloaded, or a trainer has changed them in a
                way that surgery does not know.
            OutputError: the file cannot be written.

        Warns:
            SurgeryWarning: the model was run, but did not use some of the scales; or some scales are frozen.
        """
        path = as_path(path, "path")
        used = {key: home.used for key, (home, _) in self._homes.items()}
        unused = sorted(key for key, (_, every) in used.items() if not every)
        if unused and any(some for some, _ in used.values()):
            note(
                f"the {self._noun} of {unused[0]!r} and of {len(unused) - 1} other targets were never used, or not by all "
                "layers that share the weight: the model does not run these, or reads their weights in an unknown way"
            )
        if frozen := [key for key, (home, i) in self._homes.items() if not home.path.delta(i).requires_grad]:
            note(
                f"the {self._noun} of {frozen[0]!r} and of {len(frozen) - 1} other targets are frozen: what freezes a model, "
                "such as PEFT's get_peft_model, comes before attach"
            )
        parameters = {key: self._whole(key) for key in self._homes}
        values = {key: self._values_of(key, value) for key, value in parameters.items()} | self._absent
        beside = {kind: dict(tensors) for kind, tensors in self._absent_beside.items()}
        if (chosen := self.chosen) is not None:
            beside.setdefault("chosen", {}).update({key: mask.to(torch.uint8) for key, mask in chosen.items()})
        if self._way == "orthogonal":
            shaped = {key: value if len(self._targets[key].scales_shape) > 1 else value[0] for key, value in parameters.items()}
            beside.setdefault("orthogonal", {}).update(shaped)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            write_scales(path, values, self._manifest.fingerprint, saved_as(self._way), beside)

    @on_its_own_terms
    def load(self, path: str | Path) -> None:
        """Load the values of a scales file.

        If cores are trained, scales in the file are converted to cores. If scales are trained, cores in the file are
        converted to scales, if they only scale. A choice of directions in the file is loaded too. Values of targets
        that the model does not have are kept for ``values`` and ``save``.

        Args:
            path: path of the file, which was written for the same factorized folder.

        Raises:
            ScalesError: there is no such file; or its scales belong to other factors, or are not finite; or it holds
                cores that this kind of training cannot represent; or it changes directions that are not among those
                chosen here.
            ReadError, FormatError: the file cannot be read, or is not a safetensors file.
            OptionError: ``path`` is not a path; or the scales have been offloaded; or the file holds a choice of
                directions, and the model is already distributed over processes.

        Warns:
            SurgeryWarning: the file does not say which factors it belongs to, or has other names or shapes than the
                targets; or as for ``surgery.read_scales``.
        """
        given = TrainedFile(Path(path), self._manifest)
        parameters = {key: given.parameters(self._targets[key], self._way) for key in self._homes}
        masks = {key: given.chosen(self._targets[key]) for key in self._homes}
        absent = {key: given.values(self._targets[key], self._way) for key in self._absent}
        deltas = {key: _trainable(home.path.delta(i)) for key, (home, i) in self._homes.items()}
        beside = given.file.beside
        for key, mask in (self._masks or {}).items():
            if not given.is_untouched_outside(self._targets[key], mask):
                raise ScalesError(
                    f"{path}: directions of {key!r} have been changed that are not among those chosen here",
                    hint="attach again, and load the file before any are chosen",
                )
        if self._masks is None and "chosen" in beside:
            if not all(bool(mask.all()) for mask in masks.values()):
                check_alone(list(deltas.values()))
                self._restrict({key: _positions(mask) for key, mask in masks.items()})
            self._masks = masks
        self._absent = absent
        self._absent_beside = {
            kind: kept
            for kind, some in beside.items()
            if (kind != "orthogonal" or self._way == "orthogonal")  # of another training than this one
            and (kept := {key: some[key] for key in some.keys() & absent.keys()})
        }
        with torch.no_grad():
            for key, delta in deltas.items():
                value: Any = parameters[key]
                if self._masks is not None:
                    value = restricted(self._way, value, self._targets[key].rank, _positions(self._masks[key]))
                value = value.flatten()
                if is_sharded(delta):
                    from torch.distributed.tensor import distribute_tensor

                    sharded: Any = delta
                    value = distribute_tensor(value.to(delta.device), sharded.device_mesh, sharded.placements)
                delta.copy_(value)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A context in which the model computes as with untouched scales. The values return when the context ends.

            with scales.untouched():
                reference = model(ids).logits

        On the original weights, this is the original model, bit for bit. On a residual, it equals the original model
        within the rounding of the dtype. No gradients are recorded.
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
        """Whether a weight of this module itself has scales. Modules inside it do not count.

        Args:
            module: any module of the model.
        """
        return any(module is other for attached in self._attached for other in attached.modules)

    def detach(self) -> None:
        """Remove the scales from the model. Its weights are what they were before ``attach``; they stay frozen."""
        for attached in self._attached:
            attached.remove()
        self._attached.clear()


def _state(deltas: Sequence[nn.Parameter]) -> str:
    """Describe ``g - 1`` of all targets, as far as this process holds it."""
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


def _gathered(delta: nn.Parameter, shape: tuple[int, int]) -> torch.Tensor:
    """A parameter's values on the CPU, gathered if it is sharded over processes."""
    value: Any = _trainable(delta).detach()
    gathered: torch.Tensor = value.full_tensor() if is_sharded(value) else value
    if gathered.numel() != math.prod(shape):
        raise OptionError(
            "a trainer has changed the scales in a way that surgery does not know",
            got=list(gathered.shape),
            expected=[math.prod(shape)],
            hint="shard with DistributedDataParallel or FSDP2 (fully_shard)",
        )
    return gathered.float().cpu().reshape(shape)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """The places (B, k') of what is true in a mask (B, k), as many in each row; ascending."""
    return mask.nonzero()[:, 1].view(len(mask), -1)
