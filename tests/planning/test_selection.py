"""The recipes ``attention`` and ``mlp``, held against the modules of the models of transformers, for any family."""

from __future__ import annotations

import re

import pytest
from torch import nn

from tests.releases import OLDER

if OLDER:
    pytest.skip("the classes are those of the newest transformers", allow_module_level=True)

from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.planning.recipes import find_recipe, recipe_for_family
from surgery.planning.targets import Model, Target, choose
from surgery.quantized.recognize import Quantization
from tests import oracle
from tests.oracle import Weight

#: Families of each kind: separate and fused projections, attention of other kinds, mixtures, towers, flat blocks.
FAMILIES = re.findall(
    r"\w+",
    """
    albert bert blip_2 bloom conditional_detr cohere_asr dbrx deepseek_v3 detr falcon gemma3n gpt2 gpt_oss jetmoe llama
    lxmert minimax mixtral modernbert nemotron_h phi3 qwen3_next roformer rwkv sam2_video siglip swin switch_transformers t5
    vit whisper xlm zamba2
    """,
)
_ROLES = {
    "attention": re.compile(r"Attention|Attn|SelfOutput"),
    "mlp": re.compile(
        r"MLP|Mlp|Feed_?[Ff]orward|FFN|Intermediate|(?<!Self)Output$|Experts|Moe|MoE|GLU|DenseReluDense|DenseGated|DenseAct"
    ),
}
#: Layers whose names do not tell what they are: family -> pattern of their names -> what they are taken for, if anything.
_UNTOLD: dict[str, dict[str, str | None]] = {
    "axk2": {r"layernorm\.W_(up|down)": None},
    "bridgetower": {r"\.mlp\.": "mlp"},
    "d_fine": {r"reg_conf\.layers": None},
    "deimv2": {r"reg_conf\.layers": None},
    "edgetam_video": {r"\.mlp\.": "mlp"},
    "evolla": {r"\.to_(kv|out|q)\.|adapter\.(query|key_protein|value_protein|out_proj)": None},
    "glm_moe_dsa": {r"self_attn\.indexer\.": "attention"},
    "groupvit": {r"assign\.": None},
    "jetmoe": {r"self_attention\.experts\.": "attention"},
    "jina_embeddings_v3": {r"mixer\.out_proj": None},
    "levit": {"": None},
    "lfm2_moe": {r"conv\.(in|out)_proj": None},
    "mobilebert": {r"output\.bottleneck\.": None},
    "patchtsmixer": {r"attn_layer": None},
    "qwen3_5_moe": {r"linear_attn": "attention"},
    "qwen3_vl_moe": {r"deepstack_merger_list": None},
    "segformer": {r"linear_c\.": None},
    "superglue": {r"mlp\.": "mlp"},
    "xmod": {r"adapter_modules": None},
    "zamba2": {r"adapter_list": None},
}


def _role(model: nn.Module, weight: Weight) -> str | None:
    """What the classes of the modules around a layer say of it: ``attention``, ``mlp``, or nothing."""
    parts = weight.parameters[0].split(".")[:-1]
    for i in range(len(parts) - 1, 0, -1):
        kind = type(model.get_submodule(".".join(parts[:i]))).__name__
        if re.search(r"Norm|(Layer|Block|Model|Stage)$", kind):
            return None
        role = next((role for role, pattern in _ROLES.items() if pattern.search(kind)), None)
        if role is not None:
            return role
    return None


def _taken(weight: Weight, model: Model) -> bool:
    fates = choose(TensorEntry(weight.name, "BF16", weight.shape, 0, 1), "", Options(rank=1), model)
    return any(isinstance(fate, Target) for fate in fates)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAMILIES else [pytest.mark.slow]) for name in oracle.families()]
)
def test_attention_and_feed_forward_alone(family: str) -> None:
    wrong = set()
    for kind in oracle.classes_of(family):
        made = oracle.make(kind)
        if isinstance(made, str):
            continue
        whole = Model(made.config, recipe_for_family(made.config), Quantization())
        parts = {name: Model(made.config, find_recipe(name), Quantization()) for name in _ROLES}
        seen = set()
        for weight in oracle.saved(made.model, oracle.weights(made.model)):
            alike = (re.sub(r"\.\d+\.", ".*.", weight.name), weight.shape)
            if len(weight.shape) < 2 or 0 in weight.shape or alike in seen:
                continue
            seen.add(alike)
            taken = [name for name, part in parts.items() if _taken(weight, part)]
            if not _taken(weight, whole):
                right = taken == []
            else:
                role = _role(made.model, weight)
                told = [named for pattern, named in _UNTOLD.get(family, {}).items() if re.search(pattern, weight.name)]
                expected = told[0] if told else role
                # Where the classes say nothing, as of flat blocks, it is in one of both at most.
                right = taken == ([expected] if expected else []) or (role is None and not told and len(taken) < 2)
            if not right:
                wrong.add(f"{kind.__name__}: {alike[0]} {list(weight.shape)}: {taken}")
    assert not wrong
