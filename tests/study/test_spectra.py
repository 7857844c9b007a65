"""The study of spectra: planted changes come out as planted, numbers against numpy's full SVDs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import OptionError, OutputError, SourceError, SurgeryWarning, WeightError
from surgery.names import TRAINS, Train
from surgery.planning.allocation import Candidate, gain_of, ranks_within
from surgery.progress import Silent
from surgery.report.claim_cards import cards
from surgery.report.findings import statements
from surgery.report.summary import groups_of
from surgery.study import gains
from surgery.study.gains import GainsMeasure
from surgery.study.matching import assignment, in_common
from surgery.study.recommend import _uniform
from surgery.study.spectrum import spectrum
from tests.families import FAMILIES
from tests.models import save_llama, tensors_of

R = 4
NAME = "model.layers.0.mlp.up_proj.weight"


def _orthogonal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))[0]


def _planted(m: int = 60, n: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = min(m, n)
    return _orthogonal(m, k, 0), 10 * torch.arange(1, k + 1, dtype=torch.float64) ** -0.5, _orthogonal(n, k, 1)


def _saved(folder: Path, weight: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({NAME: weight.to(torch.float32).contiguous()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _compared(tmp_path: Path, old: torch.Tensor, new: torch.Tensor, **options: Any) -> dict[str, Any]:
    report = surgery.spectra(_saved(tmp_path / "a", old), _saved(tmp_path / "b", new), subspace=R, **options).as_json()
    (target,) = report["targets"]
    assert target["converged"]
    assert target["tuned"]["converged"]
    return dict(target)


def test_one_matrix_against_numpy(tmp_path: Path) -> None:
    U, s, V = _planted()
    report = surgery.spectra(_saved(tmp_path / "m", U * s @ V.T), top=20).as_json()
    (target,) = report["targets"]
    values = np.linalg.svd((U * s @ V.T).float().double().numpy(), compute_uv=False)
    energy = (values**2).sum()
    shares = values**2 / energy
    assert target["singular_values"] == pytest.approx(values[:20], rel=1e-5)
    assert target["norm"] == pytest.approx(math.sqrt(energy), rel=1e-5)
    assert target["stable_rank"] == pytest.approx(energy / values[0] ** 2, rel=1e-5)
    assert target["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert target["effective_rank_error"] == 0
    assert target["energy"] == {str(k): pytest.approx(shares[:k].sum(), rel=1e-5) for k in (1, 2, 4, 8, 16)}
    assert target["condition"] == pytest.approx(values[0] / values[19], rel=1e-5)
    assert target["tail_exponent"] == pytest.approx(0.5, abs=1e-3)
    assert all(target["identified"])
    assert max(target["residual"]) < 1e-5
    assert {key: target[key] for key in ("tensor", "layer", "shape", "dtype", "matrix", "slice")} == {
        "tensor": NAME,
        "layer": 0,
        "shape": [60, 40],
        "dtype": "F32",
        "matrix": None,
        "slice": None,
    }
    assert report["schema_version"] == 3
    assert report["tuned"] is None
    assert "update" not in target


@pytest.mark.parametrize("shape", [(1100, 1300), (1400, 1050)])
@pytest.mark.parametrize("kind", ["power", "flat", "steps"])
def test_effective_rank_of_a_large_matrix_is_within_its_error(shape: tuple[int, int], kind: str) -> None:
    k = min(shape)
    index = torch.arange(1, k + 1, dtype=torch.float64)
    s = {"power": index**-0.5, "flat": torch.ones(k, dtype=torch.float64), "steps": 2.0 ** -(index // 200)}[kind]
    A = (_orthogonal(shape[0], k, 2) * s) @ _orthogonal(shape[1], k, 3).T
    shares = s.square() / s.square().sum()
    exact = math.exp(-(shares * shares.log()).sum().item())
    found, _ = spectrum(A.float(), 32, tolerance=1e-5, seed=0)
    assert abs(found.effective_rank - exact) <= 4 * found.effective_rank_error + 1e-3 * exact
    assert found.effective_rank_error < 0.01 * exact


def test_amplified_by_known_factors(tmp_path: Path) -> None:
    U, s, V = _planted()
    factors = torch.ones_like(s)
    factors[:R] = torch.tensor([1.5, 1.4, 1.3, 1.2], dtype=torch.float64)
    target = _compared(tmp_path, U * s @ V.T, U * (s * factors) @ V.T, top=10)
    assert target["amplification"] == pytest.approx(factors[:10], rel=1e-5)
    assert target["rest_amplification"] == pytest.approx(1, rel=1e-5)
    assert target["left_cosine"] == pytest.approx([1] * 10, abs=1e-5)
    assert target["right_cosine"] == pytest.approx([1] * 10, abs=1e-5)
    update = target["update"]
    change = (s * (factors - 1))[:R]
    assert update["norm"] == pytest.approx(change.norm().item(), rel=1e-4)
    assert update["relative"] == pytest.approx((change.norm() / s.norm()).item(), rel=1e-4)
    for share in ("in_left", "in_right", "in_both", "rescaling"):
        assert update[share] == pytest.approx(1, abs=1e-5)
    assert update["singular_values"][:R] == pytest.approx(sorted(change.tolist(), reverse=True), rel=1e-4)
    assert update["effective_rank"] < R + 0.1


def test_rotated_by_known_angles(tmp_path: Path) -> None:
    """The first and the eleventh left vectors turn towards each other, the second and the third right vectors as well."""
    U, s, V = _planted()
    a, b = 0.3, 0.5
    turned, other = U.clone(), V.clone()
    turned[:, 0] = math.cos(a) * U[:, 0] + math.sin(a) * U[:, 10]
    turned[:, 10] = -math.sin(a) * U[:, 0] + math.cos(a) * U[:, 10]
    other[:, 1] = math.cos(b) * V[:, 1] + math.sin(b) * V[:, 2]
    other[:, 2] = -math.sin(b) * V[:, 1] + math.cos(b) * V[:, 2]
    target = _compared(tmp_path, U * s @ V.T, turned * s @ other.T, top=12)
    left, right = [1.0] * 12, [1.0] * 12
    left[0] = left[10] = math.cos(a)
    right[1] = right[2] = math.cos(b)
    assert target["left_cosine"] == pytest.approx(left, abs=1e-4)
    assert target["right_cosine"] == pytest.approx(right, abs=1e-4)
    assert target["amplification"] == pytest.approx([1] * 12, abs=1e-5)
    assert target["left_top"] == pytest.approx([1, 1, 1, math.cos(a)], abs=1e-4)
    # Within the leading subspace nothing shows of a rotation of its own vectors.
    assert target["right_top"] == pytest.approx([1] * R, abs=1e-4)
    assert target["left_next"] == pytest.approx([1] * R, abs=1e-4)


def test_a_random_update_lies_nowhere_in_particular(tmp_path: Path) -> None:
    m, n = 200, 160
    U, s, V = _planted(m, n)
    update = 0.01 * _orthogonal(m, 3, 7) @ _orthogonal(n, 3, 8).T
    target = _compared(tmp_path, U * s @ V.T, U * s @ V.T + update, top=16)
    found = target["update"]
    assert found["singular_values"][:3] == pytest.approx([0.01] * 3, rel=1e-2)
    assert found["stable_rank"] == pytest.approx(3, rel=1e-2)
    assert found["in_both"] < 20 * R * R / (m * n)
    assert found["in_left"] == pytest.approx(R / m, abs=5 * R / m)
    assert found["rescaling"] < 0.01


def test_directions_that_a_matrix_does_not_determine(tmp_path: Path) -> None:
    U, s, V = _planted()
    s[2] = s[1]
    report = surgery.spectra(_saved(tmp_path / "m", U * s @ V.T), top=6, subspace=R).as_json()
    (target,) = report["targets"]
    assert target["identified"] == [True, False, False, True, True, True]
    assert report["findings"]["unidentified_share"] == pytest.approx(2 / 6, rel=1e-5)
    with pytest.warns(SurgeryWarning, match="has the same weights as the original in all 1 matrices"):
        again = surgery.spectra(tmp_path / "m", tmp_path / "m", top=6, subspace=R).as_json()["targets"][0]
    # What is not determined has not turned either.
    assert again["left_cosine"] == pytest.approx([1] * 6, abs=1e-5)
    assert again["order_changes"] == 0
    assert again["update"] is None


def test_against_numpy_through_whole_models(tmp_path: Path) -> None:
    """A bfloat16 model and a float32 one with other shards: every matrix, by the definitions."""
    old = save_llama(tmp_path / "a", torch.bfloat16)
    new = save_llama(tmp_path / "b", torch.float32, shard_size="1GB")
    weights = load_file(new / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weights[name] = weight * (1 + 0.05 * torch.randn(weight.shape, generator=generator))
    save_file(weights, new / "model.safetensors")
    report = surgery.spectra(old, new, top=8, subspace=R).as_json()
    assert len(report["targets"]) == 14
    originals = tensors_of(old)
    for target in report["targets"]:
        before, after = originals[target["tensor"]].double().numpy(), weights[target["tensor"]].double().numpy()
        (U, s, Vh), (X, t, Yh) = np.linalg.svd(before), np.linalg.svd(after)
        D = after - before
        assert target["amplification"] == pytest.approx(t[:8] / s[:8], rel=1e-4)
        rest = math.sqrt((t[8:] ** 2).sum() / (s[8:] ** 2).sum())
        assert target["rest_amplification"] == pytest.approx(rest, rel=1e-3)
        assert target["left_top"] == pytest.approx(np.linalg.svd(U[:, :R].T @ X[:, :R], compute_uv=False), abs=1e-3)
        assert target["right_next"] == pytest.approx(np.linalg.svd(Vh[R : 2 * R] @ Yh[R : 2 * R].T, compute_uv=False), abs=1e-3)
        both = U[:, :R].T @ D @ Vh[:R].T
        total = (D**2).sum()
        assert target["update"]["in_both"] == pytest.approx((both**2).sum() / total, rel=1e-3)
        assert target["update"]["in_left"] == pytest.approx(((U[:, :R].T @ D) ** 2).sum() / total, rel=1e-3)
        assert target["update"]["rescaling"] == pytest.approx((both.diagonal() ** 2).sum() / total, rel=1e-3, abs=1e-7)
        assert target["update"]["norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
    tops = [abs(value - 1) for target in report["targets"] for value in target["amplification"][:R]]
    found = report["findings"]
    assert found["targets"] == 14
    assert abs(found["most_amplified"][0]["amplification"] - 1) == pytest.approx(max(tops), rel=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "phi3", "UNet"])
def test_stacks_slices_and_convolutions(name: str, tmp_path: Path) -> None:
    folder = FAMILIES[name].save(tmp_path / "m")
    with pytest.warns(SurgeryWarning, match="has the same weights as the original"):
        report = surgery.spectra(folder, folder, top=4, subspace=2, split=name == "phi3" or None).as_json()
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4, split=name == "phi3" or None).manifest
    assert len(report["targets"]) == sum(target.matrices[0] for target in manifest.targets)
    assert len({target["key"] for target in report["targets"]}) == len(report["targets"])
    factors = {key: part for file in (tmp_path / "f/surgery").glob("factors*") for key, part in load_file(file).items()}
    for target in report["targets"]:
        key = target["tensor"] if target["slice"] is None else f"{target['tensor']}[{target['slice']}]"
        s = factors[f"{key}.s"] if target["matrix"] is None else factors[f"{key}.s"][target["matrix"]]
        assert target["singular_values"] == pytest.approx(s.tolist(), rel=1e-4)
        assert target["amplification"] == [1.0] * 4


def test_what_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the subspaces need as many singular vectors"):
        surgery.spectra(llama, top=4, subspace=8)
    with pytest.raises(SourceError, match="has no tensor"):
        surgery.spectra(llama, _saved(tmp_path / "other", torch.ones(3, 3)))
    U, s, V = _planted()
    bad = U * s @ V.T
    bad[3, 3] = math.nan
    with pytest.raises(WeightError, match=r"up_proj\.weight': the matrix holds NaN"):
        surgery.spectra(_saved(tmp_path / "bad", bad))


def test_command(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = CliRunner().invoke(main, ["spectra", str(llama), str(llama), "-o", str(out), "--top", "8", "--subspace", "4"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "spectra.json").read_text())
    assert "note: " in result.stderr
    assert "has the same weights as the original in all 14 matrices that were compared" in result.stderr
    assert report == json.loads(json.dumps(surgery.spectra(llama, llama, top=8, subspace=4, progress=Silent()).as_json()))
    assert len((out / "spectra.csv").read_text().splitlines()) == 1 + len(report["targets"])
    again = CliRunner().invoke(main, ["spectra", str(llama), "-o", str(out)])
    assert again.exit_code == 1
    assert "--overwrite" in again.output


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("unit", ["numbers", "bytes"])
def test_recommended_ranks_keep_the_most(unit: str, train: Train, tmp_path: Path) -> None:
    """Against every other way to spend the budget, for two small weights."""
    folder = tmp_path / "m"
    folder.mkdir()
    spectra = {"a": [5.0, 4.0, 0.1, 0.1], "b": [3.0, 2.9, 2.8, 0.2]}
    weights = {}
    for i, (name, values) in enumerate(spectra.items()):
        s = torch.tensor(values, dtype=torch.float64)
        weights[f"layers.{i}.{name}.weight"] = (
            ((_orthogonal(8, 4, i) * s) @ _orthogonal(6 - i, 4, 9 + i).T).float().contiguous()
        )
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    costs = [1, 1] if unit == "numbers" else [4 * (8 + 6 + 1), 4 * (8 + 5 + 1)]
    power = 2 if (unit, train) == ("numbers", "core") else 1
    budget = 4**power if unit == "numbers" else 4 * 60
    command = ["recommend", str(folder), "--budget", str(budget), "--unit", unit, "--train", train]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "r.toml"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    best = max(
        sum(v * v for v in spectra["a"][:i]) + sum(v * v for v in spectra["b"][:j])
        for i in range(5)
        for j in range(5)
        if i**power * costs[0] + j**power * costs[1] <= budget
    )
    total = sum(v * v for values in spectra.values() for v in values)
    assert found["kept"] == pytest.approx(best / total, rel=1e-4)
    assert found["spent"] <= budget
    manifest = surgery.factorize(folder, tmp_path / "f", recipe=tmp_path / "r.toml").manifest
    assert {target.tensor: target.rank for target in manifest.targets} == {k: v for k, v in found["ranks"].items() if v}
    assert sum(target.numbers_of(train) for target in manifest.targets) == found["trainable"]
    description = tomllib.loads((tmp_path / "r.toml").read_text())["description"]
    what, numbers = ("scales", "scales") if train == "scales" else ("cores", "numbers in cores")
    assert description == f"ranks recommended for {what}, for a budget of {budget} {unit}"
    told = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "again.toml")])
    assert f"{found['trainable']} {numbers}, {found['spent']} of {budget} {unit}" in " ".join(told.stderr.split())
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "r.toml").read_bytes()


def test_recommended_for_a_change(tmp_path: Path) -> None:
    """What counts is the change: of a matrix that has not changed nothing is kept, and a late direction is reached."""
    folder, tuned = tmp_path / "a", tmp_path / "b"
    U, s, V = _planted()
    old = {f"layers.{i}.w.weight": U * s @ V.T for i in range(3)}
    factors = torch.ones_like(s)
    factors[2] = 1.5
    new = {**old, "layers.1.w.weight": U * (s * factors) @ V.T}
    for path, weights in ((folder, old), (tuned, new)):
        path.mkdir()
        save_file({name: value.float().contiguous() for name, value in weights.items()}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
    found = surgery.recommend(folder, tuned, budget=7, out=tmp_path / "r.toml", max_rank=8)
    assert found.ranks == {"layers.0.w.weight": 0, "layers.1.w.weight": 3, "layers.2.w.weight": 0}
    assert found.kept == pytest.approx(1, abs=1e-4)
    assert (found.uniform_kept, found.uniform_rank) == (pytest.approx(0.0, abs=1e-9), 2)
    heard = Silent()
    with pytest.raises(OptionError, match="there is nothing to keep"):
        surgery.recommend(folder, folder, budget=7, out=tmp_path / "other.toml", progress=heard)
    assert "has the same weights as the original in all 3 matrices" in heard.notes[0]
    with pytest.raises(OptionError, match="the budget is too small for one direction"):
        surgery.recommend(folder, budget=7, unit="bytes", out=tmp_path / "other.toml")


def test_recommended_for_cores_of_a_change(tmp_path: Path) -> None:
    """A change that turns directions into each other: scales explain none of it, a core of rank 3 all."""
    U, s, V = _planted()
    turned = torch.diag(s)
    turned[0, 2], turned[2, 1] = 0.3, -0.2
    folder, tuned = _saved(tmp_path / "a", U * s @ V.T), _saved(tmp_path / "b", U @ turned @ V.T)
    found = surgery.recommend(folder, tuned, budget=15, out=tmp_path / "r.toml", train="core", max_rank=8)
    assert (found.ranks, found.trainable, found.spent) == ({NAME: 3}, 9, 9)
    assert found.kept == pytest.approx(1, abs=1e-4)
    with pytest.raises(OptionError, match="the budget is too small for one direction") as caught:
        surgery.recommend(folder, tuned, budget=8, out=tmp_path / "other.toml", train="core", max_rank=8)
    assert (caught.value.got, caught.value.expected) == ("8 numbers", "at least 9 numbers")
    with pytest.raises(OptionError, match="scales of the leading directions explain nothing of the change"):
        surgery.recommend(folder, tuned, budget=8, out=tmp_path / "other.toml", max_rank=8)
    with pytest.raises(OptionError, match=r"cores of the leading directions explain nothing(.|\n)*more than 2 directions"):
        surgery.recommend(folder, tuned, budget=8, out=tmp_path / "other.toml", train="core", max_rank=2)


@pytest.mark.parametrize("train", TRAINS)
def test_recommended_for_stacked_experts(train: Train, tmp_path: Path) -> None:
    folder = FAMILIES["gpt_oss"].save(tmp_path / "m")
    budget = 60 if train == "scales" else 240
    found = surgery.recommend(folder, budget=budget, out=tmp_path / "r.toml", train=train)
    manifest = surgery.factorize(folder, tmp_path / "f", recipe=tmp_path / "r.toml").manifest
    assert sum(target.numbers_of(train) for target in manifest.targets) == found.trainable == found.spent <= budget
    assert found.kept >= found.uniform_kept


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_gains_of_directions_against_numpy(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=generator).bfloat16()
    new = (old + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    measure, of_cores = (GainsMeasure(max_rank=20, train=train, tolerance=1e-5, seed=0) for train in TRAINS)
    before, D = old.double().numpy(), (new.double() - old.double()).numpy()
    U, s, Vh = np.linalg.svd(before, full_matrices=False)
    alone, pair = measure(old, None, (2**-7, 2**-7)), measure(old, new, (2**-7, 2**-7))
    assert alone["gains"] == pytest.approx(s[:20] ** 2, rel=1e-5)
    assert alone["total"] == pytest.approx((before**2).sum(), rel=1e-6)
    assert pair["gains"] == pytest.approx(np.diagonal(U.T @ D @ Vh.T)[:20] ** 2, rel=1e-3, abs=1e-6)
    assert pair["total"] == pytest.approx((D**2).sum(), rel=1e-6)
    blocks = [np.linalg.norm((U.T @ D @ Vh.T)[:k, :k]) ** 2 for k in range(21)]
    assert of_cores(old, new, (2**-7, 2**-7))["gains"] == pytest.approx(np.diff(blocks), rel=1e-3, abs=1e-6)
    assert of_cores(old, None, (2**-7, 2**-7)) == alone
    norms = [np.linalg.norm(matrix) for matrix in (before, new.double().numpy(), D)]
    assert [pair[name] for name in ("norm", "tuned_norm", "update_norm")] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_gains_of_a_large_matrix_against_lapack(scale: float) -> None:
    """Half of its values are 0: none of them is a gain. Scaled down, their squares would be no numbers of float32."""
    U, s, V = _orthogonal(700, 300, 0), torch.arange(1, 301, dtype=torch.float64) ** -0.5, _orthogonal(600, 300, 1)
    A = (scale * (U * s) @ V.T).float()
    found = GainsMeasure(max_rank=500, train="scales", tolerance=1e-5, seed=0)(A, None, (2**-23, 2**-23))
    values = torch.linalg.svdvals(A.double()).square()
    assert found["gains"][:300] == pytest.approx(values[:300].tolist(), rel=1e-4)
    assert max(found["gains"][300:]) < 1e-9 * found["total"]
    assert found["total"] == pytest.approx(values.sum().item(), rel=1e-6)


def test_recommend_takes_one_svd_of_each_matrix_and_no_more(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[Any] = []
    take = gains.truncated_svd

    def count(A: torch.Tensor, k: int, **how: Any) -> Any:
        solved.append(A)
        return take(A, k, **how)

    for module in ("gains", "spectrum"):
        monkeypatch.setattr(f"surgery.study.{module}.truncated_svd", count)
    tuned = tmp_path / "tuned"
    shutil.copytree(llama, tuned)
    for file in tuned.glob("*.safetensors"):
        save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    for other in (None, tuned):
        solved.clear()
        found = surgery.recommend(llama, other, budget=20, out=tmp_path / "r.toml", overwrite=True)
        assert found.spent == 20
        assert len(solved) == len(found.ranks) == 14


def test_equal_values_determine_no_direction(tmp_path: Path) -> None:
    """Also where the computed vectors are exact, with residuals of 0."""
    (target,) = surgery.spectra(_saved(tmp_path / "m", torch.eye(16)), top=8).as_json()["targets"]
    assert target["identified"] == [False] * 8
    (target,) = surgery.spectra(_saved(tmp_path / "n", torch.diag(torch.tensor([3.0, 3, 2, 1, 1]))), top=4).as_json()["targets"]
    assert target["identified"] == [False, False, True, False]


def test_rounding_is_not_amplified(tmp_path: Path) -> None:
    """Of a matrix of rank 3 the fourth value is rounding: what it became says nothing."""
    U, s, V = _planted()
    low = (U[:, :3] * s[:3]) @ V[:, :3].T
    noise = 1e-3 * torch.randn(low.shape, generator=torch.Generator().manual_seed(0))
    target = _compared(tmp_path, low, low + noise, top=8)
    assert [value is None for value in target["amplification"]] == [False] * 3 + [True] * 5
    assert target["condition"] is None
    assert target["tail_exponent"] is None
    assert target["left_cosine"][3:] == [None] * 5


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e30])
def test_scale_is_no_matter(scale: float) -> None:
    A = torch.randn(1100, 1050, generator=torch.Generator().manual_seed(0))
    found, _ = spectrum(A * scale, 16, tolerance=1e-5, seed=0)
    expected, _ = spectrum(A, 16, tolerance=1e-5, seed=0)
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-3)
    assert found.stable_rank == pytest.approx(expected.stable_rank, rel=1e-3)
    assert found.energy == pytest.approx(expected.energy, rel=1e-3)


def _to_spend_on(generator: np.random.Generator, gains: np.ndarray, *, growing: bool) -> list[Candidate]:
    """Tensors whose directions cost the same each, or 1, 3, 5 ... times that, as those of cores do."""
    prices = generator.integers(1, 6, len(gains)).tolist()
    grown = [2 * i + 1 if growing else 1 for i in range(gains.shape[1])]
    return [Candidate(str(i), gains[i].tolist(), [price * more for more in grown]) for i, price in enumerate(prices)]


def _ways(candidates: list[Candidate], budget: int) -> dict[tuple[int, ...], float]:
    """Every choice of ranks within a budget, and what it keeps."""
    return {
        ranks: sum(sum(c.gains[:rank]) for rank, c in zip(ranks, candidates, strict=True))
        for ranks in itertools.product(*(range(len(c.gains) + 1) for c in candidates))
        if sum(sum(c.costs[:rank]) for rank, c in zip(ranks, candidates, strict=True)) <= budget
    }


@pytest.mark.parametrize("growing", [False, True], ids=["scales", "cores"])
@pytest.mark.parametrize("seed", range(20))
def test_spending_against_every_way_to_spend(seed: int, growing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(seed)
    candidates = _to_spend_on(generator, generator.choice([0.0, 1.0, 2.0, 9.0], (3, 4)), growing=growing)
    budget = int(generator.integers(1, 80 if growing else 25))
    ways = _ways(candidates, budget)
    chosen = ranks_within(candidates, budget, 0.0)
    assert tuple(chosen.values()) in ways
    assert gain_of(candidates, chosen) == pytest.approx(max(ways.values()))
    # One rank for all is the largest that fits.
    kept, rank = _uniform(candidates, budget, 1.0)
    assert rank == max(rank for rank in range(5) if (rank,) * 3 in ways)
    assert kept == ways[(rank,) * 3]
    # What is too large for that is done greedily, and no worse than one rank for all.
    monkeypatch.setattr("surgery.planning.allocation._EXACT_WORK", 0)
    greedy = ranks_within(candidates, budget, 0.0)
    assert tuple(greedy.values()) in ways
    assert gain_of(candidates, greedy) >= kept


@pytest.mark.parametrize("growing", [False, True], ids=["scales", "cores"])
@pytest.mark.parametrize("seed", range(10))
def test_greedy_spending_is_the_best_where_a_price_decides(seed: int, growing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any price of a number, what all ranks cost that gain the most beyond their price is a budget without a rest."""
    monkeypatch.setattr("surgery.planning.allocation._EXACT_WORK", 0)
    generator = np.random.default_rng(seed)
    candidates = _to_spend_on(generator, generator.exponential(size=(3, 5)), growing=growing)
    for price in (0.02, 0.05, 0.1, 0.2, 0.5):
        budget = 0
        for one in candidates:
            beyond = [sum(one.gains[:rank]) - price * sum(one.costs[:rank]) for rank in range(6)]
            budget += sum(one.costs[: int(np.argmax(beyond))])
        if budget:
            found = ranks_within(candidates, budget, 0.0)
            assert gain_of(candidates, found) == pytest.approx(max(_ways(candidates, budget).values()))


def test_nothing_is_written_into_a_model(llama: Path, tmp_path: Path) -> None:
    for out in (llama, llama / "report"):
        result = CliRunner().invoke(main, ["spectra", str(llama), "-o", str(out)])
        assert result.exit_code == 1
        assert "is one of the inputs, or lies in one" in result.output
    with pytest.raises(OutputError, match="is one of the inputs, or lies in one"):
        surgery.recommend(llama, budget=9, out=llama / "model.safetensors", overwrite=True)
    other = tmp_path / "file"
    other.write_bytes(b"precious")
    result = CliRunner().invoke(main, ["spectra", str(llama), "-o", str(other)])
    assert result.exit_code == 1
    assert "is no folder" in result.output
    assert other.read_bytes() == b"precious"


# ---- what became of directions


def _slow(m: int = 80, n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A spectrum whose values are close to each other: a few per cent change their order."""
    k = min(m, n)
    return _orthogonal(m, k, seed), torch.arange(1, k + 1, dtype=torch.float64) ** -0.3, _orthogonal(n, k, seed + 100)


def _stored(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    folder.mkdir()
    save_file({name: weight.to(dtype).contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _passes(values: torch.Tensor) -> int:
    """Pairs of values that are no more in descending order."""
    return sum(a < b for a, b in itertools.combinations(values.tolist(), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rescaling_turns_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    old, new, factors = {}, {}, []
    for layer in range(4):
        U, s, V = _slow(seed=layer)
        g = torch.ones_like(s)
        g[:16] += 0.05 * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(layer)).abs()
        old[f"layers.{layer}.w.weight"], new[f"layers.{layer}.w.weight"] = U * s @ V.T, U * (s * g) @ V.T
        factors.append(g)
    report = surgery.spectra(_stored(tmp_path / "a", old, dtype), _stored(tmp_path / "b", new, dtype)).as_json()
    exact = 1e-5 if dtype == torch.float32 else 5e-3
    for target, g in zip(report["targets"], factors, strict=True):
        assert target["order_changes"] == _passes(g * _slow()[1])
        assert target["in_place"][:16] == pytest.approx(g[:16].tolist(), abs=exact)
        assert target["left_cosine"][:16] == pytest.approx([1] * 16, abs=exact)
        assert target["right_cosine"][:16] == pytest.approx([1] * 16, abs=exact)
        order = (-g * _slow()[1]).argsort(stable=True).tolist()
        assert target["place"][:16] == [order.index(i) + 1 for i in range(16)]
        assert target["gone"] == target["new"] == []
    found = report["findings"]
    passed = sum(target["order_changes"] for target in report["targets"])
    assert found["order_changes"] == passed > 10
    said = {item.question: item for item in statements(report, groups_of(report["targets"]))}
    (turned,) = (card for card in cards(report) if card.claim.startswith("The dominant directions turn"))
    assert turned.verdict == "does not hold"
    assert "none is below 0.9" in turned.details
    assert said["What became of the leading directions?"].answer == f"Their order changed {passed} times"


@pytest.mark.parametrize("factors", [(1.1, 1.3), (1.3, 1.1), (-1.2, 1.1), (-0.45, -0.35), (1, 1), (0.98, 1.02)])
def test_equal_values_that_are_rescaled(factors: tuple[float, float], tmp_path: Path) -> None:
    """A matrix does not say which basis of equal values was meant; the other one does."""
    U, s, V = _planted()
    s[2] = s[1]
    g = torch.ones_like(s)
    g[1:3] = torch.tensor(factors, dtype=torch.float64)
    g[7] = -1
    target = _compared(tmp_path, U * s @ V.T, U * (s * g) @ V.T, top=10)
    assert target["left_cosine"] == pytest.approx([1] * 10, abs=1e-4)
    assert target["right_cosine"] == pytest.approx([1] * 10, abs=1e-4)
    assert sorted(target["in_place"][1:3]) == pytest.approx(sorted(factors), abs=1e-4)
    assert target["in_place"][7] == pytest.approx(-1, abs=1e-4)
    assert target["order_changes"] == sum(abs(s[0] * g[0]) < abs(s[i] * g[i]) for i in (1, 2)) + sum(
        abs(s[i] * g[i]) < s[j] for i in (1, 2) for j in range(3, 26)
    )


def test_values_that_become_equal(tmp_path: Path) -> None:
    U, s, V = _planted()
    g = torch.ones_like(s)
    g[3] = s[1] / s[3]
    target = _compared(tmp_path, U * s @ V.T, U * (s * g) @ V.T, top=10)
    assert target["left_cosine"] == pytest.approx([1] * 10, abs=1e-4)
    assert target["in_place"] == pytest.approx(g[:10].tolist(), abs=1e-4)
    assert target["order_changes"] == 1  # of 2 and 4 there is no order any more


def test_directions_that_turn_and_change_places(tmp_path: Path) -> None:
    """Known angles on both sides, in an order of its own."""
    U, s, V = _planted()
    angles = {0: (0.2, 0.1), 2: (0.3, 0.0), 4: (0.0, 0.4)}
    new_U, new_V, g = U.clone(), V.clone(), torch.ones_like(s)
    for i, (left, right) in angles.items():
        # Towards directions that are far down.
        for vectors, turned, angle in ((U, new_U, left), (V, new_V, right)):
            a, b = math.cos(angle), math.sin(angle)
            turned[:, i], turned[:, i + 30] = (
                a * vectors[:, i] + b * vectors[:, i + 30],
                a * vectors[:, i + 30] - b * vectors[:, i],
            )
    g[:6] = torch.tensor([0.6, 1.0, 1.4, 1.0, 1.5, 0.9], dtype=torch.float64)
    target = _compared(tmp_path, U * s @ V.T, new_U * (s * g) @ new_V.T, top=8)
    for i in range(6):
        left, right = angles.get(i, (0, 0))
        assert target["left_cosine"][i] == pytest.approx(math.cos(left), abs=1e-4)
        assert target["right_cosine"][i] == pytest.approx(math.cos(right), abs=1e-4)
    order = (-s * g).argsort().tolist()
    assert target["place"] == [order.index(i) + 1 for i in range(8)]
    truth = (U * (new_U * (s * g) @ new_V.T @ V)).sum(0) / s
    assert target["in_place"] == pytest.approx(truth[:8].tolist(), abs=1e-4)


def test_directions_that_leave_the_first_ones(tmp_path: Path) -> None:
    """One falls beyond those that are told, one beyond all that are computed, one is taken out."""
    U, s, V = _planted(120, 100)
    g = torch.ones_like(s)
    g[1], g[2], g[3] = s[15] / s[1] * 1.01, 1e-3, 0
    target = _compared(tmp_path, U * s @ V.T, U * (s * g) @ V.T, top=8)
    assert target["place"] == [1, 13, None, None, 2, 3, 4, 5]
    assert target["gone"] == [3, 4]
    told = [0, 1, 4, 5, 6, 7]
    for side in ("left_cosine", "right_cosine"):
        assert [target[side][i] for i in told] == pytest.approx([1] * 6, abs=1e-4)
        assert target[side][2:4] == [None, None]
    assert target["in_place"] == pytest.approx(g[:8].tolist(), abs=1e-5)
    assert target["new"] == []
    # Passed by all that are followed, but for those two that are not.
    assert target["order_changes"] == 11


def test_an_intruder_is_new_and_turns_nobody(tmp_path: Path) -> None:
    U, s, V = _planted(120, 100)
    m, n = _orthogonal(120, 120, 0), _orthogonal(100, 100, 5)
    x = m[:, 110] - U[:, :20] @ (U[:, :20].T @ m[:, 110])
    y = n[:, 50] - V[:, :20] @ (V[:, :20].T @ n[:, 50])
    update = 20 * torch.outer(x / x.norm(), y / y.norm())
    target = _compared(tmp_path, U * s @ V.T, U * s @ V.T + update, top=8)
    assert target["new"] == [1]
    assert target["place"] == [i + 2 for i in range(8)]
    assert target["order_changes"] == 0
    assert target["left_cosine"] == pytest.approx([1] * 8, abs=1e-3)
    assert target["in_place"] == pytest.approx([1] * 8, abs=1e-4)


def test_a_model_of_another_seed_has_nothing_of_the_first(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(96, 80, generator=generator) for _ in range(2))
    with pytest.warns(SurgeryWarning, match="has hardly anything in common with the original in 1 of 1 matrices"):
        target = _compared(tmp_path, a, b, top=8)
    assert len(target["new"]) >= R - 1
    assert max(value for value in target["left_cosine"] if value is not None) < 0.9
    assert target["order_changes"] == 0


@pytest.mark.parametrize("smaller", ["old", "new"])
def test_one_side_of_lower_rank(smaller: str, tmp_path: Path) -> None:
    U, s, V = _planted()
    low = (U[:, :3] * s[:3]) @ V[:, :3].T
    full = U * s @ V.T
    target = _compared(tmp_path, *((low, full) if smaller == "old" else (full, low)), top=8)
    assert target["place"][:3] == [1, 2, 3]
    assert target["left_cosine"][:3] == pytest.approx([1] * 3, abs=1e-4)
    assert target["left_cosine"][3:] == [None] * 5
    if smaller == "old":
        assert target["in_place"][3:] == [None] * 5
        assert target["new"] == [4]
    else:
        assert target["in_place"][3:] == pytest.approx([0] * 5, abs=1e-5)
        assert target["gone"] == [4]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4, 2.0, 1e3])
def test_assignment_against_networkx(noise: float) -> None:
    generator = np.random.default_rng(0)
    k = 40
    bases = [np.linalg.qr(generator.standard_normal((60, k)))[0] for _ in range(2)]
    order = generator.permutation(k)
    moved = [np.linalg.qr(base[:, order] + noise * generator.standard_normal(base.shape) / 8)[0] for base in bases]
    shares = in_common(*(base.T @ other for base, other in zip(bases, moved, strict=True)))
    found = assignment(shares)
    assert sorted(found) == list(range(k))
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, k + j, shares[i, j]) for i in range(k) for j in range(k))
    best = sum(shares[min(pair), max(pair) - k] for pair in networkx.max_weight_matching(graph, maxcardinality=True))
    assert shares[np.arange(k), found].sum() == pytest.approx(best, rel=1e-12)
    if noise < 0.2:
        assert found[order].tolist() == list(range(k))


def test_a_rescaling_of_an_fp8_model_turns_nothing(tmp_path: Path) -> None:
    """Its rounding mixes directions whose values are close: these have not turned."""

    def saved(folder: Path, weight: torch.Tensor) -> Path:
        unit = weight.abs().max().item() / 448
        stored = {NAME: (weight / unit).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.full((5, 4), unit)}
        folder.mkdir()
        save_file(stored, folder / "model.safetensors")
        quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        return folder

    U, s, V = _slow()
    g = torch.ones_like(s)
    g[:16] += 0.05 * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    base, tuned = saved(tmp_path / "a", U * s @ V.T), saved(tmp_path / "b", U * (s * g) @ V.T)
    (target,) = surgery.spectra(base, tuned, top=64).as_json()["targets"]
    told = [value for side in ("left_cosine", "right_cosine") for value in target[side] if value is not None]
    assert len(told) == 128
    assert min(told) > 0.95
    assert target["in_place"][:16] == pytest.approx(g[:16].tolist(), abs=0.03)
