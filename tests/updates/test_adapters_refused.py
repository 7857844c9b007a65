"""Adapters that cannot be merged, do not fit, or are damaged: each refused by name, and no tensor left out in silence."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import FormatError, OptionError, SourceError, SurgeryError, SurgeryWarning
from surgery.updates.adapters.reading import read_adapters
from tests.families import FAMILIES
from tests.models import tensors_of
from tests.updates.merging import adapt, assert_equal, entries_of, merged_by_us, merged_on_disk, randomize, update_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

_O = "base_model.model.model.layers.0.self_attn.o_proj"
_HEAD = "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("model"))


def _adapter(model: Path, out: Path, **options: Any) -> Path:
    return adapt(FAMILIES["llama"].load(model), out, **{"target_modules": ["o_proj"], **options})


def _configured(adapter: Path, **change: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return adapter


def _changed(adapter: Path, **change: torch.Tensor | None) -> Path:
    path = adapter / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return adapter


@pytest.mark.parametrize(
    "way", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new", 2, ["gaussian"]]
)
def test_ways_to_begin_that_change_the_weights(way: Any, model: Path, tmp_path: Path) -> None:
    adapter = _configured(_adapter(model, tmp_path / "lora"), init_lora_weights=way)
    with pytest.raises(OptionError, match="init_lora_weights cannot be merged") as caught:
        update_of(model, adapter)
    assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_those_that_peft_has_converted(way: str, model: Path, tmp_path: Path) -> None:
    """Onto the original model, as PEFT's own documentation has it."""
    base = FAMILIES["llama"].load(model)
    options: dict[str, Any] = {"target_modules": ["o_proj"], "init_lora_weights": way}
    trained: Any = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **options))
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "initial")
    trained.peft_config["default"].init_lora_weights = way
    randomize(trained)
    trained.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    truth = merged_on_disk(FAMILIES["llama"].load(model), tmp_path / "lora", tmp_path / "merged")
    assert_equal(merged_by_us(model, update_of(model, tmp_path / "lora")), truth, tensors_of(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "VERA"}, OptionError, "is no LoRA adapter\n  got: +'VERA'"),
        ({"peft_type": "LOHA"}, OptionError, "is no LoRA adapter\n  got: +'LOHA'"),
        ({"peft_type": "LOKR"}, OptionError, "is no LoRA adapter\n  got: +'LOKR'"),
        ({"use_qalora": True}, OptionError, "a LoRA adapter with use_qalora cannot be merged"),
        ({"use_mora": True}, OptionError, "a LoRA adapter with use_mora cannot be merged"),
        ({"alora_invocation_tokens": [1]}, OptionError, "a LoRA adapter with alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, OptionError, "a LoRA adapter with layer_replication"),
        ({"megatron_config": {"a": 1}}, OptionError, "a LoRA adapter with megatron_config"),
        ({"bias": "some"}, OptionError, "a LoRA adapter with bias cannot be merged"),
        ({"use_dora": 1}, FormatError, "use_dora makes no sense"),
        ({"use_dora": True}, FormatError, "lacks a half of its update, or has more"),
        ({"lora_bias": True}, FormatError, "lacks a half of its update, or has more"),
        ({"r": 4}, FormatError, "contradicts its config"),
        ({"lora_alpha": float("nan")}, FormatError, "contradicts its config"),
        ({"rank_pattern": {"(": 3}}, FormatError, "rank_pattern cannot be looked up"),
        ({"modules_to_save": ["lm_head"]}, FormatError, "modules_to_save are not in its file(.|\n)*lm_head"),
        ({"trainable_token_indices": [1, 2]}, FormatError, "has trained tokens, and its file has none"),
        ({"target_parameters": ["experts.gate_up_proj"]}, None, ""),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else None,
)
def test_configs(change: dict[str, Any], error: type[SurgeryError] | None, message: str, model: Path, tmp_path: Path) -> None:
    adapter = _configured(_adapter(model, tmp_path / "lora"), **change)
    if error is None:
        assert update_of(model, adapter).tensors()
        return
    with pytest.raises(error, match=message) as caught:
        update_of(model, adapter)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{_O}.lora_C.weight": torch.ones(3)}, "lora_C.weight' is no part of a LoRA update"),
        ({f"{_O}.lora_A.weight": None}, "lacks a half of its update"),
        ({f"{_O}.lora_A.default.weight": torch.ones(3, 32)}, "two tensors are the same without wrappers' names"),
        ({f"{_O}.lora_A.second.weight": torch.ones(3, 32)}, "two tensors are the same"),
        ({f"{_O}.lora_A.weight": torch.ones(3, 33)}, "does not fit its weight"),
        ({f"{_O}.lora_A.weight": torch.ones(2, 32)}, "the halves of .* do not fit"),
        ({f"{_O}.lora_A.weight": torch.ones(96)}, "the halves of .* do not fit"),
        ({f"{_O}.lora_A.weight": torch.full((3, 32), torch.nan)}, "holds NaN or infinity"),
        ({f"{_O}.lora_A.weight": torch.ones(3, 32, dtype=torch.int32)}, "is no part of a LoRA update by its dtype"),
        ({f"{_O}.lora_B.bias": torch.ones(32)}, "lacks a half of its update, or has more"),
        ({f"{_O}.lora_magnitude_vector": torch.ones(32)}, "lacks a half of its update, or has more"),
        ({f"{_O}.lora_A.weight": torch.ones(2, 32), f"{_O}.lora_B.weight": torch.ones(32, 2)}, "contradicts its config"),
        ({f"{_O}.lora_A.weight": torch.ones(0, 32), f"{_O}.lora_B.weight": torch.ones(32, 0)}, "do not fit"),
        (
            {"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(3, 32)}
            | {"base_model.model.model.layers.9.x.lora_B.weight": torch.ones(32, 3)},
            r"the adapter changes 'model\.layers\.9\.x', which is no module(.|\n)*3 names fit; the nearest to",
        ),
        ({"base_model.model.score.weight": torch.ones(2, 32)}, "the adapter changes 'score', which is no module"),
        ({_HEAD: torch.ones(51, 32)}, "'lm_head' does not fit its weight"),
        (
            {_HEAD: torch.ones(50, 32, dtype=torch.int64)},
            "lm_head.weight' replaces a tensor of the model, and has a dtype that cannot be copied",
        ),
        ({f"{_O}.base_layer.lora_A.weight": torch.ones(3, 32)}, "lacks a half"),
        (
            {f"{_O}.base_layer.lora_A.weight": torch.ones(3, 32), f"{_O}.base_layer.lora_B.weight": torch.ones(32, 3)},
            "an adapter inside another",
        ),
        ({f"{_O}.base_layer.weight": torch.ones(31, 32)}, "does not fit its weight"),
        ({f"{_O}.weight": torch.ones(32, 32)}, "both replaces and adds to"),
        (
            {f"{_O.replace('model.layers', 'layers')}.lora_A.weight": torch.ones(3, 32)}
            | {f"{_O.replace('model.layers', 'layers')}.lora_B.weight": torch.ones(32, 3)},
            "the adapter changes a weight twice, under two names",
        ),
        (
            {f"{_O}.lora_A.weight": None, f"{_O}.lora_B.weight": None}
            | {f"{_O}.lora_embedding_A": torch.ones(3, 32), f"{_O}.lora_embedding_B": torch.ones(32, 3)},
            "is of another kind than the module",
        ),
    ],
    ids=range(23),
)
def test_files(change: dict[str, torch.Tensor | None], message: str, model: Path, tmp_path: Path) -> None:
    adapter = _changed(_adapter(model, tmp_path / "lora"), **change)
    with pytest.raises(SurgeryError, match=message) as caught:
        update_of(model, adapter)
    assert len(str(caught.value)) < 1000


def test_a_stored_tensor_that_is_no_number_or_has_changed(model: Path, tmp_path: Path) -> None:
    adapter = _changed(_adapter(model, tmp_path / "lora"), **{_HEAD: torch.full((50, 32), torch.inf)})
    update = update_of(model, adapter)
    change = update.change("lm_head.weight")
    assert change is not None
    assert change.replacement is not None
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        change.replacement.read()
    _changed(adapter, **{_HEAD: torch.ones(50, 31)})
    with pytest.raises(FormatError, match="has changed since the adapter was looked at"):
        change.replacement.read()
    with pytest.raises(FormatError, match="has changed since the adapter was looked at"):
        update.digests()


def test_trained_biases_that_were_not_saved_are_told(model: Path, tmp_path: Path) -> None:
    """PEFT 0.18 to 0.20 trained them and saved none; the config alone says so."""
    adapter = _configured(_adapter(model, tmp_path / "lora"), bias="lora_only")
    with pytest.warns(SurgeryWarning, match="its config says bias = 'lora_only', and its file has no biases"):
        assert update_of(model, adapter).changed


@pytest.mark.parametrize("options", [{}, {"lora_bias": False, "target_modules": ["q_proj", "embed_tokens"]}], ids=range(2))
def test_an_adapter_that_changes_nothing(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    adapter = _adapter(model, tmp_path / "lora", **options)
    zeros = {
        name: torch.zeros_like(tensor)
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
        if "_B" in name
    }
    with pytest.raises(OptionError, match=r"an adapter that changes nothing\n  got: +only zeros in all of its matrices B"):
        update_of(model, _changed(adapter, **zeros))
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(OptionError, match=r"an adapter that changes nothing\n  got: +no tensors"):
        update_of(model, adapter)


def test_files_that_are_not_there_or_no_files(model: Path, tmp_path: Path) -> None:
    adapter = _adapter(model, tmp_path / "lora")
    weights = adapter / "adapter_model.safetensors"
    for given, hint in (
        (weights, f"give its folder, {adapter}"),
        (model, "surgery merge takes the model first"),
    ):
        with pytest.raises(SourceError, match=r"there is no adapter_config\.json") as caught:
            update_of(model, given)
        assert hint in str(caught.value.hint)
    with pytest.raises(SourceError, match=r"there is no folder .*owner/name(.|\n)*check the name.*hf download ID"):
        update_of(model, tmp_path / "owner/name")
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    with pytest.raises(FormatError, match="is an empty file"):
        update_of(model, adapter)
    weights.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="size does not fit its header"):
        update_of(model, adapter)
    weights.rename(adapter / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"there is no adapter_model\.safetensors") as caught:
        update_of(model, adapter)
    assert "several files" in str(caught.value.hint)
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"there is no adapter_model\.safetensors") as caught:
        update_of(model, adapter)
    assert "save it again" in str(caught.value.hint)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_weights_that_make_no_sense(weight: float, model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has a weight that makes no sense"):
        update_of(model, _adapter(model, tmp_path / "lora"), weights=[weight])


def test_what_cannot_be_summed(model: Path, tmp_path: Path) -> None:
    head = _adapter(model, tmp_path / "head", modules_to_save=["lm_head"])
    tokens = _adapter(model, tmp_path / "tokens", trainable_token_indices=[1])
    plain = _adapter(model, tmp_path / "plain", target_modules=["lm_head", "embed_tokens"])
    for one in (head, tokens):
        with pytest.raises(OptionError, match=r"can only have the weight 1\n  got: +a weight of 0\.5"):
            update_of(model, one, weights=[0.5])
    for several in ((head, head), (head, plain), (plain, tokens)):
        with pytest.raises(OptionError, match="or rows of it, which another adapter changes too"):
            update_of(model, *several)
    both = update_of(model, head, tokens)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(both.tensors())


def test_rows_of_tokens(model: Path, tmp_path: Path) -> None:
    tokens = _adapter(model, tmp_path / "tokens", trainable_token_indices=[1, 4])
    for indices in ([1], [1, 1], [1, -4], [1, "4"], [1, True], {"wte": [1, 4]}):
        with pytest.raises(FormatError, match="the rows of trained tokens contradict its config"):
            update_of(model, _configured(tokens, trainable_token_indices=indices))
    with pytest.raises(OptionError, match=r"'model\.embed_tokens' does not fit its weight"):
        update_of(model, _configured(tokens, trainable_token_indices=[1, 50]))


@pytest.mark.parametrize("prefix", ["", "x."])
def test_a_bias_that_the_module_lacks(prefix: str, tmp_path: Path) -> None:
    """PEFT does not merge it either; of Qwen2-MoE only q, k and v have biases."""
    folder = FAMILIES["qwen2_moe"].save(tmp_path / "m")
    adapted = adapt(FAMILIES["qwen2_moe"].load(folder), tmp_path / "a", target_modules=["q_proj", "o_proj"], lora_bias=True)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        peft.PeftModel.from_pretrained(FAMILIES["qwen2_moe"].load(folder), str(adapted)).merge_and_unload()
    tensors = load_file(adapted / "adapter_model.safetensors")
    given = {name.replace("base_model.model.", f"base_model.model.{prefix}"): tensor for name, tensor in tensors.items()}
    save_file(given, adapted / "adapter_model.safetensors")
    with pytest.raises(OptionError, match=r"the bias of '(x\.)?model\.layers\.0\.self_attn\.o_proj', a layer that has no bias"):
        update_of(folder, adapted)
    with pytest.raises(OptionError, match="is no module with a weight"):  # nothing of it is there
        update_of(FAMILIES["gpt2"].save(tmp_path / "other"), adapted)


def test_a_convolution_in_groups(tmp_path: Path) -> None:
    """PEFT does not merge those either."""
    weights = {"conv.weight": torch.randn(6, 2, 3, 3), "proj.weight": torch.randn(6, 6)}
    (tmp_path / "m").mkdir()
    save_file(weights, tmp_path / "m/model.safetensors")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3}))
    halves = {"conv.lora_A.weight": torch.ones(3, 6, 3, 3), "conv.lora_B.weight": torch.ones(6, 3, 1, 1)}
    save_file(halves, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(OptionError, match=r"'conv' does not fit its weight(.|\n)*no convolution in groups"):
        update_of(tmp_path / "m", tmp_path / "lora")


_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**400,
    float("nan"),
    "",
    "a",
    "(",
    [],
    [1],
    ["o_proj"],
    [None],
    {},
    {"o_proj": 1},
    {"a": {}},
)


def test_configs_of_strangers(model: Path, tmp_path: Path) -> None:
    """Whatever is in them: an update, or an error that says what is wrong in a few lines."""
    adapter = _adapter(model, tmp_path / "lora", modules_to_save=["lm_head"], target_modules=["o_proj", "embed_tokens"])
    path = adapter / "adapter_config.json"
    good = json.loads(path.read_text())
    taken, refused = 0, list[str]()
    for key in [*good, "token_indices"]:
        for value in _ODD:
            path.write_text(json.dumps({**good, key: value}))
            try:
                taken += bool(update_of(model, adapter).tensors())
            except SurgeryError as error:
                refused.append(str(error))
    assert taken > 100
    assert len(refused) > 200
    assert max(map(len, refused)) < 1000
    assert all(str(adapter) in error for error in refused)


def test_names_of_strangers(model: Path, tmp_path: Path) -> None:
    """Whatever names a file has, each of its tensors is accounted for, or an error says which one is not."""
    adapter = _adapter(model, tmp_path / "lora", modules_to_save=["lm_head"], target_modules=["o_proj", "embed_tokens"])
    path = adapter / "adapter_model.safetensors"
    good, words = load_file(path), sorted({word for name in load_file(path) for word in name.split(".")})
    chance, outcomes = random.Random(0), Counter[str]()
    for _ in range(300):
        changed = {}
        for name, tensor in good.items():
            parts = name.split(".")
            if chance.random() < 0.1:
                where = chance.randrange(len(parts))
                change = chance.choice(("drop", "double", "swap", "default", "module"))
                if change == "drop":
                    del parts[where]
                elif change == "swap":
                    parts[where] = chance.choice(words)
                else:
                    parts.insert(where, parts[where] if change == "double" else change)
            changed[".".join(parts)] = tensor.clone()
        save_file(changed, path)
        try:
            update = update_of(model, adapter)
        except SurgeryError as error:
            outcomes[type(error).__name__] += 1
            continue
        outcomes["taken"] += 1
        assert update.accounts[0].keys() == changed.keys()
        assert all(to or source.endswith("base_layer.weight") for source, to in update.accounts[0].items())
    assert min(outcomes[kind] for kind in ("taken", "OptionError", "FormatError")) > 10


@pytest.mark.parametrize(
    ("name", "parameters", "change", "message"),
    [
        ("mixtral", ["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], "it cannot be told which parameters"),
        ("mixtral", ["experts.down_proj"], ["experts.up_proj"], "which is no module with a weight"),
        ("gpt_oss", ["experts.gate_up_proj_bias"], None, "is no stack of matrices in this checkpoint"),
    ],
    ids=range(3),
)
def test_parameters_that_are_no_stacks(
    name: str, parameters: list[str], change: list[str] | None, message: str, tmp_path: Path
) -> None:
    folder = FAMILIES[name].save(tmp_path / "m")
    options: dict[str, Any] = {"target_modules": [], "target_parameters": parameters}
    adapter = adapt(FAMILIES[name].load(folder), tmp_path / "lora", **options)
    if change is not None:
        _configured(adapter, target_parameters=change)
    with pytest.raises(OptionError, match=message):
        update_of(folder, adapter)


def test_stacks_of_another_shape_or_of_no_known_model(tmp_path: Path) -> None:
    folder = FAMILIES["gpt_oss"].save(tmp_path / "m")
    options: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    adapter = adapt(FAMILIES["gpt_oss"].load(folder), tmp_path / "lora", **options)
    with pytest.raises(OptionError, match="a stack of experts of a model that transformers does not know"):
        read_adapters([(adapter, 1.0)], None, entries_of(folder))
    name, half = next(
        (name, half) for name, half in load_file(adapter / "adapter_model.safetensors").items() if "lora_A" in name
    )
    _changed(adapter, **{name: torch.ones(len(half), half.shape[1] + 1)})
    with pytest.raises(OptionError, match="does not fit its weight"):
        update_of(folder, adapter)
