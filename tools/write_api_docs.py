"""Print docs/api.md: the signature and the docstring of every name of the package, as Markdown."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import surgery
import surgery.errors
import surgery.peft

HEAD = """# From Python

This page lists everything that `import surgery` gives. surgery imports a name when it is first used. The first name takes
about a second, because torch is imported.

- Paths are `str`, `Path` or any `os.PathLike` of text; `~` is expanded, environment variables are not. A list may be any
  ordered collection: a tuple, an iterator, an array. A `device` is its name or a `torch.device`.
- An argument of the wrong kind is an `OptionError` that names it. What is wrong with the call itself, such as an unknown
  keyword, is Python's `TypeError`.
- The package has types (`py.typed`).

Written by `make docs` from the docstrings; a test holds it to them.
"""
#: Headings in a docstring that are followed by indented lines.
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Warns")
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):")
_ITEM = re.compile(r"(\w[\w, ]*): (.*)", re.DOTALL)
_WIDTH = 100


def page() -> str:
    named = {name: getattr(surgery, name) for name in surgery.__all__}
    functions = {name: value for name, value in named.items() if inspect.isfunction(value)}
    kinds = {name: value for name, value in named.items() if inspect.isclass(value)}
    classes = {name: kind for name, kind in kinds.items() if not issubclass(kind, Exception)}
    rest = sorted(named.keys() - functions.keys() - kinds.keys())
    parts = [HEAD, "## Functions\n"]
    for name, function in sorted(functions.items()):
        parts += [f"### {name}\n", code(signature(f"surgery.{name}", function)), markdown(function)]
    parts.append("## Classes\n")
    for name, kind in sorted(classes.items()):
        parts += [f"### {name}\n", markdown(kind)]
        for inner, member in members(kind):
            parts.append(f"#### {name}.{inner}\n")
            if not isinstance(member, property):
                parts.append(code(signature(f"{name}.{inner}", member)))
            parts.append(markdown(member))
    parts += ["## surgery.peft\n", markdown(surgery.peft)]
    for name in ("SpectralConfig", "scales_of"):
        member = getattr(surgery.peft, name)
        code_of = [code(signature(f"surgery.peft.{name}", member))] if inspect.isfunction(member) else []
        parts += [f"### {name}\n", *code_of, markdown(member)]
    parts += ["## Errors\n", *errors()]
    parts += ["## Other names\n", *(f"`surgery.{name}`: a {type(named[name]).__name__}.\n" for name in rest)]
    return "\n".join(parts)


def errors() -> Iterator[str]:
    """The section of errors: the base class, and the tree of classes from the docstring of their module."""
    about, _, tree = (inspect.getdoc(surgery.errors) or "").partition("\n\n")
    yield f"{about}\n"
    yield markdown(surgery.SurgeryError)
    for paragraph in tree.split("\n\n"):
        is_tree = "+--" in paragraph or paragraph.startswith("SurgeryWarning")
        yield code(paragraph, "text") if is_tree else f"{inline(paragraph)}\n"


def members(kind: type) -> list[tuple[str, Any]]:
    """The public methods and properties of a class that have docstrings, by name."""
    found = []
    for name, member in vars(kind).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)) and inspect.getdoc(plain):
            found.append((name, plain))
    return sorted(found, key=lambda pair: pair[0])


def signature(name: str, function: Callable[..., Any]) -> str:
    """The signature of a function as code, on one line or with a line for each parameter."""
    found = inspect.signature(function)
    parts: list[str] = []
    starred = False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    result = f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= _WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```\n"


def markdown(value: Any) -> str:
    """A docstring as Markdown."""
    types = {field.name: field.type for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    parts = []
    for heading, text in sections(inspect.getdoc(value) or ""):
        if heading is None:
            parts.append(code(textwrap.dedent(text)) if text.startswith("    ") else f"{inline(text)}\n")
            continue
        parts.append(f"**{heading}**\n")
        found = items(text)
        if found and heading != "Returns":
            parts.append("".join(item(names, about, types) for names, about in found))
        else:
            parts.append(f"{inline(text)}\n")
    return "\n".join(parts)


def sections(text: str) -> list[tuple[str | None, str]]:
    """(heading, text) of each section of a docstring; the heading of a plain paragraph is None."""
    found: list[tuple[str | None, str]] = []
    heading: str | None = None
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        match = _SECTION.fullmatch(lines[0])
        if match is not None:
            heading = match[1]
            found.append((heading, textwrap.dedent("\n".join(lines[1:]))))
        elif heading is not None and paragraph.startswith("    "):
            found.append((None, textwrap.dedent(paragraph)))
        else:
            heading = None
            found.append((None, paragraph))
    return found


def items(text: str) -> list[tuple[str, str]]:
    """(names, text) of each entry ``name, name: text`` in a section; empty if the section is plain text."""
    found = []
    for entry in re.split(r"\n(?! )", text):
        match = _ITEM.fullmatch(entry)
        if match is None:
            return []
        found.append((match[1], " ".join(match[2].split())))
    return found


def item(names: str, about: str, types: dict[str, Any]) -> str:
    each = [name.strip() for name in names.split(",")]
    kinds = {str(types[name]) for name in each if name in types}
    kind = f" (`{kinds.pop()}`)" if len(kinds) == 1 else ""
    return f"- {', '.join(f'`{name}`' for name in each)}{kind}: {inline(about)}\n"


def inline(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")
