"""Layers import only downwards: the table in CONTRIBUTING.md, held against the imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "surgery"
#: What a cell of the last column names, and the modules that it means.
FORBIDDEN = {"torch": "torch", "click": "click", "the hub": "huggingface_hub"}


def _table() -> dict[str, tuple[int, str]]:
    """Layer, such as ``linalg`` -> its row, counted from above, and what it never imports."""
    rows = re.findall(r"^\| (`.*) \| (?:.*) \| (.*?) ?\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    layers = ((name, row, never) for row, (names, never) in enumerate(rows) for name in re.findall(r"`(\w+)(?:\.py|/)`", names))
    return {name: (row, never) for name, row, never in layers}


def _imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def test_every_module_is_in_the_table() -> None:
    assert {_layer(path) for path in FILES} == _table().keys()
    rows = [row for row, _ in _table().values()]
    assert all(before <= after for before, after in pairwise(rows))


@pytest.mark.parametrize("layer", sorted({_layer(path) for path in FILES}))
def test_layers_import_only_downwards(layer: str) -> None:
    table = _table()
    row, never = table[layer]
    forbidden = [module for name, module in FORBIDDEN.items() if name in never]
    for path in FILES:
        if _layer(path) != layer:
            continue
        for module in _imported(path):
            assert not any(f"{module}.".startswith(f"{one}.") for one in forbidden), f"{path.name} imports {module}"
            if module.startswith("surgery.") and (used := module.split(".")[1]) in table:
                assert table[used][0] <= row, f"{path.name} imports {module}, of a layer above"
