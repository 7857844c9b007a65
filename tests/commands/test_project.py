"""surgery project: least-squares scales, against planted ones, against NumPy's least squares and against what fold writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError, OptionError, OutputError, SourceError, SurgeryWarning, WeightError
from surgery.format import views
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import read_scales
from surgery.progress import Silent
from tests.loopback_hub import LoopbackHub
from tests.models import files_of, realistic, tensors_of
from tests.weights.test_fp8 import quantize_model

RECIPE = """
[[rules]]
match = "layers.0.attn.*"

[[rules]]
match = "layers.0.fused.weight"
slices = ["a", "b"]
split = true

[[rules]]
match = "layers.0.experts.gate_up"
view = "stack"
slices = ["gate", "up"]
every = "column"
axis = "columns"
split = true

[[rules]]
match = "layers.0.experts.down"
view = "stack"

[[rules]]
match = "layers.0.conv.weight"
view = "convolution"
"""
Tensors = dict[str, torch.Tensor]


def _seen(tensors: Tensors) -> Tensors:
    """Key of a target -> its matrices (B, m, n), in the memory of the tensors: what the recipe means, by plain indexing."""
    return {
        "layers.0.attn.o_proj.weight": tensors["layers.0.attn.o_proj.weight"][None],
        "layers.0.fused.weight[a]": tensors["layers.0.fused.weight"][None, :24],
        "layers.0.fused.weight[b]": tensors["layers.0.fused.weight"][None, 24:],
        "layers.0.experts.gate_up[gate]": tensors["layers.0.experts.gate_up"][:, :, 0::2],
        "layers.0.experts.gate_up[up]": tensors["layers.0.experts.gate_up"][:, :, 1::2],
        "layers.0.experts.down": tensors["layers.0.experts.down"],
        "layers.0.conv.weight": tensors["layers.0.conv.weight"].view(1, 12, 45),
    }


def _save(folder: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """A model without a config, in as many shards."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name].contiguous() for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model with a target of every view; the last expert is zero."""
    experts = torch.stack([realistic(24, 36, seed=i) for i in range(4)])
    experts[3] = 0
    tensors = {
        "layers.0.attn.o_proj.weight": realistic(40, 24, seed=10),
        "layers.0.fused.weight": realistic(48, 24, seed=11),
        "layers.0.experts.gate_up": experts,
        "layers.0.experts.down": torch.stack([realistic(18, 24, seed=20 + i) for i in range(4)]),
        "layers.0.conv.weight": realistic(12, 45, seed=12).view(12, 5, 3, 3),
        "layers.0.norm.weight": torch.ones(24),
    }
    return _save(tmp_path_factory.mktemp("models") / "source", tensors, shards=2)


def _factorize(model: Path, out: Path, **options: Any) -> Manifest:
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / "views.toml"
    recipe.write_text(RECIPE)
    return surgery.factorize(model, out, rank=3, recipe=recipe, device="cpu", **options).manifest


def _factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Key -> U (B, m, k), s (B, k), V (B, n, k), float64."""
    stored = {
        name: tensor.double() for file in (folder / "surgery").glob("factors-*") for name, tensor in load_file(file).items()
    }
    keys = {name.removesuffix(".s") for name in stored if name.endswith(".s")}
    found = {}
    for key in keys:
        U, s, V = (stored[f"{key}.{part}"] for part in "UsV")
        found[key] = (U, s, V) if U.ndim == 3 else (U[None], s[None], V[None])
    return found


def _formula(before: torch.Tensor, after: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """g of B matrices, float64 (B, k), as the documentation has it."""
    U, s, V = factors
    components = torch.einsum("bmk,bmn,bnk->bk", U, after.double() - before.double(), V)
    return torch.where(s > 0, 1 + components / s, 1)


def _scales(path: Path, folder: Path) -> Tensors:
    """As the project's own reader gives them, (B, k), float64."""
    manifest = Manifest.read(folder)
    return {target.key: read_scales(path, manifest)[target.key].double().view(-1, target.rank) for target in manifest.targets}


@pytest.mark.parametrize("options", [{}, {"layout": "overlay"}, {"correction": False}], ids=["residual", "overlay", "inexact"])
def test_planted_scales_are_found(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """W_t = W + U diag(s (g - 1)) V^T and something that no scales can express."""
    folder = tmp_path / "f"
    manifest = _factorize(source, folder, **options)
    original = tensors_of(source)
    if not manifest.lossless:  # W is then what fold makes of untouched scales
        surgery.fold(folder, folder / "surgery/scales.safetensors", tmp_path / "untouched")
        original = tensors_of(tmp_path / "untouched")
    tuned = {name: tensor.clone() for name, tensor in original.items()}
    generator = torch.Generator().manual_seed(0)
    planted, truth = {}, {}
    factors = _factors(folder)
    assert factors.keys() == _seen(tuned).keys()
    for key, matrices in _seen(tuned).items():
        U, s, V = factors[key]
        g = 1 + 0.3 * torch.randn(s.shape, generator=generator, dtype=torch.float64)
        noise = 0.02 * torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
        noise -= torch.einsum("bmk,bk,bnk->bmn", U, torch.einsum("bmk,bmn,bnk->bk", U, noise, V), V)
        kept = torch.einsum("bmk,bk,bnk->bmn", U, s * (g - 1), V)
        before = matrices.double()
        matrices.copy_(before + kept + noise)
        planted[key] = torch.where(s > 0, g, 1)
        change = kept.square().sum() + noise.square().sum()
        truth[key] = (change, kept.square().sum(), before.square().sum(), (planted[key] - 1).abs().max())
    assert bool((planted["layers.0.experts.gate_up[gate]"][3] == 1).all())
    out = tmp_path / "g.safetensors"
    report = surgery.project(
        folder, _save(tmp_path / "t", tuned), out, base=source if "layout" in options else None, device="cpu"
    )
    found = _scales(out, folder)
    for key, g in planted.items():
        assert torch.allclose(found[key], g, atol=2e-5), key
    assert [target.key for target in report.targets] == [target.key for target in manifest.targets]
    for one in report.targets:
        change, kept, before, largest = (number.item() for number in truth[one.key])
        assert one.change == pytest.approx((change / before) ** 0.5, rel=1e-4)
        assert one.explained == pytest.approx(kept / change, rel=1e-4)
        assert one.largest == pytest.approx(largest, abs=2e-5)
    change, kept, before, largest = (np.array([float(numbers[i]) for numbers in truth.values()]) for i in range(4))
    assert report.total.change == pytest.approx((change.sum() / before.sum()) ** 0.5, rel=1e-4)
    assert report.total.explained == pytest.approx(kept.sum() / change.sum(), rel=1e-4)
    assert report.total.largest == pytest.approx(largest.max(), abs=2e-5)
    assert (report.trainable, report.fingerprint) == (sum(g.numel() for g in planted.values()), manifest.fingerprint)


def _nudged(tensors: Tensors, dtype: torch.dtype | None = None, size: float = 0.02) -> Tensors:
    """A model after some training of all its weights."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(dtype or tensor.dtype)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_shards_may_differ(stored: torch.dtype, source: Path, tmp_path: Path) -> None:
    model = _save(tmp_path / "m", {name: tensor.to(stored) for name, tensor in tensors_of(source).items()}, shards=3)
    folder = tmp_path / "f"
    _factorize(model, folder)
    before, factors = _seen(tensors_of(model)), _factors(folder)
    for shards, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16], start=1):
        tuned = _save(tmp_path / str(dtype), _nudged(tensors_of(model), dtype), shards=shards)
        surgery.project(folder, tuned, tmp_path / f"{dtype}.safetensors", device="cpu")
        after = _seen(tensors_of(tuned))
        for key, g in _scales(tmp_path / f"{dtype}.safetensors", folder).items():
            expected = _formula(before[key], after[key], factors[key])
            assert torch.allclose(g, expected, rtol=1e-6, atol=1e-6), (key, dtype)
            assert key.endswith(("gate]", "up]")) or bool((g != 1).all())


def test_numpys_least_squares_finds_the_same(source: Path, tmp_path: Path) -> None:
    """One column for each scale, one row for each weight."""
    _factorize(source, tmp_path / "f")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)))
    surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    before, after, factors = _seen(tensors_of(source)), _seen(tensors_of(tuned)), _factors(tmp_path / "f")
    solved = 0
    for key, g in _scales(tmp_path / "g", tmp_path / "f").items():
        for i, (U, s, V) in enumerate(zip(*factors[key], strict=True)):
            if not s.any():
                continue
            design = torch.stack([torch.outer(U[:, j] * s[j], V[:, j]).flatten() for j in range(len(s))], dim=1).numpy()
            change = (after[key][i].double() - before[key][i].double()).flatten().numpy()
            best = np.linalg.lstsq(design, change, rcond=None)[0]
            assert np.allclose(g[i].numpy(), 1 + best, rtol=0, atol=1e-6), key
            solved += 1
    assert solved == 1 + 2 + 2 * 3 + 4 + 1


def test_no_other_scales_come_closer(source: Path, tmp_path: Path) -> None:
    _factorize(source, tmp_path / "f")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source), size=0.05))
    report = surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    surgery.fold(tmp_path / "f", tmp_path / "g", tmp_path / "folded", device="cpu")
    before, after, folded = (_seen(tensors_of(model)) for model in (source, tuned, tmp_path / "folded"))
    factors = _factors(tmp_path / "f")
    for one in report.targets:
        key = one.key
        far, near = ((after[key].double() - seen[key].double()).square().sum().item() for seen in (before, folded))
        assert near < far
        assert one.explained == pytest.approx(1 - near / far, abs=1e-5)
        U, s, V = factors[key]
        g = _scales(tmp_path / "g", tmp_path / "f")[key]

        def distance(scales: torch.Tensor, key: str = key, U: Any = U, s: Any = s, V: Any = V) -> float:
            moved = before[key].double() + torch.einsum("bmk,bk,bnk->bmn", U, s * (scales - 1), V)
            return float((moved - after[key].double()).square().sum())

        least = distance(g)
        assert least == pytest.approx(near, rel=1e-5)
        for place in torch.cartesian_prod(torch.arange(len(s)), torch.arange(s.shape[1])).tolist():
            if s[place[0], place[1]] > 0:
                for step in (-1e-3, 1e-3):
                    other = g.clone()
                    other[place[0], place[1]] += step
                    assert distance(other) > least


def test_the_same_model_in_other_shards_changes_nothing(source: Path, tmp_path: Path) -> None:
    _factorize(source, tmp_path / "f")
    same = _save(tmp_path / "same", tensors_of(source), shards=4)
    with pytest.warns(SurgeryWarning, match="has the same weights as the original in all 7 matrices"):
        report = surgery.project(tmp_path / "f", same, tmp_path / "g", device="cpu")
    assert all(bool((g == 1).all()) for g in load_file(tmp_path / "g").values())
    assert {(one.change, one.explained, one.largest) for one in (*report.targets, report.total)} == {(0.0, None, 0.0)}
    assert (tmp_path / "g").read_bytes() == (tmp_path / "f/surgery/scales.safetensors").read_bytes()


def test_a_zero_weight_that_has_grown(tmp_path: Path) -> None:
    """Its change has no relative size, and no scales can express it."""
    model = _save(tmp_path / "m", {"layers.0.proj.weight": torch.zeros(8, 6)})
    surgery.factorize(model, tmp_path / "f", rank=2, device="cpu")
    tuned = _save(tmp_path / "t", {"layers.0.proj.weight": torch.ones(8, 6)})
    report = surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    assert (report.targets[0].change, report.targets[0].explained, report.targets[0].largest) == (None, 0.0, 0.0)


def test_tiny_singular_values_keep_scales_finite(tmp_path: Path) -> None:
    """1 + c / s beyond float32: such a direction is of no use."""
    weight = torch.diag(torch.tensor([1.0, 1e-42, 1e-42, 0.0]))
    model = _save(tmp_path / "m", {"layers.0.proj.weight": weight})
    surgery.factorize(model, tmp_path / "f", rank=3, device="cpu")
    tuned = _save(tmp_path / "t", {"layers.0.proj.weight": weight + 0.5 * torch.eye(4)})
    surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    (g,) = _scales(tmp_path / "g", tmp_path / "f").values()
    assert g[0].tolist() == pytest.approx([1.5, 1.0, 1.0])


def test_a_stack_in_portions(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one expert is held at a time or all of them, the scales are the same."""
    _factorize(source, tmp_path / "f")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)))
    for name, size in (("one", 1), ("three", 3 * 4 * 24 * 36), ("all", 1 << 30)):
        monkeypatch.setattr(views, "STACK_BYTES", size)
        surgery.project(tmp_path / "f", tuned, tmp_path / name, device="cpu")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes() == (tmp_path / "all").read_bytes()


def _fp8(folder: Path, tensors: Tensors) -> Path:
    """Each weight in FP8, with a scale for each block of 16 x 16, in the shard after the weight's."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        m, n = tensor.shape[-2:]
        scale = torch.rand(*tensor.shape[:-2], -(-m // 16), -(-n // 16), generator=torch.Generator().manual_seed(m)) + 0.5
        stored[name] = (4 * tensor).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale / 4
    _save(folder, stored, shards=2)
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def _dense(folder: Path) -> Tensors:
    """What the numbers of an FP8 model stand for, in float64."""
    stored = tensors_of(folder)
    dense = {}
    for name in [name for name in stored if not name.endswith("_scale_inv")]:
        i, j = (torch.arange(length) // 16 for length in stored[name].shape[-2:])
        dense[name] = stored[name].double() * stored[f"{name}_scale_inv"].double()[..., i[:, None], j[None, :]]
    return dense


def test_fp8_on_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "STACK_BYTES", 1)  # one expert at a time, each with the scales that are its own
    names = {"layers.0.a_proj.weight": (40, 24), "layers.0.experts.down": (3, 24, 40)}
    made = {name: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for name, shape in names.items()}
    base = _fp8(tmp_path / "base", made)
    before = _dense(base)
    surgery.factorize(base, tmp_path / "f", rank=3, device="cpu")
    factors = _factors(tmp_path / "f")
    dense = _save(tmp_path / "dense", _nudged({name: tensor.bfloat16() for name, tensor in before.items()}, size=0.1))
    again = _fp8(tmp_path / "again", _nudged({name: tensor.float() for name, tensor in made.items()}, size=0.3))
    for tuned, after in ((dense, tensors_of(dense)), (again, _dense(again))):
        surgery.project(tmp_path / "f", tuned, tmp_path / "g", base=base, device="cpu", overwrite=True)
        for key, g in _scales(tmp_path / "g", tmp_path / "f").items():
            some = (tensor[key] if tensor[key].ndim == 3 else tensor[key][None] for tensor in (before, after))
            assert torch.allclose(g, _formula(*some, factors[key]), rtol=1e-5, atol=1e-5), (key, tuned)


def test_scales_of_the_base_that_have_changed(llama: Path, tmp_path: Path) -> None:
    """In a weight file that has no target, and that nothing else reads."""
    base = quantize_model(llama, tmp_path / "base", apart=True)
    surgery.factorize(base, tmp_path / "f", rank=2, device="cpu")
    manifest = Manifest.read(tmp_path / "f")
    (file,) = {shard.source.file for shard in manifest.shards} - {target.shard for target in manifest.targets}
    surgery.project(tmp_path / "f", llama, tmp_path / "g", base=base, device="cpu", progress=Silent())
    data = bytearray((base / file).read_bytes())
    data[-2] ^= 0x10
    (base / file).write_bytes(data)
    with pytest.raises(FormatError, match=f"{file} is not the file that the manifest describes"):
        surgery.project(tmp_path / "f", llama, tmp_path / "again", base=base, device="cpu", progress=Silent())


def test_models_from_the_hub(hub: LoopbackHub, source: Path, tmp_path: Path) -> None:
    hub.publish("acme/base", source)
    _factorize(Path("acme/base"), tmp_path / "f", layout="overlay")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)), shards=2)
    hub.publish("acme/tuned", tuned)
    surgery.project(tmp_path / "f", "acme/tuned", tmp_path / "hub", device="cpu")
    surgery.project(tmp_path / "f", tuned, tmp_path / "local", base=source, device="cpu")
    assert (tmp_path / "hub").read_bytes() == (tmp_path / "local").read_bytes()


def test_a_part_of_a_pipeline(source: Path, tmp_path: Path) -> None:
    """The fine-tuned pipeline, or the part of it alone."""
    shutil.copytree(source, tmp_path / "pipeline/unet")
    _factorize(tmp_path / "pipeline", tmp_path / "f", subfolder="unet")
    tuned = _save(tmp_path / "tuned/unet", _nudged(tensors_of(source)))
    surgery.project(tmp_path / "f", tuned.parent, tmp_path / "whole", device="cpu")
    surgery.project(tmp_path / "f", tuned, tmp_path / "part", device="cpu")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "part").read_bytes()


def _without(tensors: Tensors) -> None:
    del tensors["layers.0.experts.down"]


def _turned(tensors: Tensors) -> None:
    tensors["layers.0.attn.o_proj.weight"] = tensors["layers.0.attn.o_proj.weight"].T.contiguous()


def _integers(tensors: Tensors) -> None:
    tensors["layers.0.conv.weight"] = tensors["layers.0.conv.weight"].to(torch.int8)


def _with_nan(tensors: Tensors) -> None:
    tensors["layers.0.experts.gate_up"][2, 3, 4] = float("nan")


def _with_infinity(tensors: Tensors) -> None:
    tensors["layers.0.fused.weight"][47, 0] = -float("inf")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_without, SourceError, r"has no tensor 'layers\.0\.experts\.down'"),
        (_turned, SourceError, r"'layers\.0\.attn\.o_proj\.weight' has another shape.*\n.*\[24, 40\]\n.*\[40, 24\]"),
        (_integers, SourceError, r"'layers\.0\.conv\.weight' has a dtype that is not supported\n.*I8"),
        (_with_nan, WeightError, r"'layers\.0\.experts\.gate_up' holds NaN or infinity"),
        (_with_infinity, WeightError, r"'layers\.0\.fused\.weight' holds NaN or infinity"),
    ],
)
def test_another_model_is_refused(
    change: Callable[[Tensors], None], kind: type[Exception], message: str, source: Path, tmp_path: Path
) -> None:
    _factorize(source, tmp_path / "f")
    tensors = tensors_of(source)
    change(tensors)
    tuned = _save(tmp_path / "t", tensors, shards=2)
    with pytest.raises(kind, match=message):
        surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    assert not (tmp_path / "g").exists()


def test_a_base_or_a_residual_that_is_another(source: Path, tmp_path: Path) -> None:
    _factorize(source, tmp_path / "f")
    _factorize(source, tmp_path / "o", layout="overlay")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)))
    with pytest.raises(OptionError, match="holds its own weights"):
        surgery.project(tmp_path / "f", tuned, tmp_path / "g", base=source, device="cpu")
    with pytest.raises(SourceError, match="does not say where"):
        surgery.project(tmp_path / "o", tuned, tmp_path / "g", device="cpu")
    other = _save(tmp_path / "other", _nudged(tensors_of(source)), shards=2)
    with pytest.raises(FormatError, match="not the file that the manifest describes"):
        surgery.project(tmp_path / "o", tuned, tmp_path / "g", base=other, device="cpu")
    shard = sorted((tmp_path / "f").glob("model-*"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FormatError, match="not the file that the manifest describes"):
        surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    assert not (tmp_path / "g").exists()


def test_what_is_there_is_not_written_over(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    _factorize(source, folder)
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)))
    own = folder / "surgery/scales.safetensors"
    models = files_of(tuned), {name: data for name, data in files_of(folder).items() if name != "surgery/scales.safetensors"}
    (tmp_path / "g").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        surgery.project(folder, tuned, tmp_path / "g", device="cpu")
    assert (tmp_path / "g").read_text() == "mine"
    for out in (
        tuned / "model-00001-of-00001.safetensors",
        tuned / "new.safetensors",
        folder / "surgery/manifest.json",
        folder,
    ):
        with pytest.raises(OutputError, match="is one of the inputs, or lies in one"):
            surgery.project(folder, tuned, out, device="cpu", overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        surgery.project(folder, tuned, tmp_path, device="cpu", overwrite=True)
    surgery.project(folder, tuned, tmp_path / "g", device="cpu", overwrite=True)
    # The scales of the factorized folder are there to be replaced.
    with pytest.raises(OutputError, match="is there already"):
        surgery.project(folder, tuned, own, device="cpu")
    surgery.project(folder, tuned, own, device="cpu", overwrite=True)
    assert own.read_bytes() == (tmp_path / "g").read_bytes()
    after = files_of(tuned), {name: data for name, data in files_of(folder).items() if name != "surgery/scales.safetensors"}
    assert after == models


def test_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _factorize(source, tmp_path / "f")
    _save(tmp_path / "t", _nudged(tensors_of(source)))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["project", "f", "t", "--device", "cpu", *arguments], catch_exceptions=False)

    done = run()
    assert done.exit_code == 0
    assert done.stderr.startswith("scales.safetensors: ")
    heading, _, *rows = done.stdout.splitlines()
    assert heading.split() == ["target", "change", "explained", "|g", "-", "1|"]
    assert [row.split()[0] for row in rows[:-1]] == [target.key for target in manifest.targets]
    assert rows[-1].startswith("all 7 ")
    found = json.loads(run("--json", "-o", "again.safetensors").stdout)
    assert (found["schema_version"], found["out"], found["fingerprint"]) == (1, "again.safetensors", manifest.fingerprint)
    assert Path("again.safetensors").read_bytes() == Path("scales.safetensors").read_bytes()
    assert [one.keys() for one in found["targets"]] == [{"key", "change", "explained", "explained_by_scales", "largest"}] * 7
    shown = [f"{found['total']['change']:.3g}", f"{found['total']['explained']:.2%}", f"{found['total']['largest']:.3g}"]
    assert rows[-1].split()[2:] == shown
    done = run()
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is there already" in done.stderr
    assert run("--overwrite", "--quiet").stderr == ""


# ---- models that cannot be meant as fine-tuned ones


def _other_seed(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    return {name: tensor.std() * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def _permuted(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(8)
    return {name: tensor[..., torch.randperm(tensor.shape[-1], generator=generator)] for name, tensor in tensors.items()}


def _one_made_anew(tensors: Tensors) -> Tensors:
    return _nudged(tensors) | {"layers.1.w.weight": _other_seed(tensors)["layers.1.w.weight"]}


def _without_scales(tensors: Tensors) -> Tensors:
    return {name: 64 * tensor for name, tensor in tensors.items()}


def _emptied(tensors: Tensors) -> Tensors:
    return _nudged(tensors) | {"layers.2.w.weight": torch.zeros_like(tensors["layers.2.w.weight"])}


def _deeper(tensors: Tensors) -> Tensors:
    return _nudged(tensors) | {f"layers.{i}.w.weight": tensors["layers.0.w.weight"].clone() for i in (3, 4)}


UNLIKELY: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (dict, "has the same weights as the original in all 3 matrices that were compared"),
    (
        lambda tensors: {name: tensor.double().float() for name, tensor in tensors.items()},
        "has the same weights as the original",
    ),
    (_other_seed, "in 3 of 3 matrices: the change is 1.4"),
    (_permuted, "in 3 of 3 matrices: the change is 1.4"),
    (lambda tensors: {name: -tensor for name, tensor in tensors.items()}, "in 3 of 3 matrices: the change is 2 times"),
    (_one_made_anew, "in 1 of 3 matrices, first 'layers.1.w.weight': they look as if they had been made anew"),
    (_without_scales, "has 64 times the norm of the original in 3 of 3 matrices"),
    (_emptied, "has 0 times the norm of the original in 1 of 3 matrices, first 'layers.2.w.weight'"),
    (_deeper, "has 2 weights of the kinds that are compared, such as 'layers.3.w.weight', that the original does not have"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of three like layers, and the same factorized."""
    folder = tmp_path_factory.mktemp("plain")
    model = _save(folder / "model", {f"layers.{i}.w.weight": realistic(48, 32, seed=i).float() for i in range(3)})
    surgery.factorize(model, folder / "factorized", rank=4, device="cpu")
    return model, folder / "factorized"


@pytest.mark.parametrize(("change", "words"), UNLIKELY)
def test_models_that_cannot_be_meant(
    change: Callable[[Tensors], Tensors], words: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """By each function that takes two models: a note to who listens, else a warning; a note on the command line."""
    model, folder = plain
    tuned = _save(tmp_path / "t", change(tensors_of(model)))
    calls: list[Callable[[Silent | None], object]] = [
        lambda progress: surgery.project(folder, tuned, tmp_path / "g", device="cpu", overwrite=True, progress=progress),
        lambda progress: surgery.spectra(model, tuned, top=8, device="cpu", progress=progress),
    ]
    if "the same weights" not in words:
        calls.append(
            lambda progress: surgery.recommend(
                model, tuned, budget=6, out=tmp_path / "r", device="cpu", overwrite=True, progress=progress
            )
        )
    for call in calls:
        heard = Silent()
        call(heard)
        assert len(heard.notes) == 1
        assert words in heard.notes[0]
        with pytest.warns(SurgeryWarning) as caught:
            call(None)
        assert [str(warning.message) for warning in caught] == heard.notes
    for command in (["project", folder, tuned, "-o", tmp_path / "c"], ["spectra", model, tuned, "-o", tmp_path / "report"]):
        done = CliRunner().invoke(main, [*map(str, command), "--device", "cpu"], catch_exceptions=False)
        assert done.exit_code == 0
        assert done.stderr.count("note: ") == 1
        assert words in done.stderr


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuned_models_get_no_note(size: float, dtype: torch.dtype, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Some layers frozen, some changed by as much as training ever does, longer or shorter; and a head of its own."""
    model, folder = plain
    tensors = tensors_of(model)
    tuned = dict(tensors) | {"score.weight": torch.ones(2, 32)}
    for i, name in enumerate(list(tensors)[1:]):
        change = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(i))
        tuned[name] = (1 - i * size) * tensors[name] + (1 - i) * size * change * tensors[name].norm() / change.norm()
    heard = Silent()
    path = _save(tmp_path / "t", {name: tensor.to(dtype) for name, tensor in tuned.items()})
    report = surgery.project(folder, path, tmp_path / "g", device="cpu", progress=heard)
    surgery.spectra(model, path, top=8, device="cpu", progress=heard)
    assert report.targets[1].change == pytest.approx(size, rel=0.05, abs=2e-3)
    assert heard.notes == []
