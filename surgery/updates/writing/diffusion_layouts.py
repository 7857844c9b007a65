"""The layouts of diffusion models' adapters: of diffusers, and of kohya's scripts, which ComfyUI and tools like it read.

Source of the formats: diffusers 0.42, ``loaders/lora_base.py``, ``loaders/lora_conversion_utils.py`` and
``utils/peft_utils.py``; kohya-ss/sd-scripts, ``networks/lora.py``. The reader is ``surgery.updates.adapters.diffusion_lora``.
"""

from __future__ import annotations

import json
import re

from surgery.errors import OptionError
from surgery.names import DIFFUSERS_WEIGHTS
from surgery.updates.writing.adapter import AdapterToWrite, Pair
from surgery.updates.writing.low_rank import AdapterForm, Refusal
from surgery.updates.writing.modules import AdaptedModule, AdaptedModules
from surgery.updates.writing.peft_layout import rank_patterns

#: Component of a pipeline -> kohya's name for it; that of a transformer is OneTrainer's, which ComfyUI reads and diffusers not.
_OF_KOHYA = {
    "unet": "unet",
    "transformer": "transformer",
    "text_encoder": "te",
    "text_encoder_2": "te2",
}
#: The layers of a text encoder that loaders look for.
_OF_TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def check_component(form: AdapterForm) -> str:
    """The component that an adapter of these layouts is for. Raises OptionError if there is none."""
    if form.component not in _OF_KOHYA:
        raise OptionError(
            f"the layout {form.layout} is for a component of a diffusion pipeline",
            got=form.component or "a model that is none",
            expected=" or ".join(_OF_KOHYA),
            hint="PEFT's own layout takes any model: peft",
        )
    return form.component


def in_diffusion_layout(adapted: AdaptedModules, form: AdapterForm, refusal: Refusal) -> AdapterToWrite:
    """The adapter in the layout of diffusers or of kohya.

    Args:
        adapted: the modules that it changes, named as in the checkpoint.
        form: what it is written as.
        refusal: how it is said that a tensor cannot be written.

    Raises:
        OptionError: a module that loaders do not adapt, or two of one name.
    """
    component = check_component(form)
    names = {_name(module, component, refusal): module for module in adapted.modules}
    ranks = {name: adapted.rank if form.uniform_rank else module.rank for name, module in names.items()}
    if form.layout == "kohya":
        return _of_kohya(adapted, form, names, ranks, refusal)
    pairs = [
        Pair(module, ranks[name], (f"{component}.{name}.lora_A.weight", f"{component}.{name}.lora_B.weight"))
        for name, module in names.items()
    ]
    metadata = {"format": "pt"}
    if len({*ranks.values()}) > 1:
        # Releases before 0.40 take one rank as the alpha of all modules if nothing says otherwise.
        patterns = rank_patterns({name.removeprefix("text_model."): rank for name, rank in ranks.items()})
        config = {
            "r": adapted.rank,
            "lora_alpha": adapted.rank,
            "target_modules": [*patterns],
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
        }
        metadata["lora_adapter_metadata"] = json.dumps({f"{component}.{key}": value for key, value in config.items()})
    return AdapterToWrite(adapted, pairs, form.dtype, DIFFUSERS_WEIGHTS, None, metadata, {}, {})


def _of_kohya(
    adapted: AdaptedModules,
    form: AdapterForm,
    names: dict[str, AdaptedModule],
    ranks: dict[str, int],
    refusal: Refusal,
) -> AdapterToWrite:
    """All modules have one alpha, since diffusers loses track of which is whose: the halves are divided by the scaling."""
    pairs, alphas, by_key = [], {}, dict[str, AdaptedModule]()
    for name, module in names.items():
        key = f"lora_{_OF_KOHYA[check_component(form)]}_{name.replace('.', '_')}"
        if (other := by_key.setdefault(key, module)) is not module:
            raise refusal.of(module.tensors[0][0].key, f"a layer that kohya's layout calls as {other.name!r}")
        rank = ranks[name]
        pairs.append(Pair(module, rank, (f"{key}.lora_down.weight", f"{key}.lora_up.weight"), adapted.rank / rank))
        alphas[f"{key}.alpha"] = float(adapted.rank)
    return AdapterToWrite(adapted, pairs, form.dtype, f"{form.name}.safetensors", None, {"format": "pt"}, alphas, {})


def _name(module: AdaptedModule, component: str, refusal: Refusal) -> str:
    """The name of a module by which loaders look for it."""
    if not component.startswith("text_encoder"):
        return module.name
    if module.name.rpartition(".")[2] not in _OF_TEXT_ENCODER:
        raise refusal.of(module.tensors[0][0].key, "a layer of a text encoder that diffusers does not adapt")
    return re.sub(r"^encoder\.", "text_model.encoder.", module.name)  # transformers 5 has the one, files of adapters the other
