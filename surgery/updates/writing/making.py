"""From low-rank updates of a checkpoint's tensors to an adapter that can be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.models.placement import locate
from surgery.models.skeleton import skeleton
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor, Refusal
from surgery.updates.writing.modules import Finding
from surgery.updates.writing.peft_layout import in_peft_layout

_REFUSAL = Refusal("written as LoRA", "leave it out: --exclude; or keep the tuned checkpoint itself")


def adapter_of(
    folder: Path | None,
    tensors: Sequence[LowRankTensor],
    shapes: Mapping[str, tuple[int, ...]],
    form: AdapterForm,
    copied: Sequence[str] = (),
) -> AdapterToWrite:
    """The adapter that adds low-rank updates to tensors of a checkpoint.

    Args:
        folder: with the ``config.json`` of the checkpoint; None where there is none.
        tensors: that are updated.
        shapes: of all tensors of the checkpoint, by name.
        form: what the adapter is written as.
        copied: tensors that the adapter is to hold whole.

    Raises:
        OptionError: a tensor that no adapter of this layout can change, or that its loaders are known to load wrongly.
        MissingExtra, SourceError: see ``surgery.models.skeleton``.
    """
    model = None if folder is None else skeleton(folder, exact=True)
    places = {} if model is None else locate(model, shapes)
    for one in tensors:
        if model is not None and one.tensor not in places:
            raise _REFUSAL.of(one.key, "a tensor that the model does not have which the config names")
    adapted = Finding(_REFUSAL, single_experts=False).modules(model, tensors, places)
    return in_peft_layout(adapted, form, model)
