"""Put the scales of a factorized checkpoint, or cores, into a loaded model as its only trainable parameters."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.models.carriers import unwrapped
from surgery.models.peft_api import has_adapters
from surgery.training.attach_plan import plan_attach
from surgery.training.attached_path import AttachedPath, PathInPlace
from surgery.training.attached_scales import Scales
from surgery.training.lowrank import LowRankPath
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

    Linear layers that others have packed, in classes of their own, get scales if they pass gradients on. What
    compressed-tensors leaves packed until the model is first run is unpacked here, as it would be then.

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
    bare = unwrapped(model)
    if any(isinstance(module, LowRankPath) for module in bare.modules()):
        raise OptionError("scales are attached to this model already", hint="detach() them first")
    plan = plan_attach(model, factorized, train)
    if not has_adapters(bare):  # else PEFT has done it
        bare.requires_grad_(False)
    attached: list[PathInPlace] = []
    for path, layers in plan.paths:
        attached.append(AttachedPath(path, layers))
        path.requires_grad_(True)
    plan.note_absent()
    homes = {key: (attached[number], i) for key, (number, i) in plan.homes.items()}
    return Scales(model, factorized, plan.manifest, homes, attached, train)
