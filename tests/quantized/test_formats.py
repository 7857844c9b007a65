"""Each quantized format, read and written: against numpy's float64, the original bytes, and all numbers that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.commands.verify import verify
from surgery.progress import Silent
from tests.models import files_of, planned, tensors_of
from tests.quantized.layouts import LAYOUTS, Layout, Read

_OTHER = "model.layers.0.self_attn.o_proj.weight"


def save(layout: Layout, folder: Path, *, apart: bool = False) -> Path:
    """A model with this weight, one that is not quantized, and a norm; ``apart``: each part in a file of its own."""
    folder.mkdir()
    rest = {_OTHER: torch.randn(24, 20).bfloat16(), "model.norm.weight": torch.ones(20).bfloat16()}
    (folder / "config.json").write_text(json.dumps({"quantization_config": layout.quantization} if layout.quantization else {}))
    tensors = layout.tensors | layout.beside
    if not apart:
        save_file(tensors | rest, folder / "model.safetensors")
        return folder
    files = [rest, *({name: tensor} for name, tensor in reversed(tensors.items()))]
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, file in zip(names, files, strict=True):
        save_file(file, folder / name)
    weight_map = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _fold(folder: Path, scales: Any, out: Path, base: Path, **options: Any) -> surgery.FoldReport:
    return surgery.fold(folder, scales, out, base=base, progress=Silent(), **options)


def _told_scales(manifest: surgery.Manifest, change: float) -> dict[str, torch.Tensor]:
    """Scales that change each matrix but the second of a stack."""
    target = manifest.targets[0]
    scales = 1 + change * torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(*target.scales_shape[:-1], 1)
    if scales.ndim == 2:
        scales[1] = 1
    return {target.key: scales}


@pytest.mark.parametrize("name", LAYOUTS)
def test_format(name: str, tmp_path: Path) -> None:
    """Read exactly; untouched, the same bytes; changed, the numbers nearest to what is wanted, for scales that are kept."""
    layout = LAYOUTS[name]()
    stored = layout.read(layout.tensors)
    assert np.array_equal(stored.codes, layout.codes)
    base = save(layout, tmp_path / "base", apart="expert" in name or name == "int4 order")
    manifest = surgery.factorize(base, tmp_path / "f", rank=4, include=[layout.name]).manifest
    assert [(target.tensor, target.dtype) for target in manifest.targets] == [(layout.name, layout.dtype)]
    untouched = {target.key: torch.ones(target.scales_shape) for target in manifest.targets}
    _fold(tmp_path / "f", untouched, tmp_path / "back", base)
    assert files_of(tmp_path / "back") == files_of(base)
    assert verify(tmp_path / "f", base=base).ok
    _fold(tmp_path / "f", untouched, tmp_path / "dense", base, dequantize=True)
    # A model of its own, also where nothing is left of a weight file.
    assert planned(tmp_path / "dense", rank=4, include=[layout.name]).targets[0].dtype == "BF16"
    dense = tensors_of(tmp_path / "dense")
    assert dense.keys() == {layout.name, _OTHER, "model.norm.weight"}
    assert torch.equal(dense[layout.name], torch.from_numpy(stored.weight.copy()).float().bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())

    scales = _told_scales(manifest, 0.03)
    factors = {key: part for file in (tmp_path / "f/surgery").glob("factors*") for key, part in load_file(file).items()}
    U, s, V = (factors[f"{layout.name}.{part}"].double() for part in ("U", "s", "V"))
    distance = s * (scales[layout.name].double() - 1)
    wanted = stored.weight + ((U * distance.unsqueeze(-2)) @ V.mT).numpy()
    before = tensors_of(base)
    for rounding in ("nearest", "directions"):
        report = _fold(tmp_path / "f", scales, tmp_path / rounding, base, rounding=rounding)
        out = tensors_of(tmp_path / rounding)
        assert {name: (one.dtype, one.shape) for name, one in out.items()} == {
            name: (one.dtype, one.shape) for name, one in before.items()
        }
        kept = before.keys() - {
            name for name in layout.tensors if not name.endswith(("shape", "g_idx", "scale_2", "global_scale"))
        }
        assert len(kept) >= 2
        assert all(_bytes(out[name]) == _bytes(before[name]) for name in kept)
        read = layout.read(out)
        if U.ndim == 3:
            assert all(np.array_equal(one[1], other[1]) for one, other in zip(read, stored, strict=True) if np.ndim(one))
        arrived = torch.diagonal(U.mT @ torch.from_numpy(read.weight - stored.weight) @ V, dim1=-2, dim2=-1)
        share = float((arrived * distance).sum() / distance.square().sum())
        assert report.kept == pytest.approx(share, abs=2e-3)
        if name in ("deepseek-v3.1", "deepseek-v4"):
            assert np.array_equal(np.frexp(read.scales)[0], np.full(read.scales.shape, 0.5))
        if rounding == "nearest":
            _check_nearest(read, wanted, layout)
        else:
            assert share == pytest.approx(1, abs=0.05)


def _check_nearest(read: Read, wanted: np.ndarray, layout: Layout) -> None:
    """No number of the format is nearer, with the scales that were written; and these hold what is wanted."""
    changed = [0, 2] if wanted.ndim == 3 else slice(None)
    codes, zeros, scales = (np.broadcast_to(one, wanted.shape)[changed] for one in read)
    wanted, values = wanted[changed], (codes - zeros) * scales
    least = np.full(wanted.shape, np.inf)
    for one in layout.every:
        least = np.minimum(least, np.abs((one - zeros) * scales - wanted))
    # What is wanted is rounded to float32 first.
    assert np.all(np.abs(values - wanted) <= least + 2.0**-21 * np.abs(wanted) + 1e-12)
    # Half the distance of the largest numbers of the format.
    step = {"F8_E4M3": 32, "MXFP4": 2, "NVFP4": 2, "INT4": 1, "INT8": 1}[layout.dtype]
    assert np.all(np.abs(values - wanted) <= (step / 2) * 1.001 * np.abs(scales) + 1e-9)
