"""The truths that merges are held against, checked by hand and against what the adapted models compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tensors_of
from tests.releases import needs
from tests.truths.cases import CASES, Built, Case, parameters, scaling_of, shared_root, ties_adapters
from tests.truths.measures import Kept, kept_of
from tests.truths.models import MODELS
from tests.truths.peft_side import in_float64, merged_by_peft, output_of
from tests.truths.rewriting import CONFIG, WEIGHTS

pytestmark = [pytest.mark.usefixtures("one_thread")]

_MERGED = [case for case in CASES if not case.match]
_BY_NAME = {case.name: case for case in CASES}
#: Older releases train the biases of adapted layers with ``lora_only`` as well, but leave them out when they save.
_saves_biases = needs("peft", ">=0.21", "saving the biases of adapted layers")
_COMPUTED = [
    pytest.param(*one.values, id=one.id, marks=[*one.marks, _saves_biases])
    if _BY_NAME[one.id].options.get("bias") == "lora_only"
    else one
    for one in parameters(_MERGED)
]


@pytest.fixture
def root() -> Path:
    return shared_root()


def _built(name: str, root: Path) -> tuple[Built, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A case, its model's tensors in float64, its truth."""
    built = _BY_NAME[name].build(root)
    assert built.truth is not None
    return built, {name: tensor.double() for name, tensor in tensors_of(built.model).items()}, built.truth


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("case", _COMPUTED)
def test_the_truth_computes_what_was_trained(case: Case, root: Path, tmp_path: Path) -> None:
    """Loaded into the model, it gives the output of the adapted model before it was saved; of most cases."""
    built, before, truth = _built(case.name, root)
    assert set(truth) >= set(before)
    assert {name for name in before if not torch.equal(truth[name], before[name])}
    assert all(tensor.dtype == torch.float64 and tensor.isfinite().all() for tensor in truth.values())
    if built.output is None or set(truth) != set(before):
        return
    for path in built.model.iterdir():
        if ".safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    of_diffusers = "diffusion_pytorch_model.safetensors"
    weights = of_diffusers if (built.model / of_diffusers).exists() else "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in truth.items()}, tmp_path / weights, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    if "dtype" in config:  # in which transformers would load it
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    family = MODELS[case.model]
    bare = output_of(family, in_float64(family, built.model))
    merged = output_of(family, in_float64(family, tmp_path))
    effect = (built.output - bare).norm()
    assert (merged - built.output).norm() < 1e-5 * effect, "the truth is another model than what was trained"


@pytest.mark.parametrize(
    "name", ["lora, all linear layers", "lora, bfloat16 model", "rslora", "embedding and head", "gpt2", "UNet"]
)
def test_plain_updates_by_hand(name: str, root: Path) -> None:
    """``W + scaling B A`` for what the adapter has, and the very weights for all else."""
    built, expected, truth = _built(name, root)
    config = json.loads((built.adapters[0] / CONFIG).read_text())
    stored = load_file(built.adapters[0] / WEIGHTS)
    changed = set()
    for key in stored:
        module, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        if half in ("A.weight", "embedding_A"):
            A, B = (stored[f"base_model.model.{module}.lora_{half.replace('A', one)}"].double() for one in "AB")
            W = expected[f"{module}.weight"]
            update = B.flatten(1) @ A.flatten(1)
            update = update.T if half == "embedding_A" or name == "gpt2" else update
            expected[f"{module}.weight"] = W + scaling_of(config) * update.reshape(W.shape)
            changed.add(f"{module}.weight")
    assert changed
    for tensor, value in truth.items():
        if tensor in changed:
            assert _close(value, expected[tensor], 1e-12), tensor
        else:
            assert torch.equal(value, expected[tensor]), tensor


def test_patterns_by_hand(root: Path) -> None:
    """Ranks and alphas of single modules."""
    built, before, truth = _built("patterns of ranks and alphas", root)
    stored = load_file(built.adapters[0] / WEIGHTS)
    for module, r, alpha in (
        ("layers.0.self_attn.q_proj", 2, 4),
        ("layers.1.self_attn.q_proj", 3, 5),
        ("layers.0.mlp.down_proj", 3, 7),
        ("layers.1.mlp.down_proj", 5, 7),
    ):
        A, B = (stored[f"base_model.model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        assert len(A) == r
        name = f"model.{module}.weight"
        assert _close(truth[name], before[name] + alpha / r * (B @ A), 1e-12)


@pytest.mark.parametrize(("name", "transposed"), [("dora", False), ("gpt2, dora", True), ("UNet, dora", False)])
def test_dora_by_hand(name: str, transposed: bool, root: Path) -> None:
    """Each output's row of ``W + scaling B A``, brought to its magnitude."""
    built, before, truth = _built(name, root)
    config = json.loads((built.adapters[0] / CONFIG).read_text())
    stored = load_file(built.adapters[0] / WEIGHTS)
    count = 0
    for key, magnitude in stored.items():
        if not key.endswith("lora_magnitude_vector"):
            continue
        module = key.removesuffix(".lora_magnitude_vector")
        A, B = (stored[f"{module}.lora_{half}.weight"].double().flatten(1) for half in "AB")
        tensor = module.removeprefix("base_model.model.") + ".weight"
        W = before[tensor].T if transposed else before[tensor].flatten(1)
        turned = W + scaling_of(config) * (B @ A)
        by_hand = magnitude.double().flatten()[:, None] * turned / turned.norm(dim=1, keepdim=True)
        by_hand = by_hand.T if transposed else by_hand.reshape(before[tensor].shape)
        assert _close(truth[tensor], by_hand, 1e-12), tensor
        count += 1
    assert count >= 6


def test_what_is_copied_by_hand(root: Path) -> None:
    """Whole modules and rows: those of the adapter, whatever was there."""
    built, before, truth = _built("modules to save", root)
    stored = load_file(built.adapters[0] / WEIGHTS)
    copied = {key.removeprefix("base_model.model."): value for key, value in stored.items() if ".lora_" not in key}
    assert {"lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"} <= set(copied)
    for name, value in copied.items():
        assert torch.equal(truth[name], value.double()), name
        assert not torch.equal(truth[name], before[name]), name
    for case, tensor in (("tokens", "model.embed_tokens.weight"), ("tied, tokens", "model.embed_tokens.weight")):
        built, before, truth = _built(case, root)
        rows = load_file(built.adapters[0] / WEIGHTS)[
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        ]
        assert torch.equal(truth[tensor][[3, 5]], rows.double())
        others = [i for i in range(50) if i not in (3, 5)]
        assert torch.equal(truth[tensor][others], before[tensor][others])


@pytest.mark.parametrize("case", ["gpt2, all biases", pytest.param("gpt2, biases of its layers", marks=_saves_biases)])
def test_copied_biases_by_hand(case: str, root: Path) -> None:
    built, before, truth = _built(case, root)
    biases = {k: v for k, v in load_file(built.adapters[0] / WEIGHTS).items() if k.endswith("bias")}
    assert len(biases) >= 8
    for key, value in biases.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(truth[name], value.double()), name
        assert not torch.equal(truth[name], before[name]), name


def test_a_bias_of_an_update_by_hand(root: Path) -> None:
    built, before, truth = _built("gpt2, lora_bias", root)
    stored = load_file(built.adapters[0] / WEIGHTS)
    biases = [key for key in stored if key.endswith("lora_B.bias")]
    assert len(biases) == 8
    for key in biases:
        name = key.removeprefix("base_model.model.").replace("lora_B.bias", "bias")
        assert _close(truth[name], before[name] + 5 / 3 * stored[key].double(), 1e-12), name


def test_stacked_experts_by_hand(root: Path) -> None:
    """A row of A and a column of B for each expert: of A expert after expert, of B direction after direction."""
    built, before, truth = _built("gpt_oss", root)
    stored = load_file(built.adapters[0] / WEIGHTS)
    for layer in range(2):
        for inner, parameter in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}lora_"
            A, B = (stored[f"{key}{half}.weight"].double() for half in "AB")
            name = f"model.layers.{layer}.mlp.experts.{parameter}"
            experts = len(before[name])
            for i in range(experts):
                update = B[:, i::experts] @ A[3 * i : 3 * i + 3]
                expected = before[name][i] + 5 / 3 * (update.T if before[name][i].shape != update.shape else update)
                assert _close(truth[name][i], expected, 1e-12), (name, i)


@ties_adapters
def test_tied_embeddings_that_peft_merges_otherwise(root: Path) -> None:
    """PEFT 0.21 adds the update of an embedding and its head, which are one weight, once for each."""
    built, before, truth = _built("tied, embedding and head as one", root)
    name = "model.embed_tokens.weight"
    by_peft = merged_by_peft(MODELS["tied"], built.model, built.adapters[0])
    assert _close(by_peft[name] - before[name], 2 * (truth[name] - before[name]), 1e-6)
    built, before, truth = _built("tied, embedding alone", root)
    by_peft = merged_by_peft(MODELS["tied"], built.model, built.adapters[0])
    assert "lm_head.weight" not in by_peft
    assert torch.equal(truth["lm_head.weight"], before[name])


@pytest.mark.parametrize("case", parameters([case for case in CASES if case.match]))
def test_what_is_refused_is_there(case: Case, root: Path) -> None:
    built = case.build(root)
    assert built.truth is None
    assert all(any(adapter.iterdir()) for adapter in built.adapters)


def test_names_differ() -> None:
    assert len(_BY_NAME) == len(CASES)
    assert {case.model for case in CASES} >= {
        "llama",
        "gpt2",
        "qwen3_moe",
        "mixtral",
        "gpt_oss",
        "phi3",
        "llava",
        "t5",
        "UNet",
        "convnext",
    }


def test_what_peft_loses_of_small_updates(root: Path) -> None:
    """In bfloat16: so the measure of what is kept has something to tell."""
    for name in ("lora, small", "gpt2, small", "UNet, small", "qwen3_moe, stacked, small"):
        built, before, truth = _built(name, root)
        family = MODELS[_BY_NAME[name].model]
        by_peft = merged_by_peft(family, built.model, built.adapters[0], torch.bfloat16)
        changed = [tensor for tensor in truth if not torch.equal(truth[tensor], before[tensor])]
        least = min(one.share for t in changed for one in kept_of(before[t], truth[t], by_peft[t], rank=3))
        assert 0.05 < least < 0.97, f"{name}: {least}"
        exact = Kept.of_all([one for t in changed for one in kept_of(before[t], truth[t], truth[t], rank=3)])
        assert abs(exact.share - 1) < 1e-12
        assert exact.error < 1e-12
        assert abs(exact.within / exact.asked - 1) < 1e-9
