"""Changes of tensors: what is exported comes back, orientations that shapes do not tell, parts of tensors, and sums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError
from surgery.format.header import TensorEntry
from surgery.models.placement import TensorPart
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.geometry import Sides, in_tensor
from surgery.updates.adapters.homes import Home
from surgery.updates.adapters.reading import read_adapters
from surgery.updates.changes import LowRankPart, ReplacedRows, TensorChange, summed
from surgery.updates.protocol import ScalesUpdate, UpdateSum
from tests.families import FAMILIES
from tests.models import tensors_of
from tests.releases import needs
from tests.updates.merging import adapt, applied, assert_equal, merged_by_us, merged_on_disk, update_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

#: Families that have what no adapter can say, for which export is refused.
_REFUSED = (
    *("bloom", "falcon, grouped", "falcon, one key head", "qwen2_moe", "deepseek_v3"),
    *("gpt_oss", "llama4", "granitemoe", "jamba", "mamba"),
)
_EXPERTS = ("mixtral", "qwen3_moe", "olmoe")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[needs("peft", ">=0.20", "adapters of experts")] * (name in _EXPERTS))
        for name in FAMILIES
        if name not in _REFUSED
    ],
)
def test_what_is_exported_comes_back(name: str, tmp_path: Path) -> None:
    """An adapter of scales, read again: the checkpoint with it is what the fold of the scales is."""
    folder = FAMILIES[name].save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4)
    generator = torch.Generator().manual_seed(1)
    scales = {
        key: 1 + 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in load_file(tmp_path / "f/surgery/scales.safetensors").items()
    }
    surgery.export(tmp_path / "f", scales, tmp_path / "lora")
    surgery.fold(tmp_path / "f", scales, tmp_path / "o")
    update = update_of(folder, tmp_path / "lora")
    assert_equal(merged_by_us(folder, update), tensors_of(tmp_path / "o"), tensors_of(folder))
    assert update.accounts[0].keys() == load_file(tmp_path / "lora/adapter_model.safetensors").keys()


@pytest.mark.parametrize(("name", "target"), [("gpt2", "attn.c_proj"), ("llama", "o_proj")])
@pytest.mark.parametrize("flag", [True, False])
def test_square_weights(name: str, target: str, flag: bool, tmp_path: Path) -> None:
    """Whether they are stored as (in, out) the model knows, whatever the config of the adapter says."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    adapter = adapt(family.load(folder), tmp_path / "lora", target_modules=[target])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": flag}))
    truth = merged_on_disk(family.load(folder), adapter, tmp_path / "merged")
    assert_equal(merged_by_us(folder, update_of(folder, adapter)), truth, tensors_of(folder))


@pytest.mark.parametrize("flag", [True, False])
def test_square_weights_without_a_model(flag: bool, tmp_path: Path) -> None:
    """As the config of the adapter says, and no bias of another module contradicts."""
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "lora").mkdir()
    A, B = torch.randn(2, 4), torch.randn(4, 2)
    save_file({"a.lora_A.weight": A, "a.lora_B.weight": B}, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": flag}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    change: Any = update_of(tmp_path, tmp_path / "lora").change("a.weight")
    expected = B.double() @ A.double()
    torch.testing.assert_close(applied(torch.zeros(4, 4), change), expected.T if flag else expected)


def test_peft_s_copy_of_an_adapted_embedding(tmp_path: Path) -> None:
    folder = FAMILIES["llama"].save(tmp_path / "m")
    adapter = adapt(FAMILIES["llama"].load(folder), tmp_path / "lora", target_modules=["embed_tokens"])
    update = update_of(folder, adapter)
    assert update.accounts[0]["base_model.model.model.embed_tokens.base_layer.weight"] == ()


def test_a_tensor_that_holds_a_parameter_in_parts() -> None:
    """Rows 2 to 5 of a tensor (8, 4) are a parameter's; a magnitude needs all rows, or all that its norms are over."""
    part = TensorPart("t", (0, 1), (range(4), range(4)), (range(2, 6), range(4)))
    home = Home("p", (4, 4), [part], None)
    left, right = torch.randn(4, 2), torch.randn(4, 2)
    sides = in_tensor(part, (8, 4), Sides(left, right, None, 0), "p", home)
    expected = torch.zeros(8, 4)
    expected[2:6] = left @ right.T
    torch.testing.assert_close(sides.left @ sides.right.T, expected)
    for axis in (0, 1):
        with pytest.raises(OptionError, match="has a magnitude of DoRA, and the checkpoint stores its weight in parts"):
            in_tensor(part, (8, 4), Sides(left, right, torch.ones(4), axis), "p", home)
    turned = TensorPart("t", (1, 0), (torch.tensor([2, 0, 3, 1]), range(5)), (range(4), range(5)))
    weight, right = torch.randn(4, 5), torch.randn(5, 2)
    magnitude = torch.rand(4)
    home = Home("p", (4, 5), [turned], None)
    sides = in_tensor(turned, (5, 4), Sides(left, right, magnitude, 0), "p", home)
    stored = weight[[2, 0, 3, 1]].T
    change = TensorChange({0: (sides.scaled(1.0, 1.0),)})
    total = weight.double() + left.double() @ right.double().T
    truth = (total / total.norm(dim=1, keepdim=True) * magnitude.view(-1, 1))[[2, 0, 3, 1]].T
    torch.testing.assert_close(applied(stored, change), truth)
    with pytest.raises(OptionError, match="is stored in a way that is not followed"):
        in_tensor(TensorPart("t", (0, None), (range(4), range(1)), (range(4), range(1))), (4,), sides, "p", home)


def test_sums_of_changes() -> None:
    part = LowRankPart(torch.ones(3, 1, dtype=torch.float64), torch.ones(4, 1))
    one, stack = TensorChange({0: (part,)}), TensorChange({2: (part,)}, is_stack=True)
    rows = TensorChange(rows=ReplacedRows(torch.tensor([1]), torch.ones(1, 4)))
    offset = TensorChange(offset=torch.ones(3, 4, dtype=torch.float64))
    weight = torch.arange(12.0).view(3, 4)
    torch.testing.assert_close(applied(weight, summed(one, summed(offset, offset))), weight.double() + 3)
    both = summed(rows, one)
    assert both.rows is rows.rows
    assert both.parts == one.parts
    for pair in ((one, stack), (rows, rows)):
        with pytest.raises(OptionError, match="cannot be summed"):
            summed(*pair)
    update = UpdateSum([ScalesUpdate({}), AdapterUpdate({"t": one}), AdapterUpdate({"t": one, "u": rows})])
    change = update.change("t")
    assert change is not None
    torch.testing.assert_close(applied(weight, change), weight.double() + 2)
    assert update.change("v") is None
    digests = {str(AdapterUpdate({"t": each}).digests()) for each in (one, stack, rows, offset, both, TensorChange())}
    assert len(digests) == 6


def test_a_folder_of_several_files_is_read_by_header_alone(tmp_path: Path) -> None:
    """Of thousands of experts each finds its tensor, without a model, and without looking through all for each."""
    entries, halves = {}, {}
    for layer in range(8):
        for expert in range(64):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            entries[f"{name}.weight"] = TensorEntry(f"{name}.weight", "BF16", (8, 4), 0, 64)
            halves[f"base_model.model.{name}.lora_A.weight"] = torch.ones(1, 4)
            halves[f"base_model.model.{name}.lora_B.weight"] = torch.full((8, 1), float(layer + expert + 1))
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    update = read_adapters([(tmp_path, 1.0)], None, entries)
    assert set(update.tensors()) == entries.keys()
    change: Any = update.change("model.layers.3.mlp.experts.9.up_proj.weight")
    torch.testing.assert_close(applied(torch.zeros(8, 4), change), torch.full((8, 4), 26.0, dtype=torch.float64))
    shutil.rmtree(tmp_path)


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = torch.nn.MultiheadAttention(16, 4)
        self.mlp = torch.nn.Linear(16, 8)


def test_torch_s_own_attention(tmp_path: Path) -> None:
    """PEFT adds the update of its output's projection twice: trained so, it can be merged by PEFT alone."""
    (tmp_path / "m").mkdir()
    before = {name: tensor.clone() for name, tensor in _Attention().state_dict().items()}
    save_file(before, tmp_path / "m/model.safetensors")
    adapter = adapt(_Attention(), tmp_path / "lora", target_modules=["attn", "mlp"])
    with pytest.raises(OptionError, match=r"a layer inside of one that it changes, as in torch's MultiheadAttention"):
        update_of(tmp_path / "m", adapter)
