"""What is damaged, does not fit, or contradicts the config is refused; what is not read is no target."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import FormatError, OptionError, WeightError
from tests.models import planned, tensors_of
from tests.quantized.layouts import LAYOUTS, Layout
from tests.quantized.test_formats import save

_W = "model.layers.0.self_attn.q_proj.weight"
_Tensors = dict[str, torch.Tensor]


def _weights(layout: Layout) -> dict[str, Any]:
    return layout.quantization["config_groups"]["group_0"]["weights"]


def _part(layout: Layout, end: str) -> str:
    return next(name for name in layout.tensors if name.endswith(end))


def _without(end: str) -> Callable[[Layout], None]:
    def without(layout: Layout) -> None:
        del layout.tensors[_part(layout, end)]

    return without


def _instead(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Layout], None]:
    def changed(layout: Layout) -> None:
        layout.tensors[_part(layout, end)] = change(layout.tensors[_part(layout, end)])

    return changed


def _told(**settings: Any) -> Callable[[Layout], None]:
    return lambda layout: _weights(layout).update(settings)


_FIT, _CONTRADICTS = "do not fit", "does not fit it, or not what the config says"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt-oss", _without("_scales"), "its scales are missing"),
        ("gpt-oss", _instead("_scales", lambda scale: scale[:, :-1].clone()), _FIT),
        ("gpt-oss", _instead("_scales", lambda scale: scale.float()), _FIT),
        ("ct mxfp4", _instead("scale", lambda scale: scale[:, :2].clone()), _FIT),
        ("ct mxfp4", _told(type="int"), "is not what the config says"),
        ("ct mxfp4", _told(group_size=16), "is not what the config says"),
        ("ct nvfp4", _without("global_scale"), "its scales are missing"),
        ("ct nvfp4", _instead("global_scale", lambda scale: scale.repeat(2)), _FIT),
        ("ct nvfp4", _instead("weight_scale", lambda scale: scale[:-1].clone()), _FIT),
        ("modelopt nvfp4", _instead("scale_2", lambda scale: scale.double().int()), _FIT),
        ("modelopt nvfp4 stack", _instead("scale_2", lambda scale: scale[:2].clone()), _FIT),
        ("modelopt nvfp4 llama 4", _instead("weight_scale", lambda scale: scale[:, :3].clone()), _FIT),
        ("int4", _instead("weight_scale", lambda scale: scale[:, :-1].clone()), _CONTRADICTS),
        ("int4", _instead("weight_scale", lambda scale: scale[:-1].clone()), _CONTRADICTS),
        ("int4", _instead("weight_scale", lambda scale: scale.int()), _CONTRADICTS),
        ("int4", _instead("shape", lambda shape: shape.repeat(2)), _CONTRADICTS),
        ("int4", _told(group_size=64), _CONTRADICTS),
        ("int4", _told(num_bits=8), _CONTRADICTS),
        ("int4", _told(symmetric=False), _CONTRADICTS),
        ("int4", _told(strategy="channel"), _CONTRADICTS),
        ("int4 zeros", _told(symmetric=True), _CONTRADICTS),
        ("int4 zeros", _without("zero_point"), _CONTRADICTS),
        ("int4 zeros", _instead("zero_point", lambda zero: zero[:-1].clone()), _CONTRADICTS),
        ("int4 order", _instead("g_idx", lambda group: group[:-9].clone()), _CONTRADICTS),
        ("int4 channel", _told(strategy="group", group_size=128), _CONTRADICTS),
        ("int8", _instead("weight_scale", lambda scale: scale[:-1].clone()), _CONTRADICTS),
        ("int8", _told(symmetric=False), _CONTRADICTS),
        ("ct fp8 channel", _told(strategy="block", block_structure=[8, 96]), _FIT),
        ("ct fp8 block", _told(block_structure=[128, 128]), _FIT),
        ("ct fp8 block", _told(block_structure="all"), "block_structure makes no sense"),
        ("ct fp8 group", _told(group_size="many"), "makes no sense"),
        ("ct fp8 group", _instead("weight_scale", lambda scale: scale[:, :-1].clone()), _FIT),
        ("deepseek-v3 silent", _instead("scale_inv", lambda scale: scale[:, :-1].clone()), _FIT),
        ("mxfp8 modelopt", _instead("scale", lambda scale: scale[:, :2].clone()), _FIT),
    ],
)  # fmt: skip
def test_refused(name: str, change: Callable[[Layout], None], message: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    change(layout)
    with pytest.raises(FormatError, match=message) as caught:
        planned(save(layout, tmp_path / "base"))
    assert any(part in str(caught.value) for part in (layout.name, "config_groups['group_0']"))


def test_shapes_that_decide_nothing(tmp_path: Path) -> None:
    """Blocks of any size are read if the config tells them, and powers of two in any case."""
    layout = LAYOUTS["deepseek-v3 silent"]()
    layout.tensors = {_W: torch.zeros(200, 300).to(torch.float8_e4m3fn), f"{_W}_scale_inv": torch.ones(2, 2)}
    with pytest.raises(FormatError, match="weight_block_size in the config"):
        planned(save(layout, tmp_path / "silent"), rank=2)
    layout.quantization = {"quant_method": "fp8", "weight_block_size": [100, 150]}
    steps = planned(save(layout, tmp_path / "told"), rank=2)
    assert _W in {target.tensor for target in steps.targets}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("int4", _told(num_bits=3)),
        ("int4", lambda layout: layout.quantization["config_groups"].clear()),
        ("modelopt nvfp4", lambda layout: layout.tensors.update({f"{_W[:-6]}pre_quant_scale": torch.ones(96)})),
        ("int8", lambda layout: layout.quantization.update(quant_method="eetq", config_groups={})),
    ],
)
def test_what_is_not_read_is_no_target(name: str, change: Callable[[Layout], None], tmp_path: Path) -> None:
    layout = LAYOUTS[name]()
    change(layout)
    steps = planned(save(layout, tmp_path / "base"), rank=2, include=["*o_proj*", "*q_proj*"])
    assert [target.tensor for target in steps.targets] == ["model.layers.0.self_attn.o_proj.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(("name", "end"), [("int4", "_packed"), ("gpt-oss", "_blocks")])
def test_globs_are_for_weights(name: str, end: str, option: str, tmp_path: Path) -> None:
    """A tensor that a weight is packed in is none; what the error says to type is the weight."""
    layout = LAYOUTS[name]()
    base = save(layout, tmp_path / "base")
    for glob in (f"{layout.name}{end}", f"*j*{end}", f"*{end}"):
        with pytest.raises(OptionError, match=f"--{option} .* matches only tensors that weights are packed in") as caught:
            planned(base, rank=2, **{option: [glob]})
        assert layout.name in str(caught.value.expected)
        assert (caught.value.hint is None) == (glob != f"{layout.name}{end}")  # else it would match other weights, too
        if caught.value.hint is not None:
            _, said = shlex.split(caught.value.hint)
            taken = {target.tensor for target in planned(base, rank=2, **{option: [said]}).targets}
            assert (layout.name in taken) == (option == "include")


@pytest.mark.parametrize("name", ["int4 channel", "int8 packed"])
def test_columns_that_do_not_fill_the_last_number(name: str, tmp_path: Path) -> None:
    """Only the tensor of the shape tells of them, which is read with the weight: never a column more than there is."""
    layout = LAYOUTS[name]()
    layout.tensors[_part(layout, "shape")][1] -= 1
    base = save(layout, tmp_path / "base")
    with pytest.raises(FormatError, match=f"'{_W}' has another shape"):
        surgery.factorize(base, tmp_path / "f", rank=2, include=[_W])


@pytest.mark.parametrize("name", ["ct nvfp4", "modelopt nvfp4"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_global_scale_that_is_no_number(name: str, number: float, tmp_path: Path) -> None:
    """Divided by infinity, a weight would be a sound one of zeros."""
    layout = LAYOUTS[name]()
    whole = next(name for name in layout.tensors if name.startswith(_W) and name.endswith(("_global_scale", "_scale_2")))
    layout.tensors[whole].fill_(number)
    with pytest.raises(WeightError, match="global scale is no number"):
        surgery.factorize(save(layout, tmp_path / "base"), tmp_path / "f", rank=2, include=[_W])


@pytest.mark.parametrize("name", ["ct nvfp4", "modelopt nvfp4", "int4 of 128"])
def test_an_update_too_large_for_the_scales(name: str, tmp_path: Path) -> None:
    """E4M3 ends at 448, float16 at 65504."""
    layout = LAYOUTS[name]()
    largest = torch.finfo(layout.tensors[f"{_W}_scale"].dtype).max
    layout.tensors[f"{_W}_scale"] = torch.full(layout.tensors[f"{_W}_scale"].shape, largest).to(
        layout.tensors[f"{_W}_scale"].dtype
    )
    base = save(layout, tmp_path / "base")
    manifest = surgery.factorize(base, tmp_path / "f", rank=4, include=[_W]).manifest
    scales = {_W: torch.full(manifest.targets[0].scales_shape, 30.0)}
    with pytest.raises(WeightError, match=f"{_W}: the update is too large for its scales.*") as caught:
        surgery.fold(tmp_path / "f", scales, tmp_path / "out", base=base)
    assert "--dequantize writes bfloat16" in str(caught.value)
    surgery.fold(tmp_path / "f", scales, tmp_path / "dense", base=base, dequantize=True)
    assert tensors_of(tmp_path / "dense")[_W].dtype == torch.bfloat16


def test_an_update_too_large_for_a_scale_that_experts_share(tmp_path: Path) -> None:
    layout = LAYOUTS["modelopt fp8 stack"]()
    layout.tensors[_part(layout, "_scale")] = torch.tensor(1e-3)
    base = save(layout, tmp_path / "base")
    manifest = surgery.factorize(base, tmp_path / "f", rank=4, include=[layout.name]).manifest
    scales = torch.ones(manifest.targets[0].scales_shape)
    scales[1] = 1.001
    surgery.fold(tmp_path / "f", {layout.name: scales}, tmp_path / "small", base=base, progress=surgery.Silent())
    assert tensors_of(tmp_path / "small")[_part(layout, "_scale")] == 1e-3
    scales[1] = 30
    with pytest.raises(WeightError, match=rf"{layout.name}: the update is too large for the one scale"):
        surgery.fold(tmp_path / "f", {layout.name: scales}, tmp_path / "large", base=base)
