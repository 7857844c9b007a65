"""Adapters that are written in PEFT's layout: PEFT loads and merges them, and gives what was meant."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from surgery.errors import OptionError
from surgery.progress import Silent
from surgery.updates.writing.low_rank import AdapterForm
from surgery.updates.writing.making import AdaptableModel
from surgery.updates.writing.peft_layout import rank_patterns
from tests.families import DECODER, FAMILIES
from tests.releases import needs
from tests.truths.models import MODELS
from tests.updates.merging import assert_equal, merged_by_us, merged_on_disk, update_of
from tests.updates.writing import FALSE_WARNING, LowRank, merged_beside

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", FALSE_WARNING)

#: Parts of names of what an adapter cannot change: tied embeddings, vectors in the shape of matrices.
_LEFT = {
    "gpt2": ("wte",),
    "t5": ("shared",),
    "gemma3": ("embed_tokens",),
    "vit": ("cls_token", "position_embeddings"),
    "gpt_oss": ("_bias",),
}
#: Older releases of PEFT take the sides of stacks otherwise, or know no parameters as targets.
_stacks = needs("peft", ">=0.20", "stacks of experts as they are today")
_STACKED = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4", "granitemoe")


def _low_rank(name: str, folder: Path, rank: int | None = None) -> LowRank:
    return LowRank(folder, lambda tensor, shape: not any(part in tensor for part in _LEFT.get(name, ())), rank)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, AdapterForm("peft")) for name in ("llama", "gpt2", "phi3", "t5", "gemma3", "vit")),
        *(pytest.param(name, AdapterForm("peft"), marks=[_stacks] * (name != "gpt_oss")) for name in _STACKED),
        ("llama", AdapterForm("peft", "BF16", uniform_rank=True)),
        ("gpt2", AdapterForm("peft", "F16")),
        *(pytest.param(name, AdapterForm("peft", uniform_rank=True), marks=_stacks) for name in ("mixtral", "deepseek_v3")),
        ("gpt_oss", AdapterForm("peft", "BF16")),
    ],
    ids=lambda one: one if isinstance(one, str) else f"{one.dtype}{'-padded' * one.uniform_rank}",
)
def test_peft_adds_what_was_meant(name: str, form: AdapterForm, tmp_path: Path) -> None:
    """Of all weights: merged, beside the model, and read by us. Biases and norms have no update."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    low = _low_rank(name, folder)
    adapter = low.write(tmp_path / "lora", form)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[form.dtype]
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora/adapter_model.safetensors").values()} == {dtype}
    truth = low.after(dtype, {one.tensor: pair.scaling for pair in adapter.pairs for one, _ in pair.module.tensors})
    assert_equal(merged_by_us(folder, update_of(folder, tmp_path / "lora")), truth, low.before)
    merged = merged_beside(family, folder, tmp_path / "lora", tmp_path / "merged")
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, truth, low.before)
    assert adapter.rank == max(adapter.ranks.values())
    assert (len({*adapter.ranks.values()}) == 1) == form.uniform_rank


@pytest.mark.parametrize("name", ["gpt2", pytest.param("deepseek_v3", marks=_stacks)])
def test_the_file_is_as_peft_writes_it(name: str, tmp_path: Path) -> None:
    """The same names, the same numbers and the same order of names."""
    family = FAMILIES[name]
    low = _low_rank(name, family.save(tmp_path / "m"))
    low.write(tmp_path / "lora", AdapterForm("peft"))
    adapted: Any = peft.PeftModel.from_pretrained(family.load(tmp_path / "m"), tmp_path / "lora")
    ours = load_file(tmp_path / "lora/adapter_model.safetensors")
    theirs = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "theirs.safetensors").read_bytes() == (tmp_path / "lora/adapter_model.safetensors").read_bytes()


def test_a_model_with_other_names_on_disk(tmp_path: Path) -> None:
    folder = MODELS["llava"].save(tmp_path / "m")
    low = LowRank(folder, lambda tensor, shape: "proj" in tensor or "patch" in tensor)
    low.write(tmp_path / "lora", AdapterForm("peft"))
    load: Any = hf.LlavaForConditionalGeneration.from_pretrained
    merged = merged_on_disk(load(folder, dtype=torch.float32), tmp_path / "lora", tmp_path / "merged")
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, low.after(), low.before)
    assert_equal(merged_by_us(folder, update_of(folder, tmp_path / "lora")), low.after(), low.before)


@pytest.mark.parametrize("part", ["down_proj", "gate_up_proj"])
def test_stacks_of_square_matrices(part: str, tmp_path: Path) -> None:
    """The config tells readers by which release's rules they are, and so which side is the input."""
    torch.manual_seed(0)
    sizes = {**DECODER, "intermediate_size": 16 if part == "gate_up_proj" else 32}
    hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, num_local_experts=4, head_dim=16, sliding_window=8)).save_pretrained(
        tmp_path / "m"
    )
    low = LowRank(tmp_path / "m", lambda tensor, shape: tensor.endswith(part))
    assert {one.shape for one in low.tensors} == {(4, 32, 32)}
    low.write(tmp_path / "lora", AdapterForm("peft"))
    merged = merged_beside(FAMILIES["gpt_oss"], tmp_path / "m", tmp_path / "lora", tmp_path / "merged")
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, low.after(), low.before)
    assert_equal(merged_by_us(tmp_path / "m", update_of(tmp_path / "m", tmp_path / "lora")), low.after(), low.before)


@_stacks
def test_experts_one_by_one_where_loaders_ignore_ranks_by_module(tmp_path: Path) -> None:
    low = _low_rank("mixtral", FAMILIES["mixtral"].save(tmp_path / "m"))
    assert low.adapter(AdapterForm("peft", uniform_rank=True)).has_single_experts
    assert not low.adapter(AdapterForm("peft")).has_single_experts
    del low.tensors[next(i for i, one in enumerate(low.tensors) if "experts.0.w1" in one.tensor)]  # PEFT needs all of them
    adapter = low.adapter(AdapterForm("peft", uniform_rank=True))
    assert not adapter.has_single_experts
    adapter.write(tmp_path, low.halves, {}, Silent())
    merged = merged_beside(FAMILIES["mixtral"], tmp_path / "m", tmp_path, tmp_path / "merged")
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, low.after(), low.before)


@_stacks
def test_a_dense_layer_beside_experts(tmp_path: Path) -> None:
    """PEFT would take its projections for those of experts, by their names: they are adapted by their parameters."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [0]}
    hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**DECODER, **sizes)).save_pretrained(tmp_path / "m")
    low = LowRank(tmp_path / "m", lambda tensor, shape: "mlp" in tensor)
    assert low.write(tmp_path / "lora", AdapterForm("peft", uniform_rank=True)).has_single_experts
    merged = merged_beside(FAMILIES["qwen3_moe"], tmp_path / "m", tmp_path / "lora", tmp_path / "merged")
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, low.after(), low.before)


def test_names_that_are_the_ends_of_others(tmp_path: Path) -> None:
    """PEFT would adapt all modules that end so, and give all of them one rank."""
    folder = FAMILIES["Flux"].save(tmp_path / "m")
    low = LowRank(folder, lambda tensor, shape: tensor == "proj_out.weight" or ".ff.net" in tensor)
    low.write(tmp_path / "lora", AdapterForm("peft"))
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert isinstance(config["target_modules"], str)
    adapted: Any = peft.PeftModel.from_pretrained(FAMILIES["Flux"].load(folder), tmp_path / "lora")
    assert len(get_peft_model_state_dict(adapted)) == 2 * len(low.tensors)
    merged = adapted.merge_and_unload().state_dict()
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, low.after(), low.before)
    every = LowRank(folder, lambda tensor, shape: len(shape) == 2)
    every.write(tmp_path / "all", AdapterForm("peft"))
    merged = peft.PeftModel.from_pretrained(FAMILIES["Flux"].load(folder), tmp_path / "all").merge_and_unload().state_dict()  # type: ignore[operator]
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, every.after(), every.before)


def test_patterns_give_each_module_its_own_rank() -> None:
    chance = random.Random(0)
    parts = ("a", "b", "a_b", "ab", "1", "11", "proj", "q-proj", "x+y")
    for _ in range(300):
        names = {".".join(chance.choices(parts, k=chance.randrange(1, 4))) for _ in range(12)}
        ranks = {name: number for number, name in enumerate(sorted(names, key=lambda _: chance.random()))}
        patterns = rank_patterns(ranks)
        assert {name: patterns[get_pattern_key(list(patterns), name)] for name in names} == ranks


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("gpt2", "wte", "a weight that several modules share"),
        ("gpt_oss", "down_proj_bias", "a weight of GptOssExperts"),
        ("vit", "cls_token", "a weight of ViTEmbeddings"),
        ("mamba", "dt_proj", "a weight of Linear, which MambaMixer reads directly"),
        ("mamba", "conv1d", "a convolution in groups|a weight of Conv1d, which MambaMixer reads"),
    ],
)
def test_what_peft_cannot_change_is_refused_by_name(name: str, part: str, message: str, tmp_path: Path) -> None:
    low = LowRank(FAMILIES[name].save(tmp_path / "m"), lambda tensor, shape: part in tensor)
    with pytest.raises(OptionError, match=rf"{part}\S*' cannot be written as LoRA\n  got: +({message})(.|\n)*--exclude"):
        low.adapter(AdapterForm("peft"))


def test_a_tensor_that_the_model_does_not_have(tmp_path: Path) -> None:
    folder = FAMILIES["llama"].save(tmp_path / "m")
    low = LowRank(folder, lambda tensor, shape: "q_proj" in tensor)
    low.shapes["model.layers.9.self_attn.q_proj.weight"] = low.tensors[0].shape
    strange = [type(low.tensors[0])("model.layers.9.self_attn.q_proj.weight", low.tensors[0].shape, "matrix", 2)]
    with pytest.raises(OptionError, match="a tensor that the model does not have"):
        AdaptableModel(folder, low.shapes).adapter(strange, AdapterForm("peft"))
    with pytest.raises(OptionError, match="an adapter without low-rank updates"):
        AdaptableModel(folder, low.shapes).adapter([], AdapterForm("peft"))


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Its modules have the names of its tensors; which of these are embeddings nobody tells."""
    save_file({"a.up.weight": torch.ones(6, 4), "tok.embeddings.weight": torch.ones(9, 4)}, tmp_path / "model.safetensors")
    low = LowRank(tmp_path, lambda tensor, shape: "up" in tensor)
    low.write(tmp_path / "lora", AdapterForm("peft", base="org/model", revision="abc"))
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["target_modules"], config["base_model_name_or_path"], config["revision"]) == (["a.up"], "org/model", "abc")
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6, bias=False)})})
    model.load_state_dict({"a.up.weight": low.before["a.up.weight"]})
    merged: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora")).merge_and_unload()  # type: ignore[arg-type]
    torch.testing.assert_close(merged.state_dict()["a.up.weight"].double(), low.after()["a.up.weight"])
    with pytest.raises(OptionError, match="an embedding, by its name"):
        LowRank(tmp_path, lambda tensor, shape: True).adapter(AdapterForm("peft"))


@pytest.mark.parametrize(("factor", "what"), [(1e6, "large"), (1e-7, "small")])
def test_numbers_beyond_the_dtype(factor: float, what: str, tmp_path: Path) -> None:
    low = LowRank(FAMILIES["llama"].save(tmp_path / "m"), lambda tensor, shape: "q_proj" in tensor)
    adapter = low.adapter(AdapterForm("peft", "F16"))
    message = rf"'model\.layers\.0\.self_attn\.q_proj' has numbers that are too {what} for F16"
    with pytest.raises(OptionError, match=message):
        adapter.write(tmp_path, lambda one: tuple(factor * half for half in low.halves(one)), {}, Silent())  # type: ignore[arg-type,return-value]
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.skipif(not hasattr(hf, "LagunaConfig"), reason="this release has no Laguna")
def test_a_layer_that_peft_would_lose_on_loading(tmp_path: Path) -> None:
    """PEFT renames keys as transformers does those of a checkpoint; one of Laguna's rules fits the model's own name too."""
    torch.manual_seed(0)
    sizes = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24}
    model = hf.LagunaForCausalLM(hf.LagunaConfig(**sizes, moe_intermediate_size=24, head_dim=8))
    model.save_pretrained(tmp_path / "m")
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["shared_experts.up_proj"]))
    adapted.save_pretrained(tmp_path / "of_peft")
    fresh = hf.LagunaForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"missing adapter keys.*shared_experts\.up_proj"):
        peft.PeftModel.from_pretrained(fresh, str(tmp_path / "of_peft"))
    low = LowRank(tmp_path / "m", lambda tensor, shape: "shared_expert" in tensor and "up_proj" in tensor)
    with pytest.raises(OptionError, match=r"shared_experts\.up_proj', which PEFT takes for") as error:
        low.adapter(AdapterForm("peft"))
    assert "--exclude 'model.layers.*.mlp.shared_expert.up_proj.weight'" in str(error.value)
