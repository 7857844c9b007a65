"""Adapters with the names that tensors have on the hub, and the names that checkpoints have."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MissingExtra, OptionError, SurgeryWarning
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.reading import read_adapters
from tests.families import DECODER, FAMILIES
from tests.models import save_llama, tensors_of
from tests.releases import needs
from tests.updates.merging import adapt, assert_equal, entries_of, merged_by_us, merged_on_disk, update_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

_AutoModel: Any = hf.AutoModelForCausalLM
_PREFIX = "base_model.model."
_OPTIONS: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]}


def _renamed(adapter: Path, rename: Callable[[str], str]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


def _with_default(name: str) -> str:
    """As the names are in the model, which some tools save as they are."""
    if name.endswith("lm_head.weight"):
        return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        if f".{part}.weight" in name or name.endswith(part):
            return name.replace(f".{part}", f".{part}.default")
    return name


@pytest.mark.parametrize(
    "rename",
    [
        _with_default,
        lambda name: name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
        lambda name: name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"),
        lambda name: name.replace("layers.", "_orig_mod.layers."),
        lambda name: name.replace(_PREFIX, f"{_PREFIX}_orig_mod."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("self_attn", "_checkpoint_wrapped_module._fsdp_wrapped_module.self_attn"),
        lambda name: name.removeprefix(_PREFIX),
        lambda name: name.removeprefix(_PREFIX).removeprefix("model."),
        lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.weight"),
    ],
    ids=range(12),
)
def test_names_of_wrappers(rename: Callable[[str], str], tmp_path: Path) -> None:
    folder = FAMILIES["llama"].save(tmp_path / "m")
    adapter = adapt(FAMILIES["llama"].load(folder), tmp_path / "lora", **_OPTIONS)
    truth = merged_on_disk(FAMILIES["llama"].load(folder), adapter, tmp_path / "merged")
    before = load_file(adapter / "adapter_model.safetensors")
    _renamed(adapter, rename)
    after = load_file(adapter / "adapter_model.safetensors")
    assert len(after) == len(before)
    assert after.keys() != before.keys()
    update = update_of(folder, adapter)
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))
    assert update.accounts[0].keys() == after.keys()


def test_a_name_that_all_modules_lack(tmp_path: Path) -> None:
    """The adapter was trained on a model that was a part of another one."""
    folder = FAMILIES["llama"].save(tmp_path / "m")
    adapter = adapt(FAMILIES["llama"].load(folder), tmp_path / "lora", target_modules=["q_proj", "o_proj"])
    truth = merged_on_disk(FAMILIES["llama"].load(folder), adapter, tmp_path / "merged")
    _renamed(adapter, lambda name: name.replace(_PREFIX, f"{_PREFIX}policy."))
    with pytest.warns(SurgeryWarning, match="the adapter's names differ from the checkpoint's, and all are found"):
        update = update_of(folder, adapter)
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))


@needs("transformers", ">=5.10", "ViT with these names")
def test_a_name_that_all_modules_lack_of_a_converted_model(tmp_path: Path) -> None:
    """The files have the names of before transformers 5, the adapter those of today, with something before them."""
    folder = FAMILIES["vit"].save(tmp_path / "m")
    adapter = adapt(FAMILIES["vit"].load(folder), tmp_path / "lora", target_modules=["q_proj", "fc1"])
    truth = merged_on_disk(FAMILIES["vit"].load(folder), adapter, tmp_path / "merged")
    _renamed(adapter, lambda name: name.replace(_PREFIX, f"{_PREFIX}policy."))
    with pytest.warns(SurgeryWarning, match="the adapter's names differ from the checkpoint's, and all are found"):
        update = update_of(folder, adapter)
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))


@pytest.mark.parametrize("is_told", [True, False])
def test_a_head_without_transformers(is_told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether another module shares it the config says, or else only the model."""
    folder = FAMILIES["llama"].save(tmp_path / "m")
    adapter = adapt(FAMILIES["llama"].load(folder), tmp_path / "lora", target_modules=["lm_head", "embed_tokens"])
    truth = merged_on_disk(FAMILIES["llama"].load(folder), adapter, tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (folder / "config.json").write_text(json.dumps(config | ({"tie_word_embeddings": False} if is_told else {})))
    monkeypatch.setitem(sys.modules, "transformers", None)
    if not is_told:
        with pytest.raises(MissingExtra, match="transformers"):
            update_of(folder, adapter)
        return
    assert_equal(merged_by_us(folder, update_of(folder, adapter)), truth, tensors_of(folder))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "UNet"])
def test_transformers_is_not_asked_where_names_tell(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    targets = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["intermediate.dense"], "UNet": ["to_q", "conv1"]}
    adapter = adapt(family.load(folder), tmp_path / "lora", target_modules=targets[name], fan_in_fan_out=name == "gpt2")
    truth = merged_on_disk(family.load(folder), adapter, tmp_path / "merged")
    monkeypatch.setitem(sys.modules, "transformers", None)
    update = update_of(folder, adapter)
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))
    update = read_adapters([(adapter, 1.0)], None, entries_of(folder))
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))


def _llava(folder: Path) -> Path:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER))
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("vision", [False, True])
def test_a_model_for_images_and_texts(is_old: bool, vision: bool, tmp_path: Path) -> None:
    """Its modules have other names since transformers 4.52, and its files those of before."""
    folder = _llava(tmp_path / "m")
    targets = r".*language_model.*\.q_proj" if not vision else ["q_proj", "fc1", "linear_1"]

    def load() -> Any:
        return hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    adapter = adapt(load(), tmp_path / "lora", target_modules=targets)
    truth = merged_on_disk(load(), adapter, tmp_path / "merged")
    if is_old:
        _renamed(
            adapter,
            lambda name: (
                name.replace("model.language_model.", "language_model.model.")
                .replace("model.vision_tower.", "vision_tower.")
                .replace("model.multi_modal", "multi_modal")
            ),
        )
    update = update_of(folder, adapter)
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))


@needs("peft", ">=0.20", "loading adapters of single experts")
@pytest.mark.parametrize(
    ("name", "experts", "projections"),
    [
        ("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_adapters_of_single_experts(name: str, experts: str, projections: tuple[str, ...], tmp_path: Path) -> None:
    """As all were before transformers 5, which stacks experts in memory; on the disk they are single."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    adapter = adapt(family.load(folder), tmp_path / "lora", target_modules=["q_proj"])
    halves = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for tensor, entry in entries_of(folder).items():
        module = tensor.removesuffix(".weight")
        if f".{experts}." in tensor and module.rpartition(".")[2] in projections:
            halves[f"{_PREFIX}{module}.lora_A.weight"] = 0.1 * torch.randn(3, entry.shape[1], generator=generator)
            halves[f"{_PREFIX}{module}.lora_B.weight"] = 0.1 * torch.randn(entry.shape[0], 3, generator=generator)
    save_file(halves, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", *projections]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    truth = merged_on_disk(family.load(folder), adapter, tmp_path / "merged")
    update = update_of(folder, adapter)
    assert_equal(merged_by_us(folder, update), truth, tensors_of(folder))
    assert len(update.tensors()) == len(halves) // 2

    # The same onto a checkpoint that has the experts as they are in memory: stacked.
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    shutil.copy(folder / "config.json", stacked)
    state = {key: value.contiguous() for key, value in family.load(folder).state_dict().items()}
    save_file(state, stacked / "model.safetensors", {"format": "pt"})
    merged = peft.PeftModel.from_pretrained(family.load(stacked), str(adapter)).merge_and_unload().state_dict()
    update = update_of(stacked, adapter)
    assert_equal(merged_by_us(stacked, update), merged, state)
    assert update.accounts[0].keys() == halves.keys()


def _stored_twice(folder: Path) -> None:
    """Give the head of a tied model a tensor of its own, with the same numbers."""
    weight = tensors_of(folder)["model.embed_tokens.weight"]
    save_file({"lm_head.weight": weight.clone()}, folder / "head.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@needs("peft", ">=0.19", "ensure_weight_tying")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=range(3),
)
@pytest.mark.parametrize("is_stored_twice", [False, True])
def test_tied_embeddings(options: dict[str, Any], is_stored_twice: bool, tmp_path: Path) -> None:
    """Against the outputs with the adapter beside the model: of a tied matrix PEFT 0.21 merges the update twice."""
    folder = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True)
    if is_stored_twice:
        _stored_twice(folder)
    base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = adapt(base, tmp_path / "lora", **options)
    beside = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(adapter)
    ).eval()
    update = update_of(folder, adapter)
    assert update.accounts[0].keys() == load_file(adapter / "adapter_model.safetensors").keys()
    merged = _AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    ours = merged_by_us(folder, update)
    if is_stored_twice:
        assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    merged.load_state_dict(ours, strict=False)
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        expected, got = beside(ids).logits.double(), merged(ids).logits
        merged.load_state_dict(before)
        assert (merged(ids).logits - expected).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "whose weight several modules share"),
        ({"target_modules": ["lm_head"]}, "whose weight several modules share"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "whose weight several modules share"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, "share one weight(.|\n)*different"),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "share one weight(.|\n)*different numbers"),
        ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, "share one weight(.|\n)*DoRA"),
    ],
    ids=range(6),
)
def test_a_tied_embedding_whose_sides_were_trained_apart(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True)
    adapter = adapt(hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "lora", **options)
    with pytest.raises(OptionError, match=message):
        update_of(folder, adapter)


@needs("peft", ">=0.21", "a cast of tied LoRAs one by one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_lora_that_was_trained(dtype: torch.dtype, tmp_path: Path) -> None:
    """What docs/merging.md says of PEFT: in half precision the two LoRAs are trained apart, and cannot be merged."""
    folder = save_llama(tmp_path / "m", dtype, tie_word_embeddings=True)
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "init_lora_weights": False}
    model = peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), peft.LoraConfig(**options))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    ids = torch.tensor([[3, 5, 7, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "a")
    if dtype == torch.float32:
        assert update_of(folder, tmp_path / "a").changed.keys() == {"model.embed_tokens.weight"}
    else:
        with pytest.raises(OptionError, match=r"share one weight(.|\n)*loaded in float32"):
            update_of(folder, tmp_path / "a")


def test_a_sum_of_several_with_weights(tmp_path: Path) -> None:
    """As PEFT adds their updates up: ``add_weighted_adapter`` by concatenation is exact."""
    folder = FAMILIES["llama"].save(tmp_path / "m")
    load = FAMILIES["llama"].load
    one = adapt(load(folder), tmp_path / "one", target_modules=["q_proj", "o_proj"])
    two = adapt(load(folder), tmp_path / "two", target_modules=["o_proj", "up_proj"], r=4, use_rslora=True)
    first, second = (merged_by_us(folder, update_of(folder, path)) for path in (one, two))
    before = tensors_of(folder)
    update = update_of(folder, one, two, weights=[0.7, -0.3])
    truth = {
        name: tensor.double() + 0.7 * (first[name] - tensor.double()) - 0.3 * (second[name] - tensor.double())
        for name, tensor in before.items()
    }
    model = peft.PeftModel.from_pretrained(load(folder), str(one), adapter_name="one")
    model.load_adapter(str(one), adapter_name="again")
    model.add_weighted_adapter(["one", "again"], [0.7, -0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    merged = model.merge_and_unload().state_dict()
    assert_equal(merged_by_us(folder, update), truth, before)
    twice = merged_by_us(folder, update_of(folder, one, one, weights=[0.7, -0.3]))
    assert_equal(twice, {name: merged[name] for name in before}, before)
    assert (
        len({tuple(update_of(folder, *several).digests().values()) for several in ([one], [two], [one, two], [two, one])}) == 4
    )


@needs("peft", ">=0.19", "ensure_weight_tying")
def test_tensors_that_a_manifest_knows_as_one_parameter(tmp_path: Path) -> None:
    """What is done alike under both names counts once, and what is done under one name is done under both."""
    folder = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True)
    _stored_twice(folder)
    surgery.factorize(folder, tmp_path / "f", rank=2, include=["*embed_tokens*"])
    targets = surgery.Factorized.open(tmp_path / "f").manifest.targets
    assert [target.tensors for target in targets] == [["model.embed_tokens.weight", "lm_head.weight"]]
    base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = adapt(base, tmp_path / "lora", target_modules=["embed_tokens"], ensure_weight_tying=True)
    update = update_of(folder, adapter)
    assert update.tied(targets).digests() == update.digests()
    half = AdapterUpdate({"lm_head.weight": update.changed["lm_head.weight"]})
    assert half.tied(targets).digests() == update.digests()
