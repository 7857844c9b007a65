"""Claims of others about fine-tuning, on changes of which the truth is known, and on a small model that was trained."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.demo.run import MODEL, load, prose
from surgery.progress import Silent
from tests.models import save_llama
from tests.releases import needs

NAME = "model.layers.0.mlp.up_proj.weight"
R, ROWS, COLUMNS = 8, 120, 100
HOLDS, IN_PART, DOES_NOT, UNKNOWN = "holds", "holds in part", "does not hold", "cannot be told"


def _orthogonal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))[0]


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _turn(seed: int, angle: float) -> torch.Tensor:
    """A rotation (COLUMNS, COLUMNS) that turns each vector by about an angle."""
    skew = _normal(seed, COLUMNS, COLUMNS)
    return torch.matrix_exp((skew - skew.T) * angle / math.sqrt(2 * COLUMNS))


U, V = _orthogonal(ROWS, COLUMNS, 0), _orthogonal(COLUMNS, COLUMNS, 1)
S = 10 * torch.arange(1, COLUMNS + 1, dtype=torch.float64) ** -0.5
W = U * S @ V.T


def _stored(folder: Path, weight: torch.Tensor, dtype: torch.dtype) -> Path:
    folder.mkdir()
    save_file({NAME: weight.to(dtype).contiguous()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _tried(
    folder: Path, new: torch.Tensor, *, old: torch.Tensor = W, top: int = 32, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of the one matrix, and the verdicts."""
    models = _stored(folder / "a", old, dtypes[0]), _stored(folder / "b", new, dtypes[-1])
    report = surgery.spectra(*models, top=top, subspace=R, device="cpu", progress=Silent()).as_json()
    (target,) = report["targets"]
    assert target["converged"]
    return target, {found["claim"]: found["verdict"] for found in report["findings"]["claims"]}


# ---- one factor for all values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_values_scaled(dtype: torch.dtype, tmp_path: Path) -> None:
    target, verdicts = _tried(tmp_path, 1.05 * W, dtypes=(dtype,))
    assert target["claims"]["scaling"] == {
        "factor": pytest.approx(1.05, abs=1e-4),
        "of_values": pytest.approx(1, abs=1e-4),
        "of_update": pytest.approx(1, abs=5e-3),
    }
    # Nothing turned by more than rounding turns it.
    assert target["claims"]["turning"] is None
    assert verdicts == {
        "top_amplified": HOLDS,
        "rest_intact": DOES_NOT,
        "top_turned": DOES_NOT,
        "scaled_uniformly": HOLDS,
        "turned_alike": UNKNOWN,
        "intruders": DOES_NOT,
        "off_principals": DOES_NOT,
    }


def test_only_the_top_scaled(tmp_path: Path) -> None:
    g = torch.ones_like(S)
    g[:R] = 1 + 0.02 * torch.arange(1, R + 1)
    target, verdicts = _tried(tmp_path, U * (S * g) @ V.T)
    old, new = (np.sort(values.numpy())[::-1][:32] for values in (S, S * g))
    factor = (old @ new) / (old @ old)
    assert target["claims"]["scaling"]["factor"] == pytest.approx(factor, rel=1e-5)
    explained = 1 - ((new - factor * old) ** 2).sum() / ((new - old) ** 2).sum()
    assert target["claims"]["scaling"]["of_values"] == pytest.approx(explained, abs=1e-4)
    D = U * (S * (g - 1)) @ V.T
    of_update = 1 - ((D - (factor - 1) * W).norm() / D.norm()).item() ** 2
    assert target["claims"]["scaling"]["of_update"] == pytest.approx(max(of_update, 0), abs=1e-3)
    assert (verdicts["top_amplified"], verdicts["rest_intact"], verdicts["top_turned"]) == (HOLDS, HOLDS, DOES_NOT)


def test_the_claims_of_a_top_that_grew_and_turned(tmp_path: Path) -> None:
    """The top directions turn towards ones far down, the others stay."""
    left, right = U.clone(), V.clone()
    for vectors, base in ((left, U), (right, V)):
        a, b = math.cos(0.6), math.sin(0.6)
        vectors[:, :R], vectors[:, -R:] = a * base[:, :R] + b * base[:, -R:], a * base[:, -R:] - b * base[:, :R]
    g = torch.ones_like(S)
    g[:R] = 1.05
    _, verdicts = _tried(tmp_path, left * (S * g) @ right.T)
    assert (verdicts["top_amplified"], verdicts["rest_intact"], verdicts["top_turned"]) == (HOLDS, HOLDS, HOLDS)


# ---- both sides turned alike


def _alike(left: torch.Tensor, right: torch.Tensor) -> float:
    """By the definition, of turns that are so small that each direction has become itself."""
    L, R_ = (turn[:R, : 4 * R].clone().fill_diagonal_(0) for turn in (left, right))
    return (2 * (L * R_).sum() / (L.square().sum() + R_.square().sum())).item()


def test_both_sides_turned_by_the_same_matrix(tmp_path: Path) -> None:
    Q = _turn(2, 0.3)
    target, verdicts = _tried(tmp_path, (U @ Q) * S @ (V @ Q).T)
    turning = target["claims"]["turning"]
    assert turning["alike"] == pytest.approx(1, abs=1e-3)
    sine = Q[:R, : 4 * R].clone().fill_diagonal_(0).norm().item() / math.sqrt(R)
    assert (turning["left"], turning["right"]) == (pytest.approx(sine, rel=1e-3), pytest.approx(sine, rel=1e-3))
    assert target["claims"]["scaling"] is None
    assert (verdicts["turned_alike"], verdicts["scaled_uniformly"]) == (HOLDS, UNKNOWN)


def test_each_side_turned_by_a_matrix_of_its_own(tmp_path: Path) -> None:
    left, right = _turn(2, 0.3), _turn(3, 0.3)
    target, verdicts = _tried(tmp_path, (U @ left) * S @ (V @ right).T)
    turning = target["claims"]["turning"]
    assert turning["alike"] == pytest.approx(_alike(left, right), abs=1e-3)
    assert abs(turning["alike"]) < 3 * turning["independent"]
    assert verdicts["turned_alike"] == DOES_NOT


def test_independent_turns_are_alike_by_as_much_as_is_said(tmp_path: Path) -> None:
    found = []
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        new = (U @ _turn(10 + seed, 0.2)) * S @ (V @ _turn(50 + seed, 0.2)).T
        found.append(_tried(tmp_path / str(seed), new)[0]["claims"]["turning"])
    scores = np.array([turning["alike"] / turning["independent"] for turning in found])
    assert np.abs(scores.mean()) < 3 / math.sqrt(8)
    assert 0.3 < scores.std() < 2


@pytest.mark.parametrize(("decay", "least", "most"), [("slow", 0.8, 1.0), ("steep", 0.0, 0.5)])
def test_a_random_update_turns_both_sides_as_alike_as_is_said(decay: str, least: float, most: float, tmp_path: Path) -> None:
    """Where values are close the two sides turn alike whatever the update is."""
    s = S if decay == "slow" else 10 * 0.5 ** torch.arange(COLUMNS, dtype=torch.float64).clamp(max=20)
    old = U * s @ V.T
    size = (0.03 if decay == "slow" else 1e-4) * old.norm() / math.sqrt(ROWS * COLUMNS)
    found = []
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        target, _ = _tried(tmp_path / str(seed), old + size * _normal(seed, ROWS, COLUMNS), old=old)
        found.append(target["claims"]["turning"])
    alike = np.mean([turning["alike"] for turning in found])
    assert alike == pytest.approx(np.mean([turning["random"] for turning in found]), abs=0.15)
    assert least < alike < most


def test_negative_factors_turn_nothing(tmp_path: Path) -> None:
    """A direction (u, -v) is the old one with another sign."""
    Q = _turn(2, 0.3)
    signs = torch.where(torch.arange(COLUMNS) % 3 == 0, -1.0, 1.0).double()
    target, verdicts = _tried(tmp_path, (U @ Q) * (S * signs) @ (V @ Q).T)
    assert target["claims"]["turning"]["alike"] == pytest.approx(1, abs=1e-3)
    assert verdicts["turned_alike"] == HOLDS


# ---- intruder dimensions


def test_a_planted_intruder(tmp_path: Path) -> None:
    x = _orthogonal(ROWS, ROWS, 5)[:, 0]
    x = x - U @ (U.T @ x)
    new = W + 20 * torch.outer(x / x.norm(), _orthogonal(COLUMNS, COLUMNS, 6)[:, 0])
    (tmp_path / "all").mkdir()
    target, verdicts = _tried(tmp_path / "all", new, top=COLUMNS)
    assert (target["new"], target["new_certain"], verdicts["intruders"]) == ([1], [1], HOLDS)
    # With a part of the base's directions it may be one of the others.
    (tmp_path / "some").mkdir()
    target, verdicts = _tried(tmp_path / "some", new)
    assert (target["new"], target["new_certain"], verdicts["intruders"]) == ([1], [], UNKNOWN)


def test_a_direction_from_beyond_what_was_computed_is_no_certain_intruder(tmp_path: Path) -> None:
    g = torch.ones_like(S)
    g[90] = 20 / S[90]
    for top, new, verdict in ((32, [1], UNKNOWN), (COLUMNS, [], DOES_NOT)):
        (tmp_path / str(top)).mkdir()
        target, verdicts = _tried(tmp_path / str(top), U * (S * g) @ V.T, top=top)
        assert (target["new"], target["new_certain"], verdicts["intruders"]) == (new, [], verdict)


def test_an_intruder_among_known_directions_is_certain(tmp_path: Path) -> None:
    """A mixture of nine of the base's left vectors has a cosine of 1/3 with each: none is it, computed or not."""
    x = U[:, 10:19].sum(dim=1) / 3
    target, verdicts = _tried(tmp_path, W + 20 * torch.outer(x, V[:, 60]))
    assert (target["new"], target["new_certain"], verdicts["intruders"]) == ([1], [1], HOLDS)


# ---- on and off the principal directions


@pytest.mark.parametrize(("where", "verdict"), [("inside", DOES_NOT), ("outside", HOLDS), ("anywhere", DOES_NOT)])
def test_where_the_update_lies(where: str, verdict: str, tmp_path: Path) -> None:
    P, Q, D = U[:, :R], V[:, :R], _normal(4, ROWS, COLUMNS)
    if where == "inside":
        D = P @ (P.T @ D @ Q) @ Q.T
    elif where == "outside":
        D = D - P @ (P.T @ D)
        D = D - D @ Q @ Q.T
    target, verdicts = _tried(tmp_path, W + D * (0.01 * W.norm() / D.norm()))
    update, chance = target["update"], 1 - (1 - R / ROWS) * (1 - R / COLUMNS)
    either = update["in_left"] + update["in_right"] - update["in_both"]
    assert either == pytest.approx({"inside": 1, "outside": 0, "anywhere": chance}[where], abs=0.02)
    assert verdicts["off_principals"] == verdict


# ---- nothing but rounding


@pytest.mark.parametrize("turned", [False, True])
def test_rounding_says_nothing(turned: bool, tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float32) if turned else (torch.float32, torch.bfloat16)
    target, verdicts = _tried(tmp_path, W, dtypes=dtypes)
    assert target["claims"]["rounding"] > 0.5
    assert target["claims"]["scaling"] is None
    assert set(verdicts.values()) == {UNKNOWN}


def test_no_change_has_no_figures(tmp_path: Path) -> None:
    target, verdicts = _tried(tmp_path, W)
    assert target["claims"] == {"rounding": None, "scaling": None, "turning": None}
    assert set(verdicts.values()) == {UNKNOWN}


# ---- a model that was trained


def test_a_real_fine_tune_against_numpy(tmp_path: Path) -> None:
    """All by the definitions, from full SVDs."""
    model, (text, _) = load(MODEL), prose()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        ids = text[torch.randint(len(text) - 64, (8, 1), generator=generator) + torch.arange(64)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    names = ["*layers.0.mlp.up_proj*", "*layers.2.self_attn.[qv]_proj*", "*layers.3.mlp.down_proj*"]
    report = surgery.spectra(MODEL, tmp_path / "tuned", include=names, device="cpu").as_json()
    stored = [{name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}
              for folder in (MODEL, tmp_path / "tuned")]  # fmt: skip
    r, k = report["options"]["subspace"], report["options"]["top"]
    assert len(report["targets"]) == 4
    followed = 0
    for target in report["targets"]:
        old, new = (weights[target["tensor"]].double().numpy() for weights in stored)
        (X, s, Yh), (X2, s2, Yh2) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (old, new))
        left, right = np.abs(X.T @ X2), np.abs(Yh @ Yh2.T)
        assert len(target["new"]) == len(target["new_certain"]) == (left.max(axis=0)[:r] < 0.5).sum()
        s, s2 = s[:k], s2[:k]
        factor = (s @ s2) / (s @ s)
        scaling = target["claims"]["scaling"]
        assert scaling["factor"] == pytest.approx(factor, rel=1e-4)
        of_values = 1 - ((s2 - factor * s) ** 2).sum() / ((s2 - s) ** 2).sum()
        assert scaling["of_values"] == pytest.approx(of_values, abs=1e-2)
        signs = np.sign((X.T @ X2) * (Yh @ Yh2.T))
        match = (left**2 + right**2).argmax(axis=1)[:r]
        if len(set(match)) < r:
            continue  # with two that became one the best assignment is less plain
        followed += 1
        inside = np.ones((r, 4 * r), dtype=bool)
        inside[np.arange(r)[match < 4 * r], match[match < 4 * r]] = False
        L, R_ = (np.where(inside, part[:r, : 4 * r], 0) for part in (left, right * signs))
        alike = 2 * (L * R_).sum() / ((L**2).sum() + (R_**2).sum())
        assert target["claims"]["turning"]["alike"] == pytest.approx(alike, abs=0.05)
    assert followed >= 2
    verdicts = {found["claim"]: found["verdict"] for found in report["findings"]["claims"]}
    assert verdicts["turned_alike"] == HOLDS
    assert verdicts["intruders"] == DOES_NOT


@needs("peft", ">=0.21", "reduce_intruder_dimension")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_intruders_of_lora_as_peft_counts_them(tmp_path: Path) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    base = save_llama(tmp_path / "base", torch.float32)
    model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for i, module in enumerate(part for part in model.modules() if isinstance(part, peft.tuners.lora.Linear)):
            generator = torch.Generator().manual_seed(i)
            weight = module.lora_B["default"].weight
            # From an update that shows nowhere to one that is larger than all else.
            weight.copy_((0.02, 0.3, 1.0, 3.0)[i % 4] * torch.randn(weight.shape, generator=generator))
    said: list[str] = []
    reduce_intruder_dimension(model, top_k=R, threshold_epsilon=0.5, logging_sink=said.append)
    found = (re.fullmatch(r"base_model\.model\.(.+): (?:No intruders|Intruders: (\d+))", line) for line in said)
    counted = {f"{line[1]}.weight": int(line[2] or 0) for line in found if line}
    assert len(counted) == 4
    model.set_adapter("default")
    model.merge_and_unload(adapter_names=["default"]).save_pretrained(tmp_path / "tuned")
    report = surgery.spectra(base, tmp_path / "tuned", subspace=R, include=list(counted), device="cpu", progress=Silent())
    assert {target["tensor"]: len(target["new"]) for target in report.targets} == counted
    assert {target["tensor"]: len(target["new_certain"]) for target in report.targets} == counted
    assert 0 in counted.values()
    assert sum(counted.values()) >= 3
