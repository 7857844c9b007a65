"""The pages: links and anchors lead somewhere, the index has every page, and the commands and names that they show exist.

Pages are read as GitHub shows them. A page that is broken on purpose shows that each check can fail.
"""

from __future__ import annotations

import pkgutil
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

import surgery
from surgery.cli.main import main
from surgery.demo.run import MODEL
from surgery.format.manifest import Manifest
from surgery.publish.adapter_cards import adapter_card, extracted_card
from surgery.publish.card import factorized_card, folded_card, merged_card
from surgery.publish.told import ExportedUpdate, FoldedChanges
from tests.kept_layouts import CASES, KEPT

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = sorted(ROOT.glob("*.md")) + DOCS
#: What names a page of the documentation in code: comments, docstrings, messages.
CODE = sorted(
    path
    for folder in ("surgery", "tests", "tools", "examples", "benchmarks", "recipes")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".toml")
)

_FENCE = re.compile(r"^ *(?P<mark>```+|~~~+) *(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *(?P=mark) *$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(
    r"\]\(\s*<?([^()\s<>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s+(\S+)|(?:href|src)=\"([^\"]+)\"", re.MULTILINE
)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def _links(text: str) -> list[str]:
    """Targets of all links and images outside of code."""
    return ["".join(found) for found in _LINK.findall(_SPAN.sub("", _FENCE.sub("", text)))]


def _anchors(text: str) -> set[str]:
    """What the headings of a page are called in links: GitHub's rule, with numbers for headings that repeat."""
    anchors: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        anchors.add(next(one for one in (slug, *(f"{slug}-{i}" for i in range(1, 1000))) if one not in anchors))
    return anchors


def _broken(links: list[str], page: Path, root: Path = ROOT) -> list[str]:
    """Of the links of a page those that lead to no file of the repository, or to no heading of their page."""
    return [link for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|//", link) and not _leads_somewhere(link, page, root)]


def _leads_somewhere(link: str, page: Path, root: Path) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists() or not target.is_relative_to(root.resolve()):
        return False
    return not anchor or (target.suffix == ".md" and anchor in _anchors(target.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert _broken(_links(page.read_text()), page) == []


def test_pages_that_code_names_exist() -> None:
    """In comments, docstrings and messages: docs/NAME.md, also with an anchor."""
    named = {
        (name, path.relative_to(ROOT).as_posix())
        for path in CODE
        if path != Path(__file__)
        for name in re.findall(r"docs/[\w-]+\.md(?:#[\w-]+)?", path.read_text())
    }
    assert {(name, path) for name, path in named if _broken([name], ROOT / "README.md")} == set()


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in _links(index.read_text()) if ":" not in link}
    assert {page.name for page in DOCS if page != index and page.resolve() not in linked} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def _shell_lines(text: str) -> Iterator[str]:
    """Lines of the sh blocks of a page, and those of its text blocks that follow a prompt. Comments are left out."""
    for block in _FENCE.finditer(text):
        joined = block["text"].replace("\\\n", " ")
        if block["language"] in ("text", "console"):
            joined = "\n".join(re.findall(r"^ *\$ (.*)$", joined, re.MULTILINE))
        elif block["language"] not in ("sh", "bash", "shell"):
            continue
        begun = ""
        for line in joined.splitlines():
            begun += re.sub(r"(?:^|(?<=\s))#.*", "", line) + "\n"
            with suppress(ValueError):  # a quotation goes on in the next line
                shlex.split(begun)
                yield begun
                begun = ""
        yield begun


def _surgery_commands(line: str) -> Iterator[list[str]]:
    """The arguments of each call of surgery in a line for a shell."""
    tokens = shlex.shlex(line, posix=True, punctuation_chars=True)
    tokens.whitespace_split, tokens.commenters = True, ""
    calls: list[list[str]] = [[]]
    redirected = False
    for token in tokens:
        if set(token) <= set("|&;()"):
            calls.append([])
        elif set(token) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif token != "...":
            calls[-1].append(token)
    for call in calls:
        while call and re.match(r"[A-Za-z_]\w*=", call[0]):
            del call[0]
        if call[:1] and call[0].rpartition("/")[2].startswith("python") and call[1:3] == ["-m", "surgery"]:
            yield call[3:]
        elif call[:1] and call[0].rpartition("/")[2] == "surgery":
            yield call[1:]


def _command(arguments: list[str]) -> tuple[click.Context, click.Command, list[str]]:
    """The command that arguments call, with the context of its group, and what is left of them.

    Contexts have the group's settings, as a command keeps the help option that it was asked for first.

    Raises:
        click.UsageError: there is none.
    """
    group, rest = click.Context(main, info_name="surgery", **main.context_settings), list(arguments)
    while rest and not rest[0].startswith("-"):
        assert isinstance(group.command, click.Group)
        found = group.command.commands.get(rest.pop(0))
        if found is None:
            raise click.UsageError(f"{group.command_path} has no such command")
        if not isinstance(found, click.Group):
            return group, found, rest
        group = click.Context(found, parent=group, info_name=found.name, **found.context_settings)
    return group, group.command, rest


def _misuse(arguments: list[str]) -> str | None:
    """What the command line says of arguments before it does anything; None if it takes them."""
    try:
        group, command, rest = _command(arguments)
        if not isinstance(command, click.Group):
            command.make_context(command.name, rest, parent=group)
    except click.exceptions.Exit:  # --help
        return None
    except click.UsageError as error:
        return f"{shlex.join(arguments)}: {error.message or type(error).__name__}"
    return None


def _misused(text: str) -> list[str]:
    """Of the commands of a page those that the command line would refuse."""
    calls = [arguments for line in _shell_lines(text) for arguments in _surgery_commands(line)]
    return [found for arguments in calls if (found := _misuse(arguments)) is not None]


def _unknown(text: str) -> list[str]:
    """Of the commands in a page's sentences those that do not exist or have an option that does not. Values may be left out."""
    unknown = []
    for _, span in _SPAN.findall(_FENCE.sub("", text)):
        words = re.sub(r"[\[\]]", " ", span).split()
        if words[:1] != ["surgery"] or not re.match(r"[a-z-]", "".join(words[1:2])):
            continue
        arguments = list(filter(None, (re.sub(r"[=,|].*|\.\.\.", "", word) for word in words[1:])))
        try:
            group, command, rest = _command(arguments)
        except click.UsageError as error:
            unknown.append(f"{span}: {error.message}")
            continue
        context = group if group.command is command else click.Context(command, parent=group)
        known = {name for one in command.get_params(context) for name in (*one.opts, *one.secondary_opts)}
        unknown += [f"{span}: {word}" for word in rest if re.match(r"--?[a-z]", word) and word not in known]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    assert _misused(page.read_text()) == []
    assert _unknown(page.read_text()) == []


def _is_there(name: str) -> bool:
    """Whether a dotted name, such as ``surgery.attach``, is that of a module or of something in one."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def _missing_names(text: str) -> list[str]:
    """Of the names of the package on a page those that do not exist."""
    return [name for name in re.findall(r"(?<![\w./-])surgery(?:\.[A-Za-z_]\w*)+", text) if not _is_there(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_of_the_package_exist(page: Path) -> None:
    assert _missing_names(page.read_text()) == []


def test_the_first_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of docs/start.md, two steps of it, between the commands that stand around it."""
    blocks = _FENCE.finditer((ROOT / "docs/start.md").read_text())
    (block,) = (one["text"] for one in blocks if one["language"] == "python" and "surgery.attach" in one["text"])
    assert "blocks[64:544]" in block
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, "demo")
    surgery.factorize("demo", "factorized", rank=16, progress=surgery.Silent())
    exec(block.replace("blocks[64:544]", "blocks[64:80]"), {})
    report = surgery.fold("factorized", "scales.safetensors", "folded", progress=surgery.Silent())
    assert (report.changed, report.targets) == (42, 42)


def _cards() -> Iterator[str]:
    """Every kind of card, of every layout."""
    for name in CASES:
        manifest = Manifest.read(KEPT / name)
        for train in ("scales", "core"):
            yield factorized_card(manifest, "acme/tiny-f", train)
            for changed, adapted, dequantized in ((0, 0, False), (2, 1, True)):
                yield folded_card(manifest, "acme/tiny", FoldedChanges(changed, adapted, dequantized, train))
            for kind in ("peft", "peft-trainable", "peft-pissa", "diffusers", "kohya"):
                yield adapter_card(manifest, "acme/tiny-a", ExportedUpdate(modules=4, rank=4, train=train, kind=kind))
        yield merged_card(manifest.source, "acme/tiny-m", adapters=2, changed=3, architecture="LlamaForCausalLM")
        yield extracted_card(manifest.source, manifest.source, "acme/tiny-e", size="4 modules", component=None)


def test_cards_lead_nowhere_else_and_their_commands_exist() -> None:
    """A card is read on the hub, beside no page of this repository."""
    cards = list(_cards())
    assert any("surgery verify factorized" in card for card in cards)
    for card in cards:
        assert [link for link in _links(card) if "://" not in link] == []
        assert _misused(card) + _unknown(card) == []


BROKEN = r"""
# Title
## The `same` heading, twice
## The `same` heading, twice
[good](#the-same-heading-twice) [good](#the-same-heading-twice-1) [good](other.md#it-is-here) [a folder](../docs)
[no third](#the-same-heading-twice-2) [no heading](other.md#it-is-not) [of a block](#no-heading) [no file](none.md)
![no picture](none.svg) [no page](https://example.com/#x) `[code](none.md)` [outside](../../elsewhere.md) [`of code`](code.md)
```sh
# no heading
surgery plan MODEL --rank 16 > plan.txt && surgery fold FACTORIZED   # the model's: without the scales
A=1 .venv/bin/surgery merge MODEL one two --weights 0.7,0.3 \
    --rounding sideways
python -m surgery scales new FACTORIZED --train core; surgery scales old
surgery plan MODEL --rank many | surgery plan --help
surgery factorize MODEL ... --sideways
surgery recipes --json | python -c "
for line in 'two lines': surgery"
```
```text
$ surgery amputate MODEL
surgery is no command here
```
```python
surgery.amputate(surgery.linalg.svd.truncated_svd, surgery.linalg.svd.nothing)
```
`surgery scales show`, `surgery spectra
--nothing MODEL`, `surgery factorize MODEL [--train scales|core] --no-correction ...`, `surgery heal`, `surgery.attach(--none)`.
"""


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text(BROKEN)
    (docs / "other.md").write_text("## It is (here)\n")
    (tmp_path.parent / "elsewhere.md").write_text("")
    assert _broken(_links(BROKEN), docs / "page.md", tmp_path) == [
        "#the-same-heading-twice-2",
        "other.md#it-is-not",
        "#no-heading",
        "none.md",
        "none.svg",
        "../../elsewhere.md",
        "code.md",
    ]
    told = _misused(BROKEN)
    starts = [
        "fold FACTORIZED:",
        "merge MODEL one two",
        "scales old:",
        "plan MODEL --rank many:",
        "factorize MODEL",
        "amputate",
    ]
    assert [one for one, start in zip(told, starts, strict=True) if not one.startswith(start)] == []
    assert _missing_names(BROKEN) == ["surgery.amputate", "surgery.linalg.svd.nothing"]
    assert [one.split(": ")[-1] for one in _unknown(BROKEN)] == ["--nothing", "surgery has no such command"]
