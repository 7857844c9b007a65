"""What ``import surgery`` gives: its names, its types, its documentation, and what its functions say of wrong arguments."""

from __future__ import annotations

import ast
import contextlib
import copy
import enum
import getpass
import importlib.util
import inspect
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.arguments import as_path
from surgery.cli.main import main
from surgery.cli.options import MODEL, PATH
from surgery.errors import OptionError, OutputError, ReadError, ScalesError, SurgeryError
from surgery.progress import Silent
from surgery.solvers.processor import processor
from surgery.timing import Timing
from tests.models import files_of

ROOT = Path(__file__).parent.parent


def _tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api_docs = _tool("write_api_docs")
FUNCTIONS = {name: value for name in surgery.__all__ if inspect.isfunction(value := getattr(surgery, name))}
METHODS = {
    f"{name}.{inner}": member
    for name in surgery.__all__
    if inspect.isclass(kind := getattr(surgery, name)) and not issubclass(kind, Exception)
    for inner, member in api_docs.members(kind)
    if not isinstance(member, property)
}
CALLABLES = FUNCTIONS | METHODS


def test_names_are_those_that_a_type_checker_sees() -> None:
    """``__all__``, where each is found, and the imports for type checkers: each name in all three, and from the same module."""
    tree = ast.parse((ROOT / "surgery/__init__.py").read_text())
    imported = {
        alias.asname or alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == surgery._HOMES
    assert sorted(surgery.__all__) == sorted([*imported, "__version__"])
    assert (ROOT / "surgery/py.typed").is_file()


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs/api.md").read_text() == api_docs.page(), "run: make docs"


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_say_what_goes_in_and_out(name: str) -> None:
    function = CALLABLES[name]
    found = dict(api_docs.sections(inspect.getdoc(function) or ""))
    signature = inspect.signature(function)
    told = {one for names, _ in api_docs.items(found.get("Args", "")) for one in names.replace(" ", "").split(",")}
    every = [parameter for parameter in signature.parameters.values() if not str(parameter).startswith("*")]
    named = {parameter.name for parameter in every if parameter.name[0] != "_" and parameter.name not in ("self", "cls")}
    assert told == named
    result = str(signature.return_annotation)
    assert result == "None" or "Iterator" in result or "Returns" in found or name in METHODS
    assert "Raises" in found or name in METHODS or not signature.parameters


def _parameters(words: str) -> list[tuple[str, str]]:
    """The parameters of what the package gives whose annotation has a word in it."""
    return [
        (name, parameter.name)
        for name, function in CALLABLES.items()
        for parameter in inspect.signature(function).parameters.values()
        if words in str(parameter.annotation)
    ]


@pytest.fixture
def home(llama: Path, factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model and what was made of it; the current folder is another one, empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name, target in (("m", llama), ("f", factorized)):
        (folder / name).symlink_to(target)
    surgery.factorize(llama, folder / "overlay", rank=2, layout="overlay")
    (folder / "recipe.toml").write_text('[[rules]]\nmatch = "*.q_proj.weight"\nrank = 2\n')
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_home_folders_in_every_path(home: Path, llama: Path) -> None:
    """Each parameter that takes a path is given one that begins with ``~``, by each of its names, as a str and as a Path."""
    import transformers

    ones = "~/f/surgery/scales.safetensors"
    done: set[tuple[str, str]] = set()

    def call(name: str, *owner: Any, **arguments: Any) -> Any:
        for argument, value in arguments.items():
            some = [value] if isinstance(value, str | Path) else value if isinstance(value, list) else []
            if some and all(str(one).startswith("~") for one in some):
                done.add((name, argument))
        return CALLABLES[name](*owner, **arguments)

    assert len(call("plan", model="~/m", recipe="~/recipe.toml").targets) == 2
    call("factorize", model=Path("~/m"), out="~/made", recipe="~/recipe.toml")
    halves = {key: value / 2 for key, value in surgery.read_scales(home / "f/surgery/scales.safetensors").values.items()}
    surgery.write_scales(home / "halves.safetensors", halves, None)
    call("export", factorized="~/f", scales="~/halves.safetensors", out="~/adapter", progress=Silent())
    call("plan_merge", model="~/m", adapters=["~/adapter"])
    call("merge", model="~/m", adapters=[Path("~/adapter")], out="~/merged")
    call("resize", adapter="~/adapter", out=Path("~/resized"), rank=2)
    call("fold", factorized="~/f", scales=ones, out="~/folded", lora="~/adapter")
    call("fold", factorized="~/overlay", scales=Path("~/overlay/surgery/scales.safetensors"), out="~/folded2", base="~/m")
    assert call("verify", factorized="~/overlay", base="~/m").ok
    assert (
        call("verify_folded", factorized="~/overlay", folded="~/m", scales=ones.replace("/f/", "/overlay/"), base="~/m").kept
        is None
    )
    quiet = Silent()  # of the two models being one
    call("project", factorized="~/overlay", tuned="~/m", out="~/projected.safetensors", base="~/m", progress=quiet)
    call("plan_extract", base="~/m", tuned=Path("~/folded2"), recipe="~/recipe.toml", progress=quiet)
    with pytest.raises(OptionError, match="the same weights"):
        call("extract", base="~/m", tuned="~/m", out="~/extracted", recipe="~/recipe.toml", progress=quiet)
    call("new_scales", factorized="~/f", out="~/untouched.safetensors")
    call("blend", files=[ones, Path(ones)], out="~/blended.safetensors", factorized="~/f")
    call("spectra", model="~/m", tuned="~/m", top=2, recipe="~/recipe.toml", out="~/report", progress=quiet)
    call("recommend", model="~/m", budget=20, out="~/ranks.toml", max_rank=2, recipe="~/recipe.toml")
    with pytest.raises(OptionError, match="the same weights"):
        call("recommend", model="~/m", tuned="~/m", budget=20, out="~/r.toml", recipe="~/recipe.toml", progress=quiet)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    scales = call("attach", model=model, factorized="~/f")
    call("Scales.save", scales, path="~/saved.safetensors")
    call("Scales.load", scales, path=Path("~/saved.safetensors"))
    manifest = call("Manifest.read", surgery.Manifest, folder="~/made")
    assert call("inspect", factorized="~/made").manifest == manifest
    call("Factorized.open", surgery.Factorized, folder="~/made").close()
    call("Factorized.open", surgery.Factorized, folder="~/overlay", base=Path("~/m")).close()
    call("write_scales", path="~/again.safetensors", scales=scales.values(), fingerprint=None)
    assert call("read_scales", path="~/again.safetensors", progress=quiet).values.keys() == scales.values().keys()
    call("show_scales", path="~/again.safetensors", factorized=Path("~/f"), progress=quiet)
    (home / "demo/folded").mkdir(parents=True)
    with pytest.raises(OutputError, match="is there already"):
        call("run_demo", out="~/demo")
    (home / "copy").mkdir()
    call("Manifest.write", manifest, folder="~/copy")
    assert done == set(_parameters("Path"))
    made = {
        "made",
        "adapter",
        "folded",
        "folded2",
        "merged",
        "copy",
        "projected.safetensors",
        "blended.safetensors",
        "ranks.toml",
        "report",
        "resized",
    }
    assert made | {"saved.safetensors"} <= {path.name for path in home.iterdir()}
    assert not list(Path().iterdir())  # no folder that is called ~
    assert files_of(home / "folded2")["config.json"] == (llama / "config.json").read_bytes()


def test_home_folders_on_the_command_line(home: Path) -> None:
    """A shell does not expand ``--out=~/x``, nor what another program hands over."""

    def run(*arguments: str) -> None:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        assert "~" not in done.output

    run("factorize", "~/m", "--out=~/made", "--recipe=~/recipe.toml")
    run("project", "~/overlay", "~/m", "--out=~/p.safetensors", "--base=~/m")
    assert (home / "made/surgery/manifest.json").is_file()
    assert not list(Path().iterdir())


def _path_parameters(command: click.Command) -> Iterator[click.Parameter]:
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        yield from _path_parameters(inner)
    for parameter in command.params:
        names = {*parameter.opts, str(parameter.name)}
        if not names.isdisjoint(PATH_NAMES) or isinstance(parameter.type, click.Path):
            yield parameter


#: Of options and arguments that are paths, or may be.
PATH_NAMES = {"--out", "--base", "--lora", "--recipe", "model", "tuned", "factorized", "scales", "file", "files"}


def test_each_path_of_the_command_line_is_of_our_types() -> None:
    found = list(_path_parameters(main))
    assert {name for parameter in found for name in (*parameter.opts, parameter.name)} >= PATH_NAMES
    assert [parameter for parameter in found if parameter.type not in (PATH, MODEL)] == []


def test_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "x")
    assert as_path("~") == tmp_path
    assert as_path("~/a b/~") == tmp_path / "a b/~"
    assert as_path("a/~/b") == Path("a/~/b")
    assert as_path("./~") == Path("~")
    assert as_path("$WHERE/$HOME") == Path("$WHERE/$HOME")
    assert as_path(f"~{getpass.getuser()}/x") == Path(os.path.expanduser(f"~{getpass.getuser()}/x"))  # noqa: PTH111  # its own word
    for wrong, message in (
        ("", "is an empty path"),
        ("~no-such-user-here/x", "a user that is not known here"),
        ("a\0b", "no file can have this path"),
        ("\ud800", "no file can have this path"),
        ("~\ud800", "no file can have this path"),
        (b"x", "is no path"),
        (None, "is no path"),
        (3, "is no path"),
    ):
        with pytest.raises(OptionError, match=message):
            as_path(wrong)  # type: ignore[arg-type]


PATHS = [3, True, b"x", ["x"], object(), Path, "", "a\0b", "~no-such-user-here/x"]
SPARSE = torch.eye(4).to_sparse()
ODD_TENSORS = [
    SPARSE,
    torch.eye(4, device="meta"),
    torch.eye(4) * 1j,
    torch.eye(4).bool(),
    torch.eye(4).int(),
]
TENSORS = [
    3,
    "x",
    [[1.0]],
    np.eye(4),
    np.eye(4, dtype=np.float32),
    torch.Tensor,
    *ODD_TENSORS,
    torch.tensor(1.0),
    torch.ones(4),
]
LISTS = ["*.weight", {"*.weight"}, np.array("*.weight"), 3, [1], [None], [b"x"], {"a": 1}, b"x", object()]
#: What a parameter cannot be, by its annotation without ``| None``.
WRONG: dict[str, list[Any]] = {
    "str | Path": PATHS,
    "str": [3, True, b"x", ["x"], object()],
    "str | torch.device": [3, True, b"x", ["x"], object(), torch.device],
    "int": ["16", 4.0, float("nan"), True, [1], torch.tensor(1), np.float64(2), 1j, object()],
    "float": ["0.5", True, [0.5], torch.tensor(0.5), 1j, 10**400, object()],
    "bool": ["yes", 1, 0.0, [], np.bool_(True), object()],
    "tuple[str, ...] | list[str]": LISTS,
    "Options": [3, "x", {"rank": 2}, surgery.Options, object()],
    "Sequence[str | Path]": ["x", 3, [1], [None], [""], {"a": 1}, object()],
    "Sequence[float]": ["0.5", 3.0, ["x"], [None], [True], {1.0: 2}, {1.0}, torch.ones(2, 2), np.float64(1), object()],
    "torch.Tensor": TENSORS,
    "str | Path | Mapping[str, torch.Tensor]": [
        3,
        b"x",
        ["x"],
        {"a": 1},
        {"a": None},
        {1: torch.ones(2)},
        {"a": np.ones(2)},
        "",
    ],
    "Mapping[str, torch.Tensor]": [3, b"x", "x", ["x"], {"a": 1}, {"a": None}, {1: torch.ones(2)}, {"a": np.ones(2)}],
    "nn.Module": ["x", 3, torch.ones(3), nn.Linear, object()],
    "Layout": ["both", "", 3, True, ["residual"], b"residual", object()],
    "Train": ["cores", "", 3, True, ["core"], b"core", object()],
    "Way": ["cores", "", 3, True, ["core"], b"core", object()],
    "Exported": ["zip", "", 3, True, ["peft"], b"peft", object()],
    "EngineName": ["slurm", "", 3, ["ray"], object()],
    "Rounding": ["up", "", 3, ["nearest"], object()],
    "Rank": ["many", "", 4.5, True, [1], object()],
    "Dtype": ["int8", "", 3, torch.bfloat16, object()],
    "str | Path | Sequence[str | Path]": [3, [1], [None], [""], {"a": 1}, "", object()],
    "Space": ["cubic", 3, ["log"], object()],
    "Unit": ["euros", 3, ["bytes"], object()],
    "Progress": [3, "x", object(), Silent, print],
    "Timing": [3, "x", object(), Timing],
}
#: What it can be, where another parameter is wrong.
RIGHT: dict[str, Any] = {
    "str | Path": "nothing-is-called-so.x",
    "str": "x",
    "int": 2,
    "float": 0.5,
    "Sequence[str | Path]": ["nothing-is-called-so.x"],
    "str | Path | Sequence[str | Path]": "nothing-is-called-so.x",
    "torch.Tensor": torch.ones(6, 4),
    "str | Path | Mapping[str, torch.Tensor]": "nothing-is-called-so.x",
    "Mapping[str, torch.Tensor]": {"a": torch.ones(2)},
    "nn.Module": nn.Linear(2, 2),
}


def _kind(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation).removesuffix(" | None")


def _required(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: RIGHT[_kind(one)] for one in parameters if one.default is one.empty}


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, one) for name in FUNCTIONS for one in inspect.signature(FUNCTIONS[name]).parameters]
)
def test_arguments_of_the_wrong_kind(name: str, parameter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter of each function, by its annotation: an error of ours that names it, before anything is done."""
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[name]
    about = inspect.signature(function).parameters[parameter]
    wrong = WRONG[_kind(about)] + ([] if str(about.annotation).endswith("| None") else [None])
    for value in wrong:
        with pytest.raises(OptionError, match=rf"\b{parameter}\b") as caught:
            function(**{**_required(function), parameter: value})
        assert caught.value.got is not None or value in ("", [""])
        assert len(str(caught.value)) < 600
    assert not list(tmp_path.iterdir())


_ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("ab~.*,:\0\ud800 ", max_size=6)
    | st.binary(max_size=3)
    | st.sampled_from(
        [*TENSORS, nn.Linear(2, 2), Silent(), 10**400, np.int64(3), np.float32(0.5), "cuda:-1", "cpu:7", "meta", "all"]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(FUNCTIONS.keys() - {"recipes", "run_demo"})), data=st.data())
def test_any_arguments_at_all(name: str, data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever two parameters are, nothing but an error of ours comes out. (One function has none, one would do all it can.)"""
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[name]
    odd = data.draw(st.lists(st.sampled_from(sorted(inspect.signature(function).parameters)), min_size=1, max_size=2))
    with contextlib.suppress(SurgeryError):
        function(**{**_required(function), **{parameter: data.draw(_ANY) for parameter in odd}})


@pytest.mark.parametrize("value", [np.int64(2), np.int8(2), np.uint16(2)])
def test_numbers_of_numpy_are_numbers(value: Any, llama: Path, tmp_path: Path) -> None:
    """What arithmetic in numpy gives is taken, and written as what it is."""
    made = surgery.factorize(llama, tmp_path / "f", rank=value, tolerance=np.float32(1e-4), include=("*.q_proj.weight",))
    assert type(made.manifest.options.rank) is int
    assert surgery.Manifest.read(tmp_path / "f").options.rank == 2
    assert surgery.truncated_svd(torch.eye(4), value).s.tolist() == [1, 1]


class _Shown(enum.Enum):
    """Of the kind whose ``str()`` is not its value."""

    RESIDUAL = "residual"
    CPU = "cpu"
    QUERIES = "*.q_proj.weight"


class _Name(str, enum.Enum):  # noqa: UP042  # one that shows itself by its name
    RESIDUAL = "residual"
    CPU = "cpu"
    QUERIES = "*.q_proj.weight"


class _Place(os.PathLike[str]):
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_words_and_paths_of_other_kinds(llama: Path, tmp_path: Path) -> None:
    """What is a str or a path is taken for what it says, whatever it shows itself as; nothing is made of how it is shown."""
    kind = type("Text", (str,), {"__str__": lambda self: "shown otherwise"})
    for name, layout, device in (
        (_Place(llama), _Name.RESIDUAL, _Name.CPU),
        (kind(llama), kind("residual"), kind("cpu")),
        (np.str_(llama), np.str_("residual"), torch.device("cpu")),
        (PurePath(llama), "residual", torch.device("cpu", 0)),
        (enum.Enum("Models", {"HERE": str(llama)}, type=str)["HERE"], "residual", "cpu"),
    ):
        out = tmp_path / "f"
        shutil.rmtree(out, ignore_errors=True)
        made = surgery.factorize(name, _Place(out), rank=2, layout=layout, device=device, include=[_Name.QUERIES])  # type: ignore[arg-type]
        assert json.loads(json.dumps(made.as_json())) == made.as_json()
        manifest = surgery.Manifest.read(_Place(out))  # type: ignore[arg-type]
        assert (manifest.layout, manifest.options.include) == ("residual", ("*.q_proj.weight",))
        assert manifest.device == f"cpu, {processor()}"
    with pytest.raises(OptionError, match="cannot take this as layout"):
        surgery.plan(llama, layout=_Shown.RESIDUAL)  # type: ignore[arg-type]


def test_what_has_an_order_is_a_list(factorized: Path, llama: Path, tmp_path: Path) -> None:
    """Iterators are read once, and whole; what has no order is not guessed at."""
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    scales = surgery.read_scales(factorized / "surgery/scales.safetensors")
    for i, file in enumerate(files):
        surgery.write_scales(file, {key: value + i for key, value in scales.values.items()}, scales.fingerprint)
    given: list[Any] = [
        (file for file in files),
        iter(files),
        dict.fromkeys(files).keys(),
        dict(enumerate(files)).values(),
        np.array([str(file) for file in files]),
    ]
    out = tmp_path / "out"
    for several, weights in zip(given, [None, np.array([1, 1, 2.0]), torch.ones(3), iter([3, 2, 1]), [1.0, 1, 1]], strict=True):
        share = (
            [1.0, 1, 1] if weights is None else [3, 2, 1] if not hasattr(weights, "__len__") else [float(w) for w in weights]
        )
        surgery.blend(several, out, weights=weights, overwrite=True)
        mean = 1 + (share[1] + 2 * share[2]) / sum(share)
        blended = surgery.read_scales(out).values
        assert all(torch.allclose(value, torch.full_like(value, mean)) for value in blended.values())
    every = (f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qk")
    assert len(surgery.plan(llama, rank=2, include=every).targets) == 4  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot take this as include"):  # not what is left of it after the wrong one
        surgery.plan(llama, rank=2, include=iter([1, "*.q_proj.weight"]))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"files=sorted\(\.\.\.\)"):
        surgery.blend(set(files), out)  # type: ignore[arg-type]


def test_wrong_arguments_are_told_what_to_hand_over(factorized: Path) -> None:
    class Some:
        def start(self, label: str, total_bytes: int) -> None: ...
        def item(self, name: str) -> None: ...

    scales = surgery.read_scales(factorized / "surgery/scales.safetensors")
    for call, hint in (
        (lambda: surgery.plan("m", progress=Some()), "no advance, no note, no finish"),  # type: ignore[arg-type]
        (lambda: surgery.plan("m", progress=Silent), "an object of Silent, and not the class"),  # type: ignore[arg-type]
        (lambda: surgery.plan("m", rank=torch.tensor(4)), r"its .item\(\)"),  # type: ignore[arg-type]
        (lambda: surgery.fold("f", scales), "its .values"),  # type: ignore[arg-type]
        (lambda: surgery.fold("f", {"a": np.ones(2)}), "torch.as_tensor"),  # type: ignore[dict-item]
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert re.search(hint, caught.value.hint or "")


def test_errors_go_from_process_to_process() -> None:
    """Each is the same after pickling and copying, with all that it tells as attributes; whatever was found."""

    class Odd(Exception):
        def __init__(self, *, response: object) -> None:
            super().__init__("as it says")

    kinds = [
        kind for name in surgery.__all__ if inspect.isclass(kind := getattr(surgery, name)) and issubclass(kind, SurgeryError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("what", got=Odd(response=lambda: None), expected=3, hint="do this")
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(other) is kind
            assert str(other) == str(error) == "what\n  got:      as it says\n  expected: 3\n  try:      do this"
            assert (other.what, other.got, other.expected, other.hint) == ("what", "as it says", 3, "do this")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_file_is_not_replaced_by_one(overwrite: bool, factorized: Path, llama: Path, tmp_path: Path) -> None:
    """A file that appears under a name takes away what was there: not a pipe or a device, such as /dev/null."""
    pipe, scales = tmp_path / "pipe", factorized / "surgery/scales.safetensors"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for out in (pipe, tmp_path / "link"):
        for call in (
            lambda out=out: surgery.write_scales(out, surgery.read_scales(scales).values, None),
            lambda out=out: surgery.blend([scales], out, overwrite=overwrite),
            lambda out=out: surgery.project(factorized, llama, out, overwrite=overwrite, progress=Silent()),
            lambda out=out: surgery.recommend(llama, budget=50, out=out, overwrite=overwrite),
        ):
            with pytest.raises(OutputError, match="is a pipe or a device"):
                call()
    assert pipe.is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_scales_of_the_wrong_kind(factorized: Path, tmp_path: Path) -> None:
    keys = [target.key for target in surgery.Manifest.read(factorized).targets]
    for odd in ODD_TENSORS:
        with pytest.raises(SurgeryError, match="does not hold real floating-point numbers"):
            surgery.fold(factorized, dict.fromkeys(keys, odd), tmp_path / "out")
    with pytest.raises(ScalesError, match="has the wrong shape"):
        surgery.fold(factorized, dict.fromkeys(keys, torch.tensor(1.0)), tmp_path / "out")
    for odd in (3, None, nn.Linear(2, 2)):
        with pytest.raises(OptionError, match="these are no scales"):
            surgery.SaveScales(scales=odd)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        *({"subfolder": name} for name in ("../x", "", "a/../../b", "x\\y")),
        *({name: value} for name in ("max_memory", "max_device_memory") for value in (0, -1)),
        *({"device": name} for name in ("", "gpu", "cuda:-1", "cuda:99", "cpu,cpu", "cpu:3", "meta", "all")),
        {"rank": 0},
        {"rank": 10**40},
        {"energy": float("nan")},
        {"energy": 0.5, "max_rank": 0},
        {"rank": 2, "energy": 0.5},
        {"include": ["no-such-name"]},
        {"include": [""]},
        {"layout": "overlay", "correction": False},
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], llama: Path) -> None:
    if options.get("device") in ("all", "cuda:99") and torch.cuda.is_available():
        pytest.skip("a machine that has it, or as many")
    with pytest.raises(OptionError):
        surgery.plan(llama, **options)


def test_wrong_calls_are_errors_of_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        surgery.factorize("m", ranks=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        surgery.truncated_svd(torch.eye(3))  # type: ignore[call-arg]


@pytest.mark.skipif(sys.platform != "linux", reason="a file of Linux's that is there, and cannot be read")
@pytest.mark.parametrize("where", ["f/config.json", "f/surgery/manifest.json", "m/model-*", "s", "r.toml"])
def test_files_that_cannot_be_read(where: str, llama: Path, tmp_path: Path) -> None:
    """A folder in a file's place, and a disk that fails: an OSError of ours that names the file."""
    surgery.factorize(llama, tmp_path / "f", rank=2)
    shutil.copytree(llama, tmp_path / "m")
    shutil.copy(tmp_path / "f/surgery/scales.safetensors", tmp_path / "s")
    (tmp_path / "r.toml").write_text('[[rules]]\nmatch = "*.q_proj.weight"\n')
    file = min(tmp_path.glob(where))

    def call() -> None:
        if where in ("r.toml", "m/model-*"):
            surgery.plan(tmp_path / "m", recipe=tmp_path / "r.toml")
        else:
            surgery.fold(tmp_path / "f", tmp_path / "s", tmp_path / "out")

    file.unlink()
    file.symlink_to("/proc/self/mem")  # an ordinary file by its kind, of which the first byte cannot be read
    with pytest.raises(ReadError, match=r"cannot be read \(Input/output error\)") as caught:
        call()
    assert file.name in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, OSError)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_folders_that_nobody_may_look_into(llama: Path, factorized: Path, tmp_path: Path) -> None:
    """Permissions, which a superuser has to lay down first."""
    closed = tmp_path / "closed"
    closed.mkdir()
    for name, target in (("f", factorized), ("m", llama)):
        (closed / name).symlink_to(target)
    (closed / "s").write_bytes((factorized / "surgery/scales.safetensors").read_bytes())
    (closed / "r.toml").write_text('[[rules]]\nmatch = "*.q_proj.weight"\n')
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        calls: list[Callable[[], object]] = [
            lambda: surgery.Manifest.read(closed / "f"),
            lambda: surgery.fold(closed / "f", closed / "s", closed / "out"),
            lambda: surgery.blend([closed / "s"], closed / "b"),
            lambda: surgery.verify(closed / "f"),
            lambda: surgery.plan(closed / "m"),
            lambda: surgery.attach(nn.Linear(2, 2), closed / "f"),
        ]
        for call in calls:
            with pytest.raises(SurgeryError, match="closed") as caught:
                call()
            assert isinstance(caught.value, OSError)
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
