"""Tensors seen as batches of matrices, and checkpoints made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from surgery.commands.verify import verify
from surgery.errors import FormatError, WeightError
from surgery.format import views
from surgery.format.manifest import Manifest
from surgery.format.views import Slice, View
from tests.models import files_of, realistic
from tests.sealing import edited_manifest


@st.composite
def _viewed(draw: st.DrawFn) -> tuple[View, tuple[int, ...]]:
    """A view and the shape of a tensor that it fits."""
    kind = draw(st.sampled_from(["matrix", "stack", "convolution"]))
    axis, period, repeats, other = (draw(st.integers(low, high)) for low, high in ((0, 1), (1, 5), (1, 4), (1, 6)))
    start = draw(st.integers(0, period - 1))
    part = draw(st.none() | st.builds(Slice, st.just("x"), st.just(axis), st.just(period), st.just(start), st.just(period)))
    m, n = (period * repeats, other) if axis == 0 else (other, period * repeats)
    shape = {"matrix": (m, n), "stack": (3, m, n), "convolution": (m, n, 1, 1)}[kind]
    return View(kind, part), shape


@settings(max_examples=200, deadline=None)
@given(_viewed())
def test_matrices_are_the_entries_at_their_indices(given_view: tuple[View, tuple[int, ...]]) -> None:
    view, shape = given_view
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    seen = view.matrices(tensor)
    assert tuple(seen.shape) == view.shape(shape)
    whole = tensor.reshape(3 if view.kind == "stack" else 1, *((shape[1:]) if view.kind == "stack" else (shape[0], -1)))
    indices = [torch.arange(whole.shape[1]), torch.arange(whole.shape[2])]
    if view.slice is not None:
        place = indices[view.slice.axis] % view.slice.period
        indices[view.slice.axis] = indices[view.slice.axis][(place >= view.slice.start) & (place < view.slice.stop)]
    assert torch.equal(seen, whole[:, indices[0][:, None], indices[1]])
    # Storing puts them where they came from, and touches nothing else.
    changed = tensor.clone()
    view.store(-seen - 1, changed)
    assert torch.equal(view.matrices(changed), -seen - 1)
    assert int((changed != tensor).sum()) == seen.numel()


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (View("matrix"), (3,)),
        (View("matrix"), (3, 4, 5)),
        (View("stack"), (3, 4)),
        (View("convolution"), (3, 4)),
        (View("matrix"), (0, 4)),
        (View("matrix", Slice("q", 0, 4, 0, 2)), (6, 4)),
        (View("matrix", Slice("q", 0, 8, 0, 2)), (6, 4)),
        (View("matrix", Slice("q", 0, 3, 2, 2)), (6, 4)),
    ],
)
def test_views_that_do_not_fit(view: View, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is no|does not fit"):
        view.shape(shape)


def _experts(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    """A layer of five stacked experts, of which one is of rank one, and one zero."""
    folder.mkdir()
    stack = torch.stack([realistic(40, 72, seed=i) for i in range(5)])
    stack[2] = torch.outer(torch.ones(40), torch.arange(72.0) / 72)
    stack[4] = 0
    tensors = {
        "layers.0.mlp.experts.gate_up_proj": stack.to(dtype),
        "layers.0.mlp.experts.gate_up_proj_bias": torch.randn(5, 72).to(dtype),
        "layers.0.mlp.router.weight": torch.randn(5, 40).to(dtype),
        "layers.0.attn.o_proj.weight": realistic(40, 40, seed=9).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_stack_in_portions_is_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one expert is held at a time or all of them, the files are the same, byte for byte."""
    model = _experts(tmp_path / "m", torch.float32)
    for name, size in (("one", 1), ("two", 2 * 4 * 40 * 72), ("all", 1 << 30)):
        monkeypatch.setattr(views, "STACK_BYTES", size)
        assert View("stack").at_a_time((5, 40, 72), 4) == {"one": 1, "two": 2}.get(name, size // (4 * 40 * 72))
        surgery.factorize(model, tmp_path / name, rank=4)
        surgery.fold(tmp_path / name, tmp_path / name / "surgery/scales.safetensors", tmp_path / f"{name} back")
        assert files_of(tmp_path / f"{name} back") == files_of(model)
        assert verify(tmp_path / name).ok
    one, every = (
        load_file(next((tmp_path / "one/surgery").glob("factors*"))),
        load_file(next((tmp_path / "all/surgery").glob("f*"))),
    )
    assert one.keys() == every.keys()
    for key, value in one.items():
        assert value.shape == every[key].shape or key.startswith("layers.0.mlp.experts.gate_up_proj.correction")
        if key.endswith(".s"):
            assert torch.allclose(value, every[key], rtol=1e-5, atol=1e-6)


def test_a_stack_against_one_matrix_after_another(tmp_path: Path) -> None:
    model = _experts(tmp_path / "m")
    manifest = surgery.factorize(model, tmp_path / "f", rank=4).manifest
    (target,) = [target for target in manifest.targets if target.view == "stack"]
    assert (target.matrices, target.scales_shape, len(target.certificates)) == ((5, 40, 72), (5, 4), 5)
    assert [certificate.method for certificate in target.certificates][4] == "zero"
    weights = load_file(model / "model.safetensors")[target.tensor]
    factors = load_file(tmp_path / "f/surgery/factors-00001-of-00001.safetensors")
    assert tuple(factors[f"{target.tensor}.U"].shape) == (5, 40, 4)
    for i, weight in enumerate(weights):
        exact = torch.linalg.svdvals(weight.double())[:4]
        assert torch.allclose(factors[f"{target.tensor}.s"][i].double(), exact, atol=1e-5 * max(exact[0].item(), 1e-30))
    scales = torch.ones(5, 4)
    scales[1, 0] = 2.0
    everything = {item.key: torch.ones(item.scales_shape) for item in manifest.targets} | {target.key: scales}
    report = surgery.fold(tmp_path / "f", everything, tmp_path / "o")
    assert report.changed == 1
    folded = load_file(tmp_path / "o/model.safetensors")[target.tensor]
    assert [bool(torch.equal(folded[i], weights[i])) for i in range(5)] == [True, False, True, True, True]


def test_a_stack_by_energy_has_one_rank(tmp_path: Path) -> None:
    """The most that any expert needs, against full float64 SVDs."""
    model = _experts(tmp_path / "m", torch.float32)
    manifest = surgery.factorize(model, tmp_path / "f", energy=0.6, max_rank=30).manifest
    (target,) = [target for target in manifest.targets if target.view == "stack"]
    needed = []
    for weight in load_file(model / "model.safetensors")[target.tensor].double():
        squares = torch.linalg.svdvals(weight).square()
        shares = squares.cumsum(0) / squares.sum().clamp(min=1e-300)
        needed.append(1 + int((shares < 0.6).sum()) if squares.sum() else 1)
    assert target.rank == max(needed)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(model)


def test_an_expert_with_a_nan_is_named(tmp_path: Path) -> None:
    model = _experts(tmp_path / "m", torch.float32)
    tensors = load_file(model / "model.safetensors")
    tensors["layers.0.mlp.experts.gate_up_proj"][3, 2, 1] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(WeightError, match=r"experts\.gate_up_proj' cannot be factorized"):
        surgery.factorize(model, tmp_path / "f", rank=4)


def test_convolutions_when_they_are_asked_for(tmp_path: Path) -> None:
    tensors = {
        "conv1.weight": torch.randn(16, 8, 3),
        "conv2.weight": torch.randn(16, 8, 3, 3),
        "conv3.weight": torch.randn(12, 2, 2, 3, 3),
        "depthwise.weight": torch.randn(16, 1, 5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    steps = surgery.plan(tmp_path, include=["*"], rank=2)
    assert {target.tensor: target.matrices for target in steps.targets} == {
        "conv1.weight": (1, 16, 24),
        "conv2.weight": (1, 16, 72),
        "conv3.weight": (1, 12, 36),
    }
    assert [(item.tensor, item.reason) for item in steps.skipped] == [("depthwise.weight", "a depthwise convolution")]


@pytest.mark.parametrize(
    "change",
    [
        {"view": "stack"},
        {"view": "cube"},
        {"slice": {"name": "q", "axis": 0, "period": 7, "start": 0, "stop": 3}},
        {"slice": {"name": "q", "axis": 5, "period": 1, "start": 0, "stop": 1}},
        {"certificates": []},
        {"dtype": "F33"},
    ],
)
def test_manifest_with_a_view_that_makes_no_sense(change: dict[str, object], llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    with edited_manifest(tmp_path / "f") as manifest:
        manifest["targets"][0].update(change)
    with pytest.raises(FormatError, match=r"makes no sense|contradict"):
        Manifest.read(tmp_path / "f")


def test_a_target_twice(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    with edited_manifest(tmp_path / "f") as manifest:
        manifest["targets"].append(manifest["targets"][0])
    with pytest.raises(FormatError, match="is there twice"):
        Manifest.read(tmp_path / "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda targets: targets[0].update(tensor="model.layers.9.ghost.weight"), "is not there"),
        (lambda targets: targets[0].update(dtype="F8_E4M3"), "makes no sense"),
        (lambda targets: targets[0].update(dtype="I64"), "makes no sense"),
        (lambda targets: targets.append(_cut(targets[0], "q", 0, 4)), "contradict"),
        (
            lambda targets: targets.extend([_cut(targets[0], "q", 0, 4), _cut(targets.pop(0), "k", 3, 8)]),
            "contradict",
        ),
    ],
)
def test_manifest_that_would_fold_to_something_else(change: object, message: str, llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=2)
    with edited_manifest(tmp_path / "f") as manifest:
        change(manifest["targets"])  # type: ignore[operator]
    scales = {_key(target): torch.full((2,), 2.0) for target in manifest["targets"]}
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.fold(tmp_path / "f", scales, tmp_path / "o")
    assert not (tmp_path / "o/config.json").exists()


def _cut(target: dict[str, object], name: str, start: int, stop: int) -> dict[str, object]:
    return {**target, "slice": {"name": name, "axis": 0, "period": 8, "start": start, "stop": stop}}


def _key(target: dict[str, Any]) -> str:
    return str(target["tensor"] if target["slice"] is None else f"{target['tensor']}[{target['slice']['name']}]")
