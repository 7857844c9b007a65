"""What ``import surgery`` gives: its names, its types, its documentation, and what its functions say of wrong arguments."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.arguments import as_path
from surgery.errors import OptionError, ReadError, ScalesError, SurgeryError
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
    named = {
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls") and parameter.name[0] != "_" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    assert told == named
    result = str(signature.return_annotation)
    assert result == "None" or "Iterator" in result or "Returns" in found or name in METHODS
    assert "Raises" in found or name in METHODS
