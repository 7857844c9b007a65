"""Tensors that an adapter in PEFT's layout holds whole: norms, biases, heads, embeddings that are tied or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from surgery.errors import OptionError
from surgery.format.safetensors import ShardReader
from surgery.progress import Silent
from surgery.updates.changes import StoredTensor
from surgery.updates.writing.low_rank import AdapterForm
from tests.families import DECODER, FAMILIES
from tests.models import save_llama, tensors_of
from tests.updates.merging import assert_equal, merged_by_us, update_of
from tests.updates.writing import FALSE_WARNING, LowRank, check_files, merged_beside

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", FALSE_WARNING)


def _written(low: LowRank, copied: Sequence[str], folder: Path) -> dict[str, torch.Tensor]:
    """Write an adapter with some tensors of a tuned model whole; returns the weights that are meant, float64."""
    generator = torch.Generator().manual_seed(5)
    adapter = low.adapter(AdapterForm("peft"), copied)
    names = sorted({*adapter.copied.values()})
    assert {*copied} <= {*names}
    tuned = {
        name: low.before[name].float() + 0.1 * torch.randn(low.shapes[name], generator=generator) * (name in copied)
        for name in names
    }
    tuned = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in tuned.items()}
    save_file(tuned, folder / "tuned.safetensors")
    with ShardReader(folder / "tuned.safetensors") as reader:
        stored = {name: StoredTensor.of(reader, folder / "tuned.safetensors", reader.entries[name]) for name in names}
    (folder / "lora").mkdir()
    check_files(folder / "lora", adapter.write(folder / "lora", low.halves, stored, Silent()))
    return low.after() | {name: tensor.double() for name, tensor in tuned.items()}


@pytest.mark.parametrize(
    ("name", "updated", "copied"),
    [
        ("llama", ("q_proj",), ("model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight")),
        ("llama", ("q_proj", "lm_head"), ("model.embed_tokens.weight",)),
        ("gpt2", ("attn.c_attn",), ("transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_attn.bias")),
        ("gpt2", ("attn.c_attn",), ("transformer.h.0.attn.c_attn.bias", "transformer.h.0.mlp.c_fc.bias")),
        ("gpt2", ("attn.c_attn",), ("transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.bias")),
        ("gpt_oss", ("mlp.router",), ("model.layers.0.mlp.router.bias",)),
        ("bert", ("query",), ("bert.embeddings.LayerNorm.weight", "bert.embeddings.position_embeddings.weight")),
    ],
    ids=range(7),
)
def test_peft_puts_them_in_their_places(name: str, updated: tuple[str, ...], copied: Sequence[str], tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    low = LowRank(folder, lambda tensor, shape: any(part in tensor for part in updated))
    truth = _written(low, copied, tmp_path)
    merged = merged_beside(family, folder, tmp_path / "lora", tmp_path / "merged")
    assert_equal({key: tensor.double() for key, tensor in merged.items()}, truth, low.before)
    assert_equal(merged_by_us(folder, update_of(folder, tmp_path / "lora")), truth, low.before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_embedding(name: str, tmp_path: Path) -> None:
    """It is tied again when PEFT loads it: embedding and head change alike, once."""
    if name == "llama":
        folder = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True)
        embedding = "model.embed_tokens.weight"
    else:
        folder, embedding = FAMILIES["gpt2"].save(tmp_path / "m"), "transformer.wte.weight"
    low = LowRank(folder, lambda tensor, shape: "q_proj" in tensor or "c_attn" in tensor)
    truth = _written(low, [embedding], tmp_path)
    assert_equal(merged_by_us(folder, update_of(folder, tmp_path / "lora")), truth, low.before)
    load: Any = hf.AutoModelForCausalLM.from_pretrained
    whole = load(folder, dtype=torch.float64).eval()
    whole.load_state_dict(truth, strict=False)
    whole.tie_weights()
    ids = torch.tensor([[3, 5, 7, 9]])
    beside: Any = peft.PeftModel.from_pretrained(load(folder, dtype=torch.float32), tmp_path / "lora").eval()
    with torch.no_grad():
        expected = whole(ids).logits.float()
        torch.testing.assert_close(beside(ids).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(beside.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_that_is_stored_twice(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True)
    save_file({"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"]}, folder / "head.safetensors")
    low = LowRank(folder, lambda tensor, shape: "q_proj" in tensor)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    both, one = (low.adapter(AdapterForm("peft"), copied) for copied in (names, names[:1]))
    assert (both.config, both.copied) == (one.config, one.copied)
    assert {key.removeprefix("base_model.model.") for key in both.copied} == {*names}


@pytest.mark.parametrize(
    ("name", "updated", "copied", "message"),
    [
        ("llama", "q_proj", "model.layers.0.self_attn.q_proj.weight", "which has a low-rank update"),
        ("gpt_oss", "q_proj", "model.layers.0.self_attn.sinks", "which has layers inside"),
        ("phi3", "o_proj", "model.layers.9.input_layernorm.weight", "does not have, or holds together with others"),
        ("mixtral", "q_proj", "model.layers.0.block_sparse_moe.experts.0.w1.weight", "holds together with others"),
        ("bert", "query", "bert.embeddings.word_embeddings.weight", "a weight that 2 modules share"),
        ("t5", "SelfAttention.q", "shared.weight", "a weight that 4 modules share"),
        ("UNet", "to_q", "conv_out.bias", "of a model that transformers does not know"),
    ],
)
def test_what_peft_would_not_load_is_refused_by_name(
    name: str, updated: str, copied: str, message: str, tmp_path: Path
) -> None:
    low = LowRank(FAMILIES[name].save(tmp_path / "m"), lambda tensor, shape: updated in tensor)
    with pytest.raises(OptionError, match=rf"'{copied}' cannot be put into an adapter whole\n  got: .*{message}"):
        low.adapter(AdapterForm("peft"), [copied])


def test_names_by_which_peft_would_save_more(tmp_path: Path) -> None:
    """It compares the ends of names, in the middle of words too."""
    torch.manual_seed(0)
    hf.LlamaModel(hf.LlamaConfig(**DECODER)).save_pretrained(tmp_path / "m")
    low = LowRank(tmp_path / "m", lambda tensor, shape: "q_proj" in tensor)
    with pytest.raises(OptionError, match=r"in 'norm', by whose name PEFT would take 'layers\.0\.input_layernorm' too"):
        low.adapter(AdapterForm("peft"), ["norm.weight"])


def test_norms_with_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: Any = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)).save_pretrained(tmp_path / "m")
    low = LowRank(tmp_path / "m", lambda tensor, shape: len(shape) == 4)
    norm = next(name for name in low.shapes if name.endswith("normalization.weight"))
    with pytest.raises(OptionError, match="which has more than parameters"):
        low.adapter(AdapterForm("peft"), [norm])
