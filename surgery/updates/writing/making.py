"""From low-rank updates of a checkpoint's tensors to an adapter that can be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import nn

from surgery.errors import OptionError
from surgery.models.peft_api import taken_for_experts
from surgery.models.placement import Place, locate
from surgery.models.skeleton import skeleton
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.diffusion_layouts import check_component, in_diffusion_layout
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor, Refusal
from surgery.updates.writing.modules import AdaptedModules, Finding
from surgery.updates.writing.peft_layout import in_peft_layout
from surgery.updates.writing.single_experts import lost_module, wrong_experts
from surgery.updates.writing.whole import whole_tensors

_REFUSAL = Refusal("written as LoRA", "leave it out: --exclude GLOB; or keep the tuned checkpoint itself")


class AdaptableModel:
    """A checkpoint for whose tensors adapters are written. Its modules are looked up once.

    Args:
        folder: with the ``config.json`` of the checkpoint; None where there is none.
        shapes: of all tensors of the checkpoint, by name.
    """

    def __init__(self, folder: Path | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._folder, self._shapes = folder, shapes

    @cached_property
    def _model(self) -> nn.Module | None:
        return None if self._folder is None else skeleton(self._folder, exact=True)

    @cached_property
    def _places(self) -> Mapping[str, list[Place]]:
        return {} if self._model is None else locate(self._model, self._shapes)

    def check_whole(self, tensors: Sequence[str]) -> None:
        """Check that an adapter in PEFT's layout can hold tensors whole, beside pairs of others.

        Raises:
            OptionError: it cannot.
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
        """
        whole_tensors(tensors, self._model, self._places, ())

    def adapter(self, tensors: Sequence[LowRankTensor], form: AdapterForm, copied: Sequence[str] = ()) -> AdapterToWrite:
        """The adapter that adds low-rank updates to tensors.

        Args:
            tensors: that are updated.
            form: what the adapter is written as.
            copied: tensors that the adapter is to hold whole.

        Raises:
            OptionError: a tensor that no adapter of this layout can change, or that its loaders are known to load wrongly.
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
        """
        if not tensors:
            raise OptionError("an adapter without low-rank updates", expected="a tensor at least that has one")
        if form.layout != "peft":
            check_component(form)
            if copied:
                raise _REFUSAL.of(copied[0], f"a tensor as a whole, for which the layout {form.layout} has no place")
            return in_diffusion_layout(Finding(_REFUSAL, single_experts=False).modules(None, tensors, {}), form, _REFUSAL)
        model, places = self._model, dict(self._places)
        for one in tensors if model is not None else ():
            held = next((name for name in (one.tensor, *one.aliases) if name in places), None)
            if held is None:
                raise _REFUSAL.of(one.key, "a tensor that the model does not have which the config names")
            places[one.tensor] = places[held]
        adapted = _adapted(model, tensors, places, single_experts=form.uniform_rank)
        whole = whole_tensors(copied, model, places, {module.name for module in adapted.modules})
        if (lost := lost_module(model, adapted)) is not None:
            raise _REFUSAL.of(*lost)
        if any(module.kind == "expert" for module in adapted.modules):
            return in_peft_layout(adapted, form, whole=whole)  # which PEFT finds by the last parts of their names
        if model is None:
            every = [name.rpartition(".")[0] for name in self._shapes]
        else:
            every = [name for name, _ in model.named_modules()]
        return in_peft_layout(adapted, form, every, whole)


def _adapted(
    model: nn.Module | None,
    tensors: Sequence[LowRankTensor],
    places: Mapping[str, Sequence[Place]],
    *,
    single_experts: bool,
) -> AdaptedModules:
    """The modules, with experts one by one where the checkpoint has them so and PEFT loads that rightly."""
    finding = Finding(_REFUSAL, single_experts, by_weight=taken_for_experts(model))
    adapted = finding.modules(model, tensors, places)
    if model is not None and wrong_experts(model, adapted) is not None:
        adapted = replace(finding, single_experts=False).modules(model, tensors, places)
    return adapted
