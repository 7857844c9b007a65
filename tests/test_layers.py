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


def _module(path: Path) -> str:
    """Its name, as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Late imports and those for type checkers are counted; the table of the package's own names is no import."""
    modules = {_module(path): path for path in PACKAGE.rglob("*.py")}
    graph = {
        name: {used if used in modules else used.rpartition(".")[0] for used in _imported(path)} & modules.keys()
        for name, path in modules.items()
        if name != "surgery"
    }
    while graph:
        done = {name for name, used in graph.items() if not used & graph.keys()}
        assert done, f"a circle is among these, and what imports them: {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in done}


#: Modules of more than 400 lines -> why.
LONG_MODULES: dict[str, str] = {}


def test_modules_are_short() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name for name, lines in lengths.items() if lines > 400} == LONG_MODULES.keys()


#: Folders of more than 2,500 lines of Python, without the folders in them -> why.
LARGE_ROOMS: dict[str, str] = {}


def test_no_room_is_too_large() -> None:
    rooms: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.parent.relative_to(ROOT).as_posix()
        rooms[room] = rooms.get(room, 0) + len(path.read_text().splitlines())
    assert {room for room, lines in rooms.items() if lines > 2500} == LARGE_ROOMS.keys()


#: Functions of more than six parameters that are neither called by users nor commands.
WIDE_FUNCTIONS: set[str] = set()


def _functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module, also those inside of classes and of others, by what ``WIDE_FUNCTIONS`` calls them."""
    todo: list[tuple[str, ast.AST]] = [(f"{path.relative_to(PACKAGE).as_posix()}:", ast.parse(path.read_text()))]
    while todo:
        name, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                todo.append((f"{name}{'' if name.endswith(':') else '.'}{child.name}", child))
                if isinstance(child, ast.FunctionDef):
                    yield todo[-1][0], child
            else:
                todo.append((name, child))


def _is_called_from_outside(function: ast.FunctionDef) -> bool:
    """Whether its decorators make it part of the library's interface, or a command."""
    decorators = [ast.unparse(one) for one in function.decorator_list]
    return any("on_its_own_terms" in one or re.match(r"(\w+|click)\.(command|group)\(", one) for one in decorators)


def _parameters(function: ast.FunctionDef) -> int:
    """How many it takes; ``self`` and ``cls`` are none."""
    given = function.args
    named = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"])) + sum(one is not None for one in (given.vararg, given.kwarg))


def test_internal_functions_take_few_parameters() -> None:
    wide = {
        name
        for path in PACKAGE.rglob("*.py")
        for name, function in _functions(path)
        if _parameters(function) > 6 and not _is_called_from_outside(function)
    }
    assert wide == WIDE_FUNCTIONS


#: Names that two modules define, commands aside, whose functions are called as what they run.
HOMONYMS = {"read_scales", "write_scales"}


def test_no_two_modules_give_one_name_to_two_things() -> None:
    """Classes, and functions that other modules may use."""
    homes: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            is_command = isinstance(node, ast.FunctionDef) and _is_called_from_outside(node) and _layer(path) == "cli"
            if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and node.name[0] != "_" and not is_command):
                homes.setdefault(node.name, []).append(path)
    assert {name for name, paths in homes.items() if len(paths) > 1} == HOMONYMS
