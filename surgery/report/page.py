"""The page of a report: one HTML file, which needs no network, with all that ``surgery spectra`` has found."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from surgery.errors import MissingExtra
from surgery.files.file_writer import write_file
from surgery.report import findings, listing
from surgery.report.claim_cards import Card, cards
from surgery.report.listing import write_csv
from surgery.report.reading import terms
from surgery.report.schema import check_spectra
from surgery.report.summary import Group, change, groups_of, half_energy_rank, median, median_rank, relative_update
from surgery.report.verdicts import counted, top_amplified
from surgery.report.words import cosine, count, html_text, matrices, number, percent, rank_text

__all__ = ["write_csv", "write_page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(spectra: dict[str, Any], path: Path) -> None:
    """Write a page that needs nothing but itself: findings, pictures, a table and how to read them.

    The same numbers give the same bytes. Names in it come from files of strangers and are escaped.

    Args:
        spectra: what ``surgery spectra`` has found (docs/study.md).
        path: the file to write, such as ``report/index.html``; its folder is made if need be.

    Raises:
        MissingExtra: matplotlib is not installed.
        FormatError: numbers of another schema version, or that are none of a matrix.
        OutputError: the file cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "the pictures of a report are drawn with matplotlib, which is not installed",
            hint="pip install 'matplotlib>=3.10.8'",
        ) from error
    check_spectra(spectra)
    write_file(path, _page(spectra).encode())


def _page(spectra: dict[str, Any]) -> str:
    # These need matplotlib, which the rest of the package does without.
    from surgery.report.drawing import layer_colors
    from surgery.report.gallery import pictures

    groups = groups_of(spectra["targets"])
    names = [html_text(spectra[which]["name"]) for which in ("tuned", "base") if spectra[which] is not None]
    title = f"Singular spectra of {' against '.join(names)}"
    heading = f"Singular spectra of {' against '.join(f'<bdi>{name}</bdi>' for name in names)}"
    told = cards(spectra)
    sections = [
        *([("claims", "Claims about fine-tuning, tried here", _claims(told))] if told else []),
        ("findings", "More findings" if told else "Findings", _findings(spectra, groups)),
        ("pictures", "Pictures", pictures(spectra, groups)),
        ("matrices", "Every matrix" if len(spectra["targets"]) <= listing.MAX_ROWS else "Matrices", _listing(spectra)),
        ("reading", "How to read this", _reading(spectra)),
    ]
    light, dark = (
        "".join(f"--layer-{i}:{color};" for i, color in enumerate(layer_colors(dark=dark))) for dark in (False, True)
    )
    assets = resources.files("surgery.report")
    style = assets.joinpath("page.css").read_text("utf-8")
    style += f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
    script = assets.joinpath("page.js").read_text("utf-8")
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-heading">\n<h2 id="{name}-heading">{words}</h2>\n{content}</section>\n'
        for name, words, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the findings</a>
<header>
<h1>{heading}</h1>
{_compared(spectra, groups)}
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main id="main">
{body}</main>
<footer>
<p>Made by {html_text(spectra["tool"])} with torch {html_text(spectra["torch"])} on {html_text(spectra["device"])}. \
The numbers behind this page are in spectra.json and, by matrix, in spectra.csv, which the same command writes.</p>
</footer>
<script>
{script}</script>
</body>
</html>
"""


def _compared(spectra: dict[str, Any], groups: Sequence[Group]) -> str:
    """Which models were compared, and with which options."""
    options, targets = spectra["options"], spectra["targets"]
    layers = {row.layer for group in groups for row in group.rows if row.layer is not None}
    kept = max(group.k for group in groups)
    of = f"{matrices(len(targets))} of {count(len(groups), 'group')}"
    if layers:
        of += f" in {count(len(layers), 'layer')}"
    facts = [("Base", _model(spectra["base"]))]
    if spectra["tuned"] is not None:
        facts.append(("Tuned", _model(spectra["tuned"])))
    facts.append(("Looked at", f"{of}, the first {kept} directions of each; the first {options['subspace']} count as the top"))
    chosen = [
        f"{name} {', '.join(map(html_text, value)) if isinstance(value, list) else html_text(value)}"
        for name, value in options.items()
        if name in ("recipe", "include", "exclude") and value
    ]
    if chosen:
        facts.append(("Chosen by", "; ".join(chosen)))
    return '<dl class="pairs">' + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>"


def _model(model: dict[str, Any]) -> str:
    words = f"<bdi>{html_text(model['name'])}</bdi>"
    if model["repo_id"] is not None and model["repo_id"] != model["name"]:
        words += f", <bdi>{html_text(model['repo_id'])}</bdi>"
    if model["commit"] is not None:
        words += f", commit {html_text(model['commit'])}"
    return words


def _claims(told: Sequence[Card]) -> str:
    items = "".join(
        f'<li class="{card.verdict.replace(" ", "-")}">\n<h3>{html.escape(card.claim)}</h3>\n'
        f'<p class="answer">{card.verdict.capitalize()} <span>({card.counts})</span></p>\n'
        f'<p class="details">Here: {html.escape(card.details)}</p>\n'
        f'<p class="source">{html.escape(card.source)}</p>\n</li>\n'
        for card in told
    )
    return f'<ul class="findings claims">\n{items}</ul>\n'


def _findings(spectra: dict[str, Any], groups: Sequence[Group]) -> str:
    items = "".join(
        f'<li>\n<h3>{html.escape(item.question)}</h3>\n<p class="answer">{html.escape(item.answer)}</p>\n'
        f'<p class="details">{html.escape(item.details)}</p>\n</li>\n'
        for item in findings.statements(spectra, groups)
    )
    parts = [f'<ul class="findings">\n{items}</ul>\n', _by_group(spectra, groups)]
    if spectra["tuned"] is not None and spectra["findings"]["most_amplified"]:
        parts.append(_most_amplified(spectra["findings"]["most_amplified"]))
    return "".join(parts)


def _by_group(spectra: dict[str, Any], groups: Sequence[Group]) -> str:
    """The table with one line for each group, which shows where the findings hold."""
    r = spectra["options"]["subspace"]
    headings = ["matrices", "stable rank", "half energy"]
    if spectra["tuned"] is not None:
        headings += ["top grew by", "next", "rest", "amplified in", "in place", "order"]
        headings += ["left cos", "right cos", "update", "in both", "rescaling"]
    lines = []
    for group in groups:
        ranks = median_rank(half_energy_rank(target["singular_values"], target["norm"]) for target in group.targets)
        cells = [
            f"{len(group.targets):,}",
            number(median(target["stable_rank"] for target in group.targets)),
            rank_text(ranks, group.k),
        ]
        if spectra["tuned"] is not None:
            each = [change(target, r) for target in group.targets]
            updates = [target["update"] for target in group.targets if target["update"] is not None]
            cells += [
                percent(median(item.mean for item in each), signed=True),
                percent(median(item.middle for item in each)),
                percent(median(item.rest for item in each)),
                f"{counted(top_amplified, group.targets, r)['yes']:,} of {len(each):,}",
                percent(median(listing.in_place(target, r) for target in group.targets), signed=True),
                f"{sum(target['order_changes'] for target in group.targets):,}",
                cosine(median(median(target["left_cosine"][:r]) for target in group.targets)),
                cosine(median(median(target["right_cosine"][:r]) for target in group.targets)),
                percent(median(map(relative_update, group.targets))),
                percent(median(item["in_both"] for item in updates)),
                percent(median(item["rescaling"] for item in updates)),
            ]
        lines.append((group.name, cells))
    caption = "Medians over the matrices of a group: those of one name but for the numbers in it. "
    caption += "Half energy: the least rank that holds half of it."
    if spectra["tuned"] is not None:
        caption += (
            f" Top grew by: the mean change of the first {r} singular values; next: the mean size of the change of those after "
            "them; rest: that of all that was not kept. Amplified in: how many of the matrices the first claim holds for. "
            "In place: the change of the base's directions where they are; order: how often two of them changed their order."
        )
    return _table("By group", "groups", caption, ["group", *headings], lines)


def _most_amplified(found: Sequence[dict[str, Any]]) -> str:
    lines = [(item["key"], [f"{item['index']}", f"{item['amplification']:.4f}"]) for item in found]
    caption = "Singular values of the tuned model over those of the base, by their place in the order."
    return _table("Where singular values changed the most", "amplified", caption, ["matrix", "place", "amplification"], lines)


def _table(heading: str, name: str, caption: str, headings: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A small table with the names of things first and numbers after them."""
    first, *others = headings
    head = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="number">{other}</th>' for other in others)
    rows = "".join(
        f'<tr><th scope="row"><bdi>{html_text(key)}</bdi></th>'
        + "".join(f'<td class="number">{cell}</td>' for cell in cells)
        + "</tr>\n"
        for key, cells in lines
    )
    return (
        f'<h3 id="{name}-heading">{heading}</h3>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-heading">\n<table>\n'
        f"<caption><span>{caption}</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )


def _listing(spectra: dict[str, Any]) -> str:
    """The table of matrices that sorts by any column."""
    columns, targets = listing.columns(spectra), listing.rows(spectra)
    everything = len(spectra["targets"])
    about = "A heading sorts the table by its column; pressed again, the other way."
    if len(targets) < everything:
        which = "largest update" if spectra["tuned"] is not None else "lowest stable rank"
        about = f"The {len(targets)} of {matrices(everything)} with the {which}; the rest is in the CSV file. {about}"
    head = '<th scope="col" aria-sort="none"><button type="button">matrix</button></th>' + "".join(
        f'<th scope="col" aria-sort="none"{_number_class(column.numeric)}>'
        f'<button type="button" title="{html.escape(column.meaning)}">{html.escape(column.heading)}</button></th>'
        for column in columns
    )
    rows = "".join(
        f'<tr><th scope="row"><bdi>{html_text(target["key"])}</bdi></th>'
        + "".join(_cell(column, target) for column in columns)
        + "</tr>\n"
        for target in targets
    )
    meanings = "".join(f"<dt>{html.escape(column.heading)}</dt><dd>{html.escape(column.meaning)}</dd>" for column in columns)
    return (
        f'<p>{about}</p>\n<details>\n<summary>What the columns are</summary>\n<dl class="pairs">{meanings}</dl>\n</details>\n'
        '<p class="note status" id="sorted" role="status"></p>\n'
        '<div class="scroll tall" role="region" tabindex="0" aria-labelledby="matrices-heading">\n'
        '<table class="sorts" data-status="sorted">\n'
        f"<caption><span>{matrices(len(targets))}, in the order of the checkpoint at first</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )


def _number_class(numeric: bool) -> str:
    return ' class="number"' if numeric else ' class="name"'


def _cell(column: listing.Column, target: dict[str, Any]) -> str:
    value = column.get(target)
    text = html.escape(column.show(value))
    if not column.numeric:
        return f'<td class="name"><bdi>{text}</bdi></td>'
    # A shape is sorted by its number of entries.
    sort = math.prod(value) if isinstance(value, list | tuple) else value
    sort = "" if sort is None else "Infinity" if sort == math.inf else sort
    return f'<td class="number" data-value="{sort}">{text}</td>'


def _reading(spectra: dict[str, Any]) -> str:
    return (
        '<dl class="terms">\n'
        + "".join(f"<dt>{name}</dt>\n<dd>{meaning}</dd>\n" for name, meaning in terms(spectra))
        + "</dl>\n"
    )
