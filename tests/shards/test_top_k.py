"""Whether the kept values are the largest, from factorize to the manifest, and from there to inspect and verify."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError, OptionError, OutputError, SurgeryWarning
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.top_k_records import NOT_ON_RECORD, TopKRecord, TopKSummary
from surgery.linalg.svd import TruncatedSVD, truncated_svd
from surgery.linalg.top_k import TopK
from surgery.planning import estimate
from surgery.progress import Silent
from surgery.shards import matrices
from surgery.solvers.triplets import residuals_of
from tests.linalg.test_proof import _hiding
from tests.models import files_of, realistic, tensors_of
from tests.sealing import MANIFEST, edited_manifest

K = 4
#: Made in each way that a target can be seen and written -> whether its weights are in the model that it was made from.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "residual": ({"rank": K}, False),
    "overlay": ({"rank": K, "layout": "overlay"}, True),
    "no correction": ({"rank": K, "correction": False}, True),
    "energy": ({"energy": 0.5, "max_rank": 20}, False),
}


def _model(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "other"}')
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices for each of the solvers, a stack, a convolution, and one of zeros."""
    tensors = {
        "layers.0.small.weight": realistic(40, 60, seed=1),
        "layers.0.middle.weight": realistic(120, 90, seed=2).bfloat16(),
        "layers.0.large.weight": realistic(560, 640, seed=3).bfloat16(),
        "layers.0.zeros.weight": torch.zeros(24, 32),
        "layers.0.experts.up": torch.stack([realistic(70, 80, seed=seed) for seed in range(3)]).half(),
        "layers.0.conv.weight": realistic(16, 6 * 3 * 3, seed=4).reshape(16, 6, 3, 3),
    }
    return _model(tmp_path_factory.mktemp("top k") / "m", tensors)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, proven in each way."""
    root = tmp_path_factory.mktemp("proven")
    for name, (options, _) in WAYS.items():
        surgery.factorize(model, root / name, include=["*"], prove=True, device="cpu", progress=Silent(), **options)
    return root


def _matrices(target: TargetRecord, folder: Path) -> torch.Tensor:
    """(B, m, n), float64, of the model."""
    tensor = tensors_of(folder)[target.tensor]
    return tensor.double().reshape(target.matrices)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_proven_is_so_by_lapack(way: str, made: Path, model: Path) -> None:
    """Of each matrix of each kind: as many values as there are above s_k + margin s_1 have been kept."""
    manifest = Manifest.read(made / way)
    assert manifest.options.prove
    assert {target.view for target in manifest.targets} == {"matrix", "stack", "convolution"}
    for target in manifest.targets:
        assert len(target.top_k) == target.matrices[0]
        factors = load_file(made / way / "surgery/factors-00001-of-00001.safetensors")[f"{target.key}.s"]
        for matrix, known, s in zip(_matrices(target, model), target.top_k, factors.reshape(-1, target.rank), strict=True):
            assert known.verdict == "proven"
            assert known.chance == 0
            assert known.margin is not None
            true = torch.linalg.svdvals(matrix)
            limit = s[-1].item() + known.margin * s[0].item()
            assert int((true > limit).sum()) <= target.rank
            assert known.margin <= 0.01


def test_a_plain_run_says_less_and_has_the_same_factors(made: Path, model: Path, tmp_path: Path) -> None:
    report = surgery.factorize(model, tmp_path / "f", rank=K, include=["*"], device="cpu", progress=Silent())
    proven = Manifest.read(made / "residual")
    assert report.fingerprint == proven.fingerprint
    assert not report.manifest.options.prove
    assert b'"prove"' not in (tmp_path / "f" / MANIFEST).read_bytes()
    assert report.top_k.proven < 8 == TopKSummary.of(("", one) for t in proven.targets for one in t.top_k).proven
    there, here = files_of(made / "residual"), files_of(tmp_path / "f")
    assert {name for name in there if there[name] != here[name]} == {MANIFEST}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prove", [False, True])
def test_verify_finds_nothing_wrong(way: str, prove: bool, made: Path, model: Path) -> None:
    base = model if WAYS[way][1] else None
    report = surgery.verify(made / way, base=base, prove=prove, device="cpu")
    assert report.ok, report.failures
    assert report.top_k is not None
    assert report.top_k.proven + report.top_k.likely + report.top_k.unknown == 8
    if prove:
        assert report.top_k.proven == 8
        assert report.top_k.margin is not None
        assert report.top_k.margin < 0.01


def test_a_proof_needs_the_weights(made: Path) -> None:
    with pytest.raises(OptionError, match="contradict each other"):
        surgery.verify(made / "residual", prove=True, fast=True)
    for way in ("overlay", "no correction"):
        with pytest.raises(OptionError, match="a proof needs the weights"):
            surgery.verify(made / way, prove=True)


def test_another_value_is_another_run(made: Path, model: Path, llama: Path, tmp_path: Path) -> None:
    """A complete result is left alone, an unfinished one is not gone on with; each says what differs."""
    shutil.copytree(made / "residual", tmp_path / "f")
    options: dict[str, Any] = {"rank": K, "include": ["*"], "device": "cpu"}
    with pytest.raises(OutputError, match="complete result of another run") as caught:
        surgery.factorize(model, tmp_path / "f", **options)
    assert "prove" in str(caught.value.got)
    surgery.factorize(model, tmp_path / "f", **options, prove=True, progress=Silent())

    class Stop(Silent):
        def item(self, name: str) -> None:
            if name == "model.layers.1.mlp.down_proj.weight":
                raise KeyboardInterrupt

    stop: Any = Stop()
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, tmp_path / "g", prove=True, progress=stop)
    with pytest.raises(OutputError, match="unfinished run of another kind") as caught:
        surgery.factorize(llama, tmp_path / "g")
    assert "prove" in str(caught.value.got)
    surgery.factorize(llama, tmp_path / "g", prove=True, progress=Silent())
    surgery.factorize(llama, tmp_path / "h", prove=True, progress=Silent())
    assert files_of(tmp_path / "g") == files_of(tmp_path / "h")


def test_the_plan_counts_the_proof(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory, and the time that is told."""
    plain, proven = (surgery.plan(model, rank=K, include=["*large*"], prove=prove, device="cpu") for prove in (False, True))
    assert proven.memory.peak_bytes >= plain.memory.peak_bytes + 8 * 560**2
    command = ["factorize", str(model), "--include", "*large*", "--dry-run"]
    told = [json.loads(CliRunner().invoke(main, [*command, "--json", *more]).stdout) for more in ([], ["--prove"])]
    assert [one["prove"] for one in told] == [False, True]
    assert "with a proof" in CliRunner().invoke(main, [*command, "--prove"]).stdout
    monkeypatch.setattr(estimate, "_product_rate", lambda _: 1e10)  # which is measured, and never twice the same
    times = [estimate.estimate_seconds(one, torch.device("cpu")) for one in (plain, proven)]
    assert times[0] < times[1] < 10 * times[0]


def _missing_the_first(A: torch.Tensor, k: int) -> TruncatedSVD:
    """Triplets 2 to k + 1, as exact as can be. Their certificate says nothing false but that they are the first."""
    U, s, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    U, s, V = U[:, 1 : k + 1].float(), s[1 : k + 1].float(), Vh[1 : k + 1].T.float().contiguous()
    honest = truncated_svd(A, k)
    certificate = dataclasses.replace(
        honest.certificate,
        residual=residuals_of(A, U, s, V),
        gap=torch.zeros(k, dtype=torch.float64),
        angle_bound=torch.ones(k, dtype=torch.float64),
        top_k=TopK("proven", 1e-3, 0.0),
    )
    return dataclasses.replace(honest, U=U.contiguous(), s=s, V=V, certificate=certificate)


@pytest.mark.parametrize("layout", ["residual", "overlay"])
@pytest.mark.parametrize("shape", [(40, 60), (120, 90), (560, 640)])
def test_forged_factors_do_not_pass(
    shape: tuple[int, int], layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whole in itself, with every hash and figure right, which lacks the largest direction."""
    folder = _model(tmp_path / "m", {"layers.0.up.weight": realistic(*shape, seed=5).bfloat16()})
    monkeypatch.setattr(matrices, "truncated_svd", lambda A, k, **_: _missing_the_first(A.float(), k))
    out = tmp_path / "f"
    forged = surgery.factorize(folder, out, rank=K, layout=layout, include=["*"], device="cpu", progress=Silent())
    monkeypatch.undo()
    assert forged.top_k.proven == 1
    true = torch.linalg.svdvals(tensors_of(folder)["layers.0.up.weight"].double())
    assert forged.manifest.targets[0].s_first == pytest.approx(true[1].item(), rel=1e-5)
    base = folder if layout == "overlay" else None
    for prove in (False, True):
        report = surgery.verify(out, base=base, prove=prove, device="cpu")
        assert [failure.check for failure in report.failures] == ["no larger singular value"]
        (failure,) = report.failures
        # What was found is a lower bound of the value that is missing.
        assert true[K].item() < float(failure.got) <= true[0].item() * (1 + 1e-6)
        assert float(failure.expected.removeprefix("at most ")) == pytest.approx(true[K].item(), rel=2e-3)
    done = CliRunner().invoke(main, ["verify", str(out), *(["--base", str(base)] if base else []), "--device", "cpu"])
    assert done.exit_code == 3
    assert "no larger singular value" in done.stdout


def test_a_model_made_around_the_start_rows(tmp_path: Path) -> None:
    """It fools a plain run, whose result verify refuses; with a proof it is factorized right."""
    weight, values = _hiding((384, 400), 12, dtype=torch.float32)
    folder = _model(tmp_path / "m", {"layers.0.up.weight": weight})
    options: dict[str, Any] = {"rank": K, "include": ["*"], "device": "cpu"}
    fooled = surgery.factorize(folder, tmp_path / "f", **options)
    assert fooled.manifest.targets[0].s_first == pytest.approx(1.0, abs=1e-5)
    failures = {failure.check: failure for failure in surgery.verify(tmp_path / "f", device="cpu").failures}
    assert failures.keys() == {"no larger singular value", "gap"}  # which is that to the hidden one
    assert float(failures["no larger singular value"].got) == pytest.approx(values[0].item(), rel=0.03)
    right = surgery.factorize(folder, tmp_path / "g", **options, prove=True)
    assert right.top_k.proven == 1
    assert right.manifest.targets[0].s_first == pytest.approx(values[0].item(), abs=1e-5)
    for prove in (False, True):
        assert surgery.verify(tmp_path / "g", prove=prove, device="cpu").ok
    assert not surgery.verify(tmp_path / "f", prove=True, device="cpu").ok


def test_what_is_not_proven_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note names the worst; the report and the manifest have it."""
    found = [TopK("likely", 0.02, 1e-6), TopK("unknown", float("inf"), 1.0), TopK("proven", 1e-3, 0.0)]
    names = [f"layers.{i}.up.weight" for i in range(3)]
    folder = _model(tmp_path / "m", {name: realistic(20 + i, 30, seed=i) for i, name in enumerate(names)})

    def solved(A: torch.Tensor, k: int, **_: Any) -> TruncatedSVD:
        svd = truncated_svd(A, k)
        return dataclasses.replace(svd, certificate=dataclasses.replace(svd.certificate, top_k=found[len(A) - 20]))

    monkeypatch.setattr(matrices, "truncated_svd", solved)
    with pytest.warns(SurgeryWarning, match="for 2 of 3 targets it is not proven") as told:
        report = surgery.factorize(folder, tmp_path / "f", rank=2, include=["*"], prove=True, device="cpu")
    assert f"{names[1]} (unknown), {names[0]} (likely 2.00e-02)." in str(told[0].message)
    assert report.top_k == TopKSummary(proven=1, likely=1, unknown=1, margin=0.02, margin_in=names[0])
    assert [target.worst_top_k.verdict for target in report.manifest.targets] == ["likely", "unknown", "proven"]
    surgery.factorize(
        folder, tmp_path / "plain", rank=2, include=["*"], device="cpu"
    )  # no warning where no proof was asked for


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_inspect_tells_it(width: int, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = CliRunner().invoke(main, ["inspect", str(made / "residual")], catch_exceptions=False)
    assert all(len(line) <= width for line in done.stdout.splitlines())
    assert "largest" in done.stdout
    assert done.stdout.count("proven ") >= 6
    told = " ".join(done.stdout.split())
    assert "no larger singular value missed: proven for 8, within" in told
    found = json.loads(CliRunner().invoke(main, ["inspect", str(made / "residual"), "--json"]).stdout)
    assert found["top_k"]["proven"] == 8
    assert {(target["top_k"], target["chance"]) for target in found["targets"]} == {("proven", 0.0)}
    assert max(target["margin"] for target in found["targets"]) == found["top_k"]["margin"]


#: Entries that no factorization writes.
ODD: dict[str, dict[str, Any]] = {
    "another verdict": {"verdict": "certain", "margin": 0.1, "chance": 0.0},
    "a proof with a chance": {"verdict": "proven", "margin": 0.1, "chance": 1e-6},
    "a proof without a margin": {"verdict": "proven", "margin": None, "chance": 0.0},
    "a negative margin": {"verdict": "proven", "margin": -1e-9, "chance": 0.0},
    "no number": {"verdict": "proven", "margin": float("nan"), "chance": 0.0},
    "an infinite margin": {"verdict": "likely", "margin": float("inf"), "chance": 1e-6},
    "likely without a chance": {"verdict": "likely", "margin": 0.1, "chance": 0.0},
    "a chance above 1": {"verdict": "likely", "margin": 0.1, "chance": 1.5},
    "a chance that is no number": {"verdict": "likely", "margin": 0.1, "chance": float("nan")},
    "a margin of the unknown": {"verdict": "unknown", "margin": 0.1, "chance": 1.0},
    "a chance of the unknown": {"verdict": "unknown", "margin": None, "chance": 0.5},
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_records_are_refused(odd: str, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "overlay", tmp_path / "f"))
    with edited_manifest(folder) as manifest:
        manifest["targets"][-1]["certificates"][-1]["top_k"] = ODD[odd]
    with pytest.raises(FormatError, match=r"the top_k of .* makes no sense"):
        surgery.inspect(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"verdict": "proven", "margin": 0.1},
        {"verdict": "proven", "margin": 0.1, "chance": 0, "x": 1},
        {"verdict": 1, "margin": 0.1, "chance": 0},
        {"verdict": "proven", "margin": "0.1", "chance": 0},
        ["proven", 0.1, 0],
    ],
)
def test_records_of_another_shape_are_refused(wrong: Any, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "overlay", tmp_path / "f"))
    with edited_manifest(folder) as manifest:
        manifest["targets"][0]["certificates"][0]["top_k"] = wrong
    with pytest.raises(FormatError, match="top_k"):
        surgery.inspect(folder)


def _without(certificate: dict[str, Any]) -> None:
    del certificate["top_k"]


def _as_null(certificate: dict[str, Any]) -> None:
    certificate["top_k"] = None


@pytest.mark.parametrize("change", [_without, _as_null])
def test_nothing_on_record_is_unknown(change: Callable[[dict[str, Any]], None], made: Path, tmp_path: Path) -> None:
    """As in what earlier versions wrote; verify measures it all the same."""
    folder = Path(shutil.copytree(made / "residual", tmp_path / "f"))
    with edited_manifest(folder) as manifest:
        for target in manifest["targets"]:
            for certificate in target["certificates"]:
                change(certificate)
        del manifest["options"]["prove"]
    report = surgery.inspect(folder)
    assert report.top_k == TopKSummary(proven=0, likely=0, unknown=8, margin=None, margin_in=None)
    assert not report.manifest.options.prove
    verified = surgery.verify(folder, prove=True, device="cpu")
    assert verified.ok
    assert verified.top_k is not None
    assert verified.top_k.proven == 8


def test_margins_are_rounded_up() -> None:
    for margin in (1e-3, 1.0004e-3, 0.0123456, 9.996e-7, 1 / 3, 0.0, 7.0, 123.4):
        known = TopKRecord.of(TopK("proven", margin, 0.0))
        assert known.margin is not None
        assert margin <= known.margin <= margin * 1.0101
        assert known.margin == float(f"{known.margin:.3g}")
        assert known.makes_sense
    assert TopKRecord.of(TopK("proven", 1e-3, 0.0)).margin == 1e-3
    assert TopKRecord.of(TopK("unknown", float("inf"), 1.0)) == NOT_ON_RECORD
    assert NOT_ON_RECORD.makes_sense
