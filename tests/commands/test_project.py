"""surgery project: least-squares scales and cores, against planted ones, NumPy's least squares and what fold writes."""

from __future__ import annotations

import itertools
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
from surgery.format.scales.reading import read_trained
from surgery.format.scales.writing import write_scales, write_untouched
from surgery.names import TRAINS, Train
from surgery.progress import Silent
from tests.fp8_models import quantize_model
from tests.loopback_hub import LoopbackHub
from tests.models import files_of, realistic, tensors_of

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


def _units(s: torch.Tensor) -> torch.Tensor:
    """(B, k) -> (B, k, k): what ``C - I`` is multiplied by between U and V^T."""
    return torch.einsum("bi,bj->bij", s.sqrt(), s.sqrt())


def _of(train: Train, whole: torch.Tensor) -> torch.Tensor:
    """What can be made of matrices (B, k, k): their diagonals, if scales."""
    return whole if train == "core" else torch.diag_embed(whole.diagonal(dim1=1, dim2=2))


def _formula(before: torch.Tensor, after: torch.Tensor, factors: tuple[torch.Tensor, ...], train: Train) -> torch.Tensor:
    """C of B matrices, float64 (B, k, k), as the documentation has it; diag(g) for scales."""
    U, s, V = factors
    components = torch.einsum("bmi,bmn,bnj->bij", U, after.double() - before.double(), V)
    return torch.eye(s.shape[1]) + _of(train, torch.where(_units(s) > 0, components / _units(s), 0))


def _moved(matrices: torch.Tensor, factors: tuple[torch.Tensor, ...], cores: torch.Tensor) -> torch.Tensor:
    """``W + U diag(sqrt s) (C - I) diag(sqrt s) V^T`` of B matrices, float64."""
    U, s, V = factors
    return matrices.double() + torch.einsum("bmi,bij,bnj->bmn", U, _units(s) * (cores - torch.eye(s.shape[1])), V)


def _cores(path: Path, folder: Path) -> Tensors:
    """As the project's own reader gives them, (B, k, k), float64; diag(g) for scales."""
    trained = read_trained(path, manifest := Manifest.read(folder))
    found = {}
    for target in manifest.targets:
        values = trained.values[target.key].double()
        values = values if target.seen_as.kind == "stack" else values[None]
        found[target.key] = values if trained.train == "core" else torch.diag_embed(values)
    return found


both = pytest.mark.parametrize("train", TRAINS)


@both
@pytest.mark.parametrize("options", [{}, {"layout": "overlay"}, {"correction": False}], ids=["residual", "overlay", "inexact"])
def test_planted_ones_are_found(options: dict[str, Any], train: Train, source: Path, tmp_path: Path) -> None:
    """W_t = W + U diag(sqrt s) (C - I) diag(sqrt s) V^T, C = diag(g) for scales, and something that they cannot express."""
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
        eye = torch.eye(s.shape[1])
        C = eye + _of(train, 0.3 * torch.randn((*s.shape, s.shape[1]), generator=generator, dtype=torch.float64))
        noise = 0.02 * torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
        noise -= torch.einsum("bmi,bij,bnj->bmn", U, _of(train, torch.einsum("bmi,bmn,bnj->bij", U, noise, V)), V)
        before = matrices.double()
        kept = _moved(matrices, factors[key], C) - before
        matrices.copy_(before + kept + noise)
        planted[key] = torch.where(_units(s) > 0, C, eye.double())
        parts = (_units(s) * (C - eye)).square()
        truth[key] = (
            kept.square().sum() + noise.square().sum(),
            kept.square().sum(),
            parts.diagonal(dim1=1, dim2=2).sum(),
            before.square().sum(),
            (planted[key] - eye).abs().max(),
        )
    assert bool((planted["layers.0.experts.gate_up[gate]"][3] == torch.eye(3)).all())
    out = tmp_path / "g.safetensors"
    base = source if "layout" in options else None
    report = surgery.project(folder, _save(tmp_path / "t", tuned), out, train=train, base=base, device="cpu")
    found = _cores(out, folder)
    for key, C in planted.items():
        assert torch.allclose(found[key], C, atol=2e-5), key
    assert [target.key for target in report.targets] == [target.key for target in manifest.targets]
    for one in report.targets:
        change, all_kept, by_scales, size, largest = (number.item() for number in truth[one.key])
        assert one.change == pytest.approx((change / size) ** 0.5, rel=1e-4)
        assert one.explained == pytest.approx(all_kept / change, rel=1e-4)
        assert one.explained_by_scales == pytest.approx(by_scales / change, rel=1e-4)
        assert one.largest == pytest.approx(largest, abs=2e-5)
    sums = [np.array([float(numbers[i]) for numbers in truth.values()]) for i in range(5)]
    assert report.total.change == pytest.approx((sums[0].sum() / sums[3].sum()) ** 0.5, rel=1e-4)
    assert report.total.explained == pytest.approx(sums[1].sum() / sums[0].sum(), rel=1e-4)
    assert report.total.explained_by_scales == pytest.approx(sums[2].sum() / sums[0].sum(), rel=1e-4)
    assert report.total.largest == pytest.approx(sums[4].max(), abs=2e-5)
    assert (report.train, report.fingerprint) == (train, manifest.fingerprint)
    assert report.trainable == sum(value.numel() for value in load_file(out).values())


def _nudged(tensors: Tensors, dtype: torch.dtype | None = None, size: float = 0.02) -> Tensors:
    """A model after some training of all its weights."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(dtype or tensor.dtype)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("stored", "train"), [(torch.float32, "scales"), (torch.bfloat16, "core"), (torch.float16, "scales")])
def test_dtypes_and_shards_may_differ(stored: torch.dtype, train: Train, source: Path, tmp_path: Path) -> None:
    model = _save(tmp_path / "m", {name: tensor.to(stored) for name, tensor in tensors_of(source).items()}, shards=3)
    folder = tmp_path / "f"
    _factorize(model, folder)
    before, factors = _seen(tensors_of(model)), _factors(folder)
    for shards, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16], start=1):
        tuned = _save(tmp_path / str(dtype), _nudged(tensors_of(model), dtype), shards=shards)
        surgery.project(folder, tuned, tmp_path / f"{dtype}.safetensors", train=train, device="cpu")
        after = _seen(tensors_of(tuned))
        for key, C in _cores(tmp_path / f"{dtype}.safetensors", folder).items():
            expected = _formula(before[key], after[key], factors[key], train)
            assert torch.allclose(C, expected, rtol=1e-6, atol=1e-6), (key, dtype)
            assert key.endswith(("gate]", "up]")) or bool((C.diagonal(dim1=1, dim2=2) != 1).all())


@both
def test_numpys_least_squares_finds_the_same(train: Train, source: Path, tmp_path: Path) -> None:
    """One column for each number, one row for each weight."""
    _factorize(source, tmp_path / "f")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)))
    surgery.project(tmp_path / "f", tuned, tmp_path / "g", train=train, device="cpu")
    before, after, factors = _seen(tensors_of(source)), _seen(tensors_of(tuned)), _factors(tmp_path / "f")
    places = [(i, j) for i in range(3) for j in range(3) if train == "core" or i == j]
    rows, columns = (list(some) for some in zip(*places, strict=True))
    solved = 0
    for key, C in _cores(tmp_path / "g", tmp_path / "f").items():
        for b, (U, s, V) in enumerate(zip(*factors[key], strict=True)):
            if not s.any():
                continue
            design = torch.stack(
                [torch.outer(U[:, i] * (s[i] * s[j]).sqrt(), V[:, j]).flatten() for i, j in places], dim=1
            ).numpy()
            change = (after[key][b].double() - before[key][b].double()).flatten().numpy()
            best = np.linalg.lstsq(design, change, rcond=None)[0]
            assert np.allclose((C[b] - torch.eye(3))[rows, columns].numpy(), best, rtol=0, atol=1e-6), key
            solved += 1
    assert solved == 1 + 2 + 2 * 3 + 4 + 1


@both
def test_no_others_come_closer(train: Train, source: Path, tmp_path: Path) -> None:
    _factorize(source, tmp_path / "f")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source), size=0.05))
    report = surgery.project(tmp_path / "f", tuned, tmp_path / "g", train=train, device="cpu")
    surgery.fold(tmp_path / "f", tmp_path / "g", tmp_path / "folded", device="cpu")
    before, after, folded = (_seen(tensors_of(model)) for model in (source, tuned, tmp_path / "folded"))
    factors = _factors(tmp_path / "f")
    cores = _cores(tmp_path / "g", tmp_path / "f")
    for one in report.targets:
        key = one.key
        far, near = ((after[key].double() - seen[key].double()).square().sum().item() for seen in (before, folded))
        assert near < far
        assert one.explained == pytest.approx(1 - near / far, abs=1e-5)
        U, s, V = factors[key]
        if train == "core":  # what is written is W + U U^T D V V^T
            D = after[key].double() - before[key].double()
            D[s.sum(dim=1) == 0] = 0
            whole = before[key].double() + torch.einsum("bmi,bij,bnj->bmn", U, torch.einsum("bmi,bmn,bnj->bij", U, D, V), V)
            assert torch.allclose(folded[key].double(), whole, rtol=0, atol=1e-6)

        def distance(C: torch.Tensor, key: str = key) -> float:
            return float((_moved(before[key], factors[key], C) - after[key].double()).square().sum())

        least = distance(cores[key])
        assert least == pytest.approx(near, rel=1e-5)
        for b, i, j in itertools.product(range(len(s)), range(3), range(3)):
            if s[b, i] * s[b, j] > 0 and (train == "core" or i == j):
                for step in (-1e-3, 1e-3):
                    other = cores[key].clone()
                    other[b, i, j] += step
                    assert distance(other) > least


@both
def test_the_same_model_in_other_shards_changes_nothing(train: Train, source: Path, tmp_path: Path) -> None:
    manifest = _factorize(source, tmp_path / "f")
    same = _save(tmp_path / "same", tensors_of(source), shards=4)
    with pytest.warns(SurgeryWarning, match="has the same weights as the original in all 7 matrices"):
        report = surgery.project(tmp_path / "f", same, tmp_path / "g", train=train, device="cpu")
    assert all(torch.equal(C, torch.eye(3).expand_as(C).double()) for C in _cores(tmp_path / "g", tmp_path / "f").values())
    assert {(one.change, one.explained, one.explained_by_scales, one.largest) for one in (*report.targets, report.total)} == {
        (0.0, None, None, 0.0)
    }
    write_untouched(tmp_path / "untouched", manifest.targets, manifest.fingerprint, train)
    assert (tmp_path / "g").read_bytes() == (tmp_path / "untouched").read_bytes()
    assert train == "core" or (tmp_path / "g").read_bytes() == (tmp_path / "f/surgery/scales.safetensors").read_bytes()


def test_a_zero_weight_that_has_grown(tmp_path: Path) -> None:
    """Its change has no relative size, and no scales can express it."""
    model = _save(tmp_path / "m", {"layers.0.proj.weight": torch.zeros(8, 6)})
    surgery.factorize(model, tmp_path / "f", rank=2, device="cpu")
    tuned = _save(tmp_path / "t", {"layers.0.proj.weight": torch.ones(8, 6)})
    report = surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")
    assert (report.targets[0].change, report.targets[0].explained, report.targets[0].largest) == (None, 0.0, 0.0)


@both
def test_tiny_singular_values_keep_scales_finite(train: Train, tmp_path: Path) -> None:
    """1 + c / s beyond float32: such a direction is of no use, and neither is what two make of each other."""
    weight = torch.diag(torch.tensor([1.0, 1e-42, 1e-42, 0.0]))
    model = _save(tmp_path / "m", {"layers.0.proj.weight": weight})
    surgery.factorize(model, tmp_path / "f", rank=3, device="cpu")
    change = 0.5 * torch.eye(4)
    change[1, 0] = change[1, 2] = 0.25
    tuned = _save(tmp_path / "t", {"layers.0.proj.weight": weight + change})
    report = surgery.project(tmp_path / "f", tuned, tmp_path / "g", train=train, device="cpu")
    (C,) = _cores(tmp_path / "g", tmp_path / "f").values()
    ((U, s, V),) = _factors(tmp_path / "f").values()
    assert s[0, 1] < 1e-41
    expected, explained = torch.eye(3), 0.25
    expected[0, 0] = 1.5
    if train == "core":  # 0.25 / sqrt(1e-42) is a number of float32, 0.25 / 1e-42 is not
        at = int(U[0, 1].abs().argmax())
        expected[at, 0] = 0.25 * U[0, 1, at] * V[0, 0, 0] / s[0, at].sqrt()
        explained += 0.25**2
    assert torch.allclose(C[0], expected.double(), rtol=1e-6, atol=0)
    assert report.total.explained == pytest.approx(explained / change.square().sum().item())


@both
def test_a_stack_in_portions(train: Train, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one expert is held at a time or all of them, the scales are the same."""
    _factorize(source, tmp_path / "f")
    tuned = _save(tmp_path / "t", _nudged(tensors_of(source)))
    for name, size in (("one", 1), ("three", 3 * 4 * 24 * 36), ("all", 1 << 30)):
        monkeypatch.setattr(views, "STACK_BYTES", size)
        surgery.project(tmp_path / "f", tuned, tmp_path / name, train=train, device="cpu")
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
    for train, (tuned, after) in itertools.product(TRAINS, ((dense, tensors_of(dense)), (again, _dense(again)))):
        surgery.project(tmp_path / "f", tuned, tmp_path / "g", train=train, base=base, device="cpu", overwrite=True)
        for key, C in _cores(tmp_path / "g", tmp_path / "f").items():
            some = (tensor[key] if tensor[key].ndim == 3 else tensor[key][None] for tensor in (before, after))
            assert torch.allclose(C, _formula(*some, factors[key], train), rtol=1e-5, atol=1e-5), (key, tuned)


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
        (_integers, SourceError, r"is packed in a way that is not known\n.*'layers\.0\.conv\.weight', I8"),
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


@both
def test_command(train: Train, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _factorize(source, tmp_path / "f")
    _save(tmp_path / "t", _nudged(tensors_of(source)))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(
            main, ["project", "f", "t", "--train", train, "--device", "cpu", *arguments], catch_exceptions=False
        )

    done = run()
    assert done.exit_code == 0
    assert done.stderr.startswith("scales.safetensors: ")
    heading, _, *rows = done.stdout.splitlines()
    columns = ["explained", "|g", "-", "1|"] if train == "scales" else ["scales", "core", "|C", "-", "I|"]
    assert heading.split() == ["target", "change", *columns]
    assert [row.split()[0] for row in rows[:-1]] == [target.key for target in manifest.targets]
    assert rows[-1].startswith("all 7 ")
    found = json.loads(run("--json", "-o", "again.safetensors").stdout)
    assert (found["schema_version"], found["out"], found["fingerprint"]) == (1, "again.safetensors", manifest.fingerprint)
    assert Path("again.safetensors").read_bytes() == Path("scales.safetensors").read_bytes()
    assert [one.keys() for one in found["targets"]] == [{"key", "change", "explained", "explained_by_scales", "largest"}] * 7
    total = found["total"]
    by_scales, explained = f"{total['explained_by_scales']:.2%}", f"{total['explained']:.2%}"
    shares = [explained] if train == "scales" else [by_scales, explained]
    assert rows[-1].split()[2:] == [f"{total['change']:.3g}", *shares, f"{total['largest']:.3g}"]
    told = " ".join(done.stderr.split())
    if train == "core":
        assert f"cores of {16 * 9} numbers, which explain {explained} of the change, scales {by_scales}" in told
        assert total["explained"] > total["explained_by_scales"]
    else:
        assert f"{16 * 3} scales in" in told
        assert total["explained"] == total["explained_by_scales"]
    done = run()
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is there already" in done.stderr
    assert run("--overwrite", "--quiet").stderr == ""


# ---- what has arrived in a folded model


@both
@pytest.mark.parametrize("kind", ["residual", "inexact", "fp8"])
def test_what_has_arrived_against_dense_weights(kind: str, train: Train, source: Path, tmp_path: Path) -> None:
    """Some targets untouched, of one the cores are diagonal, of a stack one core is the identity; after rounding to nearest."""
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    base = None
    if kind == "fp8":
        base = _fp8(
            tmp_path / "m", {name: tensors[name].float() for name in ("layers.0.attn.o_proj.weight", "layers.0.experts.down")}
        )
        manifest = surgery.factorize(base, tmp_path / "f", rank=3, device="cpu").manifest
    else:
        manifest = _factorize(_save(tmp_path / "m", tensors), tmp_path / "f", correction=kind == "residual")
    factors, generator = _factors(tmp_path / "f"), torch.Generator().manual_seed(3)
    values: Tensors = {}
    for target in manifest.targets:
        moved = 0.01 * torch.randn(target.shape_of("core"), generator=generator) + torch.eye(target.rank)
        if target.key == "layers.0.fused.weight[a]":
            moved = torch.eye(target.rank)
        elif target.key == "layers.0.conv.weight":
            moved = torch.diag(moved.diagonal())
        elif target.key == "layers.0.experts.down":
            moved[1] = torch.eye(target.rank)
        values[target.key] = moved if train == "core" else moved.diagonal(dim1=-2, dim2=-1)
    write_scales(tmp_path / "s", values, manifest.fingerprint, train)
    untouched = tmp_path / "f/surgery/scales.safetensors"
    how: dict[str, Any] = {"base": base, "rounding": "nearest", "device": "cpu", "progress": Silent()}
    surgery.fold(tmp_path / "f", tmp_path / "s", tmp_path / "folded", **how)
    surgery.fold(tmp_path / "f", untouched, tmp_path / "before", **how)
    dense = _dense if kind == "fp8" else tensors_of
    before, after = (_by_key(dense(tmp_path / name), kind) for name in ("before", "folded"))
    cores, kept = _cores(tmp_path / "s", tmp_path / "f"), {}
    for key, C in cores.items():
        D = _moved(before[key], factors[key], C) - before[key].double()
        if asked := D.square().sum().item():
            kept[key] = (((after[key].double() - before[key].double()) * D).sum().item(), asked)
    check = surgery.verify_folded(tmp_path / "f", tmp_path / "folded", tmp_path / "s", base=base, device="cpu")
    assert (check.targets, check.changed) == (len(cores), len(kept))
    assert len(kept) == len(cores) - (kind != "fp8")
    arrived, asked = (sum(numbers) for numbers in zip(*kept.values(), strict=True))
    assert check.kept == pytest.approx(arrived / asked, rel=1e-5)
    shares = {key: one / whole for key, (one, whole) in kept.items()}
    assert check.kept_least == pytest.approx(min(shares.values()), rel=1e-5)
    assert check.kept_least_in == min(shares, key=lambda key: shares[key])
    assert abs(arrived / asked - 1) > 1e-4  # so that rounding is seen
    none = surgery.verify_folded(
        tmp_path / "f", tmp_path / "before", tmp_path / "s", base=base, device="cpu", progress=Silent()
    )
    assert none.kept == pytest.approx(0, abs=1e-9)


def _by_key(tensors: Tensors, kind: str) -> Tensors:
    """Key of a target -> its matrices (B, m, n)."""
    if kind != "fp8":
        return _seen(tensors)
    return {name: tensor if tensor.ndim == 3 else tensor[None] for name, tensor in tensors.items()}


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
    (_one_made_anew, "in 1 of 3 matrices, first 'layers.1.w.weight': they look as if they had been trained from scratch"),
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
