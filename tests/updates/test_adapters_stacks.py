"""Stacks of experts, of which releases of PEFT call one side or the other the input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from surgery.errors import OptionError
from tests.families import DECODER, FAMILIES
from tests.models import tensors_of
from tests.updates.merging import adapt, assert_equal, merged_by_us, merged_on_disk, update_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

_BOTH = ["experts.gate_up_proj", "experts.down_proj"]
_CLASSES: dict[str, Any] = {
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM),
    "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM),
}


def _square(name: str, folder: Path) -> Path:
    """A mixture of which each expert's last matrix, or else the first, has equal sides."""
    config, model = _CLASSES[name]
    torch.manual_seed(0)
    sizes = {**DECODER, "intermediate_size": DECODER["hidden_size"], "num_local_experts": 4, "num_experts_per_tok": 2}
    model(config(**sizes)).save_pretrained(folder)
    return folder


def _load(name: str, folder: Path) -> Any:
    return _CLASSES[name][1].from_pretrained(folder, dtype=torch.float32)


def _stack(tensors: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """(experts, out, in) of the last matrices of a Mixtral's layer, float64."""
    names = [f"model.layers.{layer}.block_sparse_moe.experts.{i}.w2.weight" for i in range(4)]
    return torch.stack([tensors[name].double() for name in names])


def _told(adapter: Path, version: str | None) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config.pop("peft_version", None)
    (adapter / "adapter_config.json").write_text(json.dumps(config | ({} if version is None else {"peft_version": version})))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("parameters", [_BOTH, _BOTH[1:]], ids=["told by another", "alone"])
def test_square_matrices(name: str, parameters: list[str], tmp_path: Path) -> None:
    """As the PEFT that is here merges them, whichever it is."""
    folder = _square(name, tmp_path / "m")
    adapter = adapt(_load(name, folder), tmp_path / "lora", target_modules=[], target_parameters=parameters)
    truth = merged_on_disk(_load(name, folder), adapter, tmp_path / "merged")
    assert_equal(merged_by_us(folder, update_of(folder, adapter)), truth, tensors_of(folder))


def test_stacks_that_are_the_weights_of_their_modules(tmp_path: Path) -> None:
    """As in JetMoe, beside layers that PEFT finds by their own names."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in DECODER.items() if name != "num_attention_heads"}
    hf.JetMoeForCausalLM(hf.JetMoeConfig(**sizes, kv_channels=16, num_local_experts=4)).save_pretrained(tmp_path / "m")
    load: Any = hf.JetMoeForCausalLM.from_pretrained
    stacks = ["mlp.input_linear.weight", "mlp.output_linear.weight"]
    adapter = adapt(load(tmp_path / "m"), tmp_path / "lora", target_modules=["kv_proj"], target_parameters=stacks)
    truth = merged_on_disk(load(tmp_path / "m"), adapter, tmp_path / "merged")
    assert_equal(merged_by_us(tmp_path / "m", update_of(tmp_path / "m", adapter)), truth, tensors_of(tmp_path / "m"))


@pytest.mark.parametrize(
    ("version", "equation"),
    [
        ("0.17.1", "ore,eri->eio"),
        ("0.18.0", "ore,eri->eio"),
        ("0.18.1", "ore,eri->eio"),
        ("0.19.0", "ore,eri->eio"),
        ("0.19.1", "ore,eri->eoi"),
        ("0.20.1.dev0@abcdef", "ore,eri->eoi"),
        ("0.21.2", "ore,eri->eoi"),
        ("1.0.0", "ore,eri->eoi"),
    ],
)
def test_square_matrices_by_release(version: str, equation: str, tmp_path: Path) -> None:
    """As ``get_delta_weight`` of each release has it, of a stack that is (experts, out, in)."""
    folder = _square("mixtral", tmp_path / "m")
    adapter = adapt(_load("mixtral", folder), tmp_path / "lora", target_modules=[], target_parameters=_BOTH[1:])
    _told(adapter, version)
    halves = load_file(adapter / "adapter_model.safetensors")
    before, after = tensors_of(folder), merged_by_us(folder, update_of(folder, adapter))
    for layer in range(2):
        A, B = (halves[f"base_model.model.model.layers.{layer}.mlp.experts.lora_{half}.weight"].double() for half in "AB")
        delta = 5 / 3 * torch.einsum(equation, B.reshape(len(B), 3, 4), A.reshape(4, 3, -1))
        torch.testing.assert_close(_stack(after, layer), _stack(before, layer) + delta)


@pytest.mark.parametrize("version", [None, "0.19.1.dev0@abcdef", "0.18.2.dev0", "newest"])
def test_square_matrices_of_which_nothing_is_known(version: str | None, tmp_path: Path) -> None:
    """Refused, if no other shape tells."""
    folder = _square("mixtral", tmp_path / "m")
    for parameters in (_BOTH[1:], _BOTH):
        out = tmp_path / f"{len(parameters)}"
        adapter = adapt(_load("mixtral", folder), out / "lora", target_modules=[], target_parameters=parameters)
        truth = merged_on_disk(_load("mixtral", folder), adapter, out / "merged")
        _told(adapter, version)
        if parameters == _BOTH:
            assert_equal(merged_by_us(folder, update_of(folder, adapter)), truth, tensors_of(folder))
        else:
            with pytest.raises(OptionError, match=r"it cannot be told which side of .*down_proj' is the input"):
                update_of(folder, adapter)


@pytest.mark.parametrize("is_rows", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_shapes_tell(name: str, is_rows: bool, tmp_path: Path) -> None:
    """Whatever release has written it: A of the rows of matrices (rows, columns), or of their columns."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    adapter = adapt(family.load(folder), tmp_path / "lora", target_modules=[], target_parameters=_BOTH)
    truth = merged_on_disk(family.load(folder), adapter, tmp_path / "merged")
    halves = load_file(adapter / "adapter_model.safetensors")
    stacks = dict(family.load(folder).named_parameters())
    turned = 0
    for name_of_A in [one for one in halves if "lora_A" in one]:
        name_of_B = name_of_A.replace("lora_A", "lora_B")
        A, B = halves[name_of_A], halves[name_of_B]
        module, _, _ = name_of_A.removeprefix("base_model.model.").removesuffix(".lora_A.weight").partition(".base_layer")
        parameter = stacks[f"{module}.{'gate_up_proj' if '.base_layer' in name_of_A else 'down_proj'}"]
        assert (A.shape[1], len(B)) in (tuple(parameter.shape[1:]), tuple(parameter.shape[:0:-1]))
        if (A.shape[1] == parameter.shape[1]) != is_rows:  # the same products, turned
            halves[name_of_A] = B.reshape(len(B), 3, 4).permute(2, 1, 0).reshape(12, len(B)).contiguous()
            halves[name_of_B] = A.reshape(4, 3, -1).permute(2, 1, 0).reshape(-1, 12).contiguous()
            turned += 1
    assert turned in (0, 4)
    save_file(halves, adapter / "adapter_model.safetensors")
    assert_equal(merged_by_us(folder, update_of(folder, adapter)), truth, tensors_of(folder))


def test_a_stack_that_is_the_weight_of_its_module(tmp_path: Path) -> None:
    """Attention with experts, of JetMoE: one adapted parameter for each module, which is called as that of a layer."""
    torch.manual_seed(0)
    sizes = {**DECODER, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    hf.JetMoeForCausalLM(hf.JetMoeConfig(**sizes)).save_pretrained(tmp_path / "m")

    def load() -> Any:
        return hf.JetMoeForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)

    parameters = ["experts.input_linear.weight", "experts.output_linear.weight"]
    adapter = adapt(load(), tmp_path / "lora", target_modules=[], target_parameters=parameters)
    truth = merged_on_disk(load(), adapter, tmp_path / "merged")
    assert_equal(merged_by_us(tmp_path / "m", update_of(tmp_path / "m", adapter)), truth, tensors_of(tmp_path / "m"))
