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

    With ``train="core"`` or ``train="orthogonal"``, a core C (k, k) is trained in place of the scales. A core also
    turns the directions: ``W + U diag(sqrt s) (C - I) diag(sqrt s) V^T``. With ``core``, C is free (LoRA-XS, arXiv
    2405.17604). With ``orthogonal``, ``C = diag(1 + a) Q diag(1 + b)``, where Q is orthogonal: the Cayley transform of
    a skew-symmetric matrix (PSOFT, arXiv 2505.11235).

    The model may have been loaded from the original weights or from the factorized folder (residual layout). To find
    out which, surgery compares the bytes of its weights, target by target. For a weight that is quantized in memory, it
    compares what the layer computes.

    Load the original model if you can. On the original weights, untouched scales change no bit of what the model
    computes. A model that was loaded from the residual layout is a different model without its scales. Code that loads
    the model once more, such as a trainer that needs a reference model, would then get that other model.

    Linear layers of other packages, which store their weights packed, get scales if gradients pass through them.
    compressed-tensors may leave weights packed until the model is first run. ``attach`` unpacks these weights, as the
    first run would.

    If transformers converts names and shapes when it loads the model, surgery follows this conversion: for experts that
    are stacked, and for weights that are joined or split. In a model with PEFT's adapters, these remain trainable or
    frozen, as they were. Targets that were not loaded, such as the vision tower of a model that is loaded for text
    only, keep their scales at 1.

    Args:
        model: in the dtype of the checkpoint or a wider one, or quantized; on one device or several. It must not be
            sharded yet.
        factorized: a folder that ``surgery.factorize`` has written.
        train: ``scales``, ``core`` or ``orthogonal``.

    Returns:
        The scales, all 1, or the cores, all the identity. Use the result to train, save and detach them.

    Raises:
        SourceError: the model's weights are neither the original weights nor the residual.
        OptionError: most targets are not in the model; or a target is in the model, but surgery does not know its name
            or cannot attach scales to it there; or scales are attached already.
        FormatError: the factorized folder is damaged.
        MissingExtra: this release of transformers does not tell how the model was loaded.

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
