"""FP8 checkpoints with scales by block and by matrix, against torch's arithmetic and transformers' own dequantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.commands.verify import verify
from surgery.errors import FormatError, OptionError, OutputError, SourceError, WeightError
from surgery.names import Train
from surgery.progress import Silent
from tests.families import FAMILIES
from tests.fp8_models import BLOCK, quantize_model, scales_by_hand
from tests.models import files_of, planned, tensors_of
from tests.quantized.fp8 import block_scales, dequantize, quantize
from tests.releases import needs, writes_e8m0


def _dense(q: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float32 weights, entry by entry."""
    m, n = q.shape[-2:]
    i, j = torch.arange(m) // block[0], torch.arange(n) // block[1]
    return q.float() * scales.float()[..., i[:, None], j[None, :]]


def _folded(tmp_path: Path, base: Path, scales: Any, name: str, **options: Any) -> Path:
    """Rounded to nearest; what other roundings give is in tests/commands/test_rounding.py."""
    surgery.fold(tmp_path / "f", scales, tmp_path / name, base=base, rounding="nearest", **options)
    return tmp_path / name


def _random_scales(manifest: surgery.Manifest, train: Train = "scales") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    distances = {target.key: 0.5 * torch.randn(target.shape_of(train), generator=generator) for target in manifest.targets}
    return {key: distance + _untouched(distance, train) for key, distance in distances.items()}


def _untouched(like: torch.Tensor, train: Train) -> torch.Tensor:
    return torch.ones_like(like) if train == "scales" else torch.eye(like.shape[-1]).expand_as(like)


def _change(factors: dict[str, torch.Tensor], key: str, trained: torch.Tensor, train: Train) -> torch.Tensor:
    """What scales or cores add to a target, in float64."""
    U, s, V = (factors[f"{key}.{part}"].double() for part in ("U", "s", "V"))
    core, root = torch.diag_embed(trained) if train == "scales" else trained, s.sqrt()
    return (U * root.unsqueeze(-2)) @ (core.double() - torch.eye(s.shape[-1])) @ (V * root.unsqueeze(-2)).mT


@pytest.mark.parametrize("shape", [(32, 48), (37, 50), (5, 3), (3, 20, 33)])
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_arithmetic(shape: tuple[int, ...], powers_of_two: bool) -> None:
    """Blocks cut off at the edges, stacks, both kinds of scales."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, shape[-1])
    expected = scales_by_hand(weight, BLOCK, powers_of_two=powers_of_two)
    scales = block_scales(weight, BLOCK, expected)
    assert scales.dtype == expected.dtype
    assert torch.equal(scales.float(), expected.float())
    q = quantize(weight, scales, BLOCK)
    assert torch.equal(dequantize(q, scales, BLOCK), _dense(q, scales, BLOCK))
    # Half a unit in the last of three places, or of the smallest subnormal.
    spread = _dense(torch.ones(shape), scales, BLOCK)
    error = (dequantize(q, scales, BLOCK) - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() * 2**-4, spread * 2**-10) * 1.0001).all())
    # What is dequantized and quantized with its own scales is itself.
    assert torch.equal(quantize(dequantize(q, scales, BLOCK), scales, BLOCK).view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_one_scale_for_all_and_zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.tensor([[1.0, -896.0], [0.25, 2.0]])
    scale = block_scales(weight, (2, 2), torch.ones(shape).to(dtype))
    assert (scale.shape, scale.dtype, scale.float().item()) == (shape, dtype, 2.0)
    assert dequantize(quantize(weight, scale, (2, 2)), scale, (2, 2)).tolist() == [[1.0, -896.0], [0.25, 2.0]]
    zeros = torch.zeros(4, 4)
    assert block_scales(zeros, BLOCK, torch.ones(1, 1)).item() == 1.0
    assert not dequantize(quantize(zeros, torch.ones(1, 1), BLOCK), torch.ones(1, 1), BLOCK).any()


@pytest.mark.parametrize(("apart", "train"), [(False, "scales"), (True, "scales"), (False, "core")])
@pytest.mark.parametrize("powers_of_two", [False, pytest.param(True, marks=writes_e8m0)])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "llama4"])
def test_there_and_back(name: str, powers_of_two: bool, apart: bool, train: Train, tmp_path: Path) -> None:
    """Untouched: the same bytes. Changed: the nearest FP8 numbers to the formula, with fresh scales; the rest untouched."""
    block = (10, 12)  # fits no side
    base = quantize_model(
        FAMILIES[name].save(tmp_path / "m"), tmp_path / "base", block=block, powers_of_two=powers_of_two, apart=apart
    )
    manifest = surgery.factorize(base, tmp_path / "f", rank=4).manifest
    assert manifest.layout == "overlay"
    mixed = {"F8_E4M3", "BF16"} if name == "deepseek_v3" else {"F8_E4M3"}  # kv_a_proj_with_mqa has stayed as it was
    assert {target.dtype for target in manifest.targets} == mixed
    assert files_of(_folded(tmp_path, base, tmp_path / "f/surgery/scales.safetensors", "back")) == files_of(base)
    assert verify(tmp_path / "f", base=base).ok

    scales = _random_scales(manifest, train)
    untouched = manifest.targets[0]
    scales[untouched.key] = _untouched(scales[untouched.key], train)
    stacks = [target for target in manifest.targets if target.view == "stack"]
    for target in stacks:
        scales[target.key][1] = _untouched(scales[target.key], train)[1]  # one expert of each
    before, after = tensors_of(base), tensors_of(_folded(tmp_path, base, scales, "folded"))
    assert before.keys() == after.keys()
    factors = {key: part for file in (tmp_path / "f/surgery").glob("factors*") for key, part in load_file(file).items()}
    for target in manifest.targets:
        if target.dtype == "BF16":
            exact = before[target.tensor].double() + _change(factors, target.key, scales[target.key], train)
            assert torch.allclose(after[target.tensor].double(), exact, rtol=2**-8, atol=0)
            continue
        q, scale = before[target.tensor], before[f"{target.tensor}_scale_inv"]
        new_q, new_scale = after[target.tensor], after[f"{target.tensor}_scale_inv"]
        assert (new_q.dtype, new_scale.dtype, new_scale.shape) == (q.dtype, scale.dtype, scale.shape)
        if target is untouched:
            assert torch.equal(q.view(torch.uint8), new_q.view(torch.uint8))
            assert torch.equal(scale.float(), new_scale.float())
            continue
        change = _change(factors, target.key, scales[target.key], train)
        wanted = (_dense(q, scale, block).double() + change).float()
        fresh = scales_by_hand(wanted, block, powers_of_two=powers_of_two)
        if target.view == "stack":
            wanted[1], fresh[1] = _dense(q, scale, block)[1], scale[1]
            assert torch.equal(q[1].view(torch.uint8), new_q[1].view(torch.uint8))
        assert torch.allclose(new_scale.float(), fresh.float(), rtol=1e-6)
        spread = _dense(torch.ones_like(wanted), new_scale, block)
        error = (_dense(new_q, new_scale, block) - wanted).abs()
        assert bool((error <= torch.maximum(wanted.abs() * 2**-4, spread * 2**-10) * 1.001).all())
    others = before.keys() - {name for t in manifest.targets for name in (t.tensor, f"{t.tensor}_scale_inv")}
    assert others
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in others)


@pytest.mark.parametrize(("apart", "train"), [(False, "scales"), (True, "scales"), (False, "core")])
def test_dequantized(apart: bool, train: Train, tmp_path: Path) -> None:
    """Every FP8 weight becomes bfloat16, targets or not; the model then loads without a quantization."""
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base", apart=apart)
    manifest = surgery.factorize(base, tmp_path / "f", rank=4, exclude=["*down_proj*"]).manifest
    scales = _random_scales(manifest, train)
    out = _folded(tmp_path, base, scales, "dense", dequantize=True)
    before, after = tensors_of(base), tensors_of(out)
    assert {name for name in before if not name.endswith("_scale_inv")} == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    factors = {key: part for file in (tmp_path / "f/surgery").glob("factors*") for key, part in load_file(file).items()}
    targets = {target.tensor for target in manifest.targets}
    for name in after:
        if f"{name}_scale_inv" not in before:
            assert torch.equal(after[name], before[name])
            continue
        expected = _dense(before[name], before[f"{name}_scale_inv"], BLOCK)
        if name in targets:
            expected = (expected.double() + _change(factors, name, scales[name], train)).float()
        assert torch.equal(after[name], expected.to(torch.bfloat16))
    if apart:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        # A file of which nothing is left is there too: without it the numbers of the others would have a gap.
        assert {path.name for path in out.glob("*.safetensors") if load_file(path)} == set(index["weight_map"].values())
        assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in base.glob("*.safetensors")}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16
    complete = Silent()
    _folded(tmp_path, base, scales, "dense", dequantize=True, progress=complete)
    assert complete.notes[-1] == f"{out} is already complete: nothing to do"
    before_it = files_of(out)
    with pytest.raises(OutputError, match="not those of this run"):
        _folded(tmp_path, base, {key: value + 1 for key, value in scales.items()}, "dense", dequantize=True, progress=Silent())
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace("bfloat16", "float16"))
    with pytest.raises(OutputError, match="not those of this run"):
        _folded(tmp_path, base, scales, "dense", dequantize=True, progress=Silent())
    (out / "config.json").write_text(config)
    assert files_of(out) == before_it


#: Before, triton is looked for; 5.16 fails by itself.
_reads_fp8 = needs("transformers", ">=5.10,!=5.16.*", "reading FP8 without a GPU")


@_reads_fp8
def test_as_transformers_dequantizes(tmp_path: Path) -> None:
    """Its loader and ours read the same weights out of an FP8 checkpoint (with blocks that fit)."""
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base")
    surgery.factorize(base, tmp_path / "f", rank=4)
    out = _folded(tmp_path, base, tmp_path / "f/surgery/scales.safetensors", "dense", dequantize=True)
    config = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    ours = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    tokens = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)


def test_residual_layout_is_refused(tmp_path: Path) -> None:
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base")
    with pytest.raises(OptionError, match="has no residual layout"):
        surgery.plan(base, layout="residual")
    # What is not FP8 in the same model has one.
    assert surgery.plan(base, include=["model.embed_tokens.weight"], layout="residual").layout == "residual"


def test_nothing_to_dequantize(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    with pytest.raises(OptionError, match="nothing to dequantize"):
        surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "o", dequantize=True)
    assert not (tmp_path / "o").exists()


def _rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


_Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{_Q}_scale_inv"), "its scales are missing"),
        (lambda tensors: tensors.update({f"{_Q}_scales": tensors.pop(f"{_Q}_scale_inv")}), f"{_Q}_scales"),
        (lambda tensors: tensors.update({f"{_Q}_scale": tensors[f"{_Q}_scale_inv"].clone()}), "is not clear"),
        (lambda tensors: tensors.update({f"{_Q}_zero_point": tensors[f"{_Q}_scale_inv"].clone()}), "is not clear"),
        (lambda tensors: tensors.update({f"{_Q}_scale_inv": torch.ones(3, 3)}), "do not fit"),
        (lambda tensors: tensors.update({f"{_Q}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}), "do not fit"),
    ],
)
def test_scales_that_are_wrong(change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path) -> None:
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base")
    _rewritten(base, change)
    with pytest.raises(FormatError) as caught:
        surgery.plan(base)
    assert message in str(caught.value)


def _with_config(folder: Path, quantization: dict[str, Any] | None) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _stack(folder: Path, scale: torch.Tensor, config: dict[str, Any]) -> Path:
    """Four FP8 experts in one tensor."""
    folder.mkdir()
    q = torch.randn(4, 24, 20, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tensors = {"layers.0.experts.up": q, "layers.0.experts.up_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8", **config}}))
    return folder


def test_one_scale_for_each_expert(tmp_path: Path) -> None:
    old = torch.tensor([0.5, 0.01, 3.0, 7.0]).reshape(4, 1, 1)
    base = _stack(tmp_path / "base", old, {"weight_block_size": None})
    surgery.factorize(base, tmp_path / "f", rank=3)
    scales = torch.ones(4, 3)
    scales[0] = 1.5
    out = _folded(tmp_path, base, {"layers.0.experts.up": scales}, "out")
    before, after = tensors_of(base), tensors_of(out)
    new = after["layers.0.experts.up_scale_inv"]
    assert torch.equal(new[1:], old[1:])
    assert torch.equal(after["layers.0.experts.up"][1:].float(), before["layers.0.experts.up"][1:].float())
    factors = load_file(tmp_path / "f/surgery/factors-00001-of-00001.safetensors")
    U, s, V = (factors[f"layers.0.experts.up.{part}"][0].double() for part in ("U", "s", "V"))
    wanted = before["layers.0.experts.up"][0].double() * 0.5 + (U * (s * 0.5)) @ V.T
    assert new[0].item() == pytest.approx(wanted.abs().max().item() / 448, rel=1e-6)
    error = (after["layers.0.experts.up"][0].double() * new[0].double() - wanted).abs()
    assert bool((error <= torch.maximum(wanted.abs() * 2**-4, new[0] * 2**-10) * 1.001).all())


@pytest.mark.parametrize("shape", [(1, 1), (5,), (4, 1), (4, 5, 1), (4, 2, 1), (4, 24, 2), (5, 24, 1), (4, 1, 1, 1)])
def test_scales_of_a_stack_that_are_not_one_for_each(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="do not fit"):
        surgery.plan(_stack(tmp_path / "base", torch.ones(shape), {"weight_block_size": None}))


def quantize_whole(source: Path, folder: Path, scale: torch.Tensor, **quantization: Any) -> Path:
    """An FP8 copy of a model as Mistral's lie on the hub: one scale for each matrix, in the shape and dtype of this one."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(source).items():
        tensors[name] = tensor.to(torch.bfloat16)
        if "layers" in name and name.endswith("_proj.weight"):
            fresh = tensor.abs().max().float() / 448
            if scale.dtype == torch.float8_e8m0fnu:
                fresh = torch.exp2(torch.ceil(torch.log2(fresh)))
            stored = fresh.to(scale.dtype).reshape(scale.shape)
            tensors[name] = (tensor.float() / stored.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = stored
            tensors[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.03, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"activation_scheme": "static", "quant_method": "fp8", **quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@_reads_fp8
@pytest.mark.parametrize(
    ("scale", "quantization"),
    [
        (torch.ones((), dtype=torch.bfloat16), {"weight_block_size": None}),
        (torch.ones(()), {"weight_block_size": None}),
        (torch.ones(1), {"weight_block_size": None}),
        (torch.ones(1, 1), {"weight_block_size": None}),
        (torch.ones(()).to(torch.float8_e8m0fnu), {"weight_block_size": None}),
        (torch.ones(()), {}),
        (torch.ones(1, 1), {"weight_block_size": [16, 16]}),
    ],
    ids=str,
)
def test_one_scale_for_a_whole_matrix(scale: torch.Tensor, quantization: dict[str, Any], tmp_path: Path) -> None:
    """Read as transformers reads it; folded is what was attached, within the step of FP8; untouched, the same bytes."""
    base = quantize_whole(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base", scale, **quantization)
    manifest = surgery.factorize(base, tmp_path / "f", rank=4).manifest
    untouched = {target.key: torch.ones(target.scales_shape) for target in manifest.targets}
    assert files_of(_folded(tmp_path, base, untouched, "back")) == files_of(base)
    assert verify(tmp_path / "f", base=base).ok

    config = transformers.FineGrainedFP8Config(dequantize=True)
    ids = torch.arange(20)[None]

    def loaded(folder: Path, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).float()

    model, scales = loaded(base, quantization_config=config), _random_scales(manifest)
    dense = _folded(tmp_path, base, untouched, "dense", dequantize=True)
    with torch.no_grad():
        before_training = model(ids).logits
        assert torch.equal(loaded(dense)(ids).logits, before_training)
        attached = surgery.attach(model, tmp_path / "f")
        for key, delta in zip(attached.values(), attached.parameters(), strict=True):
            delta.copy_(scales[key] - 1)
        out = _folded(tmp_path, base, scales, "folded")
        trained, folded = model(ids).logits, loaded(out, quantization_config=config)(ids).logits
        assert (folded - trained).norm() < 0.3 * (trained - before_training).norm()

    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    factors = load_file(tmp_path / "f/surgery/factors-00001-of-00001.safetensors")
    for target in manifest.targets:
        old, new = before[f"{target.tensor}_scale_inv"], after[f"{target.tensor}_scale_inv"]
        assert (new.shape, new.dtype) == (old.shape, old.dtype) == (scale.shape, scale.dtype)
        U, s, V = (factors[f"{target.key}.{part}"].double() for part in ("U", "s", "V"))
        wanted = before[target.tensor].double() * old.double() + (U * (s * (scales[target.key].double() - 1))) @ V.T
        error = (after[target.tensor].double() * new.double() - wanted).abs()
        assert bool((error <= torch.maximum(wanted.abs() * 2**-4, new.double() * 2**-10) * 1.01).all())
    others = before.keys() - {name for t in manifest.targets for name in (t.tensor, f"{t.tensor}_scale_inv")}
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_one_scale_for_each_expert_in_a_row(tmp_path: Path) -> None:
    """(experts,) is what (experts, 1, 1) is."""
    old, scales = torch.tensor([0.5, 0.01, 3.0, 7.0]), torch.ones(4, 3)
    scales[1:3] = 1.5
    found = {}
    for name, shape in (("row", (4,)), ("grid", (4, 1, 1))):
        (tmp_path / name).mkdir()
        base = _stack(tmp_path / name / "base", old.reshape(shape), {"weight_block_size": None})
        surgery.factorize(base, tmp_path / name / "f", rank=3)
        found[name] = tensors_of(_folded(tmp_path / name, base, {"layers.0.experts.up": scales}, "out"))
        assert found[name]["layers.0.experts.up_scale_inv"].shape == shape
    up, up_scale = "layers.0.experts.up", "layers.0.experts.up_scale_inv"
    assert torch.equal(found["row"][up].view(torch.uint8), found["grid"][up].view(torch.uint8))
    assert torch.equal(found["row"][up_scale], found["grid"][up_scale].flatten())
    assert (found["row"][up_scale] == old).tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2), (1, 1, 1), (0,), (48,), (48, 1)])
@pytest.mark.parametrize("quantization", [{}, {"weight_block_size": None}])
def test_scales_that_fit_neither_blocks_nor_matrix(
    shape: tuple[int, ...], quantization: dict[str, Any], tmp_path: Path
) -> None:
    """Told when it is planned, with both shapes."""
    base = quantize_whole(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base", torch.ones(()), **quantization)
    _rewritten(base, lambda tensors: tensors.update({f"{_Q}_scale_inv": torch.ones(shape)}))
    with pytest.raises(FormatError, match=f"the scales '{_Q}_scale_inv' do not fit") as caught:
        surgery.plan(base)
    assert f"F32 {list(shape)} for [" in str(caught.value)
    assert "F32, BF16, F16, F8_E8M0, U8, one for each matrix" in str(caught.value)


@pytest.mark.parametrize("apart", [False, True])
def test_dequantized_nothing_of_the_quantization_stays(apart: bool, tmp_path: Path) -> None:
    """Scales of activations lie beside FP8 weights, modules or stacks; what only sounds like them is no business of ours."""
    base = quantize_model(FAMILIES["llama4"].save(tmp_path / "m"), tmp_path / "base", apart=apart)
    file = base / ("model-00001-of-00002.safetensors" if apart else "model.safetensors")
    names = {name for part in base.glob("*.safetensors") for name in load_file(part)}
    stack = next(name for name in names if name.endswith("experts.down_proj"))
    module = next(name for name in names if name.endswith("q_proj.weight")).removesuffix(".weight")
    gone = [f"{module}.{of}_scale{end}" for of in ("activation", "input", "output", "act") for end in ("", "_inv")]
    gone.append(f"{stack}_activation_scale")
    kept = [f"{module}.gate_scale", f"{module}.scale", f"{module.removesuffix('.q_proj')}.k_scale", "logit_scale"]
    kept += ["model.norm.input_scale", "input_scale", f"{module}.lora.input_scale"]
    save_file({**load_file(file), **{name: torch.tensor(0.5) for name in gone + kept}}, file, metadata={"format": "pt"})
    if apart:
        index = json.loads((base / "model.safetensors.index.json").read_text())
        index["weight_map"].update(dict.fromkeys(gone + kept, file.name))
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest = surgery.factorize(base, tmp_path / "f", rank=2).manifest
    scales = _random_scales(manifest)
    before, quantized = tensors_of(base), tensors_of(_folded(tmp_path, base, scales, "quantized"))
    assert before.keys() == quantized.keys()
    out = _folded(tmp_path, base, scales, "dense", dequantize=True)
    after = tensors_of(out)
    assert before.keys() - after.keys() == {*gone, *(name for name in names if name.endswith("_scale_inv"))}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    if apart:
        assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys() == after.keys()


def test_dequantized_beyond_the_range_of_bfloat16(tmp_path: Path) -> None:
    base = quantize_whole(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base", torch.ones(()), weight_block_size=None)
    _rewritten(base, lambda tensors: tensors.update({f"{_Q}_scale_inv": torch.tensor(7.59e35)}))  # 448 of it: float32's largest
    manifest = surgery.factorize(base, tmp_path / "f", rank=4, exclude=[_Q]).manifest
    with pytest.raises(WeightError, match=f"{_Q}.*beyond the range of bfloat16"):
        _folded(tmp_path, base, _random_scales(manifest), "dense", dequantize=True)


def test_tiny_blocks_stay_finite() -> None:
    weight = torch.full((4, 4), 1e-44)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        scale = block_scales(weight, BLOCK, torch.ones(1, 1).to(dtype))
        assert not dequantize(quantize(weight, scale, BLOCK), scale, BLOCK).isnan().any()


def test_convolutions_and_stray_scales_are_no_targets(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    tensors = {
        "layers.0.q.weight": torch.randn(24, 20).to(torch.float8_e4m3fn),
        "layers.0.q.weight_scale_inv": torch.ones(3, 2),
        "layers.0.conv.weight": torch.randn(24, 20, 3).to(torch.float8_e4m3fn),
        "layers.0.conv.weight_scale_inv": torch.ones(24, 2, 1),
        "layers.0.experts.0.up.weight": torch.ones(24, 20, dtype=torch.int8),
        "layers.0.experts.0.up.weight_scale_inv": torch.randn(24, 20),
    }
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [10, 12]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    steps = planned(folder, include=["*"], rank=2)
    assert [target.tensor for target in steps.targets] == ["layers.0.q.weight"]
    reasons = {item.tensor: item.reason for item in steps.skipped}
    assert reasons["layers.0.conv.weight"] == "a quantized convolution"
    assert reasons["layers.0.q.weight_scale_inv"] == "the scales of an FP8 weight"
    assert reasons["layers.0.experts.0.up.weight_scale_inv"] == "belongs to a weight that is FP8"


def test_the_base_may_not_say_otherwise(tmp_path: Path) -> None:
    """Fold goes by the config that was factorized, not by what has become of the base's."""
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base")
    manifest = surgery.factorize(base, tmp_path / "f", rank=4).manifest
    scales = _random_scales(manifest)
    expected = files_of(_folded(tmp_path, base, scales, "before"))
    _with_config(base, {"quant_method": "fp8", "weight_block_size": [8, 8]})
    assert files_of(_folded(tmp_path, base, scales, "after")) == expected
    # Another model altogether.
    other = FAMILIES["llama"].save(tmp_path / "other")
    with pytest.raises(surgery.SurgeryError):
        _folded(tmp_path, other, scales, "wrong")
    assert not (tmp_path / "wrong/config.json").exists()


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_index_with_odd_metadata(metadata: object, tmp_path: Path) -> None:
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base", apart=True)
    path = base / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    surgery.factorize(base, tmp_path / "f", rank=4)
    out = _folded(tmp_path, base, tmp_path / "f/surgery/scales.safetensors", "dense", dequantize=True)
    assert json.loads((out / path.name).read_text())["metadata"].keys() == {"total_size"}


def test_scales_are_attached_to_the_dequantized_model(tmp_path: Path) -> None:
    """The model in memory is bfloat16: its leading singular values tell that it is the one that was factorized."""
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base")
    manifest = surgery.factorize(base, tmp_path / "f", rank=4).manifest
    scales = _random_scales(manifest)
    dense = _folded(tmp_path, base, {key: torch.ones_like(value) for key, value in scales.items()}, "dense", dequantize=True)
    changed = _folded(tmp_path, base, scales, "changed", dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(dense, dtype=torch.float32)
    attached = surgery.attach(model, tmp_path / "f")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(dense, dtype=torch.float32)(ids).logits)
        for key, delta in zip(attached.values(), attached.parameters(), strict=True):
            delta.copy_(scales[key] - 1)
        expected = load(changed, dtype=torch.float32)(ids).logits
        assert torch.allclose(model(ids).logits, expected, atol=2e-2 * expected.abs().max().item())
    other = load(dense, dtype=torch.float32)
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0)
    with pytest.raises(SourceError, match="neither the original weight nor its residual"):
        surgery.attach(other, tmp_path / "f")
