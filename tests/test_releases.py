"""The versions that are promised are those that are tried."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests import releases
from tests.releases import ROOT, has, needs, pins

OLDEST, AXOLOTL, NEWEST = (
    pins(f) for f in ("tools/constraints-oldest.txt", "tools/constraints-axolotl.txt", "constraints.txt")
)
#: Of the page's table: the columns, as packages.
COLUMNS = ("transformers", "peft", "huggingface-hub", "trl", "accelerate", "torch")


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines if not line.startswith(project["name"])]


def _lower(requirement: Requirement) -> Version | None:
    bounds = [Version(spec.version) for spec in requirement.specifier if spec.operator == ">="]
    return bounds[0] if bounds else None


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_every_lower_bound_is_installed_by_make(requirement: Requirement) -> None:
    """In the oldest environment, or in the newest where that is the only one: tools, and what ships no older wheels."""
    bound = _lower(requirement)
    if requirement.name in ("torch", "types-tqdm"):  # an older torch is gigabytes, and tried by hand; types need no bound
        return
    assert bound == Version((OLDEST if requirement.name in OLDEST else NEWEST)[requirement.name])


def test_all_environments_have_the_same_torch() -> None:
    """Its wheel is what takes the time."""
    assert OLDEST["torch"] == AXOLOTL["torch"] == NEWEST["torch"]


def _table() -> dict[str, list[str]]:
    page = (ROOT / "docs/compatibility.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("row", "constraints"),
    [("newest (`make test`)", NEWEST), ("axolotl 0.19 (`make test-oldest`)", AXOLOTL), ("oldest (`make test-oldest`)", OLDEST)],
)
def test_the_page_has_the_versions_of_the_environments(row: str, constraints: dict[str, str]) -> None:
    assert _table()[row][: len(COLUMNS)] == [constraints[package] for package in COLUMNS]


def test_the_page_says_how_old_and_how_new() -> None:
    page = (ROOT / "docs/compatibility.md").read_text()
    for package, name in (("transformers", "transformers"), ("peft", "PEFT"), ("huggingface-hub", "huggingface-hub")):
        low, high = re.search(rf"{name} (\d[\d.]*\d) to (\d[\d.]*\d)", page).groups()  # type: ignore[union-attr]
        assert Version(low) == Version(OLDEST[package])
        assert Version(high) >= Version(NEWEST[package])


@pytest.mark.skipif(releases.OLDER, reason="in an older environment")
def test_nothing_is_skipped_for_its_version_here() -> None:
    """An environment that is as constraints.txt says has all that tests need; one that is not fails in place of skipping."""
    for mark in (needs("transformers", ">=99", "a thing"), needs("no-such-package", ">=1", "it"), has("math", "no_such_name")):
        assert mark.args == (False,)
    with pytest.raises(AttributeError), releases.known_classes():
        raise AttributeError("module transformers has no attribute NoSuchModel")


def test_what_an_older_release_lacks_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "OLDER", True)
    here = metadata.version("pytest")
    newer = needs("pytest", ">=99", "a thing")
    assert (newer.args, newer.kwargs) == ((True,), {"reason": f"pytest is {here}: a thing needs >=99"})
    assert needs("pytest", f">={here}", "a thing").args == (False,)
    assert needs("no-such-package", ">=1", "it").kwargs["reason"] == "no-such-package is not here: it needs >=1"
    assert has("math", "no_such_name").args == (True,)
    with pytest.raises(pytest.skip.Exception, match="NoSuchModel"), releases.known_classes():
        raise AttributeError("module transformers has no attribute NoSuchModel")
    with pytest.raises(AttributeError), releases.known_classes():
        raise AttributeError("'NoneType' object has no attribute 'x'")
