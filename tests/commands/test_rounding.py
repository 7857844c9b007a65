"""What a fold keeps of trained scales after rounding, and what it tells of it; the truth is measured from the bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.commands.verify_folded import verify_folded
from surgery.names import TRAINS, Train
from surgery.progress import Silent
from tests.models import files_of, save_llama, tensors_of
from tests.releases import writes_e8m0
from tests.weights.test_fp8 import quantize_model

_BLOCK = (64, 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model, its FP8 copies, what was factorized of them, and scales that fine-tuning might give."""
    root = tmp_path_factory.mktemp("rounding")
    settings: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 320, "shard_size": "900KB"}
    save_llama(root / "BF16", torch.bfloat16, **settings)
    quantize_model(root / "BF16", root / "F8", block=_BLOCK)
    names = ["BF16", "F8"]
    if not writes_e8m0.args[0]:
        quantize_model(root / "BF16", root / "F8-E8M0", block=_BLOCK, powers_of_two=True)
        names.append("F8-E8M0")
    for name in names:
        surgery.factorize(root / name, root / f"{name}-f", rank=8, layout="overlay", progress=Silent())
    surgery.factorize(root / "BF16", root / "BF16-residual", rank=8, progress=Silent())
    return root


def _scales(factorized: Path, size: float, train: Train = "scales") -> dict[str, torch.Tensor]:
    """Scales around 1 + ``size``, half of them smaller than 1, or cores as far from I; of the first target untouched."""
    generator = torch.Generator().manual_seed(1)
    ones = load_file(factorized / "surgery/scales.safetensors")
    moved = {
        key: 1 + size * torch.randn(value.shape, generator=generator).sign() * torch.linspace(0.5, 1.5, value.numel())
        for key, value in ones.items()
    }
    if train == "core":
        ones = {key: torch.diag(value) for key, value in ones.items()}
        moved = {
            key: value + size / len(value) ** 0.5 * torch.randn(value.shape, generator=generator) for key, value in ones.items()
        }
    first = min(moved)
    return moved | {first: ones[first]}


def _dense(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight in float64, dequantized."""
    weight, scale = tensors[name], tensors.get(f"{name}_scale_inv")
    if scale is None:
        return weight.double()
    spread = scale.double().repeat_interleave(_BLOCK[0], 0).repeat_interleave(_BLOCK[1], 1)
    return weight.double() * spread[: weight.shape[0], : weight.shape[1]]


def _kept(before: Path, after: Path, factorized: Path, scales: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Key -> how much of the update is in the weights, and the square of the update; for targets that are not untouched."""
    old, new = tensors_of(before), tensors_of(after)
    factors = {key: part for file in (factorized / "surgery").glob("factors*") for key, part in load_file(file).items()}
    kept = {}
    for key, g in scales.items():
        U, s, V = (factors[f"{key}.{part}"].double() for part in ("U", "s", "V"))
        core = torch.diag(g) if g.ndim == 1 else g
        update = (U * s.sqrt()) @ (core.double() - torch.eye(len(core))) @ (V * s.sqrt()).T
        if (asked := update.square().sum().item()) > 0:
            kept[key] = (((_dense(new, key) - _dense(old, key)) * update).sum().item() / asked, asked)
    return kept


def _check_report(report: surgery.FoldReport, kept: dict[str, tuple[float, float]]) -> None:
    share = sum(share * asked for share, asked in kept.values()) / sum(asked for _, asked in kept.values())
    worst = min(kept, key=lambda key: kept[key])
    assert report.kept == pytest.approx(share, abs=2e-3)
    assert report.kept_least == pytest.approx(kept[worst][0], abs=2e-3)
    assert kept[str(report.kept_least_in)][0] == pytest.approx(kept[worst][0], abs=2e-3)


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize(
    ("name", "size", "by_nearest"),
    [
        ("BF16", 5e-4, 0.6),
        ("BF16", 3e-3, 0.89),
        ("BF16", 0.02, 1.0),
        ("F8", 3e-3, 0.5),
        pytest.param("F8-E8M0", 0.01, 0.7, marks=writes_e8m0),
    ],
)
def test_what_was_trained_arrives(name: str, size: float, by_nearest: float, train: Train, small: Path, tmp_path: Path) -> None:
    """Rounded to nearest much is lost, and the note names the ways out. By default nearly all of each update arrives."""
    scales = _scales(small / f"{name}-f", size, train)
    with pytest.warns(surgery.SurgeryWarning, match="rounding has kept less than 90%") if by_nearest < 0.9 else nullcontext():
        nearest = surgery.fold(small / f"{name}-f", scales, tmp_path / "n", base=small / name, rounding="nearest")
    lost = _kept(small / name, tmp_path / "n", small / f"{name}-f", scales)
    _check_report(nearest, lost)
    assert nearest.kept is not None
    assert nearest.kept < by_nearest
    report = surgery.fold(small / f"{name}-f", scales, tmp_path / "d", base=small / name)
    kept = _kept(small / name, tmp_path / "d", small / f"{name}-f", scales)
    _check_report(report, kept)
    if by_nearest < 0.9:
        assert nearest.error is None
        assert report.error is not None
        assert report.error < 0.1
    # Of so few entries a single one may be a fiftieth of what is asked.
    assert min(share for share, _ in kept.values()) >= (0.99 if name == "BF16" else 0.97)
    assert max(share for share, _ in kept.values()) <= (1.02 if name == "BF16" else 1.03)
    save_file(scales, tmp_path / "scales.safetensors")
    for folder, found in (("n", nearest), ("d", report)):
        check = verify_folded(
            small / f"{name}-f", tmp_path / folder, tmp_path / "scales.safetensors", base=small / name, progress=Silent()
        )
        assert check.kept == pytest.approx(found.kept, abs=2e-3)
        assert check.kept_least == pytest.approx(found.kept_least, abs=2e-3)
        assert check.changed == len(kept)
    untouched = min(scales)
    before, after = tensors_of(small / name), tensors_of(tmp_path / "d")
    names = before.keys() - {part for key in kept for part in (key, f"{key}_scale_inv")}
    assert untouched in names
    assert all(torch.equal(before[one].view(torch.uint8), after[one].view(torch.uint8)) for one in names)


def test_large_updates_are_rounded_to_nearest_by_default(small: Path, tmp_path: Path) -> None:
    """The same bytes as with ``nearest``, which keeps nearly all; with ``directions`` as well, as the first try will do."""
    scales = _scales(small / "BF16-residual", 0.2)
    for rounding in (None, "nearest", "directions"):
        surgery.fold(small / "BF16-residual", scales, tmp_path / f"{rounding}", rounding=rounding, progress=Silent())
    by_default = files_of(tmp_path / "None")
    assert by_default == files_of(tmp_path / "nearest")
    kept = _kept(small / "BF16", tmp_path / "directions", small / "BF16-residual", scales)
    assert min(share for share, _ in kept.values()) > 0.995


@pytest.mark.parametrize("train", TRAINS)
def test_both_layouts_and_all_numbers_of_threads_give_the_same_bytes(train: Train, small: Path, tmp_path: Path) -> None:
    scales = _scales(small / "BF16-residual", 1e-3, train)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            surgery.fold(small / "BF16-residual", scales, tmp_path / f"{count}", progress=Silent())
    finally:
        torch.set_num_threads(threads)
    save_file(scales, tmp_path / "scales.safetensors", metadata={})
    overlay = {key: value.clone() for key, value in scales.items()}
    surgery.fold(small / "BF16-f", overlay, tmp_path / "overlay", base=small / "BF16", progress=Silent())
    first = files_of(tmp_path / "1")
    assert all(files_of(tmp_path / other) == first for other in ("2", "3", "overlay"))


@pytest.mark.slow  # what merge does on Ray is in the suite
def test_ray_gives_the_same_bytes_and_the_same_report(small: Path, tmp_path: Path) -> None:
    scales = _scales(small / "F8-f", 3e-3, "core")
    reports = [
        surgery.fold(small / "F8-f", scales, tmp_path / engine, base=small / "F8", engine=engine, progress=Silent())
        for engine in ("local", "ray")
    ]
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")
    assert {(one.kept, one.kept_least, one.kept_least_in) for one in reports} == {
        (reports[0].kept, reports[0].kept_least, reports[0].kept_least_in)
    }


def test_dequantized_all_of_a_small_update_arrives(small: Path, tmp_path: Path) -> None:
    scales = _scales(small / "F8-f", 3e-3)
    report = surgery.fold(small / "F8-f", scales, tmp_path / "o", base=small / "F8", dequantize=True, progress=Silent())
    kept = _kept(small / "F8", tmp_path / "o", small / "F8-f", scales)
    _check_report(report, kept)
    assert min(share for share, _ in kept.values()) >= 0.99


def test_untouched_scales_have_no_share(small: Path, tmp_path: Path) -> None:
    report = surgery.fold(
        small / "BF16-residual", small / "BF16-residual/surgery/scales.safetensors", tmp_path / "o", progress=Silent()
    )
    assert (report.kept, report.kept_least, report.kept_least_in) == (None, None, None)


def _run(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout + ("" if "--json" in arguments else result.stderr)


def test_the_command_line_tells_it(small: Path, tmp_path: Path) -> None:
    scales = _scales(small / "BF16-residual", 5e-4)
    save_file(scales, tmp_path / "scales.safetensors")
    told = _run("fold", small / "BF16-residual", tmp_path / "scales.safetensors", "-o", tmp_path / "d")
    assert "% of the update kept" in told
    assert "rounding has kept" not in told
    told = _run("fold", small / "BF16-residual", tmp_path / "scales.safetensors", "-o", tmp_path / "n", "--rounding", "nearest")
    assert "rounding has kept less than 90% of the update of" in told
    assert "--rounding directions keeps it" in told
    found = json.loads(
        _run(
            "verify", small / "BF16-residual", "--folded", tmp_path / "n", "--scales", tmp_path / "scales.safetensors", "--json"
        )
    )
    kept = _kept(small / "BF16", tmp_path / "n", small / "BF16-residual", scales)
    assert found["kept_least"] == pytest.approx(min(share for share, _ in kept.values()), abs=2e-3)
    assert found["targets"] == len(scales)
    text = _run("verify", small / "BF16-residual", "--folded", tmp_path / "n", "--scales", tmp_path / "scales.safetensors")
    assert found["kept_least_in"] in "".join(text.split())
    result = CliRunner().invoke(main, ["verify", str(small / "BF16-residual"), "--folded", str(tmp_path / "n")])
    assert result.exit_code == 1
    assert "--scales is missing" in result.stderr


_FOLD = """
import sys, surgery
factorized, base, here, there, *trains = sys.argv[1:]
for train in trains:
    scales, out, quiet = f"{here}/{train}.safetensors", f"{there}/{train}", surgery.Silent()
    surgery.fold(factorized, scales, out, base=base, device="cpu", progress=quiet)
"""


@pytest.mark.parametrize("name", ["BF16", "F8"])
def test_other_instructions_give_the_same_bytes(name: str, small: Path, tmp_path: Path) -> None:
    """As on an older processor, where other libraries' products have other last bits."""
    factorized, base = small / f"{name}-f", small / name
    (tmp_path / "there").mkdir()
    for train in TRAINS:
        scales = tmp_path / f"{train}.safetensors"
        save_file(_scales(factorized, 3e-3, train), scales)
        surgery.fold(factorized, scales, tmp_path / "here" / train, base=base, device="cpu", progress=Silent())
    older = {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    arguments = (factorized, base, tmp_path, tmp_path / "there", *TRAINS)
    command = [sys.executable, "-c", _FOLD, *map(str, arguments)]
    subprocess.run(command, env={**os.environ, **older}, check=True, timeout=120)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
