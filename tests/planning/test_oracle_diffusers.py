"""What is chosen in the models of diffusers, held against the modules that own the tensors: of every class that can be made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.planning.recipes import find_recipe, recipe_for_family
from surgery.planning.targets import Model, Target, choose
from tests.oracle_diffusers import Made, Owner, class_names, models_of
from tests.releases import needs

pytestmark = needs("diffusers", ">=0.42", "the classes that are named here")

LAYERS: set[Owner] = {"linear", "in_proj", "experts", "convolution", "transposed convolution"}
#: Layers of blocks that are no targets: pattern of their names -> why.
EXCEPTIONS = {
    r"blocks\.\d+\.img_mlp\.gate\.weight": "a router",
    r"mid_output_head\.\d+\.weight": "an output head",
    r"(time_pos_embed|timestep_embedder)\.linear_[12]\.weight|to_local_embed\.\d+\.weight": "an embedding",
}
#: Classes that cannot be made, and why.
NOT_MADE = {
    **dict.fromkeys(
        (
            "FluxMultiControlNetModel",
            "HunyuanDiT2DMultiControlNetModel",
            "MultiAdapter",
            "MultiControlNetModel",
            "MultiControlNetUnionModel",
            "QwenImageMultiControlNetModel",
            "SD3MultiControlNetModel",
        ),
        "it holds several models, each of which is saved in a folder of its own",
    ),
    **dict.fromkeys(("MLPNeRSTFModel", "ShapERenderer"), "it counts wrongly on the meta device"),
    "IFWatermarker": "it has no config",
    "LearnedClassifierFreeSamplingEmbeddings": "it has no layers",
}


def _models() -> Iterator[Made]:
    for name in class_names():
        made = models_of(name)
        if not isinstance(made, str):
            yield from made


def _targets(made: Made, recipe: str | None = None) -> dict[str, str | None]:
    """Tensor -> why it is no target; None if it, or slices of it, are targets."""
    model = Model(made.config, find_recipe(recipe) if recipe else recipe_for_family(made.config), {})
    found: dict[str, str | None] = {}
    for weight in made.weights:
        fates = choose(TensorEntry(weight.name, "F32", weight.shape, 0, 0), "", Options(rank=2), model)
        reasons = {None if isinstance(fate, Target) else fate.reason for fate in fates}
        (found[weight.name],) = reasons
    return found


def test_targets_are_the_layers_of_blocks() -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for made in _models():
        counts["models"] += 1
        fates = _targets(made)
        for weight in made.weights:
            layer = weight.in_block and weight.owner in LAYERS
            why = next((why for pattern, why in EXCEPTIONS.items() if layer and re.search(pattern, weight.name)), None)
            counts[f"{weight.owner} in a block"] += layer
            counts["targets"] += fates[weight.name] is None
            if why is not None:
                counts[why] += 1
            if fates[weight.name] != why if layer else fates[weight.name] is None:
                wrong.append(f"{made.name}: {weight.name} of {weight.modules[-1]}: {fates[weight.name] or 'a target'}")
    assert not wrong
    assert set(EXCEPTIONS.values()) <= counts.keys()
    assert counts["models"] > 170
    assert counts["linear in a block"] > 8000
    assert counts["convolution in a block"] > 4000


def test_classes_that_cannot_be_made() -> None:
    assert {name for name in class_names() if isinstance(models_of(name), str)} == NOT_MADE.keys()
