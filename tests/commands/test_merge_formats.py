"""``surgery merge`` of models that are stored in other ways: FP8 weights and stacks, other dtypes, parts of a pipeline."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery.commands.adapters.merge import merge, plan_merge
from surgery.errors import OptionError, WeightError
from surgery.progress import Silent
from tests.commands.test_merge import DOWN, SHAPES, Q, delta, save_lora, sha256, share
from tests.families import FAMILIES
from tests.measure import measured_peak
from tests.models import files_of, realistic, save_llama, tensors_of
from tests.releases import writes_e8m0
from tests.weights.test_fp8 import BLOCK, quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")


def _dense(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """float64: what an FP8 tensor and its scales by block stand for."""
    return tensors[name].double() * _spread(tensors, name)


def _spread(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """float64: the scale of each number."""
    m, n = tensors[name].shape[-2:]
    rows, columns = torch.arange(m) // BLOCK[0], torch.arange(n) // BLOCK[1]
    return tensors[f"{name}_scale_inv"].double()[..., rows[:, None], columns[None, :]]


def _distance(tensors: dict[str, torch.Tensor], name: str, truth: torch.Tensor) -> float:
    """How far an FP8 tensor is from the truth, relative to the numbers that are nearest to it with the same scales."""
    scales = _spread(tensors, name)
    nearest = (truth / scales).float().to(torch.float8_e4m3fn).double() * scales
    return float((_dense(tensors, name) - truth).norm() / (nearest - truth).norm())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("powers_of_two", [False, pytest.param(True, marks=writes_e8m0)])
def test_fp8_stays_fp8(apart: bool, powers_of_two: bool, llama: Path, tmp_path: Path) -> None:
    """Each number within a step of the truth, the update kept, and scales that are those of the numbers beside them."""
    base = quantize_model(llama, tmp_path / "base", apart=apart, powers_of_two=powers_of_two)
    adapter = save_lora(tmp_path / "a", SHAPES, size=0.001)
    report = merge(base, adapter, tmp_path / "o", progress=Silent())
    before, after = tensors_of(base), tensors_of(tmp_path / "o")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in before.items()
    }
    for name in before:
        module = name.removesuffix("_scale_inv").removesuffix(".weight")
        if module not in SHAPES:
            assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    for module in SHAPES:
        name = f"{module}.weight"
        old, new, update = _dense(before, name), _dense(after, name), delta(adapter, module)
        assert _distance(after, name, old + update) <= 2
        assert share(old, new, update) >= 0.99
    assert report.kept_least is not None
    assert report.kept_least >= 0.99
    config = (tmp_path / "o/config.json").read_bytes()
    assert config == (base / "config.json").read_bytes()


@pytest.mark.parametrize("apart", [False, True])
def test_fp8_becomes_bfloat16(apart: bool, llama: Path, tmp_path: Path) -> None:
    base = quantize_model(llama, tmp_path / "base", apart=apart)
    adapter = save_lora(tmp_path / "a", SHAPES, size=0.001)
    report = merge(base, adapter, tmp_path / "o", dequantize=True, rounding="nearest", progress=Silent())
    before, after = tensors_of(base), tensors_of(tmp_path / "o")
    assert report.dequantized
    assert "quantization_config" not in json.loads((tmp_path / "o/config.json").read_text())
    assert set(after) == {name for name in before if not name.endswith("_scale_inv")}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, tensor in after.items():
        truth = _dense(before, name) if f"{name}_scale_inv" in before else before[name].double()
        if (module := name.removesuffix(".weight")) in SHAPES:
            truth = truth + delta(adapter, module)
        assert torch.equal(tensor, truth.to(torch.bfloat16)), name
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")


def test_fp8_with_magnitudes_of_dora(llama: Path, tmp_path: Path) -> None:
    """Against DoRA's own formula in float64: W' scaled to rows of the norms that were trained."""
    base = quantize_model(llama, tmp_path / "base")
    old = _dense(tensors_of(base), f"{Q}.weight")
    magnitude = old.norm(dim=1) * torch.linspace(0.7, 1.4, 48)
    adapter = save_lora(tmp_path / "a", {Q: SHAPES[Q]}, use_dora=True, more={f"{Q}.lora_magnitude_vector": magnitude.float()})
    whole = old + delta(adapter, Q)
    truth = magnitude[:, None] / whole.norm(dim=1, keepdim=True) * whole
    merge(base, adapter, tmp_path / "o", progress=Silent())
    after = tensors_of(tmp_path / "o")
    new = _dense(after, f"{Q}.weight")
    assert _distance(after, f"{Q}.weight", truth) <= 2
    assert share(old, new, truth - old) >= 0.99
    merge(base, adapter, tmp_path / "dense", dequantize=True, rounding="nearest", progress=Silent())
    torch.testing.assert_close(tensors_of(tmp_path / "dense")[f"{Q}.weight"].double(), truth, rtol=2.0**-8 * 1.001, atol=1e-9)


def test_saved_modules_of_an_fp8_model(llama: Path, tmp_path: Path) -> None:
    """A whole tensor that replaces an FP8 weight is quantized, with scales of its own."""
    base = quantize_model(llama, tmp_path / "base")
    saved = realistic(48, 48, seed=11) * 7
    head = realistic(97, 48, seed=12)
    more = {f"{Q}.modules_to_save.weight": saved, "lm_head.modules_to_save.weight": head}
    adapter = save_lora(tmp_path / "a", {DOWN: SHAPES[DOWN]}, more=more, modules_to_save=["q_proj", "lm_head"])
    merge(base, adapter, tmp_path / "o", progress=Silent())
    after = tensors_of(tmp_path / "o")
    error = (_dense(after, f"{Q}.weight") - saved.double()).norm() / saved.double().norm()
    assert error < 0.04
    assert torch.equal(after["lm_head.weight"], head.to(torch.bfloat16))


@pytest.mark.parametrize("dequantize", [False, True])
def test_fp8_stacks_of_experts(dequantize: bool, tmp_path: Path) -> None:
    """One expert's update, in the half of a stack that holds its projection: the others keep their bytes and scales."""
    family = FAMILIES["qwen3_moe"]
    model = family.load(family.save(tmp_path / "m"))
    stacked, experts = tmp_path / "stacked", "model.layers.0.mlp.experts"
    stacked.mkdir()
    shutil.copy(tmp_path / "m/config.json", stacked)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, stacked / "model.safetensors")
    base = quantize_model(stacked, tmp_path / "base", which=lambda name: ".experts." in name)
    before = tensors_of(base)
    _, fused, inputs = before[f"{experts}.gate_up_proj"].shape
    up = f"{experts}.2.up_proj"
    adapter = save_lora(tmp_path / "a", {up: (fused // 2, inputs)}, size=0.01)
    report = merge(base, adapter, tmp_path / "o", dequantize=dequantize, progress=Silent())
    assert [one.tensor for one in report.tensors] == [f"{experts}.gate_up_proj"]
    update = torch.zeros(fused, inputs, dtype=torch.float64)
    update[fused // 2 :] = delta(adapter, up)
    after = tensors_of(tmp_path / "o")
    for name in before:
        if dequantize or name.removesuffix("_scale_inv") != f"{experts}.gate_up_proj":
            continue
        same = [0, 1, 3] if name.startswith(experts) else ...
        assert torch.equal(after[name][same].view(torch.uint8), before[name][same].view(torch.uint8)), name
    old = _dense(before, f"{experts}.gate_up_proj")
    new = after[f"{experts}.gate_up_proj"].double() if dequantize else _dense(after, f"{experts}.gate_up_proj")
    assert share(old[2], new[2], update) >= 0.99
    if dequantize:
        assert torch.equal(new[[0, 1, 3]], old[[0, 1, 3]].to(torch.bfloat16).double())
        assert "quantization_config" not in json.loads((tmp_path / "o/config.json").read_text())
    assert report.kept == pytest.approx(share(old[2], new[2], update), abs=2e-3)


def test_everything_in_bfloat16(llama: Path, tmp_path: Path) -> None:
    """Norms and what is not changed too; config and index say so, and transformers loads it so."""
    model = save_llama(tmp_path / "m", torch.float32)
    adapter = save_lora(tmp_path / "a", SHAPES)
    report = merge(model, adapter, tmp_path / "o", dtype="bfloat16", rounding="nearest", progress=Silent())
    before, after = tensors_of(model), tensors_of(tmp_path / "o")
    assert set(after) == set(before)
    for name, tensor in after.items():
        truth = before[name].double()
        if (module := name.removesuffix(".weight")) in SHAPES:
            truth = truth + delta(adapter, module)
        assert torch.equal(tensor, truth.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "o/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "o/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in after.values())
    assert report.restored == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    plan = plan_merge(model, adapter, dtype="bfloat16")
    assert plan.bytes_written == report.bytes_written
    # In its own dtype it is no other model.
    merge(llama, adapter, tmp_path / "same", dtype="bfloat16", progress=Silent())
    merge(llama, adapter, tmp_path / "plain", progress=Silent())
    assert tensors_of(tmp_path / "same").keys() == tensors_of(tmp_path / "plain").keys()
    for name, tensor in tensors_of(tmp_path / "plain").items():
        assert torch.equal(tensors_of(tmp_path / "same")[name], tensor)


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)]
)
def test_in_a_dtype_with_more_digits(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """The sum is rounded once, to the dtype that is written, and not first to the one that the weight is stored in."""
    model = save_llama(tmp_path / "m", stored)
    adapter = save_lora(tmp_path / "a", SHAPES)
    name = str(dtype).removeprefix("torch.")
    merge(model, adapter, tmp_path / "o", dtype=name, rounding="nearest", progress=Silent())  # type: ignore[arg-type]
    before, after = tensors_of(model), tensors_of(tmp_path / "o")
    for tensor in before:
        truth = before[tensor].double()
        if (module := tensor.removesuffix(".weight")) in SHAPES:
            truth = truth + delta(adapter, module)
        assert torch.equal(after[tensor], truth.to(dtype)), tensor


def test_beyond_the_range_of_float16(tmp_path: Path) -> None:
    """Named, whether the weights are in float16 or become so, and whatever takes them there."""
    model = save_llama(tmp_path / "m", torch.float16)
    large = save_lora(tmp_path / "large", SHAPES, size=1e5)
    saved = save_lora(tmp_path / "saved", SHAPES, more={"lm_head.modules_to_save.weight": torch.full((97, 48), 1e6)})
    tokens = {"model.embed_tokens.trainable_tokens_delta": torch.full((1, 48), 1e6)}
    rows = save_lora(tmp_path / "rows", SHAPES, more=tokens, trainable_token_indices={"embed_tokens": [96]})
    dora = {f"{module}.lora_magnitude_vector": torch.full((shape[0],), 1e7) for module, shape in SHAPES.items()}
    scaled = save_lora(tmp_path / "scaled", SHAPES, use_dora=True, more=dora)
    wide = save_llama(tmp_path / "wide", torch.bfloat16)
    for adapter, name in ((large, Q), (saved, "lm_head"), (rows, "model.embed_tokens"), (scaled, Q)):
        with pytest.raises((WeightError, ValueError), match=rf"{name}.weight.* beyond the range of float16"):
            merge(model, adapter, tmp_path / "o", progress=Silent())
        assert not (tmp_path / "o/config.json").exists()
        shutil.rmtree(tmp_path / "o", ignore_errors=True)  # a run that failed early has not made it
        with pytest.raises((WeightError, ValueError), match=rf"{name}.weight.* beyond the range of float16"):
            merge(wide, adapter, tmp_path / "o", dtype="float16", progress=Silent())
        assert not (tmp_path / "o/config.json").exists()
        shutil.rmtree(tmp_path / "o", ignore_errors=True)  # a run that failed early has not made it


def test_a_model_that_is_not_fp8(llama: Path, tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "a", SHAPES)
    with pytest.raises(OptionError, match="there is nothing to dequantize"):
        merge(llama, adapter, tmp_path / "o", dequantize=True, progress=Silent())


@pytest.mark.parametrize("where", ["the pipeline", "the part"])
def test_a_part_of_a_pipeline(where: str, tmp_path: Path) -> None:
    """What the file has for other parts is told; the part is merged as a model of its own."""
    pipeline = tmp_path / "pipeline"
    module, text = "down_blocks.0.attentions.0.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
    for part, name, config in (
        ("unet", module, {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.1"}),
        ("text_encoder", text, {"architectures": ["CLIPTextModel"]}),
    ):
        (pipeline / part).mkdir(parents=True)
        tensors = {f"{name}.weight": realistic(24, 32, seed=len(part)), "norm.weight": torch.ones(5)}
        save_file(tensors, pipeline / part / "model.safetensors", metadata={"format": "pt"})
        (pipeline / part / "config.json").write_text(json.dumps(config))
    (pipeline / "model_index.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    halves = {
        f"{part}.{name}.lora_{half}.weight": torch.randn(shape, generator=generator) * 0.1
        for part, name in (("unet", module), ("text_encoder", text))
        for half, shape in (("A", (3, 32)), ("B", (24, 3)))
    }
    (tmp_path / "a").mkdir()
    save_file(halves, tmp_path / "a/pytorch_lora_weights.safetensors")
    for part, name in (("unet", module), ("text_encoder", text)):
        if where == "the part" and part == "text_encoder":
            continue  # by its own folder alone it is not known to be one of a pipeline
        said, out = Silent(), tmp_path / f"o {part}"
        if where == "the pipeline":
            merge(pipeline, tmp_path / "a", out, subfolder=part, progress=said)
        else:
            merge(pipeline / part, tmp_path / "a", out, progress=said)
        before, after = (load_file(folder / "model.safetensors") for folder in (pipeline / part, out))
        update = halves[f"{part}.{name}.lora_B.weight"].double() @ halves[f"{part}.{name}.lora_A.weight"].double()
        torch.testing.assert_close(
            after[f"{name}.weight"].double(), before[f"{name}.weight"].double() + update, rtol=1e-6, atol=1e-7
        )
        assert torch.equal(after["norm.weight"], before["norm.weight"])
        assert any("there are others: 2 for" in note for note in said.notes)
        assert sha256(out / "config.json") == sha256(pipeline / part / "config.json")
        assert files_of(out).keys() == files_of(pipeline / part).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "kind", ["rank 256", pytest.param("saved", marks=pytest.mark.slow), pytest.param("dora", marks=pytest.mark.slow)]
)
def test_memory_is_that_of_the_largest_weight(kind: str, tmp_path: Path) -> None:
    """An embedding of 67 MB: its copies are few, whatever is done to it, and fewer than the plan says."""
    model, rows, columns = tmp_path / "m", 16384, 2048
    model.mkdir()
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    small = realistic(64, 64).to(torch.bfloat16)
    save_file({"lm_head.weight": weight, "model.x.weight": small}, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    if kind == "saved":
        more = {"lm_head.modules_to_save.weight": weight.float() + 1}
        adapter = save_lora(tmp_path / "a", {"model.x": (64, 64)}, more=more, modules_to_save=["lm_head"])
        numbers = 4 * rows * columns  # of the adapter, as they are read
    elif kind == "dora":
        magnitude = {"lm_head.lora_magnitude_vector": weight.float().norm(dim=1) * 1.1}
        adapter = save_lora(tmp_path / "a", {"lm_head": (rows, columns)}, rank=16, use_dora=True, more=magnitude)
        numbers = 4 * 16 * (rows + columns)
    else:
        adapter = save_lora(tmp_path / "a", {"lm_head": (rows, columns)}, rank=256, size=1e-4)
        numbers = 4 * 256 * (rows + columns)
    plan = plan_merge(model, adapter, device="cpu")
    imports = "from surgery.commands.adapters.merge import merge\nfrom surgery.progress import Silent\n"
    call = f"merge({str(model)!r}, {str(adapter)!r}, {str(tmp_path / 'o')!r}, device='cpu', progress=Silent())"
    base = measured_peak(imports, threads=2)
    peak = measured_peak(imports + call, threads=2)
    assert peak <= plan.peak_memory_bytes
    # The weight, the new one, and one more; the sides of an update in float64 besides, and as orthonormal bases.
    assert peak - base <= 3 * weight.nbytes + (1 if kind == "saved" else 7) * numbers + (100 << 20)


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_with_nan(dora: bool, tmp_path: Path) -> None:
    """It is the model that is named, and no training that would have diverged; what does not change is copied as it is."""
    model = tmp_path / "m"
    model.mkdir()
    weight, other = realistic(48, 48), realistic(20, 30)
    weight[3, 5], other[0, 0] = math.nan, math.inf
    save_file({f"{Q}.weight": weight, "other.weight": other, "whole.weight": realistic(8, 8)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    more = {f"{Q}.lora_magnitude_vector": torch.ones(48)} if dora else {}
    adapter = save_lora(tmp_path / "a", {Q: (48, 48)}, use_dora=dora, more=more)
    with pytest.raises(WeightError, match=f"'{Q}.weight' of the model holds NaN or infinity"):
        merge(model, adapter, tmp_path / "o", progress=Silent())
    assert not (tmp_path / "o/config.json").exists()
    merge(model, save_lora(tmp_path / "b", {"whole": (8, 8)}), tmp_path / "p", progress=Silent())
    assert torch.equal(tensors_of(tmp_path / "p")["other.weight"], other)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tensors_of_odd_shapes(dtype: Any, tmp_path: Path) -> None:
    """Empty ones, numbers, integers: beside what changes, and replaced."""
    model = tmp_path / "m"
    model.mkdir()
    odd = {"empty": torch.empty(0, 8), "number": torch.tensor(3.1), "integers": torch.arange(4), "flags": torch.ones(3) > 0}
    save_file({"a.weight": realistic(8, 8), **odd}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    replaced = {"empty": torch.empty(0, 8), "number": torch.tensor(2.7)}
    adapter = save_lora(tmp_path / "a", {"a": (8, 8)}, more=replaced)
    merge(model, adapter, tmp_path / "o", dtype=dtype, progress=Silent())
    for name, tensor in tensors_of(tmp_path / "o").items():
        if name in odd:
            before = replaced.get(name, odd[name])
            becomes = torch.bfloat16 if dtype is not None and before.is_floating_point() else before.dtype
            assert torch.equal(tensor, before.to(becomes)), name
            assert tensor.dtype == becomes


def test_tied_weights_that_are_stored_twice(tmp_path: Path) -> None:
    """Both copies change, or the adapter is refused: they are never two."""
    model = save_llama(tmp_path / "m", torch.bfloat16, tie_word_embeddings=True)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    save_file({head: tensors_of(model)[embedding].clone()}, model / "head.safetensors", metadata={"format": "pt"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"][head] = "head.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = realistic(2, 48)
    tokens = {"model.embed_tokens.trainable_tokens_delta": rows}
    adapter = save_lora(tmp_path / "tokens", SHAPES, more=tokens, trainable_token_indices={"embed_tokens": [5, 96]})
    merge(model, adapter, tmp_path / "o", progress=Silent())
    after = tensors_of(tmp_path / "o")
    assert torch.equal(after[head], after[embedding])
    assert torch.equal(after[head][[5, 96]], rows.to(torch.bfloat16))
    one_side = save_lora(tmp_path / "head", SHAPES, more={"lm_head.modules_to_save.weight": realistic(97, 48)})
    with pytest.raises(OptionError, match="whose weight several modules share"):
        merge(model, one_side, tmp_path / "x", progress=Silent())
    assert not (tmp_path / "x").exists()
