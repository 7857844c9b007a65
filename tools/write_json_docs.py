"""Print docs/json.md: what each command prints with --json, from the fields and docstrings of the reports."""

from __future__ import annotations

import inspect
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from surgery.cli.printing import ADDED
from surgery.commands.adapters.export import ExportReport
from surgery.commands.adapters.extract import ExtractPlan
from surgery.commands.adapters.merge import MergePlan, MergeReport
from surgery.commands.adapters.resize import ResizeReport
from surgery.commands.blend import BlendReport
from surgery.commands.factorize import FactorizeReport
from surgery.commands.fold import FoldReport
from surgery.commands.inspect import InspectReport
from surgery.commands.new_scales import NewScales
from surgery.commands.project import ProjectReport
from surgery.commands.scales import ScalesSummary
from surgery.commands.verify import VerifyReport
from surgery.commands.verify_folded import FoldCheck
from surgery.demo.run import DemoReport
from surgery.extraction.told import ExtractReport
from surgery.planning.recipes import RecipesReport
from surgery.planning.summary import PlanSummary
from surgery.reports import Report, json_fields
from surgery.study.overview import Findings
from surgery.study.recommend import Recommendation

HEAD = """# JSON

With `--json` a command prints one object on stdout, and nothing else there. From Python it is `as_json()` of what the operation
returns, without what only the command knows: `seconds`, the `profile` and, of `spectra`, `out`.

`schema_version` changes when an entry is gone or means something else, and not when there is a new one: ignore entries that you
do not know.
Sizes are in bytes, times in seconds, paths are strings as they were given. A number that is not finite is `null`.

Written by `make docs` from the reports' fields and docstrings; a test holds it to what the commands print.
"""

#: What each command prints, and what it adds to the report.
COMMANDS: dict[str, tuple[type[Report], tuple[str, ...]]] = {
    "blend": (BlendReport, ()),
    "demo": (DemoReport, ()),
    "export": (ExportReport, ("seconds",)),
    "extract": (ExtractReport, ("seconds", "profile")),
    "extract --dry-run": (ExtractPlan, ()),
    "factorize": (FactorizeReport, ("seconds", "profile")),
    "fold": (FoldReport, ("seconds", "profile")),
    "inspect": (InspectReport, ()),
    "merge": (MergeReport, ("seconds", "profile")),
    "merge --dry-run": (MergePlan, ()),
    "plan": (PlanSummary, ("seconds",)),
    "project": (ProjectReport, ("seconds",)),
    "recipes": (RecipesReport, ()),
    "recommend": (Recommendation, ("seconds",)),
    "resize": (ResizeReport, ("seconds",)),
    "scales new": (NewScales, ()),
    "scales show": (ScalesSummary, ()),
    "spectra": (Findings, ("out", "seconds")),
    "verify": (VerifyReport, ("seconds",)),
    "verify --folded": (FoldCheck, ("seconds",)),
}

_OTHER_WORDS = {
    ("plan", "seconds"): "an estimate of what `factorize` takes on this machine, without downloads",
    ("factorize", "schema_version"): "with `--dry-run` the command prints what `plan` prints",
}


def entries(kind: type[Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, type, meaning) of each entry in the JSON of a dataclass; nested entries come after the one that holds them."""
    meanings, hints = _meanings(kind), get_type_hints(kind)
    for name, field in json_fields(kind).items():
        text, inner = _type(hints[field.name])
        yield path + name, text, meanings[field.name]
        if inner is not None:
            yield from entries(inner, f"{path}{name}{'[]' if text.startswith('array') else ''}.")


def _type(hint: Any) -> tuple[str, type[Any] | None]:
    """A type in words, and the dataclass that its values or items are, if they are one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (one,) = (argument for argument in arguments if argument is not types.NoneType)
        text, inner = _type(one)
        return f"{text} or null", inner
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments), None
    if origin in (list, tuple):
        text, inner = _type(arguments[0])
        return f"array of {text}s" if " " not in text else f"array of {text}", inner
    if origin is not None and issubclass(origin, Mapping):
        return f"object: name to {_type(arguments[1])[0]}", None
    if is_dataclass(hint) and isinstance(hint, type):
        return "object", hint
    return {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean"}[hint], None


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Attribute -> its meaning, from the section ``Attributes`` of a docstring."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    if section is None:
        raise ValueError(f"the docstring of {kind.__name__} has no attributes")
    found = {}
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()):
        names, _, meaning = entry.strip().partition(": ")
        for name in names.split(", "):
            found[name] = _for_json(re.sub(r"\s+", " ", meaning).removesuffix("."))
    return found


def _for_json(text: str) -> str:
    return re.sub(r"\bNone\b", "`null`", text.replace("``", "`"))


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    """A Markdown table with one line for successive entries of the same type and meaning."""
    lines = ["| entry | type | meaning |", "| --- | --- | --- |"]
    for (text, meaning), group in itertools.groupby(rows, key=lambda row: row[1:]):
        names = ", ".join(f"`{path}`" for path, _, _ in group)
        lines.append("| {} | {} | {} |".format(*(cell.replace("|", r"\|") for cell in (names, text, meaning))))
    return "\n".join(lines)


def page() -> str:
    parts = [HEAD]
    version = _meanings(Report)["schema_version"].partition(":")[0]
    for command, (kind, added) in COMMANDS.items():
        first = _for_json((kind.__doc__ or "").splitlines()[0])
        rows = [("schema_version", f"`{kind.schema_version}`", version), *entries(kind)]
        rows += [(name, *ADDED[name]) for name in added]
        rows = [(path, text, _OTHER_WORDS.get((command, path), meaning)) for path, text, meaning in rows]
        parts.append(f"## surgery {command}\n\n{first}\n\n{_table(rows)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
