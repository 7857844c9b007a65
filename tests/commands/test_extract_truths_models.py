"""``surgery extract`` of models as they lie on the hub, against PEFT and diffusers, and float64 of both models' weights."""

from __future__ import annotations

import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from safetensors.torch import load_file

from surgery.errors import SurgeryError
from tests.commands.tuned_models import (
    Tensors,
    assert_best,
    extracted,
    least_error,
    merged_by_us,
    relative,
    saved,
    trained,
)
from tests.families import FAMILIES
from tests.models import tensors_of
from tests.releases import installed, needs, writes_e8m0
from tests.truths.models import MODELS
from tests.truths.peft_side import merged_by_peft, quietly
from tests.updates.test_writing_diffusion import _pipeline
from tests.weights.test_fp8 import _dense, quantize_model, quantize_whole

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

BF16, F32 = torch.bfloat16, torch.float32
#: Older releases of PEFT take the sides of stacks otherwise, or know no parameters as targets.
_stacks = needs("peft", ">=0.20", "stacks of experts as they are today")
_slow = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _model(root: Path, name: str) -> Path:
    """A float32 model whose norms are no ones. Read-only."""
    folder = root / name.replace(" ", "-")
    if not folder.exists():
        torch.manual_seed(0)
        model: Any = MODELS[name].make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1).add_(parameter.ndim == 1)
        model.save_pretrained(folder)
    return folder


# ---- what PEFT makes of the adapter


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gpt2", {"include": ["*.c_*.weight"]}),
        ("phi3", {}),
        ("bert", {}),
        ("t5", {"include": ["*Attention*", "*Dense*"]}),
        pytest.param("mixtral", {}, marks=_stacks),
        pytest.param("qwen3_moe", {"uniform": True}, marks=_stacks),
        ("gpt_oss", {}),
        ("llama", {"include": ["*embed_tokens*", "*lm_head*", "*up_proj*"]}),
        pytest.param("tied", {"full": ["*embed_tokens*", "*norm*"]}, marks=needs("peft", ">=0.19", "ensure_weight_tying")),
        ("qwen2_5_vl", {}),
        ("convnext", {"include": ["*pwconv*", "*downsampling*1.weight"]}),
        pytest.param("qwen3_moe", {}, marks=[_stacks, _slow]),
        pytest.param("deepseek_v3", {}, marks=[_stacks, _slow]),
        pytest.param("llama4", {}, marks=[_stacks, _slow]),
        pytest.param("granitemoe", {}, marks=[_stacks, _slow]),
        *(pytest.param(name, {}, marks=_slow) for name in ("llava", "llava, new names", "gemma3", "whisper", "vit", "clip")),
        *(pytest.param(name, {}, marks=_slow) for name in ("modernbert", "gpt_neox", "mpt", "opt", "falcon, grouped")),
    ],
    ids=str,
)
def test_peft_merges_the_best_approximations(name: str, options: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """And what it makes of each tensor is what ``surgery merge`` makes of it; nothing else changes."""
    base = _model(root, name) if name != "llava, new names" else MODELS[name].save(tmp_path / "b")
    old = tensors_of(base)
    new = trained(old)
    one = extracted(base, saved(tmp_path / "t", new, base, files=2), tmp_path / "a", rank=3, **options)
    merged = merged_by_peft(MODELS[name], base, tmp_path / "a", F32)
    ours = merged_by_us(base, tmp_path / "a", tmp_path / "m")
    assert_best(one, old, new, merged, 3)
    targets = {told.tensor for told in one.report.targets}
    for told in one.report.others:
        expected = new[told.tensor] if told.fate == "saved" else old[told.tensor]
        if told.tensor in merged:  # a tied head is not saved
            assert torch.equal(merged[told.tensor], expected), told.tensor
        assert torch.equal(ours[told.tensor], expected), told.tensor
    for tensor in targets:
        assert relative(merged[tensor].double() - ours[tensor].double(), ours[tensor]) < 3e-7, tensor


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"rank": "auto"}, {"budget": 6000}], ids=str)
def test_experts_with_ranks_of_their_own(options: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """Of a stack each matrix has as many directions as the one with most, or fewer; the others are zeros."""
    base = _model(root, "gpt_oss")
    old = tensors_of(base)
    generator = torch.Generator().manual_seed(7)
    new = {}
    for name, tensor in old.items():
        new[name] = tensor.clone()
        if tensor.ndim == 3:
            for i, matrix in enumerate(new[name]):  # of ranks 1 to 4, above noise
                left, right = (torch.randn(size, i + 1, generator=generator) for size in matrix.shape)
                matrix += 0.02 * left @ right.T + 1e-4 * torch.randn(matrix.shape, generator=generator)
    one = extracted(base, saved(tmp_path / "t", new, base), tmp_path / "a", include=["*experts.*_proj"], **options)
    merged = merged_by_peft(MODELS["gpt_oss"], base, tmp_path / "a", F32)
    assert len(one.report.targets) == 4
    left = whole = 0.0
    for told in one.report.targets:
        change = new[told.tensor].double() - old[told.tensor].double()
        missed = merged[told.tensor].double() - new[told.tensor].double()
        assert told.error == pytest.approx(relative(missed, change), rel=1e-4, abs=1e-6)
        left += missed.square().sum().item()
        whole += change.square().sum().item()
        if "energy" in options:
            values = torch.linalg.svdvals(change).square()
            shares = values.cumsum(1) / values.sum(1, keepdim=True)
            fewest = (shares < 0.9).sum(1) + 1
            assert told.rank == fewest.max()
            kept = sum(row[:k].sum().item() for row, k in zip(values, fewest.tolist(), strict=True))
            assert told.kept == pytest.approx(kept / values.sum().item(), abs=6e-6)
        if "rank" in options:
            assert told.rank == told.above_floor == 4
        if "budget" not in options:
            assert told.merged_error == pytest.approx(told.error, rel=1e-3)
    assert one.report.kept == pytest.approx(1 - left / whole, abs=6e-6)
    assert one.report.numbers <= options.get("budget", 10**9)


@pytest.mark.parametrize(
    ("name", "uniform", "told"),
    [("mixtral", False, True), ("qwen3_moe", True, True), ("gpt_oss", False, False), ("llama", False, False)],
)
def test_peft_that_is_too_old_is_told(name: str, uniform: bool, told: bool, root: Path, tmp_path: Path) -> None:
    """Before 0.20 PEFT passes over single experts, and takes the sides of stacks otherwise."""
    base = _model(root, name)
    one = extracted(base, saved(tmp_path / "t", trained(tensors_of(base)), base), tmp_path / "a", rank=3, uniform=uniform)
    version = installed("peft")
    assert version is not None
    said = f"the adapter changes experts: PEFT loads it from 0.20 on, and here is {version}"
    assert (said in one.notes) == (told and version < Version("0.20"))


@pytest.mark.parametrize(
    ("name", "uniform"),
    [
        pytest.param("mixtral", False, marks=_stacks),
        pytest.param("mixtral", True, marks=_stacks),
        ("phi3", True),
        pytest.param("deepseek_v3", False, marks=[_stacks, _slow]),
    ],
)
def test_a_budget_counts_all_numbers_of_the_file(name: str, uniform: bool, root: Path, tmp_path: Path) -> None:
    """Also the zeros that fill up experts that the model stacks, and pairs that must have one rank."""
    base = _model(root, name)
    old = tensors_of(base)
    sizes = torch.linspace(0.2, 1.5, len(old))
    new = {}
    for size, (key, tensor) in zip(sizes, trained(old).items(), strict=True):
        new[key] = old[key] + size * (tensor - old[key]) if tensor.ndim > 1 else old[key]
    one = extracted(base, saved(tmp_path / "t", new, base), tmp_path / "a", budget=6000, uniform=uniform)
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert one.report.numbers == sum(tensor.numel() for tensor in stored.values())
    assert 4000 < one.report.numbers <= 6000
    merged = merged_by_peft(MODELS[name], base, tmp_path / "a", F32)
    left = whole = 0.0
    for told in one.report.targets:
        change = new[told.tensor].double() - old[told.tensor].double()
        assert told.error == pytest.approx(least_error(change, told.rank), rel=1e-5)
        left += (merged[told.tensor].double() - new[told.tensor].double()).square().sum().item()
        whole += change.square().sum().item()
    assert one.report.kept == pytest.approx(1 - left / whole, abs=6e-6)
    experts = [told for told in one.report.targets if "experts" in told.tensor]
    for kind in {re.sub(r"experts\.\d+", "#", told.tensor) for told in experts}:
        assert len({told.rank for told in experts if re.sub(r"experts\.\d+", "#", told.tensor) == kind}) == 1


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Modules are named as tensors are, and PEFT adapts any module of torch."""
    torch.manual_seed(0)

    def made() -> torch.nn.Module:
        parts = {
            "first": torch.nn.Linear(20, 30),
            "second": torch.nn.Linear(30, 10, bias=False),
            "norm": torch.nn.LayerNorm(10),
        }
        return torch.nn.Sequential(OrderedDict(parts))

    model = made()
    old = {f"{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    new = trained(old)
    base = saved(tmp_path / "b", old, None)
    one = extracted(base, saved(tmp_path / "t", new, None), tmp_path / "a", rank=3, include=["*.weight"])
    with quietly():
        merged: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload()  # type: ignore[arg-type]
    assert_best(one, old, new, merged.state_dict(), 3)
    assert set(one.fates()) == {"first.bias", "norm.weight", "norm.bias"}
    with pytest.raises(SurgeryError, match=r"cannot be put into an adapter whole(.|\n)*transformers does not know"):
        extracted(base, tmp_path / "t", tmp_path / "o", rank=3, include=["*.weight"], full=["norm.*"])
    old["embeddings.weight"] = torch.randn(20, 10)
    with_embedding = saved(tmp_path / "e", old, None), saved(tmp_path / "te", trained(old), None)
    with pytest.raises(SurgeryError, match=r"'embeddings\.weight' cannot be written as LoRA") as caught:
        extracted(*with_embedding, tmp_path / "o", rank=3, include=["*.weight"])
    assert "--full" not in str(caught.value.hint)  # which is no way either, as for the norm


@needs("diffusers", ">=0.39", "kohya's names of all layers")
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_pipeline_loads_it(layout: str, tmp_path: Path) -> None:
    """Convolutions and layers of a UNet, which lies in a folder of the pipeline."""
    for part in ("unet", "text_encoder"):
        (tmp_path / "parts" / part).mkdir(parents=True)
    FAMILIES["UNet"].save(tmp_path / "parts/unet")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.CLIPTextConfig(
        vocab_size=50, max_position_embeddings=8, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    hf.CLIPTextModel(config).save_pretrained(tmp_path / "parts/text_encoder")
    with quietly():
        pipeline = _pipeline(tmp_path / "parts")
        pipeline.save_pretrained(tmp_path / "base")
    old = tensors_of(tmp_path / "base/unet")
    new = trained(old)
    shutil.copytree(tmp_path / "base", tmp_path / "tuned", ignore=lambda folder, names: ["unet"] if "unet" in names else [])
    saved(tmp_path / "tuned/unet", new, tmp_path / "base/unet")
    one = extracted(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=3, layout=layout, subfolder="unet")
    assert {told.view for told in one.report.targets} == {"matrix", "convolution"}
    (file,) = (record.file for record in one.report.files if record.file.endswith(".safetensors"))
    with quietly():
        pipeline.load_lora_weights(tmp_path / "a", weight_name=file)
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
        pipeline.unet.save_pretrained(tmp_path / "fused")
    assert_best(one, old, new, tensors_of(tmp_path / "fused"), 3)


# ---- the tuned model under other names, in other dtypes, files and forms


RENAMED: dict[str, Callable[[str], str]] = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "headless": lambda name: name.removeprefix("model."),
    "images and text": lambda name: name.replace("model.", "model.language_model."),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED.keys())
def test_under_other_names(rename: Callable[[str], str], root: Path, tmp_path: Path) -> None:
    base = _model(root, "llama")
    old = tensors_of(base)
    new = trained(old)
    tuned = saved(tmp_path / "t", {rename(name): tensor for name, tensor in new.items()}, base, files=3)
    one = extracted(base, tuned, tmp_path / "a", rank=3, full=["*norm*"])
    assert_best(one, old, new, merged_by_us(base, tmp_path / "a", tmp_path / "m"), 3)
    fates = {name: "saved" if "norm" in name else "changed" for name in old if "_proj." not in name}
    assert one.fates() == fates
    assert one.report.further == ()
    for told in one.report.others:
        change = new[told.tensor].double() - old[told.tensor].double()
        assert told.change == pytest.approx(relative(change, old[told.tensor]), rel=6e-6)
    assert "names differ from the original's" in one.notes[0]


@pytest.mark.parametrize(("before", "after"), [(F32, BF16), (BF16, F32), (torch.float16, BF16)], ids=str)
def test_in_another_dtype(before: torch.dtype, after: torch.dtype, root: Path, tmp_path: Path) -> None:
    """What is the same but for rounding has changed by that."""
    model = _model(root, "llama")
    old = {name: tensor.to(before) for name, tensor in tensors_of(model).items()}
    base = saved(tmp_path / "b", old, model, dtype=str(before).removeprefix("torch."))
    new = trained(old, after) | {name: old[name].to(after) for name in old if "norm" in name or "embed" in name}
    one = extracted(base, saved(tmp_path / "t", new, model), tmp_path / "a", rank=3)
    assert_best(one, old, new, {name: old[name].double() + pair for name, pair in one.pairs().items()}, 3)
    for told in one.report.others:
        change = relative(new[told.tensor].double() - old[told.tensor].double(), old[told.tensor])
        assert told.change == pytest.approx(change, rel=6e-6)
        assert told.fate == ("changed" if change else "same")
    assert any(told.fate == "same" for told in one.report.others) == (before == BF16)


@pytest.mark.parametrize("direction", ["modules in files", "files in modules"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", pytest.param("deepseek_v3", marks=_slow)])
def test_experts_stored_in_another_way(name: str, direction: str, root: Path, tmp_path: Path) -> None:
    """Stacked as the modules hold them, or one by one as transformers saves them."""
    tuned_as, base_as = direction.split(" in ")
    torch.manual_seed(0)
    model: Any = MODELS[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    folders: dict[str, Path] = {}
    for what in ("original", "tuned"):
        model.save_pretrained(tmp_path / f"{what}, files")
        folders[f"{what}, files"] = tmp_path / f"{what}, files"
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        folders[f"{what}, modules"] = saved(tmp_path / f"{what}, modules", state, tmp_path / f"{what}, files")
        with torch.no_grad():
            for key, tensor in trained(dict(model.named_parameters())).items():
                model.get_parameter(key).copy_(tensor)
    base, tuned = folders[f"original, {base_as}"], folders[f"tuned, {tuned_as}"]
    old, new = tensors_of(base), tensors_of(folders[f"tuned, {base_as}"])
    patterns = ["*_proj*", "*experts*"] if base_as == "modules" else []  # recipes have the names of files
    one = extracted(base, tuned, tmp_path / "a", rank=3, include=patterns, full=["*layernorm*"])
    assert any("expert" in told.tensor for told in one.report.targets)
    ours = merged_by_us(base, tmp_path / "a", tmp_path / "m")
    assert_best(one, old, new, ours, 3)
    assert {told.tensor for told in one.report.targets} | set(one.fates()) == set(old)
    assert one.report.further == ()
    for told in one.report.others:
        change = new[told.tensor].double() - old[told.tensor].double()
        if old[told.tensor].any():
            assert told.change == pytest.approx(relative(change, old[told.tensor]), rel=6e-6)
        changed = "saved" if "layernorm" in told.tensor else "changed"
        assert told.fate == (changed if change.any() else "same")
        assert torch.equal(ours[told.tensor], (new if changed == "saved" else old)[told.tensor])


# ---- FP8


def _numbers(folder: Path) -> Tensors:
    """The weights of a model, dequantized."""
    stored = tensors_of(folder)
    scales = {name: stored.pop(f"{name}_scale_inv") for name in [*stored] if f"{name}_scale_inv" in stored}
    return {n: _dense(tensor, scales[n], (16, 16)) if n in scales else tensor for n, tensor in stored.items()}


@pytest.mark.parametrize("which", ["base", "tuned", "both"])
def test_fp8(which: str, root: Path, tmp_path: Path) -> None:
    model = _model(root, "llama")
    exact = tensors_of(model)
    folders = []
    for i, tensors in enumerate([exact, trained(exact, size=0.1)]):
        dense = saved(tmp_path / f"{i}", {n: tensor.to(BF16) for n, tensor in tensors.items()}, model, dtype="bfloat16")
        is_fp8 = which in (("base", "both") if i == 0 else ("tuned", "both"))
        folders.append(quantize_model(dense, tmp_path / f"{i} fp8") if is_fp8 else dense)
    base, tuned = folders
    old, new = map(_numbers, folders)
    one = extracted(base, tuned, tmp_path / "a", rank=3)
    merged_by_us(base, tmp_path / "a", tmp_path / "m")
    merged = _numbers(tmp_path / "m")
    pairs = one.pairs()
    assert len(one.report.targets) == 14
    for told in one.report.targets:
        change = new[told.tensor].double() - old[told.tensor].double()
        assert told.error == pytest.approx(least_error(change, 3), rel=1e-5)
        assert relative(change - pairs[told.tensor], change) == pytest.approx(told.error, rel=1e-5)
        missed = relative(merged[told.tensor].double() - new[told.tensor].double(), change)
        assert told.merged_error == pytest.approx(missed, rel=1e-5)
    assert {told.tensor for told in one.report.targets} | set(one.fates()) == set(old)
    assert one.report.further == ()
    for told in one.report.others:
        change = new[told.tensor].double() - old[told.tensor].double()
        assert told.change == pytest.approx(relative(change, old[told.tensor]), rel=6e-6)


@pytest.mark.parametrize(
    "scale",
    [torch.ones(()), torch.ones(1, 1), pytest.param(torch.ones(()).to(torch.float8_e8m0fnu), marks=writes_e8m0)],
    ids=str,
)
def test_fp8_with_one_scale_for_each_matrix(scale: torch.Tensor, root: Path, tmp_path: Path) -> None:
    """As Mistral's lie on the hub, with scales of activations beside."""
    model = _model(root, "llama")
    base = quantize_whole(model, tmp_path / "b", scale, weight_block_size=None)
    stored = tensors_of(base)
    old = {n: t.float() * stored[f"{n}_scale_inv"].float() if f"{n}_scale_inv" in stored else t for n, t in stored.items()}
    old = {name: tensor for name, tensor in old.items() if not name.endswith("scale") and not name.endswith("scale_inv")}
    new = trained(old, BF16, size=0.1)
    one = extracted(base, saved(tmp_path / "t", new, model), tmp_path / "a", rank=3)
    assert len(one.report.targets) == 14
    merged = merged_by_us(base, tmp_path / "a", tmp_path / "m")
    pairs = one.pairs()
    for told in one.report.targets:
        change = new[told.tensor].double() - old[told.tensor].double()
        assert told.error == pytest.approx(least_error(change, 3), rel=1e-5)
        assert relative(change - pairs[told.tensor], change) == pytest.approx(told.error, rel=1e-5)
        written = merged[told.tensor].double() * merged[f"{told.tensor}_scale_inv"].double()
        assert told.merged_error == pytest.approx(relative(written - new[told.tensor].double(), change), rel=1e-5)
    assert {told.tensor for told in one.report.targets} | set(one.fates()) == set(old)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_fp8_that_is_saved_whole(which: str, root: Path, tmp_path: Path) -> None:
    """With the numbers that it has in the tuned model."""
    model = _model(root, "llama")
    exact = {name: tensor.to(BF16) for name, tensor in tensors_of(model).items()}
    folders = {
        "base": saved(tmp_path / "b", exact, model, dtype="bfloat16"),
        "tuned": saved(tmp_path / "t", trained(exact), model, dtype="bfloat16"),
    }
    folders[which] = quantize_model(folders[which], tmp_path / "fp8", which=lambda name: "lm_head" in name)
    one = extracted(folders["base"], folders["tuned"], tmp_path / "a", rank=3, full=["lm_head*"])
    expected = _numbers(folders["tuned"])["lm_head.weight"]
    stored = load_file(tmp_path / "a/adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert one.fates()["lm_head.weight"] == "saved"
    assert stored.dtype == expected.dtype == (F32 if which == "tuned" else BF16)
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_fp8_that_is_only_compared(which: str, root: Path, tmp_path: Path) -> None:
    """Its numbers are, and not its bytes."""
    model = _model(root, "llama")
    exact = tensors_of(model)
    new = trained(exact, size=0.1)
    dense = {
        name: saved(tmp_path / name, {n: tensor.to(BF16) for n, tensor in tensors.items()}, model, dtype="bfloat16")
        for name, tensors in (("base", exact), ("tuned", new))
    }
    dense[which] = quantize_model(dense[which], tmp_path / "fp8")
    old, new = _numbers(dense["base"]), _numbers(dense["tuned"])
    one = extracted(dense["base"], dense["tuned"], tmp_path / "a", rank=3, include=["*q_proj*"], full=["*norm*"])
    assert len(one.report.targets) == 2
    assert {told.tensor for told in one.report.targets} | set(one.fates()) == set(old)
    left = whole = 0.0
    pairs = one.pairs()
    for told in one.report.others:
        change = new[told.tensor].double() - old[told.tensor].double()
        assert told.change == pytest.approx(relative(change, old[told.tensor]), rel=6e-6), told
        whole += change.square().sum().item()
        left += change.square().sum().item() * (told.fate != "saved")
    for name, pair in pairs.items():
        change = new[name].double() - old[name].double()
        whole += change.square().sum().item()
        left += (change - pair).square().sum().item()
    assert one.report.kept_of_all == pytest.approx(1 - left / whole, abs=6e-6)


# ---- models that have more, or less, or others


def test_a_classifier_in_the_place_of_the_head(root: Path, tmp_path: Path) -> None:
    base = _model(root, "llama")
    old = tensors_of(base)
    new = trained(old)
    head = {"score.weight": torch.ones(3, 32)}
    rest = {name: tensor for name, tensor in new.items() if name != "lm_head.weight"}
    tuned = saved(tmp_path / "t", rest | head, base, architectures=["LlamaForSequenceClassification"], num_labels=3)
    one = extracted(base, tuned, tmp_path / "a", rank=3)
    assert_best(one, old, new, merged_by_us(base, tmp_path / "a", tmp_path / "m"), 3)
    assert one.fates()["lm_head.weight"] == "gone"
    assert one.report.further == ("score.weight",)


def test_names_of_long_ago(tmp_path: Path) -> None:
    """As in BERT's first files, which transformers renames when it loads them."""
    model = FAMILIES["bert"].save(tmp_path / "m")
    new = trained(tensors_of(model))

    def former(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    old = {former(name): tensor for name, tensor in tensors_of(model).items()}
    base = saved(tmp_path / "b", old, model)
    one = extracted(base, saved(tmp_path / "t", new, model), tmp_path / "a", rank=3, full=["*.LayerNorm.*"])
    assert one.fates() == {name: "saved" if "LayerNorm" in name else "changed" for name in one.fates()}
    assert one.report.further == ()
    with quietly():
        load: Any = hf.BertForMaskedLM.from_pretrained
        merged: Any = peft.PeftModel.from_pretrained(load(base, dtype=F32), str(tmp_path / "a")).merge_and_unload()
    found = merged.state_dict()
    assert_best(one, old, {former(name): tensor for name, tensor in new.items()}, found, 3)
    assert all(torch.equal(found[name], new[name]) for name in new if "LayerNorm" in name)


@pytest.mark.parametrize("rows", [-4, 6])
def test_a_vocabulary_of_another_size(rows: int, root: Path, tmp_path: Path) -> None:
    base = _model(root, "llama")
    old = tensors_of(base)
    load: Any = hf.AutoModelForCausalLM.from_pretrained
    resized = load(saved(tmp_path / "n", trained(old), base), dtype=F32)
    resized.resize_token_embeddings(50 + rows, mean_resizing=False)
    resized.save_pretrained(tmp_path / "t")
    new = tensors_of(tmp_path / "t")
    one = extracted(base, tmp_path / "t", tmp_path / "a", rank=3)
    common = min(50, 50 + rows)
    for told in one.report.others:
        if told.tensor in ("lm_head.weight", "model.embed_tokens.weight"):
            difference = new[told.tensor][:common].double() - old[told.tensor][:common].double()
            assert (told.fate, told.tuned_shape) == ("resized", (50 + rows, 32))
            assert told.change == pytest.approx(relative(difference, old[told.tensor]), rel=6e-6)
    kept = {name: tensor for name, tensor in new.items() if tensor.shape == old[name].shape}
    merged = merged_by_us(base, tmp_path / "a", tmp_path / "m")
    assert_best(one, old, kept, merged, 3)
    assert torch.equal(merged["lm_head.weight"], old["lm_head.weight"])  # as the note says
    (note,) = (note for note in one.notes if "another shape" in note)
    assert f"lm_head.weight, [50, 32] and there [{50 + rows}, 32]" in note
    with pytest.raises(SurgeryError, match=r"'lm_head.weight' has another shape in the tuned model, and cannot be saved whole"):
        extracted(base, tmp_path / "t", tmp_path / "o", rank=3, full=["lm_head*"])
    with pytest.raises(SurgeryError, match=r"'lm_head.weight' has another shape than in the original"):
        extracted(base, tmp_path / "t", tmp_path / "o", rank=3, include=["lm_head*"])


def test_a_vision_tower_that_is_not_there(root: Path, tmp_path: Path) -> None:
    """The text model of a model for images and texts was tuned and saved alone."""
    base = _model(root, "llava")
    old = tensors_of(base)
    new = trained(old)
    text = {name.removeprefix("language_model."): t for name, t in new.items() if name.startswith("language_model.")}
    tuned = saved(tmp_path / "t", text, _model(root, "llama"))
    one = extracted(base, tuned, tmp_path / "a", rank=3, include=["language_model.*_proj*"])
    assert_best(one, old, new, merged_by_us(base, tmp_path / "a", tmp_path / "m"), 3)
    gone = {name for name, fate in one.fates().items() if fate == "gone"}
    assert gone == {name for name in old if not name.startswith("language_model.")}
    assert {told.fate for told in one.report.others} == {"gone", "changed"}
    with pytest.raises(SurgeryError, match=r"has no tensor '.*vision_tower"):
        extracted(base, tuned, tmp_path / "o", rank=3)
    # And the reverse.
    plain = saved(
        tmp_path / "p", {n.removeprefix("language_model."): old[n] for n in old if "language" in n}, _model(root, "llama")
    )
    one = extracted(plain, saved(tmp_path / "v", new, base), tmp_path / "a2", rank=3)
    assert set(one.report.further) == gone
    assert_best(one, tensors_of(plain), text, merged_by_us(plain, tmp_path / "a2", tmp_path / "m2"), 3)


def test_lora_that_was_left_beside(root: Path, tmp_path: Path) -> None:
    base = _model(root, "llama")
    tensors = {}
    for name, tensor in trained(tensors_of(base)).items():
        if "q_proj" in name:
            module = name.removesuffix(".weight")
            tensors[f"base_model.model.{module}.base_layer.weight"] = tensor
            tensors[f"base_model.model.{module}.lora_A.default.weight"] = torch.ones(2, 32)
            tensors[f"base_model.model.{module}.lora_B.default.weight"] = torch.ones(32, 2)
        else:
            tensors[f"base_model.model.{name}"] = tensor
    with pytest.raises(SurgeryError, match="merge adapters first"):
        extracted(base, saved(tmp_path / "t", tensors, base), tmp_path / "a", rank=3)
    assert not list((tmp_path / "a").glob("*"))
