"""What is chosen in the models of diffusers, held against the modules that own the tensors: of every class that can be made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.planning.recipes import find_recipe, recipe_for_family
from surgery.planning.targets import Model, Target, choose
from surgery.quantized.recognize import Quantization
from tests.oracle_diffusers import Made, Owner, Weight, class_names, models_of
from tests.releases import needs

pytestmark = needs("diffusers", ">=0.42", "the classes that are named here")

LAYERS: set[Owner] = {"linear", "in_proj", "experts", "convolution", "transposed convolution"}
#: Layers of blocks that are no targets: pattern of their names -> why.
EXCEPTIONS = {
    r"blocks\.\d+\.img_mlp\.gate\.weight": "a router",
    r"mid_output_head\.\d+\.weight": "an output head",
    r"(time_pos_embed|timestep_embedder)\.linear_[12]\.weight|to_local_embed\.\d+\.weight": "an embedding",
}
#: What a module around a layer says of it, by its class, from the innermost on.
ROLES = {
    "other": re.compile(r"Norm|Modulat|FiLM"),
    "attention": re.compile(r"Attn(Block)?$|Attention(Block)?(1d)?$|[a-z]Attention$|LiteLA$|Attn\w*Processor"),
    "mlp": re.compile(r"FeedForward|MLP|Mlp|GLU|GELU|Experts$|MoELayer$|DenseGated|Transition$|ViTMAE(Intermediate|Output)"),
}
#: Layers of attention and feed-forward layers that are not in modules of their own, by their names.
FLAT = {
    r"\.proj_mlp\.": "mlp",
    r"\d+\.(mlp|ffn)\.\d+\.": "mlp",
    r"\d+\.(ff_in|ff_out|(gate|up|down)_proj)\.": "mlp",
    r"attentions\.\d+\.feed_forward\.": "mlp",
    r"\.mlp\.(inverted|point)_conv\.": "mlp",
    r"\.kv_mapper\.": "other",  # brings the condition to the width of the attention's keys and values
    r"\.mhba\.scale_output\.": "other",  # modulation
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
    model = Model(made.config, find_recipe(recipe) if recipe else recipe_for_family(made.config), Quantization())
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
    assert {name: why for name in class_names() if isinstance(why := models_of(name), str) and name not in NOT_MADE} == {}
    assert not [name for name in NOT_MADE if not isinstance(models_of(name), str)]


def _role(weight: Weight) -> str:
    """Whether a layer is one of attention or of a feed-forward: ``attention``, ``mlp`` or ``other``."""
    flat = next((role for pattern, role in FLAT.items() if re.search(pattern, weight.name)), None)
    if flat is not None:
        return flat
    for kind in reversed(weight.modules[:-1]):
        role = next((role for role, pattern in ROLES.items() if pattern.search(kind)), None)
        if role is not None:
            return role
        if re.search(r"Block|Layer$|Model$", kind):
            return "other"
    return "other"


def test_attention_and_feed_forward_alone() -> None:
    """The recipes that select take what they say, of what is a target by default, and all of it."""
    wrong = []
    counts: Counter[str] = Counter()
    for made in _models():
        fates = _targets(made)
        chosen = {
            recipe: {name for name, why in _targets(made, recipe).items() if why is None} for recipe in ("attention", "mlp")
        }
        for weight in made.weights:
            expected = _role(weight) if fates[weight.name] is None else "other"
            found = [recipe for recipe, names in chosen.items() if weight.name in names]
            counts[expected] += expected in chosen
            if found != ([] if expected == "other" else [expected]):
                wrong.append(f"{made.name}: {weight.name} of {weight.modules[-4:]}: {found}, not {expected}")
    assert not wrong, "\n".join(wrong)
    assert counts["attention"] > 4000
    assert counts["mlp"] > 1000
