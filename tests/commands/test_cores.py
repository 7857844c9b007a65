"""Cores wherever a command makes, means, shows or tells of them: against NumPy in float64, and against what scales give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import OutputError, ScalesError, SurgeryWarning
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import read_scales, read_trained
from surgery.format.scales.writing import write_scales
from surgery.progress import Silent
from tests.models import files_of, tensors_of

SCALES = "surgery/scales.safetensors"
FINGERPRINT = "0123456789abcdef" * 4
Tensors = dict[str, torch.Tensor]
#: Of a matrix, a slice and a stack.
SHAPES = {"layers.0.q.weight": (5,), "layers.0.qkv.weight[v]": (4,), "layers.0.experts.up": (3, 4)}


def _scales(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: 1 + 0.3 * torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def _cores(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: (*shape, shape[-1]) for key, shape in SHAPES.items()}
    return {key: torch.eye(shape[-1]) + 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def _owner(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["surgery"])


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def _random_cores(manifest: Manifest, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        target.key: torch.eye(target.rank) + 0.2 * torch.randn(target.shape_of("core"), generator=generator)
        for target in manifest.targets
    }


# -- untouched files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factorized stack of 6 and a matrix, at rank 3, as cores; and the model beside it."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "m").mkdir()
    save_file(
        {"layers.0.experts.up": torch.randn(6, 20, 16), "layers.0.q.weight": torch.randn(16, 16)}, folder / "m/a.safetensors"
    )
    surgery.factorize(folder / "m", folder / "f", rank=3, train="core")
    return folder


def test_factorize_writes_cores_beside_the_same_factors(experts: Path, tmp_path: Path) -> None:
    report = surgery.factorize(experts / "m", tmp_path / "f", rank=3)
    ours, cores = files_of(tmp_path / "f"), files_of(experts / "f")
    assert {name for name in ours if ours[name] != cores[name]} == {SCALES}
    assert ours.keys() == cores.keys()
    found = load_file(experts / "f" / SCALES)
    assert {key: value.tolist() for key, value in found.items()} == {
        "layers.0.experts.up": [np.eye(3).tolist()] * 6,
        "layers.0.q.weight": np.eye(3).tolist(),
    }
    assert _owner(experts / "f" / SCALES) == {"format_version": 1, "fingerprint": report.fingerprint, "train": "core"}
    assert surgery.verify(experts / "f").ok
    surgery.fold(experts / "f", experts / "f" / SCALES, tmp_path / "o")
    assert files_of(tmp_path / "o") == files_of(experts / "m")
    inspected = surgery.inspect(experts / "f")
    assert (inspected.train, inspected.trainable) == ("core", 7 * 9)
    assert (report.train, report.trainable, surgery.inspect(tmp_path / "f").train) == ("scales", 7 * 3, "scales")
    planned = [surgery.plan(experts / "m", rank=3, train=train) for train in ("scales", "core")]  # type: ignore[arg-type]
    assert [one.trainable for one in planned] == [21, 63]
    assert planned[1].bytes_written - planned[0].bytes_written == 4 * 63


def test_new_scales_are_those_that_factorize_writes(experts: Path, tmp_path: Path) -> None:
    surgery.factorize(experts / "m", tmp_path / "f", rank=3)
    for train, folder in (("scales", tmp_path / "f"), ("core", experts / "f")):
        report = surgery.new_scales(experts / "f", tmp_path / train, train=train)  # type: ignore[arg-type]
        assert (tmp_path / train).read_bytes() == (folder / SCALES).read_bytes()
        assert (report.train, report.targets) == (train, 2)
        assert report.trainable == sum(value.numel() for value in load_file(tmp_path / train).values())
        assert report.fingerprint == Manifest.read(folder).fingerprint
    with pytest.raises(OutputError, match="is there already"):
        surgery.new_scales(experts / "f", tmp_path / "core")
    surgery.new_scales(experts / "f", tmp_path / "core", overwrite=True)
    assert (tmp_path / "core").read_bytes() == (tmp_path / "scales").read_bytes()
    with pytest.raises(OutputError, match="lies in one"):
        surgery.new_scales(tmp_path / "f", tmp_path / "f/mine.safetensors")
    surgery.new_scales(tmp_path / "f", tmp_path / "f" / SCALES, train="core", overwrite=True)
    assert surgery.inspect(tmp_path / "f").train == "core"


def test_a_complete_result_of_the_other_kind(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    manifest = surgery.factorize(llama, out, rank=3).manifest
    before = files_of(out)
    said = Silent()
    report = surgery.factorize(llama, out, rank=3, train="core", progress=said)
    assert report.trainable == 14 * 9
    assert [note for note in said.notes if "was untouched, and now holds untouched cores" in note]
    assert read_trained(out / SCALES, manifest).train == "core"
    with pytest.warns(SurgeryWarning) as caught:
        surgery.factorize(llama, out, rank=3, train="core")
    assert [str(warning.message) for warning in caught] == [f"{out} is already complete: nothing to do"]
    surgery.factorize(llama, out, rank=3, progress=Silent())
    assert files_of(out) == before
    # What has been trained is not lost: numbers of either kind, and a choice of directions.
    ones, halves = load_file(out / SCALES), torch.tensor([1, 0, 1], dtype=torch.uint8)
    write_scales(out / "trained", ones | {max(ones): torch.tensor([1.0, 1.0, 1 + 2**-23])}, manifest.fingerprint)
    write_scales(out / "chosen", ones, manifest.fingerprint, "scales", {"chosen": dict.fromkeys(ones, halves)})
    write_scales(out / "cores", _random_cores(manifest), manifest.fingerprint, "core")
    for name, asked, said_of in (("trained", "core", "scales"), ("chosen", "core", "scales"), ("cores", "scales", "cores")):
        shutil.copy(out / name, out / SCALES)
        there = files_of(out)
        with pytest.raises(OutputError, match=f"holds {said_of} that have been trained") as raised:
            surgery.factorize(llama, out, rank=3, train=asked, progress=Silent())  # type: ignore[arg-type]
        assert f"surgery scales new {out} --train {asked} -o FILE" in str(raised.value)
        assert files_of(out) == there


def test_an_interrupted_run_goes_on_as_the_other_kind(llama: Path, tmp_path: Path) -> None:
    """What is trained is no part of what a run is: the shards are taken as they are."""

    class Stop(Silent):
        def start(self, label: str, total_bytes: int) -> None:
            if label == "copying":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(llama, tmp_path / "f", rank=3, progress=Stop())
    said = Silent()
    surgery.factorize(llama, tmp_path / "f", rank=3, train="core", progress=said)
    assert said.notes == ["continuing after 3 of 3 shards"]
    assert surgery.inspect(tmp_path / "f").train == "core"


def test_a_scales_file_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    """inspect tells what the manifest says, and that nothing is known of the file; repair writes scales where it is missing."""
    surgery.factorize(llama, tmp_path / "f", rank=3, train="core")
    for spoil in (lambda path: path.write_bytes(b"nothing"), lambda path: path.unlink()):
        spoil(tmp_path / "f" / SCALES)
        found = surgery.inspect(tmp_path / "f")
        assert (found.train, found.trainable) == (None, 14 * 3)
    done = surgery.verify(tmp_path / "f", base=llama, repair=True, fast=True, progress=(said := Silent()))
    assert (done.ok, done.repaired) == (True, (SCALES,))
    assert any("scales that are all 1" in note for note in said.notes)
    assert surgery.inspect(tmp_path / "f").train == "scales"


def test_what_the_commands_say(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = _run("factorize", llama, "--rank", 4, "--train", "core", "-o", "f")
    assert "14 matrices at rank 4, 224 trainable numbers in cores, " in done.stderr
    assert 'train with surgery.attach(model, "f", train="core"), then: surgery fold f scales.safetensors' in done.stderr
    assert "14 targets, 224 trainable numbers in cores, " in _run("inspect", "f").stdout
    assert "14 targets, 224 trainable numbers in cores; " in _run("plan", llama, "--rank", 4, "--train", "core").stdout
    assert _run("factorize", llama, "--rank", 4, "--train", "core", "--dry-run").stdout.count("224 trainable numbers") == 1
    assert _run("factorize", llama, "--train", "cores").exit_code == 2
    done = _run("scales", "new", "f", "--train", "core")
    assert done.stderr == "scales.safetensors: 224 trainable numbers in cores, 14 targets, untouched\n"
    assert _run("scales", "new", "f").exit_code == 1
    assert _run("scales", "new", "f", "-o", "ones").stderr == "ones: 56 trainable scales, 14 targets, untouched\n"
    assert json.loads(_run("scales", "new", "f", "-o", "more", "--json").stdout)["trainable"] == 56
    done = _run("fold", "f", "scales.safetensors")
    assert "the original weights, byte for byte" in done.stderr
    write_scales(Path("cores"), _random_cores(Manifest.read("f")), Manifest.read("f").fingerprint, "core")
    done = _run("blend", "cores", "ones", "-o", "mean")
    assert done.stderr == (
        "mean: 224 of 224 numbers in the cores of 14 targets differ from the identity; weights 0.5, 0.5, linear mean\n"
    )


# -- means -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1.5, -0.25, -0.5]])
@pytest.mark.parametrize("mixed", [(), (0,), (1, 2)])
def test_means_of_cores(mixed: tuple[int, ...], weights: list[float], tmp_path: Path) -> None:
    """Linear, by NumPy; scales among them are diagonal cores."""
    expected = {key: np.zeros((*shape, shape[-1])) for key, shape in SHAPES.items()}
    for seed, weight in enumerate(weights):
        values, train = (_scales(seed), "scales") if seed in mixed else (_cores(seed), "core")
        write_scales(tmp_path / f"{seed}", values, FINGERPRINT, train)  # type: ignore[arg-type]
        for key, value in values.items():
            wide = value.double().numpy()
            expected[key] += weight / sum(weights) * (wide[..., None] * np.eye(wide.shape[-1]) if seed in mixed else wide)
    report = surgery.blend([tmp_path / f"{seed}" for seed in range(3)], tmp_path / "out", weights=weights)
    for key, value in load_file(tmp_path / "out").items():
        assert np.allclose(value.numpy(), expected[key], rtol=2e-7, atol=1e-7)
    assert (report.train, report.trainable, report.changed) == ("core", 25 + 16 + 48, 25 + 16 + 48)
    assert _owner(tmp_path / "out") == {"format_version": 1, "fingerprint": FINGERPRINT, "train": "core"}


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_mean_of_the_same_cores_is_the_same(count: int, tmp_path: Path) -> None:
    """Bit for bit; what is untouched in all of them stays so. Nothing is kept for a training."""
    values = _cores(1)
    values["layers.0.q.weight"] = torch.eye(5)
    write_scales(tmp_path / "one", values, FINGERPRINT, "core")
    write_scales(
        tmp_path / "s", values, FINGERPRINT, "core", {"chosen": {"layers.0.q.weight": torch.ones(5, dtype=torch.uint8)}}
    )
    surgery.blend([tmp_path / "s"] * count, tmp_path / "out", weights=[0.1 * (1 + i) for i in range(count)])
    assert (tmp_path / "out").read_bytes() == (tmp_path / "one").read_bytes()


def test_cores_have_no_geometric_mean(tmp_path: Path) -> None:
    write_scales(tmp_path / "c", _cores(0), FINGERPRINT, "core")
    write_scales(tmp_path / "s", _scales(0), FINGERPRINT)
    for files in (["c"], ["s", "c"]):
        with pytest.raises(ScalesError, match="c holds cores, of which there is no geometric mean") as caught:
            surgery.blend([tmp_path / name for name in files], tmp_path / "out", space="log")
        assert caught.value.hint == "blend in linear space"
    assert not (tmp_path / "out").exists()


def test_cores_and_scales_of_other_ranks(tmp_path: Path) -> None:
    write_scales(tmp_path / "c", _cores(0) | {"layers.0.q.weight": torch.eye(6)}, FINGERPRINT, "core")
    write_scales(tmp_path / "s", _scales(0), FINGERPRINT)
    with pytest.raises(ScalesError, match=r"'layers\.0\.q\.weight' has another shape"):
        surgery.blend([tmp_path / "s", tmp_path / "c"], tmp_path / "out")


def test_a_blend_of_cores_is_folded_as_the_mean_of_the_folds(llama: Path, tmp_path: Path) -> None:
    """Of cores and scales; up to rounding to bfloat16."""
    manifest = surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu").manifest
    generator = torch.Generator().manual_seed(1)
    scales = {target.key: 1 + 0.5 * torch.randn(target.scales_shape, generator=generator) for target in manifest.targets}
    write_scales(tmp_path / "0", _random_cores(manifest), manifest.fingerprint, "core")
    write_scales(tmp_path / "1", scales, manifest.fingerprint)
    surgery.blend([tmp_path / "0", tmp_path / "1"], tmp_path / "blended", weights=[0.25, 0.75])
    for name in ("0", "1", "blended"):
        surgery.fold(tmp_path / "f", tmp_path / name, tmp_path / f"folded {name}", device="cpu", rounding="nearest")
    one, other, both = (tensors_of(tmp_path / f"folded {name}") for name in ("0", "1", "blended"))
    for name in both:
        mean = 0.25 * one[name].double() + 0.75 * other[name].double()
        largest = torch.stack([part[name].abs().double() for part in (one, other, both)]).amax(0)
        assert bool(((both[name].double() - mean).abs() <= 2**-7 * largest + 1e-12).all()), name


# -- read, write, show -------------------------------------------------------------------------------------------------------


def test_cores_are_read_as_they_were_written(tmp_path: Path) -> None:
    cores = {key: value.double() for key, value in _cores(0).items()}
    surgery.write_scales(tmp_path / "c", cores, FINGERPRINT, train="core")
    found = surgery.read_scales(tmp_path / "c")
    assert (found.train, found.fingerprint, found.beside) == ("core", FINGERPRINT, {})
    assert all(torch.equal(found.values[key], value.float()) for key, value in cores.items())
    surgery.write_scales(tmp_path / "again", found.values, found.fingerprint, train=found.train)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2), (2, 2, 2, 2), (), (0, 0), (3, 0, 0)])
def test_what_can_be_no_core_is_not_written(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ScalesError, match="'a' has a shape that a core cannot have") as caught:
        surgery.write_scales(tmp_path / "c", {"a": torch.ones(shape)}, None, train="core")
    assert caught.value.expected == "(k, k), or (B, k, k) for a stack"
    assert not (tmp_path / "c").exists()


def test_show_cores(tmp_path: Path) -> None:
    """Turns by known angles of known stretches, by NumPy; sorted by the distance from the identity."""
    small, large = np.deg2rad([2.0, 25.0])
    turned = np.eye(5)
    turned[:2, :2] = [[np.cos(small), -np.sin(small)], [np.sin(small), np.cos(small)]]
    turned[2:4, 2:4] = [[np.cos(large), -np.sin(large)], [np.sin(large), np.cos(large)]]
    one = turned @ np.diag([1.2, 1.2, 0.9, 0.9, 1.0])
    stack = np.stack([np.eye(4), np.diag([1.0, 1.0, 3.0, 1.0]), np.eye(4)])
    values = {
        "layers.0.q.weight": torch.from_numpy(one),
        "layers.0.qkv.weight[v]": torch.eye(4),
        "layers.0.experts.up": torch.from_numpy(stack),
    }
    surgery.write_scales(tmp_path / "c", values, FINGERPRINT, train="core")
    found = surgery.show_scales(tmp_path / "c")
    assert (found.train, found.targets, found.matrices, found.matrices_changed) == ("core", 3, 5, 2)
    assert (found.trainable, found.changed, found.directions) == (25 + 16 + 48, 8 + 1, ())
    assert (found.least, found.median, found.most) == pytest.approx((0.9, 1, 3), abs=1e-6)
    assert found.largest_angle == pytest.approx(25, abs=1e-5)
    first, second = found.cores
    assert (first.target, first.matrix, first.distance, first.angles) == ("layers.0.experts.up", 1, 2, (0, 0))
    assert (first.least, first.most) == (1, 3)
    assert [(entry.row, entry.column, entry.value) for entry in first.entries] == [(3, 3, 2)]
    assert (second.target, second.matrix) == ("layers.0.q.weight", None)
    assert second.distance == pytest.approx(np.linalg.norm(one - np.eye(5)), rel=1e-6)
    assert (second.least, second.most) == pytest.approx((0.9, 1.2), abs=1e-6)
    assert second.angles == pytest.approx((25, 2, 0), abs=1e-5)
    change = np.abs(one - np.eye(5))
    assert [abs(entry.value) for entry in second.entries] == pytest.approx(sorted(change.ravel(), reverse=True)[:5], abs=1e-6)
    for entry in second.entries:
        assert entry.value == pytest.approx((one - np.eye(5))[entry.row - 1, entry.column - 1], abs=1e-6)
    assert surgery.show_scales(tmp_path / "c", top=1).cores == (first,)

    done = _run("scales", "show", tmp_path / "c")
    table, _, summary = done.stdout.partition("\n\n")
    heading, _, *rows = table.splitlines()
    assert heading.split() == ["target", "matrix", "|C", "-", "I|", "stretch", "turn", "entries"]
    assert rows[0].split() == ["layers.0.experts.up", "1", "2", "1", "to", "3", "0", "3,3:+2"]
    assert rows[1].split()[:7] == ["layers.0.q.weight", f"{second.distance:.4g}", "0.9", "to", "1.2", "25,", "2"]
    assert summary.splitlines() == [
        "3 targets, 5 cores with 89 trainable numbers, 2 of them differ from the identity",
        "singular values: least 0.9, median 1, most 3; largest turn 25 degrees",
        f"fingerprint {FINGERPRINT}",
    ]
    surgery.write_scales(tmp_path / "eye", {"a": torch.eye(3)}, None, train="core")
    assert _run("scales", "show", tmp_path / "eye").stdout.splitlines() == [
        "1 targets, 1 cores with 9 trainable numbers, all of them the identity: an untouched file",
        "singular values: least 1, median 1, most 1; largest turn 0 degrees",
        "fingerprint unknown: the file does not say which factors it belongs to",
    ]


def test_show_a_diagonal_core_as_its_scales(tmp_path: Path) -> None:
    scales = {key: value.abs() for key, value in _scales(0).items()}
    write_scales(tmp_path / "s", scales, FINGERPRINT)
    write_scales(tmp_path / "c", {key: torch.diag_embed(value) for key, value in scales.items()}, FINGERPRINT, "core")
    one, other = (surgery.show_scales(tmp_path / name) for name in ("s", "c"))
    assert (one.least, one.median, one.most) == (other.least, other.median, other.most)
    assert (one.matrices, one.matrices_changed, one.changed) == (other.matrices, other.matrices_changed, other.changed)
    assert (one.largest_angle, other.largest_angle) == (None, 0)


def test_show_what_has_been_chosen(tmp_path: Path) -> None:
    masks = {
        "layers.0.q.weight": torch.tensor([1, 0, 0, 1, 0], dtype=torch.uint8),
        "layers.0.experts.up": torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.uint8),
    }
    ones = {key: torch.ones(shape) for key, shape in SHAPES.items()}
    write_scales(tmp_path / "s", ones, FINGERPRINT, "scales", {"chosen": masks})
    found = surgery.show_scales(tmp_path / "s")
    listed = [(one.target, one.matrix, one.rank, one.directions) for one in found.chosen]
    assert sorted(listed, key=str) == sorted(
        [
            ("layers.0.q.weight", None, 5, (1, 4)),
            ("layers.0.experts.up", 0, 4, (1, 2)),
            ("layers.0.experts.up", 1, 4, (2, 4)),
            ("layers.0.experts.up", 2, 4, (3, 4)),
        ],
        key=str,
    )
    assert (found.orthogonal, found.trainable) == (False, 21)
    assert (
        "2 of 4-5 directions of each matrix are trained, the others untouched\n"
        in _run("scales", "show", tmp_path / "s").stdout
    )
    beside = {"chosen": {"a": masks["layers.0.q.weight"]}, "orthogonal": {"a": torch.zeros(10 + 10)}}
    write_scales(tmp_path / "o", {"a": torch.eye(5)}, FINGERPRINT, "core", beside)
    shown = _run("scales", "show", tmp_path / "o").stdout
    assert "\ntrained as orthogonal cores: a turn between two scalings\n2 of 5 directions of each target are trained" in shown
    assert surgery.show_scales(tmp_path / "o").orthogonal


def test_read_scales_of_a_checkpoint_gives_the_values(experts: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(experts / "f")
    cores = _random_cores(manifest)
    surgery.write_scales(tmp_path / "c", cores, manifest.fingerprint, train="core")
    assert all(torch.equal(value, cores[key]) for key, value in read_scales(tmp_path / "c", manifest).items())
