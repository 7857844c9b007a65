"""LoRA adapters as PEFT saves them, hostile variants of them, and what PEFT itself makes of any."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

_MODULES = ("q_proj", "k_proj", "o_proj", "up_proj")
#: What people write for the modules of an adapter, and what is nearly that.
_TAME = (
    *("q_proj", "k_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj", "up.proj", "proj", ""),
    *(r"layers\.(0|1)\..*q_proj", r"model\.layers\.\d+\.mlp\..*", "^model.*k_proj", "(q|k|o)_proj$", "[qk]_proj", ".*"),
    *(
        r"\.o_proj",
        r"layers\.[0-9]{1,2}\.self_attn\.\w+",
        r".*\b(q|up)_proj",
        "q_proj+",
        "(?:up|o)_proj",
        "layers.1.",
        "[0-9]+",
    ),
)
#: What only backtracking could match, what keeps it busy for ever, and what is no expression.
_WILD = (
    *("([a-z._0-9]+)+X", "(.*a|.*b)*c", r"(\w+\.?)*!", "(?=.*q)q_proj", r"(.)\1", "(?i:Q_PROJ)", "(?!k)._proj", "(?<=l)x"),
    *("(", "a)|(b", "[", "a{99999999999999999999}", "(" * 3000 + ")" * 3000, "(a{900}){900}", "q_proj\n", "\\", "x**", "*"),
    *(".*a" * 300, "(?P<a>x)", "(.*a.{40}b|.*b.{30}c)+x.*", "[z-a]", "[[a]", "\ud800", "a+" * 60_000),
)


def save_adapter(model: Path, folder: Path) -> Path:
    """An adapter of four kinds of modules, with ranks and alphas of their own, as PEFT saves it."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(_MODULES),
        rank_pattern={"layers.1.mlp.up_proj": 5, "k_proj": 2},
        alpha_pattern={"up_proj": 7, r"layers\.0\..*o_proj": 4},
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute that has a new name
        adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return folder


def mutate_patterns(config: dict[str, Any], chance: random.Random) -> str:
    """A config whose alphas, or now and then ranks, are looked up by other patterns; of some a name is there twice."""
    key = chance.choice(("alpha_pattern", "alpha_pattern", "rank_pattern"))
    kinds = chance.choice(((_TAME,), (_TAME,), (_TAME, _WILD)))
    found = {chance.choice(chance.choice(kinds)): chance.choice((2, 3, 5, 0.5, -1)) for _ in range(chance.randrange(1, 5))}
    text = json.dumps({**config, key: found})
    return text.replace("{", chance.choice(('{"r": 3, ', '{"alpha_pattern": {}, ')), 1) if chance.randrange(8) == 0 else text


def is_tame(config: dict[str, Any]) -> bool:
    """Whether PEFT may be asked: of other patterns it would perhaps never be done."""
    return all(
        pattern in (*_TAME, *_MODULES, "layers.1.mlp.up_proj", r"layers\.0\..*o_proj")
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in config.get(key) or ()
    )


def merged_by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor] | None:
    """float64 weights of a model with an adapter merged into it; None if PEFT does not take all of it.

    Whatever PEFT raises means that it does not.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.PeftModel(base, peft.PeftConfig.from_pretrained(str(adapter)))
            result = set_peft_model_state_dict(adapted, load_file(adapter / "adapter_model.safetensors"))
            if result.unexpected_keys or any("lora_" in key for key in result.missing_keys):
                return None
            merged: Any = adapted.merge_and_unload()
        except Exception:
            return None
    return dict(merged.state_dict())
