"""One ``Options`` from the command line to the manifest: as an object, as keywords, as both, and what each function takes."""

from __future__ import annotations

import inspect
import json
import pydoc
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner

import surgery
from surgery.cli.main import main
from surgery.cli.options import fills_options
from surgery.errors import OptionError
from surgery.format.options import OptionKeywords, Options, RecommendKeywords, SpectraKeywords
from surgery.progress import Silent
from tests.models import files_of

FIELDS = [field.name for field in fields(Options)]
KEYWORDS: dict[str, type[RecommendKeywords]] = {
    "factorize": OptionKeywords,
    "plan": OptionKeywords,
    "spectra": SpectraKeywords,
    "recommend": RecommendKeywords,
}
#: Of each field a value that is not its default, for a model that has such tensors.
SET: dict[str, Any] = {
    "rank": 3,
    "energy": 0.5,
    "max_rank": 5,
    "recipe": "attention",
    "split": True,
    "correction": False,
    "include": ("*.q_proj.weight", "*.k_proj.weight"),
    "exclude": ("*.k_proj.weight",),
    "seed": 7,
    "tolerance": 1e-4,
    "prove": True,
}


def test_keywords_are_the_fields() -> None:
    """The types that type checkers hold keywords against are those of the fields, or take what becomes one."""
    loose = {"recipe": str | Path | None, "include": tuple[str, ...] | list[str], "exclude": tuple[str, ...] | list[str]}
    kinds = get_type_hints(Options)
    assert list(kinds) == FIELDS == list(SET)
    assert get_type_hints(OptionKeywords) == {name: loose.get(name, kinds[name]) for name in get_type_hints(OptionKeywords)}
    assert get_type_hints(OptionKeywords).keys() == set(FIELDS)


@pytest.mark.parametrize("name", KEYWORDS)
def test_help_shows_each_keyword(name: str) -> None:
    """As if it were written in the signature: with its type and its default, after ``options`` and in their order."""
    function = getattr(surgery, name)
    parameters = inspect.signature(function).parameters
    expected = [field for field in FIELDS if field in KEYWORDS[name].__annotations__]
    names = list(parameters)
    after = names.index("options") + 1
    assert names[after : after + len(expected)] == expected
    assert set(expected) == set(KEYWORDS[name].__annotations__)
    page = pydoc.plain(pydoc.render_doc(function))
    for field in expected:
        assert parameters[field].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[field].default == getattr(Options(), field)
        assert f"{field}: {parameters[field].annotation!r} = {parameters[field].default!r}" in page
    assert "**" not in page.split(" -> ")[0]


@pytest.mark.parametrize("chosen", [{"rank": 3}, {"energy": 0.2, "max_rank": 5}, {"correction": False}, {}])
def test_an_object_keywords_and_both_are_one_and_the_same(chosen: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    more = {name: SET[name] for name in ("recipe", "include", "exclude", "seed", "tolerance", "prove")}
    options = Options(**chosen, **more)
    surgery.factorize(llama, tmp_path / "object", options=options)
    surgery.factorize(llama, tmp_path / "keywords", **chosen, **more)
    made = surgery.factorize(llama, tmp_path / "both", options=Options(**more), seed=7, **chosen)
    assert files_of(tmp_path / "object") == files_of(tmp_path / "keywords") == files_of(tmp_path / "both")
    assert made.manifest.options == options
    recorded = json.loads((tmp_path / "object/surgery/manifest.json").read_bytes())["options"]
    assert recorded == json.loads(json.dumps(asdict(options)))
    assert list(recorded) == FIELDS
    assert surgery.plan(llama, options=options) == surgery.plan(llama, **chosen, **more)
    again = surgery.factorize(llama, tmp_path / "again", options=surgery.Manifest.read(tmp_path / "both").options)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "both")
    assert again.fingerprint == made.fingerprint


def test_the_recipe_that_applies_is_recorded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.toml").write_text('[[rules]]\nmatch = "*.q_proj.weight"\nrank = 2\n')
    for recipe, expected in ((None, "llama"), ("attention", "attention"), ("~/mine.toml", "mine")):
        options = Options(recipe=recipe, seed=7)
        made = surgery.factorize(llama, tmp_path / expected, options=options)
        assert made.manifest.options == replace(options, recipe=expected)


def test_studies_take_options_too(llama: Path, tmp_path: Path) -> None:
    more = {name: SET[name] for name in ("recipe", "include", "seed", "tolerance")}
    quiet = Silent()
    studied = surgery.spectra(llama, top=2, options=Options(**more), progress=quiet)
    assert studied.as_json() == surgery.spectra(llama, top=2, **more, progress=quiet).as_json()
    assert {target["tensor"].split(".")[-2] for target in studied.targets} == {"q_proj", "k_proj"}
    assert (studied.options.seed, studied.options.tolerance, studied.options.recipe) == (7, 1e-4, "attention")
    one = surgery.recommend(llama, budget=9, max_rank=2, out=tmp_path / "a", options=Options(**more), progress=quiet)
    other = surgery.recommend(llama, budget=9, max_rank=2, out=tmp_path / "b", **more, progress=quiet)
    assert replace(one, out=other.out) == other
    assert len(one.ranks) == 4


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in KEYWORDS for field in FIELDS])
def test_what_a_function_has_no_use_for_is_refused(name: str, field: str, tmp_path: Path) -> None:
    """By name, before anything else; whatever it has a use for leads on, to the model that is not there."""
    arguments: dict[str, Any] = {"out": tmp_path / "r.toml", "budget": 5} if name == "recommend" else {}
    call = getattr(surgery, name)
    has_no_use = field not in KEYWORDS[name].__annotations__
    with pytest.raises(surgery.SurgeryError) as caught:
        call(tmp_path / "no-model", options=Options(**{field: SET[field]}), progress=Silent(), **arguments)
    if has_no_use:
        assert isinstance(caught.value, OptionError)
        assert caught.value.what == f"{name}() does not use {field}, which its options set"
    else:
        assert isinstance(caught.value, surgery.SourceError)
    assert (name, field) in {
        *(("spectra", one) for one in ("rank", "energy", "max_rank", "correction", "prove")),
        *(("recommend", one) for one in ("rank", "energy", "max_rank", "correction", "split", "prove")),
    } or not has_no_use


@pytest.mark.parametrize("field", FIELDS)
def test_a_keyword_that_contradicts_the_options_is_refused(field: str, tmp_path: Path) -> None:
    options = Options(**{field: SET[field]})
    given: dict[str, Any] = {field: getattr(Options(), field)}
    with pytest.raises(OptionError, match=rf"^plan\(\): the keyword {field} contradicts its options"):
        surgery.plan(tmp_path / "no-model", options=options, **given)
    with pytest.raises(surgery.SourceError):  # not if it says the same
        surgery.plan(tmp_path / "no-model", options=options, **{field: SET[field]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "a rank and an energy contradict each other"),
        ({"rank": 0}, "the rank must be at least 1"),
        ({"max_rank": 0, "energy": 0.5}, "the max-rank must be at least 1"),
        ({"energy": 0.0}, "the energy makes no sense"),
        ({"energy": float("nan")}, "the energy makes no sense"),
        ({"tolerance": 1.0}, "the tolerance makes no sense"),
        ({"tolerance": 1e-9}, "at least 1.9e-06, the rounding of torch.float32"),
        ({"seed": -1}, "the seed makes no sense"),
        ({"seed": 1 << 63}, "the seed makes no sense"),
    ],
)
def test_values_that_make_no_sense_for_any_model(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Told before the model is looked for; an object may hold them, as one from a manifest that somebody has edited does."""
    options = Options(**wrong)
    with pytest.raises(OptionError, match=message):
        options.check()
    for call in (
        lambda: surgery.plan(tmp_path / "no-model", options=options),
        lambda: surgery.factorize(tmp_path / "no-model", tmp_path / "out", **wrong),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_the_wrong_kind(field: str) -> None:
    for value in (object(), b"x", {"a": 1}, 1j):
        with pytest.raises(OptionError, match=rf"Options\(\) cannot take this as {field}"):
            Options(**{field: value})  # type: ignore[arg-type]
    assert type(getattr(Options(**{field: SET[field]}), field)) is type(SET[field])


def test_lists_become_tuples() -> None:
    one = Options(include=["a", "b"], exclude=iter("c"))  # type: ignore[arg-type]
    assert (one.include, one.exclude) == (("a", "b"), ("c",))
    assert hash(one) == hash(Options(include=("a", "b"), exclude=("c",)))
    with pytest.raises(OptionError, match="cannot take this as include"):
        Options(include="*.weight")  # type: ignore[arg-type]


def test_the_command_line_fills_one() -> None:
    """Every field has an option, whose default is that of the field; what else a command takes comes as before."""
    given: list[Any] = []

    @click.command()
    @fills_options(*FIELDS[:4], click.option("--other"), *FIELDS[4:], words={"rank": "other words"})
    def command(**received: Any) -> None:
        given.append(received)

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return given.pop()

    assert run() == {"options": Options(), "other": None}
    words = "--rank 3 --energy 0.5 --max-rank 5 --recipe attention --split --no-correction --include *.q_proj.weight"
    words += " --include *.k_proj.weight --exclude *.k_proj.weight --seed 7 --tolerance 1e-4 --prove --other x"
    assert run(*words.split()) == {"options": Options(**SET), "other": "x"}
    page = CliRunner().invoke(command, ["--help"]).output
    assert "other words" in page
    assert page.index("--recipe") < page.index("--other") < page.index("--split")


def test_what_the_command_line_records(llama: Path, tmp_path: Path) -> None:
    """The same as the function with the same options."""
    words = [
        "--rank",
        "3",
        "--recipe",
        "attention",
        "--exclude",
        "*.k_proj.weight",
        "--seed",
        "7",
        "--tolerance",
        "1e-4",
        "--prove",
    ]
    done = CliRunner().invoke(main, ["factorize", str(llama), "-o", str(tmp_path / "f"), *words])
    assert done.exit_code == 0, done.output
    options = Options(rank=3, recipe="attention", exclude=("*.k_proj.weight",), seed=7, tolerance=1e-4, prove=True)
    assert surgery.Manifest.read(tmp_path / "f").options == options
    surgery.factorize(llama, tmp_path / "g", options=options)
    assert files_of(tmp_path / "f") == files_of(tmp_path / "g")
