"""surgery blend and surgery scales show: scales files by themselves, against NumPy in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.cli.main import main
from surgery.commands.blend import blend
from surgery.commands.scales import show_scales
from surgery.errors import FormatError, OptionError, OutputError, ScalesError, SurgeryWarning
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import read_scales
from surgery.format.scales.writing import write_scales
from tests.models import files_of, tensors_of

FINGERPRINT = "0123456789abcdef" * 4
Tensors = dict[str, torch.Tensor]


def _values(seed: int, spread: float = 0.3) -> Tensors:
    """Positive scales of a matrix, of a slice and of a stack."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.q.weight": (5,), "layers.0.qkv.weight[v]": (4,), "layers.0.experts.up": (3, 4)}
    return {key: torch.exp(spread * torch.randn(shape, generator=generator)) for key, shape in shapes.items()}


def _write(path: Path, values: Tensors, fingerprint: str | None = FINGERPRINT) -> Path:
    write_scales(path, values, fingerprint)
    return path


def _owner(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("surgery")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [_write(tmp_path / f"{seed}.safetensors", _values(seed)) for seed in range(3)]


@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 0.1], [3, 0, 1], [1.5, -0.25, -0.5], [1e300, 1e300, 2e300]])
@pytest.mark.parametrize("space", ["linear", "log"])
def test_means(space: Any, weights: list[float] | None, files: list[Path], tmp_path: Path) -> None:
    report = surgery.blend(files, tmp_path / "out", weights=weights, space=space)
    shares = np.array(weights or [1, 1, 1]) / np.abs(weights or [1]).max()
    shares = shares / shares.sum()
    assert report.weights == pytest.approx(shares)
    blended = load_file(tmp_path / "out")
    for key, value in blended.items():
        parts = np.stack([load_file(file)[key].double().numpy() for file in files])
        along = shares.reshape(-1, *[1] * (parts.ndim - 1))
        expected = (along * parts).sum(0) if space == "linear" else np.prod(parts**along, axis=0)
        assert value.dtype == torch.float32
        assert np.allclose(value.numpy(), expected, rtol=2e-7, atol=0)
    assert blended.keys() == _values(0).keys()
    assert (report.targets, report.trainable, report.changed, report.fingerprint) == (3, 21, 21, FINGERPRINT)
    assert json.loads(_owner(tmp_path / "out")) == {"format_version": 1, "fingerprint": FINGERPRINT}


@pytest.mark.parametrize("space", ["linear", "log"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_mean_of_the_same_is_the_same(space: Any, count: int, files: list[Path], tmp_path: Path) -> None:
    """Bit for bit, whatever the weights round to; so what is 1 in all of them stays 1."""
    blend([files[0]] * count, tmp_path / "out", weights=[0.1 * (1 + i) for i in range(count)], space=space)
    assert (tmp_path / "out").read_bytes() == files[0].read_bytes()


def test_negative_scales_have_a_linear_mean_only(files: list[Path], tmp_path: Path) -> None:
    values = _values(1)
    values["layers.0.qkv.weight[v]"][2] = 0
    _write(files[1], values)
    with pytest.raises(ScalesError, match=r"1\.safetensors: 'layers\.0\.qkv\.weight\[v\]' has a scale that is not positive"):
        blend(files, tmp_path / "out", space="log")
    values["layers.0.qkv.weight[v]"][2] = -1.5
    _write(files[1], values)
    with pytest.raises(ScalesError, match="not positive"):
        blend(files, tmp_path / "out", space="log")
    assert not (tmp_path / "out").exists()
    blend(files[:2], tmp_path / "out")
    first = _values(0)["layers.0.qkv.weight[v]"][2].item()
    assert load_file(tmp_path / "out")["layers.0.qkv.weight[v]"][2].item() == pytest.approx((first - 1.5) / 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "one weight for each file"),
        ([1, 2, 3, 4], "one weight for each file"),
        ([], "one weight for each file"),
        ([1, -2, 0.5], "is not positive"),
        ([0, 0, 0], "is not positive"),
        ([0.1, 0.2, -0.3], "too close to 0"),
        ([1, float("nan"), 1], "no finite number"),
        ([1, float("inf"), 1], "no finite number"),
    ],
)
def test_weights_that_make_no_sense(weights: list[float], message: str, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        blend(files, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_other_options_that_make_no_sense(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no scales files"):
        blend([], tmp_path / "out")
    with pytest.raises(OptionError, match="unknown space"):
        blend(files, tmp_path / "out", space="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["linear", "log"])
def test_a_mean_beyond_float32(space: Any, tmp_path: Path) -> None:
    high = _write(tmp_path / "high", {"a": torch.tensor([1e38, 1.0])})
    low = _write(tmp_path / "low", {"a": torch.tensor([1e-30, 1.0])})
    weights = [100, -99] if space == "linear" else [2, -1]
    with pytest.raises(ScalesError, match="the blend of 'a' is beyond the range of float32"):
        blend([high, low], tmp_path / "out", weights=weights, space=space)


def test_files_that_do_not_belong_together(files: list[Path], tmp_path: Path) -> None:
    other = _write(tmp_path / "other", _values(7), "f" * 64)
    with pytest.raises(ScalesError, match="belong to different factors"):
        blend([*files, other], tmp_path / "out")
    fewer = _values(8)
    del fewer["layers.0.experts.up"]
    with pytest.raises(ScalesError, match=r"'layers\.0\.experts\.up' is in .*0\.safetensors and not in .*fewer"):
        blend([files[0], _write(tmp_path / "fewer", fewer)], tmp_path / "out")
    with pytest.raises(ScalesError, match=r"'layers\.0\.experts\.up' is in .*0\.safetensors and not in .*fewer"):
        blend([tmp_path / "fewer", files[0]], tmp_path / "out")
    longer = _values(9) | {"layers.0.q.weight": torch.ones(6)}
    with pytest.raises(ScalesError, match=r"'layers\.0\.q\.weight' has another shape"):
        blend([files[0], _write(tmp_path / "longer", longer)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_say_what_it_belongs_to(files: list[Path], tmp_path: Path) -> None:
    nameless = _write(tmp_path / "nameless", _values(4), None)
    assert _owner(nameless) is None
    with pytest.warns(SurgeryWarning, match="nameless does not say which factors"):
        report = blend([nameless, files[0]], tmp_path / "out")
    assert report.fingerprint == FINGERPRINT
    assert json.loads(_owner(tmp_path / "out"))["fingerprint"] == FINGERPRINT
    with pytest.warns(SurgeryWarning, match="does not say which factors"):
        report = blend([nameless, nameless], tmp_path / "out", overwrite=True)
    assert report.fingerprint is None
    assert _owner(tmp_path / "out") is None


def test_what_is_there_is_not_written_over(files: list[Path], tmp_path: Path) -> None:
    before = files_of(tmp_path)
    with pytest.raises(OutputError, match="is one of the inputs"):
        blend(files, files[0], overwrite=True)
    (tmp_path / "link").symlink_to(files[1])
    with pytest.raises(OutputError, match="is one of the inputs"):
        blend(files, tmp_path / "link", overwrite=True)
    (tmp_path / "link").unlink()
    (tmp_path / "out").write_text("mine")
    with pytest.raises(
        OutputError, match=r"is there already\n.*--overwrite \(in Python: overwrite=True\) replaces it; -o \(out\)"
    ):
        blend(files, tmp_path / "out")
    assert files_of(tmp_path) == {**before, "out": b"mine"}
    blend(files, tmp_path / "out", overwrite=True)
    assert load_file(tmp_path / "out").keys() == _values(0).keys()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _with_metadata(path: Path, owner: str) -> None:
    save_file(_values(0), path, metadata={"surgery": owner})


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda path: path.unlink(), ScalesError, "there is no scales file"),
        (_truncated, FormatError, "size does not fit"),
        (lambda path: path.write_bytes(b"PK\3\4"), FormatError, "is a zip archive"),
        (lambda path: save_file({}, path), ScalesError, "holds no scales"),
        (lambda path: save_file({"a": torch.ones(2, dtype=torch.int32)}, path), ScalesError, "'a' has a dtype"),
        (lambda path: save_file({"a": torch.ones(2, 3, 2)}, path), ScalesError, "'a' has a shape"),
        (lambda path: save_file({"a": torch.tensor(1.0)}, path), ScalesError, "'a' has a shape"),
        (lambda path: save_file({"a": torch.ones(0)}, path), ScalesError, "'a' has a shape"),
        (lambda path: save_file({"a": torch.tensor([1.0, np.nan])}, path), ScalesError, "'a' holds NaN or infinity"),
        (lambda path: _with_metadata(path, "[]"), ScalesError, "metadata is damaged"),
        (lambda path: _with_metadata(path, "{"), ScalesError, "metadata is damaged"),
        (lambda path: _with_metadata(path, '{"format_version": 1}'), ScalesError, "metadata is damaged"),
        (lambda path: _with_metadata(path, f'{{"format_version": 2, "fingerprint": "{FINGERPRINT}"}}'), ScalesError, "version"),
        (lambda path: _with_metadata(path, '{"format_version": 1, "fingerprint": "\\u001b[2J"}'), ScalesError, "damaged"),
    ],
)
def test_files_that_are_no_scales(spoil: Any, kind: type[Exception], message: str, files: list[Path], tmp_path: Path) -> None:
    spoil(files[1])
    for call in (lambda: blend(files, tmp_path / "out"), lambda: show_scales(files[1])):
        with pytest.raises(kind, match=message):
            call()
    assert not (tmp_path / "out").exists()


def test_half_precision_is_warned_of(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 1.5], dtype=torch.bfloat16)}, tmp_path / "half")
    with pytest.warns(SurgeryWarning, match="holds BF16 numbers"):
        found = show_scales(tmp_path / "half")
    assert (found.most, found.changed) == (1.5, 1)


def test_a_blend_is_folded_as_the_mean_of_the_folds(llama: Path, tmp_path: Path) -> None:
    """A folded weight is linear in its scales: up to rounding to bfloat16, blend and fold may change places."""
    manifest = surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu").manifest
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        values = {target.key: 1 + 0.5 * torch.randn(target.scales_shape, generator=generator) for target in manifest.targets}
        write_scales(tmp_path / f"{seed}", values, manifest.fingerprint)
        surgery.fold(tmp_path / "f", tmp_path / f"{seed}", tmp_path / f"folded {seed}", device="cpu")
    surgery.blend([tmp_path / "0", tmp_path / "1"], tmp_path / "out", weights=[0.25, 0.75])
    assert read_scales(tmp_path / "out", Manifest.read(tmp_path / "f")).keys() == values.keys()
    surgery.fold(tmp_path / "f", tmp_path / "out", tmp_path / "folded", device="cpu")
    one, other, both = (tensors_of(tmp_path / name) for name in ("folded 0", "folded 1", "folded"))
    for name in both:
        mean = 0.25 * one[name].double() + 0.75 * other[name].double()
        largest = torch.stack([part[name].abs().double() for part in (one, other, both)]).amax(0)
        assert bool(((both[name].double() - mean).abs() <= 2**-7 * largest + 1e-12).all()), name


def _known(path: Path) -> Path:
    """21 numbers of which four are not 1."""
    values = {key: torch.ones_like(value) for key, value in _values(0).items()}
    values["layers.0.experts.up"][2, 1] = 0.25
    values["layers.0.q.weight"][4] = 1.5
    values["layers.0.q.weight"][0] = 0.5
    values["layers.0.qkv.weight[v]"][3] = -3
    return _write(path, values)


def test_show_finds_what_has_changed_most(tmp_path: Path) -> None:
    found = show_scales(_known(tmp_path / "s"), top=3)
    assert (found.targets, found.trainable, found.changed, found.fingerprint) == (3, 21, 4, FINGERPRINT)
    assert (found.least, found.median, found.most) == (-3, 1, 1.5)
    listed = [(one.target, one.matrix, one.direction, one.g) for one in show_scales(tmp_path / "s").directions]
    assert listed == [
        ("layers.0.qkv.weight[v]", None, 4, -3.0),
        ("layers.0.experts.up", 2, 2, 0.25),
        ("layers.0.q.weight", None, 1, 0.5),
        ("layers.0.q.weight", None, 5, 1.5),
    ]
    assert list(found.directions) == list(show_scales(tmp_path / "s").directions)[:3]
    with pytest.raises(OptionError, match="negative number"):
        show_scales(tmp_path / "s", top=-1)


def test_show_agrees_with_numpy(tmp_path: Path) -> None:
    values = _values(3)
    found = show_scales(_write(tmp_path / "s", values), top=100)
    flat = np.concatenate([value.double().numpy().ravel() for value in values.values()])
    assert (found.least, found.median, found.most) == (flat.min(), np.median(flat), flat.max())
    assert sorted(one.g for one in found.directions) == sorted(flat)
    distances = [abs(one.g - 1) for one in found.directions]
    assert distances == sorted(distances, reverse=True)
    for one in found.directions:
        value = values[one.target] if one.matrix is None else values[one.target][one.matrix]
        assert one.g == value[one.direction - 1].item()


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_show_command(llama: Path, tmp_path: Path) -> None:
    done = _run("scales", "show", _known(tmp_path / "s"), "--top", 2)
    assert (done.exit_code, done.stderr) == (0, "")
    table, _, summary = done.stdout.partition("\n\n")
    heading, _, *rows = table.splitlines()
    assert heading.split() == ["target", "matrix", "direction", "g", "change", "in", "%"]
    assert [row.split() for row in rows] == [
        ["layers.0.qkv.weight[v]", "4", "-3", "-400"],
        ["layers.0.experts.up", "2", "2", "0.25", "-75"],
    ]
    assert summary.splitlines() == [
        "3 targets, 21 trainable numbers, 4 of them differ from 1",
        "least -3, median 1, most 1.5",
        f"fingerprint {FINGERPRINT}",
    ]
    parsed = json.loads(_run("scales", "show", tmp_path / "s", "--top", 1, "--json").stdout)
    assert parsed["directions"] == [{"target": "layers.0.qkv.weight[v]", "matrix": None, "direction": 4, "g": -3.0}]
    assert (parsed["schema_version"], parsed["changed"], parsed["median"]) == (1, 4, 1.0)

    manifest = surgery.factorize(llama, tmp_path / "f", rank=4, device="cpu").manifest
    done = _run("scales", "show", tmp_path / "f/surgery/scales.safetensors")
    assert done.stdout.splitlines() == [
        "14 targets, 56 trainable numbers, all of them 1: an untouched file",
        "least 1, median 1, most 1",
        f"fingerprint {manifest.fingerprint}",
    ]
    save_file({"a": torch.ones(2)}, tmp_path / "nameless")
    assert "fingerprint unknown" in _run("scales", "show", tmp_path / "nameless").stdout
    done = _run("scales", "show", tmp_path / "nowhere")
    assert (done.exit_code, done.stdout) == (1, "")
    assert _run("scales", "show", tmp_path / "s", "--top", -1).exit_code == 2


def test_blend_command(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = _run("blend", *files, "--weights", "2,1,1")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == (
        "scales.safetensors: 21 of 21 scales of 3 targets differ from 1; weights 0.5, 0.25, 0.25, linear mean\n"
    )
    blend(files, tmp_path / "expected", weights=[0.5, 0.25, 0.25])
    assert Path("scales.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert _run("blend", *files).exit_code == 1
    found = json.loads(_run("blend", *files, "--space", "log", "--overwrite", "--json").stdout)
    assert found["weights"] == pytest.approx([1 / 3] * 3)
    assert (found["schema_version"], found["space"], found["out"]) == (1, "log", "scales.safetensors")
    done = _run("blend", *files, "--weights", "0.5,half,1", "-o", "other")
    assert done.exit_code == 2
    assert "'0.5,half,1' is not a list of numbers" in done.stderr
    assert _run("blend", *files, "--space", "cubic", "-o", "other").exit_code == 2
    assert _run("blend").exit_code == 2
    save_file(_values(0), "nameless")
    done = _run("blend", files[0], "nameless", "-o", "other")
    assert done.exit_code == 0
    assert done.stderr.startswith("note: nameless does not say which factors it belongs to")
    assert _run("blend", files[0], "nameless", "-o", "other", "--overwrite", "-q").output == ""


# ---- numbers that cannot be meant as multipliers


def _like(values: Tensors, make: Any) -> Tensors:
    return {key: make(value) for key, value in values.items()}


UNLIKELY: list[Any] = [
    lambda g: 0.3 * (g - 1),
    torch.log,
    lambda g: 1e-3 * (g - 1),
    torch.zeros_like,  # changes that were never trained
]


@pytest.mark.parametrize("make", UNLIKELY)
def test_scales_that_cannot_be_meant(make: Any, tmp_path: Path) -> None:
    odd, words = _like(_values(0, spread=0.1), make), "they look like changes g - 1, or logarithms"
    file = _write(tmp_path / "odd", odd)
    good = _write(tmp_path / "good", _like(odd, lambda g: torch.linspace(0.9, 1.1, g.numel()).view(g.shape)))
    with pytest.warns(SurgeryWarning, match="odd: ") as caught:
        show_scales(file)
    assert [words in str(warning.message) for warning in caught] == [True]
    with pytest.warns(SurgeryWarning, match="odd: ") as caught:
        blend([good, file], tmp_path / "out")
    assert [words in str(warning.message) for warning in caught] == [True]
    for command in (["scales", "show", file], ["blend", good, file, "-o", tmp_path / "other"]):
        done = CliRunner().invoke(main, list(map(str, command)), catch_exceptions=False)
        assert done.exit_code == 0
        assert f"note: {file}: " in done.stderr
        assert words in done.stderr


def _legitimate(values: Tensors) -> list[Tensors]:
    first = {key: value.clone() for key, value in values.items()}
    first["layers.0.q.weight"] = torch.tensor([10.0, -1.5, 0.0, 1e-3, 1.0])
    return [
        _like(values, torch.ones_like),
        values,
        first,
        _like(values, lambda g: 1 + 1e-6 * (g - 1)),
        _like(values, lambda g: 0.55 * g),
        _like(values, lambda g: 2 * g),
        _like(values, torch.neg),
        _like(values, lambda g: torch.full_like(g, 1.5)),
        _like(values, lambda g: torch.rand(g.shape, generator=torch.Generator().manual_seed(0))),
        {"a": torch.tensor([0.3])},
        {"a": torch.tensor([0.3, 0.1, 1.0])},
        values | {"layers.0.qkv.weight[v]": torch.tensor([0.1, 0.2, -0.1, 0.4])},
    ]


@pytest.mark.parametrize("index", range(12))
def test_scales_that_training_makes_get_no_note(index: int, tmp_path: Path) -> None:
    show_scales(_write(tmp_path / "g", _legitimate(_values(3, spread=0.15))[index]))


def test_scales_that_cannot_be_meant_wherever_they_are_given(factorized: Path, llama: Path, tmp_path: Path) -> None:
    """To fold and export, as a file and as tensors, and to attached scales: each says so, and goes on."""
    manifest = Manifest.read(factorized)
    deltas = {target.key: 0.1 * torch.randn(target.scales_shape, generator=torch.Generator()) for target in manifest.targets}
    file = _write(tmp_path / "deltas", deltas, manifest.fingerprint)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    scales = surgery.attach(model, factorized)
    calls: list[Any] = [
        lambda: surgery.fold(factorized, file, tmp_path / "a"),
        lambda: surgery.fold(factorized, deltas, tmp_path / "b"),
        lambda: surgery.export(factorized, file, tmp_path / "c"),
        lambda: surgery.export(factorized, deltas, tmp_path / "d"),
        lambda: scales.load(file),
    ]
    for call in calls:
        with pytest.warns(SurgeryWarning, match="they look like changes g - 1, or logarithms") as caught:
            call()
        assert len(caught) == 1
    for command in ("fold", "export"):
        arguments = [command, str(factorized), str(file), "-o", str(tmp_path / command)]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        assert f"note: {file}: nearly all scales are near 0" in done.stderr
