"""Reports: what operations return, what commands print with --json, and what docs/json.md says of both."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery import errors
from surgery.cli.main import main
from surgery.format.scales.writing import write_scales
from surgery.reports import Report
from tests.models import files_of, save_llama, tensors_of
from tools import write_json_docs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m: a model; t: it fine-tuned; f: it at rank 4; s: trained scales."""
    folder = tmp_path_factory.mktemp("reports")
    save_llama(folder / "m", torch.float32)
    (folder / "t").mkdir()
    for file in (folder / "m").glob("*.json"):
        if "index" not in file.name:
            (folder / "t" / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    tuned = {
        name: value + 0.05 * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in tensors_of(folder / "m").items()
    }
    save_file(tuned, folder / "t/model.safetensors")
    surgery.factorize(folder / "m", folder / "f", rank=4)
    scales = surgery.read_scales(folder / "f/surgery/scales.safetensors")
    surgery.write_scales(folder / "s", {key: 1.25 * value for key, value in scales.values.items()}, scales.fingerprint)
    return folder


def _json(*arguments: object) -> Any:
    """What a command prints: one object and nothing else."""
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code in (0, 3)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(done.stdout, parse_constant=refuse)
    assert isinstance(found, dict)
    assert next(iter(found)) == "schema_version"
    return found


def _runs(at: Path, to: Path) -> dict[str, list[Any]]:
    """Of each command what it prints, in several situations."""
    broken = to / "broken"
    surgery.factorize(at / "m", broken, rank=2, layout="overlay")
    surgery.write_scales(broken / "surgery/scales.safetensors", {"x": torch.ones(2)}, None)
    stack = to / "stack"
    surgery.write_scales(stack, {"experts": torch.tensor([[1.0, 2.0], [1.0, 1.0]])}, None)
    cores = to / "cores"
    chosen = {"experts": torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8)}
    turned = {"experts": torch.stack([torch.tensor([[1.5, 0.0], [0.0, 1.0]]), torch.eye(2)])}
    write_scales(cores, turned, None, "core", {"chosen": chosen})
    only = ("--include", "*q_proj*")
    return {
        "blend": [_json("blend", at / "s", "-o", to / "b")],
        "demo": [_json("demo", "--steps", 1, "--rank", 2)],
        "export": [_json("export", at / "f", at / "s", "-o", to / "a")],
        "extract": [_json("extract", at / "m", at / "t", "--rank", 2, "-o", to / "extracted", "--profile")],
        "extract --dry-run": [_json("extract", at / "m", at / "t", "--rank", "auto", "--dry-run")],
        "factorize": [_json("factorize", at / "m", "--rank", 2, "-o", to / "f", "--profile")],
        "fold": [
            _json("fold", at / "f", at / "s", "-o", to / "d", "--profile"),
            _json("fold", at / "f", at / "s", "--lora", _adapter(at / "f", to), "-o", to / "d2"),
        ],
        "inspect": [_json("inspect", at / "f")],
        "merge": [_json("merge", at / "m", _adapter(at / "f", to), "-o", to / "merged", "--profile")],
        "merge --dry-run": [_json("merge", at / "m", _adapter(at / "f", to), "--dry-run")],
        "plan": [_json("plan", at / "m", "--rank", 4), _json("factorize", _with_leftovers(to), "--rank", 2, "--dry-run")],
        "project": [
            _json("project", at / "f", at / "t", "-o", to / "p"),
            _json("project", at / "f", at / "t", "--train", "core", "-o", to / "c"),
        ],
        "recipes": [_json("recipes")],
        "recommend": [
            _json("recommend", at / "m", "--budget", 9, *only, "-o", to / "r.toml"),
            _json("recommend", at / "m", "--budget", 9, "--train", "core", *only, "-o", to / "c.toml"),
        ],
        "resize": [_json("resize", _adapter(at / "f", to), "--rank", 2, "-o", to / "resized")],
        "scales new": [_json("scales", "new", at / "f", "--train", "core", "-o", to / "n")],
        "scales show": [_json("scales", "show", one) for one in (at / "s", stack, cores)],
        "spectra": [
            _json("spectra", at / "m", *only, "-o", to / "s1"),
            _json("spectra", at / "m", at / "t", *only, "-o", to / "s2"),
        ],
        "verify": [_json("verify", at / "f"), _json("verify", at / "f", "--fast"), _json("verify", broken, "--fast")],
        "verify --folded": [_json("verify", at / "f", "--folded", at / "m", "--scales", at / "s")],
    }


def _adapter(factorized: Path, to: Path) -> Path:
    """An adapter that changes the model."""
    scales = {target.key: torch.full(target.scales_shape, 1.5) for target in surgery.Manifest.read(factorized).targets}
    surgery.write_scales(to / "half more", scales, None)
    surgery.export(factorized, to / "half more", to / "lora", progress=surgery.Silent())
    return to / "lora"


def _with_leftovers(to: Path) -> Path:
    """A model with a file that stays behind."""
    folder = to / "left"
    folder.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.randn(16, 16)}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"the same in another format")
    return folder


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Those of all entries: ``targets[].tensor``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path + key
            yield from _paths(item, f"{path}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, path.removesuffix(".") + "[].")


def _documented(command: str) -> set[str]:
    kind, added = write_json_docs.COMMANDS[command]
    return {"schema_version", *(path for path, _, _ in write_json_docs.entries(kind)), *added}


#: Objects whose keys are names of tensors, numbers and kinds of threads.
_OPEN = ("ranks.", "median_energy.", "profile.", "accounts[].", "changed_by_projection.", "changed_by_layer.")


def test_every_command_prints_what_the_page_says_and_the_page_says_what_it_prints(at: Path, tmp_path: Path) -> None:
    runs = _runs(at, tmp_path)
    assert runs.keys() == write_json_docs.COMMANDS.keys()
    for command, printed in runs.items():
        found = {path for one in printed for path in _paths(one) if not path.startswith(_OPEN)}
        assert found == _documented(command), command
        for one in printed:
            assert one["schema_version"] == write_json_docs.COMMANDS[command][0].schema_version

    assert runs["verify"][0]["ok"]
    assert not runs["verify"][-1]["ok"]
    assert runs["plan"][1]["left_out"]
    assert runs["factorize"][0]["profile"]["threads"]
    assert {one["name"] for one in runs["recipes"][0]["recipes"]} >= {"llama", "attention"}
    # What spectra.json holds is what the report is.
    written = json.loads((tmp_path / "s2/spectra.json").read_text())
    assert written["findings"] == {key: runs["spectra"][1][key] for key in written["findings"]}
    assert written["schema_version"] == runs["spectra"][1]["schema_version"] == 3


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", part) for inner, part in command.commands.items())
        else:
            yield name, command


def test_every_command_has_json() -> None:
    having = {name for name, command in _commands() if any("--json" in parameter.opts for parameter in command.params)}
    assert having == {name for name, _ in _commands()} == {name.partition(" --")[0] for name in write_json_docs.COMMANDS}


def test_the_page_is_up_to_date() -> None:
    assert write_json_docs.page() == (ROOT / "docs/json.md").read_text()


def test_from_python_it_is_the_same(at: Path, tmp_path: Path) -> None:
    reports: dict[str, tuple[Report, list[object]]] = {
        "factorize": (surgery.factorize(at / "m", tmp_path / "f", rank=4), ["factorize", at / "m", "--rank", 4, "-o"]),
        "fold": (surgery.fold(at / "f", at / "s", tmp_path / "d"), ["fold", at / "f", at / "s", "-o"]),
        "project": (surgery.project(at / "f", at / "t", tmp_path / "p"), ["project", at / "f", at / "t", "-o"]),
        "blend": (surgery.blend([at / "s"], tmp_path / "b"), ["blend", at / "s", "-o"]),
        "export": (surgery.export(at / "f", at / "s", tmp_path / "a"), ["export", at / "f", at / "s", "-o"]),
        "plan": (surgery.plan(at / "m", rank=4), ["plan", at / "m", "--rank", 4]),
        "inspect": (surgery.inspect(at / "f"), ["inspect", at / "f"]),
        "verify": (surgery.verify(at / "f"), ["verify", at / "f"]),
        "recipes": (surgery.recipes(), ["recipes"]),
        "scales": (surgery.show_scales(at / "s"), ["scales", "show", at / "s"]),
    }
    for report, arguments in reports.values():
        assert dataclasses.is_dataclass(report)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(report, dataclasses.fields(report)[0].name, None)
        out = [tmp_path / "x" / arguments[0]] if arguments[-1] == "-o" else []  # type: ignore[operator]
        printed = _json(*arguments, *out)
        made = report.as_json()
        assert next(iter(made)) == "schema_version"
        assert {**printed, "seconds": 0, "out": 0} == {**made, "seconds": 0, "out": 0}
        assert json.loads(json.dumps(made, allow_nan=False)) == made  # nothing but what JSON has

    found = surgery.spectra(at / "m", include=["*q_proj*"])
    _json("spectra", at / "m", "--include", "*q_proj*", "-o", tmp_path / "report")
    assert json.loads((tmp_path / "report/spectra.json").read_text()) == found.as_json()
    assert found.as_json()["targets"][0]["key"] == found.targets[0]["key"]


def test_numbers_that_json_does_not_have_are_null() -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        """."""

        values: tuple[float, ...]

    @dataclasses.dataclass(frozen=True)
    class Odd(Report):
        """."""

        schema_version: ClassVar[int] = 3

        one: float
        inside: dict[str, float]
        several: list[Inner]
        path: Path
        nothing: None
        flag: bool

    odd = Odd(math.nan, {"a": math.inf, "b": 0.5}, [Inner((-math.inf, 1.0))], Path("a/b"), None, True)
    assert odd.as_json() == {
        "schema_version": 3,
        "one": None,
        "inside": {"a": None, "b": 0.5},
        "several": [{"values": [None, 1.0]}],
        "path": "a/b",
        "nothing": None,
        "flag": True,
    }
    with pytest.raises(TypeError):
        Odd(0.5, {}, [], Path(), torch.ones(1), True).as_json()  # type: ignore[arg-type]


def _modules() -> Iterator[Any]:
    for module in pkgutil.walk_packages(surgery.__path__, "surgery."):
        if not module.name.startswith(("surgery.cli", "surgery.demo.model", "surgery.report.")):
            yield importlib.import_module(module.name)


def test_all_that_users_meet_is_exported() -> None:
    """Every error and every report, by what the modules define and not by a list."""
    kinds = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert {kind.__name__ for kind in kinds} <= set(surgery.__all__)
    reports = {
        kind
        for module in _modules()
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Report) and kind.__module__.startswith("surgery.")
    }
    assert len(reports) > 10
    for kind in reports | kinds:
        if kind.__name__ != "PlanSummary":  # which is what a Plan's JSON is made of
            assert getattr(surgery, kind.__name__) is kind
    operations = {
        "attach", "blend", "energy_svd", "export", "extract", "factorize", "fold", "inspect", "merge", "new_scales", "plan",
        "plan_extract", "plan_merge", "project", "read_scales", "recipes", "recommend", "resize", "run_demo", "show_scales",
        "spectra", "truncated_svd", "verify", "verify_folded", "write_scales",
    }  # fmt: skip
    others = {
        "Certificate", "ChooseDirections", "Factorized", "Factors", "Manifest", "Options", "Plan", "Progress", "SaveScales",
        "Scales", "ScalesFile", "Silent", "TopK", "TruncatedSVD",
    }  # fmt: skip
    expected = operations | others | {kind.__name__ for kind in reports | kinds} - {"PlanSummary"} | {"__version__"}
    assert set(surgery.__all__) == expected
    for name in operations:
        assert callable(getattr(surgery, name))


def test_what_a_plan_and_a_factorization_say(at: Path) -> None:
    """Against what safetensors reads."""
    report, plan = surgery.factorize(at / "m", at / "f", rank=4, progress=surgery.Silent()), surgery.plan(at / "m", rank=4)
    scales = load_file(at / "f/surgery/scales.safetensors")
    assert report.targets == len(scales) == len(plan.targets) == len(report.manifest.targets) == 14
    assert report.trainable == sum(value.numel() for value in scales.values()) == plan.trainable
    with safe_open(at / "f/surgery/scales.safetensors", "pt") as file:
        assert report.fingerprint == json.loads(file.metadata()["surgery"])["fingerprint"]
    sizes = {name: len(data) for name, data in files_of(at / "f").items()}
    assert report.bytes_written == sum(sizes.values()) - sizes["surgery/manifest.json"] - sizes["surgery/scales.safetensors"]
    tensors = tensors_of(at / "m")
    assert report.skipped + report.targets == len(tensors)
    described = plan.as_json()["targets"]
    assert {one["tensor"]: tuple(one["shape"]) for one in described} == {one: tuple(tensors[one].shape) for one in scales}


# --- scales files


def test_scales_are_read_as_they_were_written(at: Path, tmp_path: Path) -> None:
    fingerprint = surgery.inspect(at / "f").fingerprint
    values = {
        key: torch.rand(value.shape, dtype=torch.float64) + 0.5
        for key, value in load_file(at / "f/surgery/scales.safetensors").items()
    }
    surgery.write_scales(str(tmp_path / "s"), values, fingerprint)
    theirs = load_file(tmp_path / "s")
    assert {key: value.dtype for key, value in theirs.items()} == dict.fromkeys(values, torch.float32)
    assert all(torch.equal(theirs[key], value.float()) for key, value in values.items())
    found = surgery.read_scales(str(tmp_path / "s"))
    assert found.fingerprint == fingerprint
    assert found.values.keys() == values.keys()
    assert all(torch.equal(found.values[key], theirs[key]) for key in values)
    surgery.write_scales(tmp_path / "t", found.values, found.fingerprint)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "s").read_bytes()
    assert surgery.fold(at / "f", tmp_path / "s", tmp_path / "out").changed == 14

    surgery.write_scales(tmp_path / "s", {"stack": torch.ones(2, 3)}, None)
    assert (surgery.read_scales(tmp_path / "s").fingerprint, surgery.show_scales(tmp_path / "s").trainable) == (None, 6)


@pytest.mark.parametrize(
    ("scales", "fingerprint", "kind"),
    [
        ({}, None, surgery.ScalesError),
        ([torch.ones(2)], None, surgery.OptionError),
        ({"a": [1.0]}, None, surgery.OptionError),
        ({"a": 1.0}, None, surgery.OptionError),
        ({1: torch.ones(2)}, None, surgery.OptionError),
        ({"a": torch.ones(2, dtype=torch.int64)}, None, surgery.OptionError),
        ({"a": torch.ones(2, dtype=torch.complex64)}, None, surgery.OptionError),
        ({"a": torch.tensor(1.0)}, None, surgery.ScalesError),
        ({"a": torch.ones(2, 2, 2)}, None, surgery.ScalesError),
        ({"a": torch.ones(0)}, None, surgery.ScalesError),
        ({"a": torch.ones(2, device="meta")}, None, surgery.OptionError),
        ({"a": torch.ones(2).to_sparse()}, None, surgery.OptionError),
        ({"a": torch.tensor([1.0, math.nan])}, None, surgery.ScalesError),
        ({"a": torch.tensor([1.0, 1e300], dtype=torch.float64)}, None, surgery.ScalesError),
        ({"a": torch.ones(2)}, "the fingerprint", surgery.OptionError),
        ({"a": torch.ones(2)}, 7, surgery.OptionError),
    ],
)
def test_what_can_be_no_scales_is_not_written(scales: Any, fingerprint: Any, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind):
        surgery.write_scales(tmp_path / "s", scales, fingerprint)
    assert not (tmp_path / "s").exists()
